"""The effect of low precision on clips of the embedded model: scores of the world's judge and PSNR, paired by prompt.

    python -m benchmarks.lowp_judge [--prompts 512] [--modes fp8_linears] [--model FOLDER] [--device cuda]

In every mode clip i comes from prompt i and seed i. The mode `exact` is the unchanged model, with which the other
modes are compared. Half of the prompts have one body, half have two. Differences of the judge's score have 95 %
bootstrap intervals over prompts. PSNR compares a mode's clip with the exact clip. Where a kernel is missing, its
rounding is simulated. The benchmark writes `results/lowp_judge.json` after every 64 clips of each mode. Its gate
`judge_drop` is the upper end of the interval of the score's drop, in the worst mode. Further modes can be added to
`MODES`: each is a function from a pipeline to a context manager.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import postgen
from benchmarks.embedded_measures import judging
from benchmarks.embedded_sampling import Defaults, Job, generate, load
from benchmarks.enhance_a_video import scenes
from benchmarks.gates import gate, write_result
from postgen import world
from postgen.fp8_linear import fp8_linears_for_call
from postgen.fused.fp8_attention import fp8_attention_for_call
from postgen.kernels.attention_fp8 import graphs
from postgen.metrics.bootstrap import bootstrap
from postgen.metrics.video_measures import motion
from postgen.world.check import check_batch
from postgen.world.spec import Spec

Mode = Callable[[Any], AbstractContextManager[Any]]
"""A function from a pipeline to the context manager in which its clips are generated."""

LINEARS = postgen.FP8LinearConfig(simulate=True)


def attention_of(pipe: Any) -> postgen.FP8AttentionConfig:
    """Return the default config without `min_tokens`, as the embedded model has few tokens; simulated if necessary."""
    return postgen.FP8AttentionConfig(min_tokens=0, simulate=graphs.refusal(pipe.transformer.device, 64) is not None)


@contextmanager
def both(pipe: Any) -> Iterator[None]:
    """Apply FP8 linear layers and FP8 attention inside a `with` block."""
    with fp8_linears_for_call(pipe, LINEARS), fp8_attention_for_call(pipe, attention_of(pipe)):
        yield


MODES: dict[str, Mode] = {
    "exact": lambda pipe: nullcontext(),
    "fp8_linears": lambda pipe: fp8_linears_for_call(pipe, LINEARS),
    "fp8_attention": lambda pipe: fp8_attention_for_call(pipe, attention_of(pipe)),
    "fp8_both": lambda pipe: both(pipe),
}
"""The modes to compare, by name."""
AT_ONCE = 64
"""How many clips are generated and judged together, and then dropped."""


def clips_of(pipe: Any, mode: Mode, specs: Sequence[Spec], first: int, how: Defaults, label: str) -> Tensor:
    """Generate clips (B,F,3,H,W) in [0,1] of some scenes; clip i has the seed first + i."""
    prompts = [world.simple_caption(spec) for spec in specs]
    seeds = list(range(first, first + len(prompts)))
    with mode(pipe):
        return generate(pipe, Job(prompts=prompts, seeds=seeds, **dataclasses.asdict(how)), label).clamp(0, 1)


def psnr(one: Tensor, other: Tensor) -> Tensor:
    """Return the PSNR in decibels between two batches of clips (B,F,3,H,W), as (B,), at most 100 (for equal clips)."""
    error = (one.double() - other.double()).square().flatten(1).mean(1).clamp_min(1e-10)
    return -10 * error.log10()


def measure(
    pipe: Any, specs: Sequence[Spec], how: Defaults, modes: Mapping[str, Mode], workers: int
) -> Iterator[dict[str, dict[str, Tensor]]]:
    """Yield the numbers of all clips so far, (B,), by mode and name: judge score, motion, PSNR to the exact clip."""
    found: dict[str, dict[str, list[Tensor]]] = {name: {} for name in modes}
    for low in range(0, len(specs), AT_ONCE):
        part = specs[low : low + AT_ONCE]
        exact: Tensor | None = None
        for name, mode in modes.items():
            clips = clips_of(pipe, mode, part, low, how, f"{name}, {low}")
            exact = clips if exact is None else exact
            reports = check_batch(clips, part, workers=workers)
            numbers = {
                "score": torch.tensor([report.score for report in reports]),
                "motion": motion(clips).cpu(),
                "psnr": psnr(clips, exact).cpu(),
            }
            for measure_name, values in numbers.items():
                found[name].setdefault(measure_name, []).append(values.double())
        yield {name: {key: torch.cat(values) for key, values in rows.items()} for name, rows in found.items()}


def rows_of(numbers: Mapping[str, Mapping[str, Tensor]]) -> list[dict[str, Any]]:
    """Return one row per mode: means, and the drop of the score against the first mode with its interval."""
    plain = next(iter(numbers.values()))
    rows = []
    for name, values in numbers.items():
        row: dict[str, Any] = {"mode": name, **{key: float(each.mean()) for key, each in values.items()}}
        row["lowest_psnr"] = float(values["psnr"].min())
        row["motion_ratio"] = float(values["motion"].mean() / plain["motion"].mean())
        row["drop"] = dataclasses.asdict(bootstrap(plain["score"] - values["score"]))
        rows.append(row)
    return rows


def gates(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the gate: the upper end of the interval of the drop, in the worst mode."""
    worst = max((row["drop"]["high"] for row in rows[1:]), default=None)
    return [gate("judge_drop", worst, "<=", 0.01)]


def main(argv: list[str] | None = None, modes: Mapping[str, Mode] = MODES) -> int:
    """Generate and judge the clips, print the rows and write the result file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lowp_judge", description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=512, help="number of clips of each mode, even (default: 512)")
    parser.add_argument("--modes", nargs="+", choices=list(modes), default=list(modes), help="exact always runs first")
    parser.add_argument("--model", type=Path, help="folder of another model than the embedded one")
    usual = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=usual, choices=["cpu", "cuda"], help="device of the model")
    parser.add_argument("--workers", type=int, help="number of additional processes that judge clips")
    parser.add_argument("--steps", type=int, help="denoising steps (default: the model's)")
    parser.add_argument("-o", "--output", default="lowp_judge", help="name or path of the result file")
    options = parser.parse_args(argv)
    if options.prompts < 2 or options.prompts % 2:
        parser.error(f"--prompts must be an even number of at least 2, got {options.prompts}")
    folder = options.model or Path(postgen.embedded_model())
    how = Defaults.of(folder)
    how = how if options.steps is None else dataclasses.replace(how, steps=options.steps)
    chosen = {name: modes[name] for name in dict.fromkeys(["exact", *options.modes])}
    pipe = load(folder, options.device)
    workers = judging(options.workers, options.device)
    half = options.prompts // 2
    specs = scenes(half, how.frames)
    # Alternate one and two bodies, so that the results of an interrupted run have as many of each.
    specs = [each for pair in zip(specs[:half], specs[half:], strict=True) for each in pair]
    for numbers in measure(pipe, specs, how, chosen, workers):
        rows = rows_of(numbers)
        done = len(numbers["exact"]["score"])
        settings = {"prompts": done, **dataclasses.asdict(how)}
        place = write_result(options.output, {"settings": settings, "rows": rows, "gates": gates(rows)})
        print(f"{done} of {options.prompts} prompts are in {place}", flush=True)
    for row in rows:
        print(row, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
