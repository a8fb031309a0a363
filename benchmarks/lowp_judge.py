"""What low precision does to the clips of the embedded model: the world's judge and PSNR, paired by prompt and seed.

    python -m benchmarks.lowp_judge [--prompts 512] [--modes fp8_linears] [--model FOLDER] [--device cuda]

Clip i is from prompt i and seed i in every mode; `exact` is the model as it is, which the others are compared with.
Half the prompts are of one body, half of two. Differences of the judge's score have 95 % bootstrap intervals over
prompts; PSNR is of a mode's clip against the exact one. Where a kernel is missing, the rounding is emulated. Writes
`results/lowp_judge.json`, again after every 64 clips of each mode, with the gate `judge_drop`: the upper end of the
interval of the drop, the worst mode.
`MODES` takes further modes, a function from a pipeline to a context manager each.
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
"""From a pipeline to what is open while its clips are made."""

LINEARS = postgen.FP8LinearConfig(emulate=True)


def attention_of(pipe: Any) -> postgen.FP8AttentionConfig:
    """Return the usual setting for the few tokens of the embedded model, simulated where there is no such kernel."""
    return postgen.FP8AttentionConfig(min_tokens=0, simulate=graphs.refusal(pipe.transformer.device, 64) is not None)


@contextmanager
def both(pipe: Any) -> Iterator[None]:
    """Put both on for one call."""
    with fp8_linears_for_call(pipe, LINEARS), fp8_attention_for_call(pipe, attention_of(pipe)):
        yield


MODES: dict[str, Mode] = {
    "exact": lambda pipe: nullcontext(),
    "fp8_linears": lambda pipe: fp8_linears_for_call(pipe, LINEARS),
    "fp8_attention": lambda pipe: fp8_attention_for_call(pipe, attention_of(pipe)),
    "fp8_both": lambda pipe: both(pipe),
}
"""What is compared, by name."""
AT_ONCE = 64
"""Clips that are made, judged and forgotten together."""


def clips_of(pipe: Any, mode: Mode, specs: Sequence[Spec], first: int, how: Defaults, label: str) -> Tensor:
    """Clips (B,F,3,H,W) in [0,1] of some scenes, clip i from seed first + i."""
    prompts = [world.simple_caption(spec) for spec in specs]
    seeds = list(range(first, first + len(prompts)))
    with mode(pipe):
        return generate(pipe, Job(prompts=prompts, seeds=seeds, **dataclasses.asdict(how)), label).clamp(0, 1)


def psnr(one: Tensor, other: Tensor) -> Tensor:
    """Decibels between clips (B,F,3,H,W), (B,); 100 and more is the same."""
    error = (one.double() - other.double()).square().flatten(1).mean(1).clamp_min(1e-10)
    return -10 * error.log10()


def measure(
    pipe: Any, specs: Sequence[Spec], how: Defaults, modes: Mapping[str, Mode], workers: int
) -> Iterator[dict[str, dict[str, Tensor]]]:
    """Yield numbers of every clip so far by mode: the judge's score, motion, and PSNR to the exact clip."""
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
    """Return a row a mode: means, and the drop of the score against the first mode with its interval."""
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
    """Return the gate: the upper end of the drop of the worst mode."""
    worst = max((row["drop"]["high"] for row in rows[1:]), default=None)
    return [gate("judge_drop", worst, "<=", 0.01)]


def main(argv: list[str] | None = None, modes: Mapping[str, Mode] = MODES) -> int:
    """Make the clips, print the rows, write the result."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lowp_judge", description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=512, help="clips of each mode (default: 512)")
    parser.add_argument("--modes", nargs="+", choices=list(modes), default=list(modes), help="exact is always first")
    parser.add_argument("--model", type=Path, help="another folder than the embedded model's")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--workers", type=int, help="processes that judge beside this one")
    parser.add_argument("--steps", type=int, help="denoising steps (default: the model's)")
    parser.add_argument("-o", "--output", default="lowp_judge", help="name or path of the result file")
    options = parser.parse_args(argv)
    if options.prompts < 2 or options.prompts % 2:
        parser.error("--prompts must be an even number of at least 2")
    folder = options.model or Path(postgen.embedded_model())
    how = Defaults.of(folder)
    how = how if options.steps is None else dataclasses.replace(how, steps=options.steps)
    chosen = {name: modes[name] for name in dict.fromkeys(["exact", *options.modes])}
    pipe = load(folder, options.device)
    workers = judging(options.workers, options.device)
    half = options.prompts // 2
    specs = scenes(half, how.frames)
    # In turns, so that what an interrupted run leaves has as many of two bodies as of one.
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
