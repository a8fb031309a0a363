"""Scores video files: finds files and their prompts, reads them one by one, and compares two sets of videos."""

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
"""Number of clips that are scored together; their rows are written afterwards."""
_MOST_BYTES, _LONG = 2**28, 2**26
"""Bytes (12 per pixel) of clips that are scored together, and size from which a clip is read in windows."""


@dataclass(kw_only=True, slots=True)
class Clip:
    """One video or picture with its prompt, scores and errors."""

    path: Path
    """A video file, a folder of frames, or a picture."""
    origin: int = 0
    """Index of the given path under which the clip was found."""
    named: bool = False
    """Whether the file itself was given, rather than a folder that contains it."""
    prompt: str | None = None
    """Description of what the clip should show."""
    columns: dict[str, Any] = field(default_factory=dict)
    """Further columns for the rewards."""
    scores: dict[str, float | None] = field(default_factory=dict)
    """Reward -> score; None where the reward returned none."""
    error: str | None = None
    """Why the file could not be read; None if it could."""
    failures: dict[str, str] = field(default_factory=dict)
    """Reward -> why it failed; a reward that found nothing to score did not fail."""
    reasons: dict[str, str] = field(default_factory=dict)
    """Reward -> why there is no score, although the reward did not fail."""
    key: str = ""
    """Hash that changes with the file and with everything else that determines the scores."""

    @property
    def done(self) -> bool:
        """Whether the clip has scores or an error."""
        return bool(self.scores or self.error)

    def to_dict(self, names: Sequence[str]) -> dict[str, Any]:
        """Return one row of a table: file, prompt, one column per name, no_score, error, key."""
        scores = {name: self.scores.get(name) for name in names}
        told = {"no_score": _joined(self.reasons), "error": self.error or _joined(self.failures), "key": self.key}
        return {"file": str(self.path), "prompt": self.prompt, **scores, **told}


def _joined(texts: Mapping[str, str]) -> str | None:
    return "; ".join(f"{name}: {text}" for name, text in texts.items()) or None


def find_clips(paths: Sequence[Path], *, frames: bool = False) -> list[Clip]:
    """Find the videos and pictures in files and folders.

    A folder yields its videos. A folder without videos yields the contents of its sub-folders with pictures, or its
    own pictures if there are no such sub-folders. A folder of pictures is one clip if the first picture stores a frame
    rate, as `postgen generate --format frames` writes it; otherwise each picture is a clip of one frame.

    Args:
        paths: files and folders.
        frames: treat every folder of pictures as one clip.

    Raises:
        UserError: a path does not exist or cannot be read, or a folder has nothing to score.
    """
    clips: list[Clip] = []
    for origin, path in enumerate(paths):
        try:
            if not path.exists():
                raise UserError(f"{path} does not exist: give videos, pictures, or folders with videos or pictures")
            found = _inside(path, frames) if path.is_dir() else [path]
        except OSError as error:  # no permission to read a folder, or a name that is too long
            raise UserError(f"cannot read {error.filename or path}: {error.strerror or error}") from error
        if not found:
            raise UserError(f"{path} has neither videos ({', '.join(SUFFIXES)}) nor pictures ({', '.join(PICTURES)})")
        clips += [Clip(path=file, origin=origin, named=file == path) for file in found]
    return clips


def _inside(folder: Path, frames: bool) -> list[Path]:
    videos = sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES)
    if videos:
        return videos
    # Sub-folders come first: `postgen generate --format frames` puts a contact sheet next to each folder of frames.
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
    """Assign a prompt to every clip: one prompt for all, a row per clip, or its sidecar (`NAME.json` next to it).

    Rows with `file` go to the clips of that name (with or without suffix). Rows without it are assigned in order,
    to the clips of each folder and to the clips that were given as single files. Other keys become columns.

    Raises:
        UserError: rows that match no clip, or a number of rows that differs from the number of clips.
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
            f"a row of the prompts has the key {taken[0]!r}, which is reserved for an argument of rewards: rename it"
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
    """Return the row of a file from all rows with its file name: the one whose folders match those of the file."""
    own = path.absolute().parts[:-1][::-1]
    shared = []
    for row in rows:
        folders = [part for part in Path(str(row["file"])).parts[:-1] if part != ".."][::-1]
        shared.append(len(folders) if tuple(folders) == own[: len(folders)] else -1)
    best = [row for row, count in zip(rows, shared, strict=True) if count == max(shared)]
    if any(row != best[0] for row in best[1:]):
        raise UserError(f"{len(best)} rows of the prompts have the file {path.name}: write its folders in each row")
    return best[0]


def _in_order(clips: Sequence[Clip], rows: Sequence[Mapping[str, Any]]) -> None:
    # Files that were given one by one form one series; the contents of each folder form another.
    series: dict[int | None, list[Clip]] = {}
    for clip in clips:
        series.setdefault(None if clip.named else clip.origin, []).append(clip)
    for own in series.values():
        if len(own) != len(rows):
            raise UserError(f"{len(rows)} prompts for {len(own)} videos: give one per video, or rows with 'file'")
        for clip, row in zip(own, rows, strict=True):
            _take(clip, row)


def check_needs(clips: Sequence[Clip], runner: RewardRunner) -> None:
    """Check, before any video is read, that the rewards have what they need.

    A single clip without a prompt is not an error here: only its own scoring fails.

    Raises:
        UserError: a column that a reward needs is missing, or no clip has a prompt for a reward that needs one.
    """
    for reward in runner.rewards:
        reward.check_columns({key for clip in clips for key in clip.columns})
        if clips and all(reward.lacks_prompt(clip.prompt, clip.columns) for clip in clips):
            _check_media(clips)
            which = f"for {clips[0].path.name}" + (f" and {len(clips) - 1} more" if len(clips) > 1 else "")
            raise UserError(f"{reward.name} needs a prompt {which}: use --prompt, --prompts, or sidecars of the files")


def _check_media(clips: Sequence[Clip]) -> None:
    """Check files with unusual suffixes that the user has named, because a prompt would not help a file of text."""
    for clip in clips:
        if clip.named and clip.path.is_file() and clip.path.suffix.lower() not in (*SUFFIXES, *PICTURES):
            try:
                probe(clip.path)
            except (VideoError, OSError) as error:
                raise UserError(f"{clip.path} is not a video or picture that can be read") from error


def score_clips(
    clips: Sequence[Clip],
    runner: RewardRunner,
    after: Callable[[Clip], None] | None = None,
    *,
    most: int | None = None,
) -> None:
    """Read and score clips in order. A clip that cannot be read gets an `error`, and scoring continues.

    A long video is passed as a `Footage`, which rewards read in windows; a reward that needs all frames reads all.

    Args:
        clips: clips of `find_clips`, with prompts; the function writes scores and errors into them. Clips that are
            already done are skipped.
        runner: the rewards.
        after: called with each clip, in order, when it is done.
        most: largest size in bytes (12 per pixel) of a video that a reward may read as a whole; None sets no limit.

    Raises:
        UserError: a reward lacks a column or its weights.
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
                    one.video.closed = True  # also ends a read in another thread
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
    """Yield batches of opened clips that are not done and fit into memory together; a long clip is a batch of one."""
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
    """Open a clip and set its error if this fails; a long clip is only scanned for damage, not kept in memory."""
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
    except Exception as error:  # an error in one file must not stop the others
        told = " ".join(str(error).split())
        clip.error = told if isinstance(error, UserError | OSError) else f"{type(error).__name__}: {told}"
        return _Read(clip=clip)


def win_rates(clips: Sequence[Clip], names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Compare the clips of the first path with those of the second path, for each prompt.

    Returns:
        Prompt -> reward -> share of pairs (one clip of each path) in which the first clip is better; a tie counts
        half. Prompts and rewards without scores on both sides are left out.
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
