"""Generate one seed with two settings or with two models: the implementation of `postgen compare`."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import postgen
from postgen.compat import execution_device, quiet_libraries
from postgen.enhancing import enhanced_jobs
from postgen.errors import UserError, shown
from postgen.families.loading import inspect_model
from postgen.families.model_folder import optional, small_files
from postgen.families.own_format import read_note, without_note
from postgen.files import check_apart
from postgen.generate import (
    Job,
    StepCallback,
    Written,
    all_written,
    load,
    output_paths,
    prepare,
    read_by,
    run,
    versions,
    write_parts,
)
from postgen.request import portable

if TYPE_CHECKING:
    from torch import Tensor

    from postgen.families.loading import ModelFacts
    from postgen.rewards import RewardRunner

Lend = Callable[[Job], AbstractContextManager[Any]]
"""Function that returns a context manager, which yields the loaded pipeline of a job. An app that keeps models in
memory lends them in this way."""

_ROW = 8
"""Largest number of frames of a row of the contact sheet."""
_LATENTS = {
    "transformer": ("in_channels", "out_channels", "patch_size", "patch_size_t"),
    "vae": (
        *("latent_channels", "z_dim", "scale_factor_spatial", "scale_factor_temporal"),
        *("spatial_compression_ratio", "temporal_compression_ratio"),
    ),
}
"""Keys of the network configurations that determine the shape of the latents. Models with different values do not
start from the same noise."""
_SIDE = 256
"""Longest side, in pixels, of the clip on which motion is measured."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PairPaths:
    """Output files of a comparison."""

    both: Path
    """Video that shows both videos side by side."""
    sheet: Path
    """Contact sheet with one row of frames for each video."""
    a: Written
    """Files of the left video."""
    b: Written
    """Files of the right video."""
    kind: str
    """Format of the three videos."""
    report: Path | None = None
    """JSON file with the measurements; None: no measurements are written."""

    @property
    def files(self) -> list[Path]:
        """All eight files, or nine with the report: the side-by-side video and its sheet first, the report last."""
        files = [self.both, self.sheet, *self.a.files, *self.b.files]
        return files if self.report is None else [*files, self.report]


def pair_paths(output: Path, format: str | None = None, *, report: bool = False) -> PairPaths:
    """Return the output files of a comparison: `x.mp4`, and `x-a.mp4` and `x-b.mp4` beside it.

    Args:
        output: path of the side-by-side video.
        format: format of the videos; None: the suffix of `output` determines it.
        report: whether the measurements are also written, to `x.json`.

    Raises:
        VideoError: the format is unknown, or a path cannot be written.
    """
    both, kind = output_paths(output, format)
    output = both.video
    a, b = (output_paths(output.with_name(f"{output.stem}-{side}{output.suffix}"), format)[0] for side in "ab")
    told = both.sidecar if report else None
    paths = PairPaths(both=both.video, sheet=both.sheet, a=a, b=b, kind=kind, report=told)
    check_apart(paths.files)
    return paths


def compare_videos(
    a: Job,
    b: Job,
    paths: PairPaths,
    *,
    labels: tuple[str, str] = ("a", "b"),
    on_step: StepCallback | None = None,
    rewards: RewardRunner | None = None,
    lend: Lend | None = None,
) -> tuple[Tensor, Tensor]:
    """Generate two videos. Write both, a side-by-side video, and a contact sheet with one row for each video.

    Args:
        a: job of the left video, from `postgen.generate.prepare`.
        b: job of the right video. If both jobs use the same model, the model is loaded once.
        paths: output files, from `pair_paths`.
        labels: names of the two videos on the contact sheet.
        on_step: callback after each denoising step, with (steps done, all steps) counted over both videos.
        rewards: scores both videos for `paths.report`.
        lend: returns the pipelines, one at a time. None: this function loads them, and frees the first before it loads
            the second.

    Returns:
        The two clips, (F, 3, H, W) in [0, 1].

    Raises:
        UserError: the seeds differ, or an error of `generate_video`.
    """
    check_apart(paths.files, [file for job in (a, b) for file in read_by(job.config)])
    if a.config.seed != b.config.seed:
        raise UserError(f"both videos of a comparison must have one seed, got {a.config.seed} and {b.config.seed}")
    a, b = enhanced_jobs((a, b))
    clips, notes = _both((a, b), on_step, lend or _loaded)
    told = None if paths.report is None else _report((a, b), clips, notes, paths, rewards)
    with all_written(paths.files) as parts:
        _write_both(clips[0], clips[1], parts[:2], paths.kind, labels, a.config.fps or 8.0)
        for job, clip, own, (seconds, place) in zip((a, b), clips, (parts[2:5], parts[5:8]), notes, strict=True):
            write_parts(clip, job, own, paths.kind, seconds=seconds, place=place)
        if told is not None:
            parts[8].write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    return clips[0], clips[1]


def _both(jobs: tuple[Job, Job], on_step: StepCallback | None, lend: Lend) -> tuple[list[Tensor], list[Any]]:
    """Return the clips of two jobs, and for each clip the seconds of its generation and the device."""
    steps = [job.config.num_inference_steps or 0 for job in jobs]
    total = sum(steps) if all(steps) else 0
    clips: list[Tensor] = []
    notes: list[tuple[float, str]] = []
    for loaded in [jobs] if jobs[0].loading == jobs[1].loading else [jobs[:1], jobs[1:]]:
        with lend(loaded[0]) as pipe:
            for job in loaded:
                start, before = time.perf_counter(), steps[0] * len(clips)
                clips.append(run(pipe, job, _shifted(on_step, before, total)))
                notes.append((time.perf_counter() - start, str(execution_device(pipe))))
        pipe = None  # free this model before the next model or the networks of rewards are loaded
    return clips, notes


@contextmanager
def _loaded(job: Job) -> Iterator[Any]:
    with quiet_libraries():
        pipe = load(job)
    yield pipe


def student(a: Job, model: str) -> Job:
    """Return the job of a student model with the same settings as the job of its teacher.

    Args:
        a: job of the teacher, from `prepare`.
        model: folder or Hub id of the student: the output of `postgen convert lit` or of a training run, or a whole
            pipeline.

    Raises:
        UserError: `model` is not a model, is the teacher itself, or has another class, another base model, or latents
            of another shape.
    """
    name = "the embedded model" if a.config.model is None else a.config.model
    base = inspect_model(postgen.embedded_model() if a.config.model is None else a.config.model)
    facts = inspect_model(model)
    if facts.parts == base.parts and facts.source == base.source:
        raise UserError(f"{model} is the same model as {name}: give another model to compare it with")
    if facts.parts and facts.source != base.source:
        made = "the embedded model" if Path(facts.source) == postgen.embedded_model() else facts.source
        option = "omit --model" if made != facts.source else f"give --model {facts.source}"
        raise UserError(f"{model} was made from {made}, but the comparison is with {name}: {option}")
    kinds = (facts.pipeline, facts.transformer), (base.pipeline, base.transformer)
    if kinds[0] != kinds[1]:
        told, own = (" with a ".join(map(str, kind)) for kind in kinds)
        raise UserError(f"{model} cannot be compared with {name}: it is a {told}, not a {own}")
    _check_networks(model, name, facts, base, a)
    dtype = a.facts.defaults.dtype or "auto" if a.config.dtype == "auto" else a.config.dtype
    return prepare(dataclasses.replace(a.config, model=model, dtype=dtype))


def _check_networks(model: str, name: str, facts: ModelFacts, base: ModelFacts, a: Job) -> None:
    """Check that the networks of two models have latents of the same shape.

    The networks of an export of postgen must have the whole configuration of the base model. Their converted layers
    must support the token grid of the clip.

    Raises:
        UserError: a configuration value differs.
    """
    known = small_files(base.source)[0]
    if facts.parts:
        pairs = {part: small_files(source)[0] for part, source in facts.parts}
    else:
        pairs = dict.fromkeys(_LATENTS, small_files(facts.source)[0])
    for part, folder in pairs.items():
        config = optional(folder / part / "config.json")
        theirs, ours = (without_note(each) for each in (config, optional(known / part / "config.json")))
        keys = [*theirs, *ours] if facts.parts else _LATENTS[part]
        for key in keys:
            if not key.startswith("_") and theirs.get(key) != ours.get(key):
                raise UserError(
                    f"{model} cannot be compared with {name}: {key} of its {part} is {shown(theirs.get(key))},"
                    f" and in {name} it is {shown(ours.get(key))}"
                )
        if len(config) > len(theirs):
            _check_clip(model, part, config, a)


def _check_clip(model: str, part: str, config: Mapping[str, Any], a: Job) -> None:
    """Check that the layers of a converted network support the token grid of a clip.

    The check runs before the generation of the other video, which can take minutes.

    Raises:
        UserError: a layer does not support the grid.
    """
    frames, height, width = a.config.num_frames, a.config.height, a.config.width
    if frames is None or height is None or width is None:
        return
    from postgen.lit.clips import check_clip
    from postgen.lit.convert import LOADER

    if read_note(config, LOADER) is None:
        return
    try:
        check_clip(config, frames, height, width)
    except UserError as error:
        raise UserError(f"{model}/{part}: {error}") from error


def _report(
    jobs: tuple[Job, Job],
    clips: list[Tensor],
    notes: list[tuple[float, str]],
    paths: PairPaths,
    rewards: RewardRunner | None,
) -> dict[str, Any]:
    """Return the measurements of two clips as JSON values."""
    sides = []
    for job, clip, (seconds, place), files in zip(jobs, clips, notes, (paths.a, paths.b), strict=True):
        sides.append(
            {
                "model": portable(job.config)["model"] or "embedded",
                "video": files.video.name,
                "settings": files.sidecar.name,
                "seconds": round(seconds, 3),
                "device": place,
                "motion": motion_of(clip),
            }
        )
    if rewards is not None:
        found = rewards([job.config.prompt for job in jobs], clips, fps=jobs[0].config.fps, must_score=False)
        for row, side in enumerate(sides):
            values = dict(zip(found.names, found.values[row].tolist(), strict=True))
            side["rewards"] = {name: None if math.isnan(value) else value for name, value in values.items()}
            why = {n: {**found.reasons[n], **found.failures[n]}.get(row) for n in found.names}
            side["no_score"] = {n: text for n, text in why.items() if text}
    prompts = {job.config.prompt for job in jobs}
    return {
        "prompt": prompts.pop() if len(prompts) == 1 else None,
        "seed": jobs[0].config.seed,
        **difference(clips[0], clips[1]),
        "a": sides[0],
        "b": sides[1],
        "versions": versions(),
    }


def difference(a: Tensor, b: Tensor) -> dict[str, float | None]:
    """Return the difference of two clips (F, 3, H, W) in [0, 1].

    `psnr` is 10 log10(1 / mean squared difference) in decibels over all frames, and None if the clips are equal.
    `largest_difference` is the largest absolute difference of a value. Both are None if the clips have different
    shapes.
    """
    if a.shape != b.shape:
        return {"psnr": None, "largest_difference": None}
    squares, largest = 0.0, 0.0
    for ours, theirs in zip(a, b, strict=True):  # frame by frame: a long clip in double precision is large
        far = (ours.double() - theirs.double()).abs()
        squares, largest = squares + float(far.square().sum()), max(largest, float(far.max()))
    mean = squares / a.numel()
    return {"psnr": -10 * math.log10(mean) if mean else None, "largest_difference": largest}


def motion_of(clip: Tensor) -> float | None:
    """Return the motion of a clip (F, 3, H, W) in pixels per frame, measured by `postgen.metrics`.

    A clip with a side of more than 256 pixels is first reduced by a whole factor, which takes less time and detects
    faster motion. Returns None for a clip of one frame, or of frames smaller than a block of 8 x 8 pixels.
    """
    from torch.nn.functional import avg_pool2d

    from postgen.metrics.video_measures import motion

    factor = -(-max(clip.shape[-2:]) // _SIDE)
    small = avg_pool2d(clip, factor) if factor > 1 else clip
    if len(small) < 2 or min(small.shape[-2:]) < 8:
        return None
    return factor * float(motion(small[None], gap=min(4, len(small) - 1))[0])


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
    """Return up to `_ROW` frames of each clip, evenly spaced and padded to one size, and their indices; `a` first."""
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
