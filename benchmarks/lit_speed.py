"""Speed of converted and stock transformers: a layer, a block and a whole step of Wan 1.3B and 14B, random weights.

`python -m benchmarks.lit_speed` needs a GPU. It writes `results/lit_speed.json` after every row, so an interrupted run
keeps its rows. `--only` selects parts, and `--join A.json B.json` combines several results; if rows have the same
name, the last one is used. `--device cpu` runs the checks and a tiny model, only to try the benchmark.

Expected minutes on an H200: checks 1, curve 1, 1.3b 1, 14b-480p 2, 14b-720p 4, 1.3b-long 2, 14b-302k 3, 14b-500k 5;
`--quick` (checks, curve, 1.3b at 480p) 3. Only the complete run takes more than ten minutes. In each part, the rows
for gates come first; `--kinds` selects layer types.

Both sides of a row run in one process, on the same weights and inputs, in eager mode (`torch.compile` would take
longer than the benchmark). Both sides use the fused operations, or with `--plain` neither does, and both use the
router's best softmax backend. For clips up to 81 frames whole steps are measured. For longer clips, the time of a step
is the sum of measured blocks and of the rest of a step with two blocks, and the row says so. The ceiling is the gain
of a step if the converted attention took no time: 1 / (1 - attention share x converted share). The attention share is
the time of softmax attention alone, without projections, norms and rotary embedding. The density of a window layer is
the share of (query, key) pairs that its softmax computes. The density of a plan also counts softmax blocks, with 1.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import lit_checks
from benchmarks.gates import Gate, device, gate, largest, write_result
from benchmarks.lit_models import (
    KINDS,
    LARGE,
    PLANS,
    SMALL,
    TINY,
    TINY_CLIP,
    Built,
    Clip,
    Model,
    Plan,
    Timing,
    clip,
    density,
    timed,
)
from postgen.lit import LitConfig, layers_of, set_grid
from postgen.lit.pattern import types_of_blocks

Row = dict[str, Any]
REPEATS, LONG_REPEATS = 3, 2
"""Numbers of timed calls, after one warm-up call: for clips up to 81 frames, and for longer clips."""
CURVE = (3, 6, 11)
"""Latent frames at 480p, besides the 21 and 84 of other parts, to find where linear attention becomes faster."""
WHOLE, ADDED_UP = "whole step", "added up of measured blocks and the rest of a step of two blocks"
NO_MEMORY = "out of memory"
DENSEST = 0.35
"""Largest share of pairs that a plan for the gate may compute by softmax, over all blocks including softmax blocks.
The share of its window layers alone is even smaller, so the gate holds for both readings."""


class Part(NamedTuple):
    """A part of the benchmark, which `--only` can select."""

    model: Model
    clips: tuple[Clip, ...]
    plans: bool
    """Whether to measure steps, in addition to layers and blocks."""
    whole: bool
    """Whether to measure whole steps; False adds up measured blocks."""


PARTS = {
    "curve": Part(SMALL, tuple(clip("480p", frames) for frames in CURVE), plans=False, whole=False),
    "14b-curve": Part(LARGE, tuple(clip("480p", frames) for frames in CURVE), plans=False, whole=False),
    "1.3b-480p": Part(SMALL, (clip("480p", 21),), plans=True, whole=True),
    "1.3b-720p": Part(SMALL, (clip("720p", 21),), plans=True, whole=True),
    "14b-480p": Part(LARGE, (clip("480p", 21),), plans=True, whole=True),
    "14b-720p": Part(LARGE, (clip("720p", 21),), plans=True, whole=True),
    "1.3b-long": Part(SMALL, (clip("480p", 84), clip("720p", 84), clip("720p", 139)), plans=True, whole=False),
    "14b-302k": Part(LARGE, (clip("480p", 84), clip("720p", 84)), plans=True, whole=False),
    "14b-500k": Part(LARGE, (clip("720p", 139),), plans=True, whole=False),
    "tiny": Part(TINY, (TINY_CLIP,), plans=True, whole=True),
}
QUICK = ("checks", "curve", "1.3b-480p")
ON_CPU = ("checks", "tiny")


@torch.no_grad()
def rows_of(part: Part, device: str, *, fused: bool, kinds: Sequence[str] | None = None) -> Iterator[Row]:
    """Measure every clip of a part, with the given layer types of `KINDS` or with all."""
    for each in part.clips:
        fits = True
        try:
            yield from clip_rows(part, each, device, fused=fused, kinds=[*KINDS] if kinds is None else kinds)
        except torch.OutOfMemoryError:
            fits = False  # leave the handler first, because the exception keeps tensors alive
        release(device)
        if not fits:
            yield {"part": "layer", "model": part.model.name, "clip": each.name, "fused": fused, "failed": NO_MEMORY}


def release(device: str) -> None:
    """Free unused GPU memory."""
    if device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def clip_rows(part: Part, chosen: Clip, device: str, *, fused: bool, kinds: Sequence[str]) -> Iterator[Row]:
    """Measure softmax, then for each layer type one converted block and the plans with this type."""
    model, grid = part.model, chosen.grid
    repeats = REPEATS if grid.frames <= 21 else LONG_REPEATS
    name = {"model": model.name, "clip": chosen.name, "tokens": grid.tokens, "fused": fused}
    here = Built(model, grid, model.layers if part.whole else 2, device, fused=fused)
    with here.side(None):
        calls = here.calls()
        step = timed(here.step, device, repeats) if part.plans else None
        soft = {what: timed(call, device, repeats) for what, call in calls.items()}
    alone = timed(here.softmax_alone(), device, repeats).milliseconds
    layer_of = {"softmax": layer_row(name, "softmax", soft, soft, None)}
    layer_of["softmax"] |= {"alone_ms": alone, "backend": here.backend}
    yield layer_of["softmax"]
    stock = None if step is None else stock_row(part, name, step, layer_of["softmax"])
    if stock is not None:
        yield stock
    for kind in kinds:
        row: Row | None = {"part": "layer", **name, "kind": kind, "failed": NO_MEMORY}
        with suppress(torch.OutOfMemoryError), here.side(KINDS[kind].config("1:{}", grid)):
            set_grid(here.transformer, grid)
            (layer,) = layers_of(here.transformer).values()
            if layer.covers(grid):  # the layer would run the stock softmax
                row = None
            else:
                found = {what: timed(call, device, repeats) for what, call in calls.items()}
                row = layer_of[kind] = layer_row(name, kind, found, soft, density(layer, grid))
        release(device)
        if row is not None:
            yield row
        if stock is not None and kind in layer_of:
            plans = [plan for plan in PLANS if plan.kind == kind]
            yield from (plan_row(part, here, plan, layer_of, stock, repeats) for plan in plans)


def stock_row(part: Part, name: Row, step: Timing, soft: Row) -> Row:
    """Return the row of a step with softmax in every block."""
    blocks = part.model.layers
    rest = max(0.0, step.milliseconds - (blocks if part.whole else 2) * soft["block_ms"])
    base = step.milliseconds if part.whole else rest + blocks * soft["block_ms"]
    how, peak = (WHOLE, step.peak_gib) if part.whole else (ADDED_UP, None)
    row = {"part": "step", **name, "plan": "softmax", "how": how, "ms": base, "rest_ms": rest}
    return row | {"attention_share": blocks * soft["alone_ms"] / base, "peak_gib": peak}


def layer_row(
    name: Row, kind: str, found: Mapping[str, Timing], soft: Mapping[str, Timing], dense: float | None
) -> Row:
    """Return the row of a layer type: times of its self-attention, with projections, and of its block."""
    row: Row = {"part": "layer", **name, "kind": kind, "peak_gib": found["block"].peak_gib, "density": dense}
    for what, timing in found.items():
        row[f"{what}_ms"] = timing.milliseconds
        row[f"{what}_speed_up"] = soft[what].milliseconds / timing.milliseconds
    return row


def plan_row(part: Part, here: Built, plan: Plan, layer_of: Mapping[str, Row], stock: Row, repeats: int) -> Row:
    """Return the row of a plan: a measured whole step if the part has them, else the sum of blocks and the rest."""
    config = KINDS[plan.kind].config(plan.where, here.grid)
    blocks = part.model.layers
    converted = len(converted_blocks(config, blocks))
    composed = stock["rest_ms"] + sum(
        count * layer_of[kind]["block_ms"] for kind, count in (("softmax", blocks - converted), (plan.kind, converted))
    )
    row = {**stock, "plan": plan.name, "kind": plan.kind, "composed_ms": composed}
    row |= {"converted_blocks": converted, "converted_share": converted / blocks}
    row |= densities(layer_of[plan.kind]["density"], converted / blocks)
    milliseconds, row["peak_gib"] = composed, None
    if part.whole:
        whole = None
        with suppress(torch.OutOfMemoryError), here.side(config):
            whole = timed(here.step, here.device, repeats)
        release(here.device)
        if whole is None:
            return {**row, "ms": None, "failed": NO_MEMORY}
        milliseconds, row["peak_gib"] = whole
    return row | against_ceiling(stock, milliseconds, converted / blocks)


def densities(windows: float | None, converted: float) -> Row:
    """Return the share of (query, key) pairs that softmax computes: in window layers, and in all blocks together."""
    whole = None if windows is None else windows * converted + 1 - converted
    return {"density": windows, "plan_density": whole}


def against_ceiling(stock: Row, milliseconds: float, converted: float) -> Row:
    """Return the time and speed-up of a step, and the limit of the speed-up by Amdahl's law."""
    ceiling = 1 / max(1e-9, 1 - stock["attention_share"] * converted)
    gain = stock["ms"] / milliseconds
    return {"ms": milliseconds, "speed_up": gain, "ceiling": ceiling, "over_ceiling": gain / ceiling}


def converted_blocks(config: LitConfig, blocks: int) -> list[int]:
    """Return the indices of the blocks that a config converts."""
    kinds = types_of_blocks(config.layers, blocks, first_block=config.first_block)
    return [block for block, kind in enumerate(kinds) if kind != "softmax"]


def crossings(rows: Sequence[Row]) -> list[Row]:
    """Return the number of tokens from which each layer type is faster than softmax, from the measurements at 480p.

    Between two measured clips the speed-up is interpolated linearly in logarithms. `at_most` means that the type is
    faster for every measured clip, so the crossing is at or below the first one. Tokens None means that it is never
    faster.
    """
    curves: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for row in (row for row in rows if "layer_speed_up" in row):
        if row["clip"].startswith("480p") and row["kind"] != "softmax":
            place = (row["model"], row["kind"])
            curves.setdefault(place, []).append((row["tokens"], row["layer_speed_up"]))
    return [
        {"model": model, "kind": kind, **crossing(sorted(points))} for (model, kind), points in sorted(curves.items())
    ]


def crossing(points: Sequence[tuple[int, float]]) -> Row:
    """Return the number of tokens from which the speed-up is above 1, for points (tokens, speed-up) in order."""
    slower = [place for place, (_, gain) in enumerate(points) if gain <= 1]
    if not slower:
        return {"tokens": points[0][0], "at_most": True}
    if slower[-1] == len(points) - 1:
        return {"tokens": None, "at_most": False}
    (low, below), (high, above) = points[slower[-1]], points[slower[-1] + 1]
    part = -math.log(below) / (math.log(above) - math.log(below))
    return {"tokens": round(low * (high / low) ** part), "at_most": False}


def gates(rows: Sequence[Row]) -> list[Gate]:
    """Return the gates. Gates of steps use only whole steps."""
    steps = [row for row in rows if row["part"] == "step" and row["how"] == WHOLE and row["ms"]]
    at_720p = [row for row in steps if row["clip"] == "720p 81f"]

    def over_ceiling(model: Model) -> float | None:
        half = [row for row in at_720p if row["model"] == model.name and row["plan"] == "half lit"]
        return largest(half[-1:], "over_ceiling")

    windows = [
        row
        for row in at_720p
        if row["model"] == LARGE.name and "window_delta" in row["plan"] and row["plan_density"] <= DENSEST
    ]
    checked = {row["check"]: row["value"] for row in rows if row["part"] == "check"}
    return [
        gate("families_converted", checked.get("families_converted"), "==", 8),
        gate("step_over_ceiling_14b_720p", over_ceiling(LARGE), ">=", 0.95),
        gate("step_over_ceiling_1p3b_720p", over_ceiling(SMALL), ">=", 0.95),
        gate("window_delta_step_14b_720p", largest(windows, "speed_up"), ">=", 1.3),
        gate("memory_constant", checked.get("memory_constant"), "==", 1),
        gate("resume_identical", checked.get("resume_identical"), "==", 1),
    ]


def name_of(row: Row) -> tuple[Any, ...]:
    """Return the values that identify a row."""
    return tuple(row.get(key) for key in ("part", "check", "model", "clip", "kind", "plan", "fused"))


def payload(rows: Sequence[Row], **more: Any) -> dict[str, Any]:
    """Return the content of the result file. If several rows have the same name, the last one is used."""
    kept = [*{name_of(row): row for row in rows}.values()]
    # Gates and crossings use rows with fused operations if there are any, else the plain rows.
    chosen = [row for row in kept if row.get("fused", True)] if any(row.get("fused") for row in kept) else kept
    return {**more, "repeats": REPEATS, "rows": kept, "crossings": crossings(chosen), "gates": gates(chosen)}


def joined(paths: Sequence[str]) -> dict[str, Any]:
    """Return the combined payload of several result files.

    Raises:
        ValueError: a file cannot be read, or is not a result of this benchmark.
    """
    rows, stamps = [], []
    for path in paths:
        try:
            result = json.loads(Path(path).read_text(encoding="utf-8"))
            payload(result["rows"])
            rows += result["rows"]
            stamps.append({key: result[key] for key in ("date", "device", "versions")})
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a result file of benchmarks.lit_speed: {error!r}") from error
    return payload(rows, measured=stamps)


def run(parts: Sequence[str], device: str, output: str, *, fused: bool, kinds: Sequence[str] | None = None) -> Path:
    """Measure the given parts with the given layer types, or with all; write the result after every row."""
    found: list[Row] = []
    for name in parts:
        checks = name == "checks"
        rows = lit_checks.rows(device) if checks else rows_of(PARTS[name], device, fused=fused, kinds=kinds)
        for row in rows:
            found.append(row)
            told = {key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}
            print(told, flush=True)
            path = write_result(output, payload(found))
    return path


def chosen_parts(options: argparse.Namespace) -> tuple[str, ...]:
    """Return the parts that the options select.

    Raises:
        ValueError: an unknown part or layer type, or an option that the device does not support.
    """
    known = ("checks", *PARTS)
    if strange := [name for name in options.only or () if name not in known]:
        raise ValueError(f"--only has unknown parts {', '.join(strange)}. Known: {', '.join(known)}")
    if strange := [name for name in options.kinds or () if not any(kind.startswith(name) for kind in KINDS)]:
        raise ValueError(f"--kinds has unknown layer types {', '.join(strange)}. Known: {', '.join(KINDS)}")
    if options.device == "cpu":
        if options.quick:
            raise ValueError(f"--quick needs a GPU; the CPU supports {', '.join(ON_CPU)}")
        if large := [name for name in options.only or () if name not in ON_CPU]:
            raise ValueError(f"--only {', '.join(large)} needs a GPU; the CPU supports {', '.join(ON_CPU)}")
        if not options.output.endswith(".json"):
            raise ValueError("a CPU run must not replace the measured results: name another file with -o FILE.json")
    everything = ON_CPU if options.device == "cpu" else tuple(name for name in known if name != "tiny")
    return tuple(options.only or (QUICK if options.quick else everything))


def main(argv: list[str] | None = None) -> int:
    """Measure, print the rows and write the result."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lit_speed", description=__doc__.splitlines()[0])
    part = parser.add_mutually_exclusive_group()
    part.add_argument("--quick", action="store_true", help=f"measure {', '.join(QUICK)} only")
    part.add_argument("--only", nargs="+", metavar="PART", help=f"parts to measure, of checks, {', '.join(PARTS)}")
    part.add_argument("--join", nargs="+", metavar="JSON", help="combine these result files; measure nothing")
    parser.add_argument("--kinds", nargs="+", metavar="TYPE", help=f"beginnings of layer types, of {', '.join(KINDS)}")
    parser.add_argument("--plain", action="store_true", help="no fused norms, rotary embeddings and modulation")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu runs a tiny model")
    parser.add_argument("-o", "--output", default="lit_speed", help="name or path of the result file")
    options = parser.parse_args(argv)
    try:
        if options.join:
            if options.plain or options.kinds or options.device != "cuda":
                raise ValueError("--join measures nothing, so leave --plain, --kinds and --device out")
            print(write_result(options.output, joined(options.join)))
            return 0
        parts = chosen_parts(options)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if options.device == "cuda" and not torch.cuda.is_available():
        print("benchmarks.lit_speed needs a GPU: torch sees none", file=sys.stderr)
        return 2
    print(device())
    # In the order of `KINDS`, which has the types for gates first.
    kinds = [kind for kind in KINDS if options.kinds is None or kind.startswith(tuple(options.kinds))]
    print(run(parts, options.device, options.output, fused=not options.plain, kinds=kinds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
