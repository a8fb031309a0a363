"""The same seed under two settings: what stands behind `postgen compare`."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from postgen.compat import execution_device, quiet_libraries
from postgen.errors import UserError
from postgen.files import check_apart
from postgen.generate import Job, StepCallback, Written, all_written, load, output_paths, read_by, run, write_parts

if TYPE_CHECKING:
    from torch import Tensor

_ROW = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class PairPaths:
    """The files of a comparison."""

    both: Path
    """The two videos side by side."""
    sheet: Path
    """Contact sheet: a row of frames of each."""
    a: Written
    """The left video."""
    b: Written
    """The right video."""
    kind: str
    """Format of the three videos."""

    @property
    def files(self) -> list[Path]:
        """All eight; the side-by-side video and its sheet first."""
        return [self.both, self.sheet, *self.a.files, *self.b.files]


def pair_paths(output: Path, format: str | None = None) -> PairPaths:
    """Name the files of a comparison after the side-by-side video: `x.mp4` gets `x-a.mp4` and `x-b.mp4` beside it.

    Raises:
        VideoError: an unknown format, or a place that cannot be written.
    """
    both, kind = output_paths(output, format)
    output = both.video
    a, b = (output_paths(output.with_name(f"{output.stem}-{side}{output.suffix}"), format)[0] for side in "ab")
    paths = PairPaths(both=both.video, sheet=both.sheet, a=a, b=b, kind=kind)
    check_apart(paths.files)
    return paths


def compare_videos(
    a: Job, b: Job, paths: PairPaths, *, labels: tuple[str, str] = ("a", "b"), on_step: StepCallback | None = None
) -> tuple[Tensor, Tensor]:
    """Make two videos and write both, the two side by side, and a contact sheet with a row of each.

    Args:
        a: the left one, from `postgen.generate.prepare`.
        b: the right one; the loaded model is used again where it is the same.
        paths: from `pair_paths`.
        labels: what tells them apart, for the contact sheet.
        on_step: called after each step with (steps done, steps in all) of both together.

    Returns:
        The two clips, (F, 3, H, W) in [0, 1].

    Raises:
        UserError: seeds that differ, or anything that `generate_video` would raise.
    """
    check_apart(paths.files, [file for job in (a, b) for file in read_by(job.config)])
    if a.config.seed != b.config.seed:
        raise UserError(f"a comparison needs one seed, got {a.config.seed} and {b.config.seed}")
    steps = [job.config.num_inference_steps or 0 for job in (a, b)]
    total = sum(steps) if all(steps) else 0
    clips: list[Tensor] = []
    notes: list[tuple[float, str]] = []
    pipe: Any = None
    for number, job in enumerate((a, b)):
        if pipe is None or job.loading != a.loading:
            pipe = None  # frees the first model before the second is loaded
            with quiet_libraries():
                pipe = load(job)
        start = time.perf_counter()
        clips.append(run(pipe, job, _shifted(on_step, steps[0] * number, total)))
        notes.append((time.perf_counter() - start, str(execution_device(pipe))))
    with all_written(paths.files) as parts:
        _write_both(clips[0], clips[1], parts[:2], paths.kind, labels, a.config.fps or 8.0)
        for job, clip, own, (seconds, place) in zip((a, b), clips, (parts[2:5], parts[5:]), notes, strict=True):
            write_parts(clip, job, own, paths.kind, seconds=seconds, place=place)
    return clips[0], clips[1]


def _shifted(on_step: StepCallback | None, before: int, total: int) -> StepCallback | None:
    if on_step is None:
        return None
    return lambda done, own: on_step(before + done, total or own)


def _write_both(a: Tensor, b: Tensor, parts: list[Path], kind: str, labels: tuple[str, str], fps: float) -> None:
    from postgen.video import contact_sheet, side_by_side, write_video

    both, sheet = parts
    write_video(both, side_by_side(a, b), fps=fps, format=kind)
    rows, indices = _rows(a, b)
    title = f"upper: {labels[0]} | lower: {labels[1]}"
    contact_sheet(rows, sheet, columns=len(rows) // 2, title=title, indices=indices)


def _rows(a: Tensor, b: Tensor) -> tuple[Tensor, list[int]]:
    """Return up to `_ROW` frames of each, evenly in time and of one size, first those of `a`; and their indices."""
    import torch
    from torch.nn.functional import pad

    columns = min(_ROW, len(a), len(b))
    height, width = (max(a.shape[axis], b.shape[axis]) for axis in (-2, -1))
    picked, indices = [], []
    for clip in (a, b):
        index = torch.linspace(0, len(clip) - 1, columns).round().long()
        picked.append(pad(clip[index], (0, width - clip.shape[-1], 0, height - clip.shape[-2])))
        indices += index.tolist()
    return torch.cat(picked), indices
