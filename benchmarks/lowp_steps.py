"""Whole denoising steps in low precision: stock, exact kernels, FP8 linear layers, FP8 attention, and both.

`python -m benchmarks.lowp_steps` needs a GPU with FP8 and writes `results/lowp_steps.json` after each model. `--only`
measures the models whose names begin with a given text and keeps the rows of the other models in the file. `--tiny`
runs a small model once on any device, with simulated FP8 attention, and writes nothing (its times have no meaning).
Shapes are the published ones, and weights are random, because time does not depend on them. All forms run in one
process on the same inputs. Times are medians of five calls, of two long calls, or of one very long call. Every form is
timed without and with torch.compile, but if a stock step takes more than `LONG` seconds, the FP8 forms are timed with
torch.compile only. The times of an unfinished model are kept in `lowp_steps.partial.json`, and a repeated command
continues there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import postgen
from benchmarks.fused_step import Case, built, cogvideox, flash_attention_4, free, wait, wan
from benchmarks.gates import RESULTS, gate, read_result, write_result
from postgen.families import layout_of
from postgen.files import replacing
from postgen.kernels.attention_fp8 import graphs
from postgen.kernels.fp8_rows.ops import why_not_fp8

Apply = Callable[[Any], Any]
"""A function that applies a plug-in to a transformer and returns its handle."""

QUIET = postgen.FP8LinearConfig(simulate=True)
REPEATS = 5
LONG = 1.5
"""Steps of more than so many seconds are timed in two calls only."""
VERY_LONG = 20.0
"""Steps of more than so many seconds are timed in one call."""


def hunyuan_video() -> Case:
    """Return HunyuanVideo with 129 frames of 720 x 1280: 33 latent frames of 90 x 160, and 256 text tokens."""

    def arguments() -> dict[str, Any]:
        return {
            "hidden_states": torch.randn(1, 16, 33, 90, 160, dtype=torch.bfloat16),
            "timestep": torch.tensor([500]),
            "encoder_hidden_states": torch.randn(1, 256, 4096, dtype=torch.bfloat16),
            "encoder_attention_mask": torch.ones(1, 256),
            "pooled_projections": torch.randn(1, 768, dtype=torch.bfloat16),
            "guidance": torch.tensor([6000.0]),
        }

    kind = "HunyuanVideoTransformer3DModel"
    return Case(name="HunyuanVideo 720p 129f", kind=kind, config={}, arguments=arguments)


CASES = (
    wan("Wan 1.3B 480p 81f", 12, 8960, 30),
    wan("Wan 14B 480p 81f", 40, 13824, 40),
    wan("Wan 14B 720p 81f", 40, 13824, 40, (21, 90, 160)),
    hunyuan_video(),
    cogvideox(),
)


def tiny() -> Case:
    """Return a small Wan model, which runs on any device."""
    case = CASES[0]

    def arguments() -> dict[str, Any]:
        given = case.arguments()
        cut = {"hidden_states": given["hidden_states"][:, :, :2, :4, :4]}
        return {**given, **cut, "encoder_hidden_states": given["encoder_hidden_states"][:, :8, :16]}

    narrow = {"num_attention_heads": 2, "attention_head_dim": 64, "ffn_dim": 64, "num_layers": 1, "text_dim": 16}
    return replace(case, name="tiny", config=narrow, arguments=arguments)


def forms_of(attention: Apply) -> dict[str, tuple[Apply, ...]]:
    """Return the plug-ins of each form: none for stock, exact kernels, and exact kernels with FP8."""
    fused = postgen.apply_fused_ops
    linears: Apply = lambda model: postgen.apply_fp8_linears(model, QUIET)  # noqa: E731
    return {
        "stock": (),
        "exact": (fused,),
        "fp8_linears": (fused, linears),
        "fp8_attention": (fused, attention),
        "fp8_both": (fused, attention, linears),
    }


def fp8_attention(simulate: bool = False) -> Apply:
    """Return a function that applies FP8 attention in all layers and steps, as in a step in the middle of a run."""
    config = postgen.FP8AttentionConfig(first_exact_steps=0, last_exact_steps=0, min_tokens=0, simulate=simulate)
    return lambda model: postgen.apply_fp8_attention(model, config)


@torch.no_grad()
def step_row(
    case: Case,
    device: str,
    repeats: int = REPEATS,
    attention: Apply | None = None,
    *,
    before: Mapping[str, Any] | None = None,
    keep: Callable[[Mapping[str, Any]], None] = lambda row: None,
) -> dict[str, Any]:
    """Time a whole step of a model with random weights, in every form, without and with torch.compile.

    Args:
        case: the model and its inputs.
        device: the device of the model.
        repeats: the number of timed calls of each form.
        attention: the function that applies FP8 attention; None is `fp8_attention()`.
        before: forms that an earlier call has timed, which are not timed again.
        keep: called with the row after each form.

    Returns:
        Milliseconds by form, `<form>_ms` and `<form>_compiled_ms`, and `<form>_difference`, relative to stock.
    """
    import diffusers

    torch.manual_seed(0)
    with torch.device(device):
        transformer = built(getattr(diffusers, case.kind), case.config)
        arguments = case.arguments()

    def step() -> Tensor:
        out: Tensor = transformer(**arguments, return_dict=False)[0]
        return out

    row: dict[str, Any] = {"model": case.name, **(before or {})}
    first, stock = _seconds(step, device)
    stock = stock.double()
    if first > VERY_LONG:  # a second call would cost another minute and differ by little
        row |= {"stock_difference": 0.0, "stock_ms": 1000 * first}
    for compiled in (False, True):
        if compiled:
            for block in layout_of(transformer).block_modules(transformer).values():
                block.compile(fullgraph=True)
        for form, puts in forms_of(attention or fp8_attention()).items():
            name = f"{form}_compiled" if compiled else form
            skipped = not compiled and form not in ("stock", "exact") and row["stock_ms"] > 1000 * LONG
            if skipped or f"{name}_ms" in row:
                continue
            handles = [put(transformer) for put in puts]
            difference = _error(step(), stock)
            row |= {f"{name}_difference": difference, f"{name}_ms": timed(step, device, repeats)}
            for handle in reversed(handles):
                handle.remove()
            keep(row)
    return _compared(row)


def _compared(row: dict[str, Any]) -> dict[str, Any]:
    """Add the speeds relative to the best exact form and to stock, and print the row."""
    row["best_exact_ms"] = best(row, "exact")
    for form in ("fp8_linears", "fp8_attention", "fp8_both"):
        row[f"{form}_vs_exact"] = row["best_exact_ms"] / best(row, form)
        row[f"{form}_vs_stock"] = row["stock_ms"] / best(row, form)
    print({key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}, flush=True)
    return row


def timed(call: Callable[[], Tensor], device: str, repeats: int) -> float:
    """Return the median milliseconds of a call that has run once before; fewer calls if one takes more than `LONG`."""
    times: list[float] = []
    wanted = repeats
    while len(times) < wanted:
        times.append(_seconds(call, device)[0])
        wanted = repeats if times[0] <= LONG else 2 if times[0] <= VERY_LONG else 1
    return 1000 * statistics.median(times)


def _seconds(call: Callable[[], Tensor], device: str) -> tuple[float, Tensor]:
    wait(device)
    start = time.perf_counter()
    found = call()
    wait(device)
    return time.perf_counter() - start, found


def _error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def best(row: Mapping[str, Any], form: str) -> float:
    """Return the milliseconds of a form, compiled or not, whichever is faster; compiled stock also counts as exact."""
    names = (form, f"{form}_compiled", *(("stock_compiled",) if form == "exact" else ()))
    return min(float(row[f"{name}_ms"]) for name in names if f"{name}_ms" in row)


def gates(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the gates of steps; a gate whose model was not measured has no value and does not pass."""
    by_model = {row["model"]: row for row in rows}
    small, large = by_model.get("Wan 14B 480p 81f"), by_model.get("Wan 14B 720p 81f")
    slowest = min((row[f"{form}_vs_exact"] for row in rows for form in ("fp8_linears", "fp8_attention")), default=None)
    return [
        gate("step_14b_480p_vs_stock", small and small["fp8_both_vs_stock"], ">=", 1.6),
        gate("step_14b_720p_vs_exact", large and large["fp8_both_vs_exact"], ">=", 1.25),
        gate("slowest_step_vs_exact", slowest, ">=", 1.0),
    ]


def why_not(device: torch.device) -> str | None:
    """Return why this machine cannot run the benchmark, or None."""
    return why_not_fp8(device) or graphs.refusal(device, 128)


def main(argv: list[str] | None = None) -> int:
    """Measure all models, print the rows, and write the result file after each row."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lowp_steps", description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="run a tiny model on any device and write nothing")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="measure only models whose names begin with NAME")
    parser.add_argument("-o", "--output", default="lowp_steps", help="name or path of the result file")
    options = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.tiny:
        simulate = why_not(torch.device(device)) is not None
        step_row(tiny(), device, 1, fp8_attention(simulate=simulate))
        return 0
    cases = [each for each in CASES if not options.only or each.name.startswith(tuple(options.only))]
    reason = why_not(torch.device(device)) if cases else f"no model begins with {', '.join(options.only)}"
    if reason:
        print(f"benchmarks.lowp_steps needs a GPU with FP8 and a model: {reason}", file=sys.stderr)
        return 2
    rows = {row["model"]: row for row in _before(options.output)} if options.only else {}
    partial = _place(options.output).with_suffix(".partial.json")
    for case in cases:
        before = json.loads(partial.read_text(encoding="utf-8")) if partial.is_file() else {}

        def keep(row: Mapping[str, Any]) -> None:
            print(f"{row['model']}: {', '.join(key for key in row if key.endswith('_ms'))}", flush=True)
            with replacing(partial) as part:
                part.write_text(json.dumps(row), encoding="utf-8")

        found = before if before.get("model") == case.name else None
        rows[case.name] = step_row(case, device, before=found, keep=keep)
        free(device)
        ordered = [rows[each.name] for each in CASES if each.name in rows]
        told = {"flash_attn_4": flash_attention_4(), "steps": ordered, "gates": gates(ordered)}
        print(write_result(options.output, told))
        partial.unlink(missing_ok=True)
    return 0


def _place(output: str) -> Path:
    return Path(output) if output.endswith(".json") else RESULTS / f"{output}.json"


def _before(output: str) -> list[dict[str, Any]]:
    return list(read_result(output)["steps"]) if _place(output).is_file() else []


if __name__ == "__main__":
    sys.exit(main())
