"""Converted transformers against stock ones: a layer, a block and a whole step of Wan 1.3B and 14B, random weights.

`python -m benchmarks.lit_speed` needs a GPU and writes `results/lit_speed.json`, again after every row, so that a run
that is cut keeps its rows. `--only` takes some parts, and `--join A.json B.json` makes one result of several; of rows
of the same name the last counts. `--device cpu` runs the checks and a tiny model and is there to try the benchmark.

Expected on an H200, in minutes: checks 1, curve 1, 1.3b 1, 14b-480p 2, 14b-720p 4, 1.3b-long 2, 14b-302k 3,
14b-500k 5; `--quick` (checks, curve, 1.3b at 480p) 3. No run but the whole one takes more than ten minutes. Rows that
gates look at come first in each part; `--kinds` leaves layer types out.

Both sides of a row run in one process, on the same weights and inputs, eager (`torch.compile` would take longer than
the benchmark), with the fused operations on both sides or, with `--plain`, on neither. Softmax takes the router's best
backend on both. Steps of clips up to 81 frames are whole steps; those of longer clips are added up of measured blocks
and of what a step of two blocks takes beside its blocks, and say so. The ceiling is what a step would gain if
converted attention took no time: 1 / (1 - attention share x converted share), where the attention share is the time
of softmax attention alone, without projections, norms and rotation. The density of a window layer is the share of
(query, key) pairs that its softmax computes; that of a plan counts the blocks that stay softmax too, as 1.
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
from postgen.lit import LiTConfig, layers_of, set_grid
from postgen.lit.pattern import types_of_blocks

Row = dict[str, Any]
REPEATS, LONG_REPEATS = 3, 2
"""Timed calls, after one that is not; of clips longer than 81 frames the second number."""
CURVE = (3, 6, 11)
"""Frames of tokens at 480p, beside the 21 and 84 of other parts, for where linear attention begins to win."""
WHOLE, ADDED_UP = "whole step", "added up of measured blocks and the rest of a step of two blocks"
NO_MEMORY = "out of memory"
DENSEST = 0.35
"""Of all pairs of all blocks, those that stay softmax included, a plan of the gate may compute at most so many by
softmax: its windows alone are sparser still, so that the gate holds whichever of the two is meant."""


class Part(NamedTuple):
    """What `--only` can choose."""

    model: Model
    clips: tuple[Clip, ...]
    plans: bool
    """Whether there are steps beside layers and blocks."""
    whole: bool
    """Whether steps are whole."""


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
    """Measure every clip of a part, with some layer types of `KINDS` or all."""
    for each in part.clips:
        fits = True
        try:
            yield from clip_rows(part, each, device, fused=fused, kinds=[*KINDS] if kinds is None else kinds)
        except torch.OutOfMemoryError:
            fits = False  # what the error holds is let go of first
        release(device)
        if not fits:
            yield {"part": "layer", "model": part.model.name, "clip": each.name, "fused": fused, "failed": NO_MEMORY}


def release(device: str) -> None:
    """Give memory back that nobody holds."""
    if device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def clip_rows(part: Part, chosen: Clip, device: str, *, fused: bool, kinds: Sequence[str]) -> Iterator[Row]:
    """Measure softmax, then each layer type in one block and its plans."""
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
            if layer.covers(grid):  # softmax of the base
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
    """Return the row of a layer type: its self-attention, projections included, and its block."""
    row: Row = {"part": "layer", **name, "kind": kind, "peak_gib": found["block"].peak_gib, "density": dense}
    for what, timing in found.items():
        row[f"{what}_ms"] = timing.milliseconds
        row[f"{what}_speed_up"] = soft[what].milliseconds / timing.milliseconds
    return row


def plan_row(part: Part, here: Built, plan: Plan, layer_of: Mapping[str, Row], stock: Row, repeats: int) -> Row:
    """Return the row of a plan: a whole step where the part has them, else added up of blocks and the rest."""
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
    """Return what a step gains, and Amdahl's limit of it."""
    ceiling = 1 / max(1e-9, 1 - stock["attention_share"] * converted)
    gain = stock["ms"] / milliseconds
    return {"ms": milliseconds, "speed_up": gain, "ceiling": ceiling, "over_ceiling": gain / ceiling}


def converted_blocks(config: LiTConfig, blocks: int) -> list[int]:
    """Return the blocks of a model that a config converts."""
    kinds = types_of_blocks(config.layers, blocks, first_block=config.first_block)
    return [block for block, kind in enumerate(kinds) if kind != "softmax"]


def crossings(rows: Sequence[Row]) -> list[Row]:
    """Return the tokens from which each layer type wins over softmax: where the measured curves at 480p cross.

    Between two measured clips both curves are straight lines in logarithms. `at_most`: it wins at every clip that was
    measured, so the crossing is not above the first; tokens None: it never wins.
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
    """Return from how many tokens on the speed-ups (tokens, speed-up), ascending, are above 1."""
    slower = [place for place, (_, gain) in enumerate(points) if gain <= 1]
    if not slower:
        return {"tokens": points[0][0], "at_most": True}
    if slower[-1] == len(points) - 1:
        return {"tokens": None, "at_most": False}
    (low, below), (high, above) = points[slower[-1]], points[slower[-1] + 1]
    part = -math.log(below) / (math.log(above) - math.log(below))
    return {"tokens": round(low * (high / low) ** part), "at_most": False}


def gates(rows: Sequence[Row]) -> list[Gate]:
    """Return the gates; those of steps look at whole steps alone."""
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
    """Return what tells a row from others."""
    return tuple(row.get(key) for key in ("part", "check", "model", "clip", "kind", "plan", "fused"))


def payload(rows: Sequence[Row], **more: Any) -> dict[str, Any]:
    """Return what stands in the result file; of rows of one name the last counts."""
    kept = [*{name_of(row): row for row in rows}.values()]
    # Gates and crossings are of fused steps, unless there are no others.
    chosen = [row for row in kept if row.get("fused", True)] if any(row.get("fused") for row in kept) else kept
    return {**more, "repeats": REPEATS, "rows": kept, "crossings": crossings(chosen), "gates": gates(chosen)}


def joined(paths: Sequence[str]) -> dict[str, Any]:
    """Return the payload of several results together.

    Raises:
        ValueError: a file that is not there, or is no result of this benchmark.
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
            raise ValueError(f"{path} is no result that benchmarks.lit_speed has measured: {error!r}") from error
    return payload(rows, measured=stamps)


def run(parts: Sequence[str], device: str, output: str, *, fused: bool, kinds: Sequence[str] | None = None) -> Path:
    """Measure some parts, of layer types some or all; the result is written after every row."""
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
    """Return the parts that the options ask for.

    Raises:
        ValueError: it says what does not go.
    """
    known = ("checks", *PARTS)
    if strange := [name for name in options.only or () if name not in known]:
        raise ValueError(f"--only {', '.join(strange)}: there is {', '.join(known)}")
    if strange := [name for name in options.kinds or () if not any(kind.startswith(name) for kind in KINDS)]:
        raise ValueError(f"--kinds {', '.join(strange)}: there is {', '.join(KINDS)}")
    if options.device == "cpu":
        if options.quick:
            raise ValueError(f"--quick needs a GPU; on a CPU there is {', '.join(ON_CPU)}")
        if large := [name for name in options.only or () if name not in ON_CPU]:
            raise ValueError(f"--only {', '.join(large)} needs a GPU; on a CPU there is {', '.join(ON_CPU)}")
        if not options.output.endswith(".json"):
            raise ValueError("a CPU is no place for results: name another file with -o FILE.json")
    everything = ON_CPU if options.device == "cpu" else tuple(name for name in known if name != "tiny")
    return tuple(options.only or (QUICK if options.quick else everything))


def main(argv: list[str] | None = None) -> int:
    """Measure, print the rows and write the result."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lit_speed", description=__doc__.splitlines()[0])
    part = parser.add_mutually_exclusive_group()
    part.add_argument("--quick", action="store_true", help=f"{', '.join(QUICK)} only")
    part.add_argument("--only", nargs="+", metavar="PART", help=f"some of checks, {', '.join(PARTS)}")
    part.add_argument("--join", nargs="+", metavar="JSON", help="results to put together; nothing is measured")
    parser.add_argument("--kinds", nargs="+", metavar="TYPE", help=f"layer types that begin so, of {', '.join(KINDS)}")
    parser.add_argument("--plain", action="store_true", help="fused norms, rotations and modulation on neither side")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("-o", "--output", default="lit_speed", help="name or path of the result file")
    options = parser.parse_args(argv)
    try:
        if options.join:
            if options.plain or options.kinds or options.device != "cuda":
                raise ValueError("--join measures nothing: leave --plain, --kinds and --device out")
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
    # In the order of the table, whose first are those of the gates.
    kinds = [kind for kind in KINDS if options.kinds is None or kind.startswith(tuple(options.kinds))]
    print(run(parts, options.device, options.output, fused=not options.plain, kinds=kinds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
