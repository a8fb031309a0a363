"""Scores video files: finds them and their prompts, reads them piece by piece, and compares two sets of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from postgen.errors import UserError
from postgen.rewards.batches import RESERVED
from postgen.rewards.runner import RewardRunner
from postgen.video import VideoError, probe, read_video

SUFFIXES = (".mp4", ".webm", ".gif", ".mkv", ".mov", ".avi", ".ogv", ".m4v")
_MOST_CLIPS, _MOST_BYTES = 16, 2**29


@dataclass(kw_only=True, slots=True)
class Clip:
    """One video and what came of it."""

    path: Path
    """A video file, or a folder of PNG frames."""
    origin: int = 0
    """Which of the given paths it was found under."""
    named: bool = False
    """Whether it was given itself, rather than found in a folder."""
    prompt: str | None = None
    """What it should show."""
    columns: dict[str, Any] = field(default_factory=dict)
    """Further columns for rewards."""
    scores: dict[str, float | None] = field(default_factory=dict)
    """Reward -> score; None where it gave none."""
    error: str | None = None
    """Why it could not be read."""

    def to_dict(self) -> dict[str, Any]:
        """Return one row of a table: file, prompt, a column for each reward, error."""
        return {"file": str(self.path), "prompt": self.prompt, **self.scores, "error": self.error}


def find_clips(paths: Sequence[Path]) -> list[Clip]:
    """Return the videos of files and folders.

    A folder without video files holds one in each folder of PNG pictures inside, or is one that is made of its own.

    Raises:
        UserError: a path that does not exist, or a folder that holds nothing to score.
    """
    clips: list[Clip] = []
    for origin, path in enumerate(paths):
        if not path.exists():
            raise UserError(f"there is no {path}: give video files, or folders that hold some")
        found = _inside(path) if path.is_dir() else [path]
        if not found:
            raise UserError(f"{path} holds neither videos ({', '.join(SUFFIXES)}) nor PNG frames")
        clips += [Clip(path=file, origin=origin, named=file == path) for file in found]
    return clips


def _inside(folder: Path) -> list[Path]:
    videos = sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES)
    if videos:
        return videos
    # Before its own pictures: `postgen generate --format frames` puts a contact sheet beside each folder of frames.
    inner = sorted(inner for inner in folder.iterdir() if inner.is_dir() and any(inner.glob("*.png")))
    return inner or ([folder] if any(folder.glob("*.png")) else [])


def set_prompts(clips: Sequence[Clip], prompt: str | None, rows: Sequence[Mapping[str, Any]] | None) -> None:
    """Give every clip its prompt: the same one, or a row each, or what its sidecar (`NAME.json` beside it) says.

    Rows with `file` go to the clips of that name (with or without suffix), rows without it to the clips of each
    folder, or to the clips that were named one by one, in their order. Other keys become columns.

    Raises:
        UserError: rows that fit no clip, or not as many as clips.
    """
    if prompt is not None:
        for clip in clips:
            clip.prompt = prompt
    elif rows is None:
        for clip in clips:
            clip.prompt = _sidecar_prompt(clip.path)
    elif any("file" in row for row in rows):
        _by_name(clips, rows)
    else:
        _in_order(clips, rows)


def _sidecar_prompt(path: Path) -> str | None:
    try:
        told = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))["prompt"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return told if isinstance(told, str) else None


def _take(clip: Clip, row: Mapping[str, Any]) -> None:
    taken = sorted(RESERVED & row.keys())
    if taken:
        raise UserError(
            f"a row of the prompts has the key {taken[0]!r}, which says something else to rewards: rename it"
        )
    clip.prompt = row["prompt"]
    clip.columns = {key: value for key, value in row.items() if key not in ("prompt", "file")}


def _by_name(clips: Sequence[Clip], rows: Sequence[Mapping[str, Any]]) -> None:
    table = {Path(str(row["file"])).name: row for row in rows if "file" in row}
    for clip in clips:
        row = table.get(clip.path.name, table.get(clip.path.stem))
        if row is None:
            raise UserError(f"no row of the prompts has the file {clip.path.name}")
        _take(clip, row)


def _in_order(clips: Sequence[Clip], rows: Sequence[Mapping[str, Any]]) -> None:
    # Files that were named one by one are one series, what a folder holds is one of its own.
    series: dict[int | None, list[Clip]] = {}
    for clip in clips:
        series.setdefault(None if clip.named else clip.origin, []).append(clip)
    for own in series.values():
        if len(own) != len(rows):
            raise UserError(f"{len(rows)} prompts for {len(own)} videos: give one each, or rows with 'file'")
        for clip, row in zip(own, rows, strict=True):
            _take(clip, row)


def check_needs(clips: Sequence[Clip], runner: RewardRunner) -> None:
    """Find out before any video is read whether the rewards get what they need.

    Raises:
        UserError: a prompt or a column that a reward needs is missing.
    """
    for reward in runner.rewards:
        reward.check_columns({key for clip in clips for key in clip.columns})
        bare = [clip.path.name for clip in clips if clip.prompt is None]
        if reward.needs_prompts and bare:
            raise UserError(
                f"{reward.name} needs a prompt for {bare[0]}: use --prompt, --prompts, or a sidecar beside it"
            )


def score_clips(clips: Sequence[Clip], runner: RewardRunner, after: Callable[[int], None] | None = None) -> None:
    """Read and score clips in their order; one that cannot be read gets an `error`, and the others go on.

    Args:
        clips: from `find_clips`, with prompts; scores and errors are written into them.
        runner: the rewards.
        after: called with the number of clips that are done.

    Raises:
        UserError: a reward needs columns that are not there, or its weights.
    """
    for part, videos, rates in _pieces(clips):
        names = sorted({key for clip in part for key in clip.columns})
        columns: dict[str, Any] = {key: [clip.columns.get(key) for clip in part] for key in names}
        if part:
            result = runner(
                prompts=[clip.prompt or "" for clip in part],
                completions=videos,
                fps=rates,
                must_score=False,
                **columns,
            )
            for clip, values in zip(part, result.values.tolist(), strict=True):
                clip.scores = {n: None if v != v else v for n, v in zip(result.names, values, strict=True)}
        if after is not None:
            after(sum(1 for clip in clips if clip.scores or clip.error))


def _pieces(clips: Sequence[Clip]) -> Iterator[tuple[list[Clip], list[Tensor], list[float | None]]]:
    """Readable clips with their videos and frame rates, as many at a time as fit the memory."""
    part: list[Clip] = []
    videos: list[Tensor] = []
    rates: list[float | None] = []
    for clip in clips:
        try:
            video, rate = read_video(clip.path), probe(clip.path).fps or None
        except (VideoError, OSError) as error:
            clip.error = " ".join(str(error).split())
            continue
        part.append(clip)
        videos.append(video)
        rates.append(rate)
        if len(part) >= _MOST_CLIPS or sum(4 * v.numel() for v in videos) >= _MOST_BYTES:
            yield part, videos, rates
            part, videos, rates = [], [], []
    yield part, videos, rates


def win_rates(clips: Sequence[Clip], names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Compare the clips of the first path with those of the second, prompt by prompt.

    Returns:
        Prompt -> reward -> share of the pairs (one clip of each) in which the first is better, ties half. A prompt, or
        a reward, that is not scored on both sides is left out.
    """
    rates: dict[str, dict[str, float]] = {}
    for prompt in dict.fromkeys(clip.prompt or clip.path.name for clip in clips):
        sides = [[c for c in clips if c.origin == side and (c.prompt or c.path.name) == prompt] for side in (0, 1)]
        for name in names:
            ours, theirs = ([v for clip in side if (v := clip.scores.get(name)) is not None] for side in sides)
            if ours and theirs:
                wins = sum((a > b) + 0.5 * (a == b) for a in ours for b in theirs)
                rates.setdefault(prompt, {})[name] = wins / (len(ours) * len(theirs))
    return rates
