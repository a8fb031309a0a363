"""Scores video files: finds them and their prompts, reads them piece by piece, and compares two sets of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from postgen.errors import UserError, check_text
from postgen.reading import read_json
from postgen.rewards.batches import RESERVED
from postgen.rewards.runner import RewardRunner
from postgen.video import PICTURES, Footage, NoFFmpegError, VideoError, probe, read_picture, read_video

SUFFIXES = (".mp4", ".webm", ".gif", ".mkv", ".mov", ".avi", ".ogv", ".m4v")
_MOST_CLIPS = {"cpu": 4, "cuda": 16}
"""Clips that are scored together: rows are written after them."""
_MOST_BYTES, _LONG = 2**28, 2**26
"""Bytes (12 a pixel) of clips that are scored together, and of one from which on it is read in windows."""


@dataclass(kw_only=True, slots=True)
class Clip:
    """One video or picture and what came of it."""

    path: Path
    """A video file, a folder of frames, or a picture."""
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
    failures: dict[str, str] = field(default_factory=dict)
    """Reward -> why it failed; one that finds nothing to score has no score and is not among them."""
    reasons: dict[str, str] = field(default_factory=dict)
    """Reward -> why it has no score, though it did not fail."""
    key: str = ""
    """Changes with the file and with whatever else its scores follow from."""

    @property
    def done(self) -> bool:
        """Whether there is something to say of it."""
        return bool(self.scores or self.error)

    def to_dict(self, names: Sequence[str]) -> dict[str, Any]:
        """Return one row of a table: file, prompt, a column for each name, no_score, error, key."""
        scores = {name: self.scores.get(name) for name in names}
        told = {"no_score": _joined(self.reasons), "error": self.error or _joined(self.failures), "key": self.key}
        return {"file": str(self.path), "prompt": self.prompt, **scores, **told}


def _joined(texts: Mapping[str, str]) -> str | None:
    return "; ".join(f"{name}: {text}" for name, text in texts.items()) or None


def find_clips(paths: Sequence[Path], *, frames: bool = False) -> list[Clip]:
    """Return the videos and pictures of files and folders.

    Of a folder its videos are taken; without any, what is in the folders inside that hold pictures; without those, its
    own pictures. A folder of pictures is one clip where the first says its frame rate, as `postgen generate --format
    frames` notes it; else each of its pictures is a clip of one frame.

    Args:
        paths: files and folders.
        frames: take every folder of pictures for one clip.

    Raises:
        UserError: a path that does not exist or cannot be read, or a folder that holds nothing to score.
    """
    clips: list[Clip] = []
    for origin, path in enumerate(paths):
        try:
            if not path.exists():
                raise UserError(f"there is no {path}: give videos or pictures, or folders that hold some")
            found = _inside(path, frames) if path.is_dir() else [path]
        except OSError as error:  # a folder that may not be read, a name that is too long
            raise UserError(f"cannot read {error.filename or path}: {error.strerror or error}") from error
        if not found:
            raise UserError(
                f"{path} holds neither videos ({', '.join(SUFFIXES)}) nor pictures ({', '.join(PICTURES)})"
            )
        clips += [Clip(path=file, origin=origin, named=file == path) for file in found]
    return clips


def _inside(folder: Path, frames: bool) -> list[Path]:
    videos = sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES)
    if videos:
        return videos
    # Before its own pictures: `postgen generate --format frames` puts a contact sheet beside each folder of frames.
    inner = sorted(inner for inner in folder.iterdir() if inner.is_dir() and _pictures(inner))
    return [clip for one in inner or [folder] for clip in _in_pictures(one, frames)]


def _pictures(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in PICTURES and not file.is_dir())


def _in_pictures(folder: Path, frames: bool) -> list[Path]:
    pictures = _pictures(folder)
    return [folder] if pictures and (frames or _noted_rate(folder)) else pictures


def _noted_rate(folder: Path) -> bool:
    try:
        return probe(folder).fps > 0
    except (VideoError, OSError):
        return False


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
        told = read_json(path.with_suffix(".json"), "the sidecar")["prompt"]
        check_text("the prompt", told)
    except (UserError, LookupError, TypeError, AttributeError):
        return None
    return str(told)


def _take(clip: Clip, row: Mapping[str, Any]) -> None:
    taken = sorted(RESERVED & row.keys())
    if taken:
        raise UserError(
            f"a row of the prompts has the key {taken[0]!r}, which says something else to rewards: rename it"
        )
    clip.prompt = row["prompt"]
    clip.columns = {key: value for key, value in row.items() if key not in ("prompt", "file")}


def _by_name(clips: Sequence[Clip], rows: Sequence[Mapping[str, Any]]) -> None:
    table: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if "file" in row:
            table.setdefault(Path(str(row["file"])).name, []).append(row)
    found = [table.get(clip.path.name) or table.get(clip.path.stem) for clip in clips]
    if not any(found):
        raise UserError(f"no row of the prompts has the file {clips[0].path.name}, nor any of the {len(clips)} files")
    for clip, own in zip(clips, found, strict=True):
        if own:
            _take(clip, _nearest(clip.path, own))


def _nearest(path: Path, rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Return which of the rows with the name of a file is its own: that whose folders are those of the file."""
    own = path.absolute().parts[:-1][::-1]
    shared = []
    for row in rows:
        folders = [part for part in Path(str(row["file"])).parts[:-1] if part != ".."][::-1]
        shared.append(len(folders) if tuple(folders) == own[: len(folders)] else -1)
    best = [row for row, count in zip(rows, shared, strict=True) if count == max(shared)]
    if any(row != best[0] for row in best[1:]):
        raise UserError(f"{len(best)} rows of the prompts have the file {path.name}: name it in each with its folders")
    return best[0]


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

    A single clip without a prompt is no reason to end: it fails alone.

    Raises:
        UserError: a column that a reward needs is missing, or the prompts of all clips are.
    """
    for reward in runner.rewards:
        reward.check_columns({key for clip in clips for key in clip.columns})
        if clips and all(reward.lacks_prompt(clip.prompt, clip.columns) for clip in clips):
            which = f"for {clips[0].path.name}" + (f" and {len(clips) - 1} more" if len(clips) > 1 else "")
            raise UserError(f"{reward.name} needs a prompt {which}: use --prompt, --prompts, or a sidecar beside each")


def score_clips(
    clips: Sequence[Clip],
    runner: RewardRunner,
    after: Callable[[Clip], None] | None = None,
    *,
    most: int | None = None,
) -> None:
    """Read and score clips in their order; one that cannot be read gets an `error`, and the others go on.

    A long video is a `Footage`, which each reward reads in windows; one that needs all frames gets all.

    Args:
        clips: from `find_clips`, with prompts; scores and errors are written into them. Those that are done are left
            out.
        runner: the rewards.
        after: called with each clip when it is done, in their order.
        most: bytes (12 a pixel) of a video that a reward may get as a whole; None sets no bound.

    Raises:
        UserError: a reward needs columns that are not there, or its weights.
    """
    kind = torch.device(runner.device or "cpu").type
    size = max(_MOST_CLIPS.values()) if any(r.groupwise for r in runner.rewards) else _MOST_CLIPS.get(kind, 4)
    for part in _pieces(clips, size, most):
        read = [one for one in part if one.video is not None]
        try:
            _score(read, runner)
        except BaseException:
            for one in read:
                if isinstance(one.video, Footage):
                    one.video.closed = True  # what reads it in another thread shall end too
            raise
        for one in part:
            if after is not None:
                after(one.clip)


@dataclass(kw_only=True, slots=True)
class _Read:
    clip: Clip
    video: Tensor | Footage | None = None
    fps: float | None = None


def _score(read: Sequence[_Read], runner: RewardRunner) -> None:
    if not read:
        return
    clips = [one.clip for one in read]
    names = sorted({key for clip in clips for key in clip.columns})
    columns: dict[str, Any] = {key: [clip.columns.get(key) for clip in clips] for key in names}
    result = runner(
        prompts=[clip.prompt for clip in clips],
        completions=[one.video for one in read if one.video is not None],
        fps=[one.fps for one in read],
        must_score=False,
        **columns,
    )
    for row, (one, values) in enumerate(zip(read, result.values.tolist(), strict=True)):
        if isinstance(one.video, Footage) and one.video.error:
            one.clip.error = one.video.error
            continue
        one.clip.scores = {n: None if v != v else v for n, v in zip(result.names, values, strict=True)}
        one.clip.failures = {name: told[row] for name, told in result.failures.items() if row in told}
        one.clip.reasons = {name: told[row] for name, told in result.reasons.items() if row in told}


def _pieces(clips: Sequence[Clip], size: int, most: int | None) -> Iterator[list[_Read]]:
    """Clips that are not done with their videos, as many at a time as fit the memory; a long one alone."""
    part: list[_Read] = []
    room = _MOST_BYTES
    for clip in clips:
        if clip.done:
            continue
        one = _opened(clip, most)
        long = isinstance(one.video, Footage)
        if long and part:
            yield part
            part, room = [], _MOST_BYTES
        part.append(one)
        room -= 4 * one.video.numel() if one.video is not None else 0
        if long or len(part) >= size or room <= 0:
            yield part
            part, room = [], _MOST_BYTES
    if part:
        yield part


def _opened(clip: Clip, most: int | None) -> _Read:
    """Read a clip; a long one is only gone through, which finds damage. What cannot be read gets its error."""
    try:
        if clip.path.suffix.lower() in PICTURES and not clip.path.is_dir():
            picture = torch.from_numpy(np.array(read_picture(clip.path)))
            return _Read(clip=clip, video=picture.permute(2, 0, 1)[None].float().div_(255))
        info = probe(clip.path)
        footage = Footage(clip.path, info, most=most)
        return _Read(
            clip=clip,
            video=footage if 4 * footage.numel() > _LONG else read_video(clip.path),
            fps=info.fps or None,
        )
    except NoFFmpegError:
        raise
    except Exception as error:  # whatever is wrong with one file, the others are scored
        told = " ".join(str(error).split())
        clip.error = told if isinstance(error, UserError | OSError) else f"{type(error).__name__}: {told}"
        return _Read(clip=clip)


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
