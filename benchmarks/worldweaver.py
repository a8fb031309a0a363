"""Measure the drift of long WorldWeaver rollouts on scenes of the world, whose future frames are known.

    python -m benchmarks.worldweaver --arms a=runs/ww-a/export d=runs/ww-d/export --worlds 128 --out out/worldweaver

Every arm (a trained model) receives the first frames of a scene that no training has used, with exact depth if the arm
has depth, and captions of what happens from there on. It continues the video to 161 frames. Each clip is compared with
the scene (`postgen.metrics.drift`). The latents of RGB and of depth are also compared with those of the scene, frame
by frame, to find out whether depth drifts less. OUT/ARM.json has a row for each scene. An arm with a complete file is
not run again, and an interrupted run continues (`benchmarks.worldweaver_jobs`). Training seeds of an arm are named
NAME.0, NAME.1, ... The arms `sliding=`, `sliding_pixels=` and `ceiling=` need no folder
(`benchmarks.worldweaver_baselines`). The printed table compares each arm with the first. With `--report` as the first
argument, the command joins the files to `results/worldweaver.json` (`benchmarks.worldweaver_report`).
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.worldweaver_along import along
from benchmarks.worldweaver_captions import KINDS, encoded
from benchmarks.worldweaver_captions import schedule as schedule_of_captions
from benchmarks.worldweaver_stats import value_of
from postgen import world
from postgen.assets import embedded_model
from postgen.errors import UserError
from postgen.families import denoiser_for
from postgen.metrics.drift import compare_drift, measure_drift
from postgen.metrics.world_truth import true_clip
from postgen.sampling.schedule import linspace_schedule
from postgen.sampling.seeds import seed_of
from postgen.training.policy import ModelConfig, load_model
from postgen.worldweaver.adapter import load_adapter
from postgen.worldweaver.depth import DisparityRange, flow_picture
from postgen.worldweaver.levels import Modality
from postgen.worldweaver.memory import MemoryBank, capacity_for
from postgen.worldweaver.model import WorldWeaverModel
from postgen.worldweaver.placed_rollout import PlacedRollout
from postgen.worldweaver.rollout import Poses, Rollout
from postgen.worldweaver.segments import Segments
from postgen.worldweaver.world_clips import latent_ends

SHOWN = ("score", "permanence.after_absence", "permanence.always", "motion.total", "revisit.memory.gap_db", "seam")
"""Numbers in the printed table."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """A trained model with the settings of its training."""

    name: str
    model: WorldWeaverModel
    settings: Mapping[str, Any]
    guidance: float

    @property
    def unknown(self) -> tuple[Modality, ...]:
        """Modalities that its memory does not include."""
        return () if self.settings["depth_in_memory"] else self.model.modalities[1:]


@dataclass(slots=True)
class Made:
    """Generated clips of one arm."""

    frames: Tensor
    """(B, F, 3, H, W) in [0, 1]."""
    disparity: Tensor | None
    """(B, F, H, W)."""
    latents: Tensor
    """(B, M * C, T, h, w)."""
    seconds: float
    """Time of the rollout, without decoding."""


def load_arm(
    name: str, folder: Path | str, device: torch.device, pipe: Any = None, guidance: float | None = None
) -> Arm:
    """Load an arm: the embedded model, or another pipeline, with an adapter."""
    made = load_model(embedded_model() if pipe is None else pipe, ModelConfig(), device)[0]
    loaded = load_adapter(made, folder)
    model = WorldWeaverModel(denoiser_for(made), loaded.embedder)
    asked = guidance if guidance is not None else float(loaded.settings.get("guidance_scale", 1.0))
    return Arm(name=name, model=model, settings=loaded.settings, guidance=asked)


def bank_of(arm: Arm, rows: int) -> MemoryBank:
    """Return an empty memory bank for `rows` scenes with the settings of an arm."""
    told = arm.settings
    long, short = told["history_sizes"]
    sink = min(1, long) if told["keep_first_frame"] else 0
    return MemoryBank(
        long,
        short,
        sink,
        capacity_for(told["memory_policy"], rows, long=long, short=short, sink=sink),
        told["memory_policy"],
        mem_noise=told["addnoise_condition"] / 1000,
        flow_noise=told["flow_noise"],
        modalities=len(arm.model.modalities),
        hidden=arm.unknown,
    )


def placed_of(arm: Arm, poses: Poses, limits: DisparityRange, begin: Tensor) -> PlacedRollout | None:
    """Return the placed memory of an arm, with the given latents stored; None: the arm has no placed memory."""
    told = arm.settings
    if not told.get("placed_memory", False):
        return None
    noise = told["addnoise_condition"] / 1000
    made = PlacedRollout(arm.model, poses, limits, mem_noise=noise, warp=told["placed_warp"])
    made.store(begin, 0)
    return made


@torch.no_grad()
def given_latents(arm: Arm, truth: world.Frames, count: int, seen: int | None = None) -> tuple[Tensor, DisparityRange]:
    """Return the latents (B, M * C, n, h, w) of the first `count` frames of scenes, and their disparity range.

    With `seen`, the range is that of the first `seen` frames, as a rollout keeps the range of its given frames.
    """
    limits = DisparityRange.of(truth.disparity_BFHW[:, : seen or count])
    parts = [arm.model.encode(truth.rgb_BF3HW[:, :count])]
    if "depth" in arm.model.modalities:
        parts.append(arm.model.encode(limits.picture(truth.disparity_BFHW[:, :count]), "depth"))
    if "flow" in arm.model.modalities:
        assert truth.flow_BF2HW is not None
        parts.append(arm.model.encode(flow_picture(truth.flow_BF2HW[:, : count - 1]), "flow"))
    return torch.cat(parts, 1), limits


@torch.no_grad()
def make_clips(
    arm: Arm,
    specs: Sequence[world.Spec],
    truth: world.Frames,
    *,
    given: int,
    seed: int = 0,
    captions: str = "along",
    first: int = 0,
) -> Made:
    """Generate the continuation of the first frames of scenes, to the length of the scenes.

    Args:
        arm: the model.
        specs: the scenes.
        truth: a render of the scenes with geometry.
        given: number of given frames.
        seed: seed of the noise.
        captions: kind of captions, one of `worldweaver_captions.KINDS`.
        first: frame of the scenes at which `truth` begins.
    """
    model, told = arm.model, arm.settings
    device, total = model.transformer.device, truth.rgb_BF3HW.shape[1]
    begin, limits = given_latents(arm, truth, given)
    shape = model.latent_shape(total, *truth.rgb_BF3HW.shape[-2:])
    steps = told["num_inference_steps"]
    segments = Segments(steps=steps, groups=steps // told["ar_step"])
    schedule = linspace_schedule(model.denoiser, steps, told["flow_shift"], device)
    poses = truth.pose_BF34[:, latent_ends(total, shape[1])]
    placed = placed_of(arm, lambda start, stop: poses[:, start:stop], limits, begin)
    run = Rollout(
        model,
        schedule,
        segments,
        frames=told["causal_block_size"],
        guidance=arm.guidance,
        poses=lambda start, stop: poses[:, start:stop],
        extras=None if placed is None else placed.extras,
    )
    texts = schedule_of_captions(
        *(captions, specs, range(first, first + total), shape[1]),
        given=begin.shape[2],
        size=told["causal_block_size"],
        groups=segments.groups,
    )
    prompts = encoded(model.denoiser, texts, guided=arm.guidance > 1)
    seeds = [seed_of(seed, "initial", number) for number in range(len(specs))]
    generators = [torch.Generator().manual_seed(each) for each in seeds]
    left = shape[1] - begin.shape[2]
    bank = bank_of(arm, len(specs))
    state = run.start((shape[0], *shape[2:]), prompts, generators, bank, num_latents=left, given=begin)
    clock = time.perf_counter()
    store = None if placed is None else placed.on_group
    latents = torch.cat([begin, *(group.latents for group in run.groups(state, on_group=store))], 2)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - clock
    parts = model.split(latents)
    disparity = limits.disparity(model.decode(parts["depth"], "depth")) if "depth" in parts else None
    return Made(frames=model.decode(parts["rgb"]), disparity=disparity, latents=latents, seconds=seconds)


def latent_errors(arm: Arm, made: Made, true: Tensor) -> list[dict[str, list[float]]]:
    """Return for each clip and modality the squared error of every latent frame, divided by the true variance."""
    rows: list[dict[str, list[float]]] = [{} for _ in range(len(true))]
    for name, expected in arm.model.split(true).items():
        found = arm.model.split(made.latents)[name]
        error = (found - expected).square().mean((1, 3, 4)) / expected.var((1, 2, 3, 4))[:, None]
        for row, line in zip(rows, error.tolist(), strict=True):
            row[name] = line
    return rows


def measured(
    arm: Arm, specs: Sequence[world.Spec], truth: world.Frames, made: Made, given: int, true: Tensor | None = None
) -> list[dict[str, Any]]:
    """Return the measures of each clip, and some of them over time.

    Args:
        arm: the model that generated the clips.
        specs: the scenes.
        truth: a render of the scenes.
        made: the clips.
        given: number of given frames.
        true: latents (B, M * C, T, h, w) of the render; None: encode them here.
    """
    total = truth.rgb_BF3HW.shape[1]
    ends = latent_ends(total, made.latents.shape[2])
    size = arm.settings["causal_block_size"]
    first = len([end for end in ends if end < given])
    borders = [ends[place - 1] + 1 for place in range(first, len(ends), size)]
    groups = arm.settings["num_inference_steps"] // arm.settings["ar_step"]
    # Frames that the network sees beside long memory: short memory and the groups in flight.
    window = (arm.settings["history_sizes"][1] + groups * size) * (ends[-1] // max(1, len(ends) - 1))
    true = given_latents(arm, truth, total, given)[0] if true is None else true
    errors, rows = latent_errors(arm, made, true), []
    for number, spec in enumerate(specs):
        depth = None if made.disparity is None else made.disparity[number]
        # The render computes texels and disparity lazily for all its scenes, so take out one scene first.
        clip = true_clip(spec, one_scene(truth, number))
        report = measure_drift(made.frames[number], clip, disparity=depth, borders=borders, window=window)
        lines = along(made.frames[number], clip, report, ends)
        seconds = made.seconds / len(specs)
        rows.append({**report.to_dict(), "latent_error": errors[number], "along": lines, "seconds": seconds})
    return rows


def one_scene(truth: world.Frames, number: int) -> world.Frames:
    """Return one scene of a render of several scenes."""
    each = {field.name: getattr(truth, field.name) for field in fields(truth)}
    return world.Frames(**{name: None if what is None else what[number : number + 1] for name, what in each.items()})


def table(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Return a table that compares every arm with the first arm, number by number, with 95 % intervals."""
    if not found:
        return ""
    # Only the numbers of the table: an interval takes some milliseconds, and there are hundreds of numbers.
    kept = {name: [_shown(row) for row in rows] for name, rows in found.items()}
    (first, base), *others = kept.items()
    pair = max((len(f"{name} - {first}") for name in kept), default=0)
    lines = [f"{'pair':{pair}}  {'number':26} {'mean':>8} {'of first':>8}  95 % of the difference"] if others else []
    for name, rows in others:
        both = compare_drift(rows, base)
        for number in SHOWN:
            if number in both:
                row = both[number]
                low, high = row.difference.low, row.difference.high
                title = f"{name} - {first}"
                lines.append(f"{title:{pair}}  {number:26} {row.a:8.3f} {row.b:8.3f}  [{low:+.3f}, {high:+.3f}]")
    return "\n".join(lines)


def _shown(row: Mapping[str, Any]) -> dict[str, float]:
    values = {number: value_of(row, number) for number in SHOWN}
    return {number: value for number, value in values.items() if math.isfinite(value)}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["--report"]:
        from benchmarks.worldweaver_report import main as report

        return report(words[1:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--arms",
        nargs="+",
        required=True,
        metavar="NAME=FOLDER",
        help="adapters, or arms without a folder; the first is compared with all others",
    )
    parser.add_argument("--out", type=Path, default=Path("out/worldweaver"), help="output folder")
    parser.add_argument("--worlds", type=int, default=128, help="number of scenes")
    parser.add_argument("--first", type=int, default=500_000, help="seed of the first scene, below training seeds")
    parser.add_argument("--frames", type=int, default=161, help="frames of a clip, with the given frames")
    parser.add_argument("--given", type=int, default=17, help="number of given frames")
    parser.add_argument("--size", type=int, default=128, help="height and width in pixels")
    parser.add_argument("--batch", type=int, default=32, help="scenes of a job")
    parser.add_argument(
        "--captions", choices=KINDS, default="along", help="captions along the scene, or only that of its start"
    )
    parser.add_argument("--guidance", type=float, help="guidance scale, instead of the adapter's default")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="device of the models"
    )
    parser.add_argument(
        "--workers", type=int, default=1, help="number of processes; several commands may share --out too"
    )
    options = parser.parse_args(words)
    from benchmarks.worldweaver_jobs import run

    try:
        print(table(run(options.arms, options)))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
