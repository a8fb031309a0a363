"""The effect of Enhance-A-Video on the embedded model, its agreement with the official method, and its cost.

    python -m benchmarks.enhance_a_video [--prompts 256] [--weights auto 0.5 1 2 4 8] [--model FOLDER] [--quick]

The prompts have one or two bodies and a static camera. Clip i has seed i at every weight. Size, length, steps and
guidance scale come from the postgen.json of the model folder. The checker judges every clip. Flicker is measured on
the whole picture and on the ground (floor and backdrop, where no body is visible in the compared frames). Warp error
is measured on the ground, whose exact flow under a static camera is zero. Motion is measured on the whole picture: a
frozen clip has no flicker, so less flicker is an improvement only with unchanged motion. Differences to the plain
model are paired by clip and have 95 % bootstrap intervals. Writes benchmarks/results/enhance_a_video.json after every
weight. Several processes can share the weights; each generates the clips of the plain model again. Merging their files
keeps the results that do not come from clips:

    python -m benchmarks.enhance_a_video --clips_only --weights auto 0.5 1 --output a.json
    python -m benchmarks.enhance_a_video --merge a.json b.json
"""

from __future__ import annotations

import argparse
import dataclasses
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import postgen
from benchmarks.embedded_measures import ground, judging, shares
from benchmarks.embedded_sampling import Defaults, Job, generate, load
from benchmarks.enhance_cost import extra_memory_mib, layer_cost
from benchmarks.enhance_families import passing_families
from benchmarks.gates import amend_result, gate, read_result, write_result
from postgen import world
from postgen.assets import embedded_model
from postgen.errors import UserError
from postgen.metrics.bootstrap import Interval, bootstrap, ratio_of_means
from postgen.metrics.video_measures import flicker, motion, warp_error
from postgen.world.check import check_batch
from postgen.world.spec import Spec
from tests.enhance.official import MODELS, parity

WEIGHTS = ("auto", 0.5, 1.0, 2.0, 4.0, 8.0)
AT_ONCE = 32

Rows = dict[str, Tensor]
"""Measure -> one number per clip."""


def measured(clips: Tensor) -> Rows:
    """Return the measures of every clip that need no prompt."""
    parts = defaultdict(list)
    for part in clips.split(AT_ONCE):
        still = ground(part)
        no_flow = part.new_zeros(len(part), part.shape[1] - 1, 2, *part.shape[-2:])
        parts["flicker"].append(flicker(part))
        parts["flicker_ground"].append(flicker(part, still))
        parts["warp_error_ground"].append(warp_error(part, no_flow, still[:, :-1] & still[:, 1:]))
        parts["motion"].append(motion(part))
    return {name: torch.cat(values).cpu() for name, values in parts.items()}


class Gains:
    """Context that records the gains of every layer in all forward passes of the transformer."""

    def __init__(self, pipe: Any, handle: postgen.EnhanceAVideoHandle) -> None:
        self.transformer, self.handle = pipe.transformer, handle
        self.found: dict[str, list[float]] = defaultdict(list)

    def __enter__(self) -> Gains:
        self.hook = self.transformer.register_forward_hook(self._note)
        return self

    def _note(self, *call: Any) -> None:
        for layer, gains in self.handle.stats().items():
            self.found[layer] += gains

    def __exit__(self, *failure: object) -> None:
        self.hook.remove()

    def table(self) -> dict[str, dict[str, float]]:
        """Return for each layer the mean and largest gain, and the share of samples and steps with a gain above 1."""
        return {
            layer: {
                "mean": sum(gains) / len(gains),
                "largest": max(gains),
                "active": sum(gain > 1 for gain in gains) / len(gains),
            }
            for layer, gains in self.found.items()
        }


def scenes(count: int, frames: int) -> list[Spec]:
    """Return `count` scenes with one body and `count` scenes with two bodies, all with a static camera."""
    return [
        world.sample(i, num_bodies=bodies, camera="static", num_frames=frames)
        for bodies in (1, 2)
        for i in range(count)
    ]


def judged(pipe: Any, specs: list[Spec], how: Defaults, label: str, workers: int) -> tuple[Rows, dict[str, Any]]:
    """Generate a clip of every scene; return the measures of the clips and the checker's shares by body count."""
    half = len(specs) // 2
    groups = {"one": specs[:half], "two": specs[half:]}
    clips, reports, checker = [], [], {}
    for name, part in groups.items():
        prompts = [world.simple_caption(spec) for spec in part]
        job = Job(prompts=prompts, seeds=list(range(half)), **dataclasses.asdict(how))
        clips.append(generate(pipe, job, f"{label}, {name}"))
        reports += check_batch(clips[-1], part, workers=workers)
        checker[name] = shares(reports[-half:])
    rows = measured(torch.cat(clips).clamp(0, 1))
    rows["score"] = torch.tensor([report.score for report in reports])
    rows["all_right"] = torch.tensor([float(report.all_right) for report in reports])
    return rows, checker


def compared(rows: Rows, plain: Rows) -> dict[str, dict[str, float]]:
    """Return the differences to the plain model by measure, and the ratio for motion, with intervals."""
    found: dict[str, Interval] = {}
    for name, values in rows.items():
        # A clip without visible ground has no number for the measures on the ground.
        both = torch.stack([values, plain[name]], dim=1).double()
        both = both[both.isfinite().all(dim=1)]
        found[f"{name}_delta"] = bootstrap(both[:, 0] - both[:, 1])
        if name == "motion":
            found["motion_ratio"] = bootstrap(both, ratio_of_means)
    return {name: dataclasses.asdict(interval) for name, interval in found.items()}


def means(rows: Rows) -> dict[str, float]:
    """Return the mean of every measure."""
    return {name: float(values.nanmean()) for name, values in rows.items()}


def sweep(
    pipe: Any, specs: list[Spec], how: Defaults, weights: Sequence[float | str], workers: int
) -> Iterator[dict[str, Any]]:
    """Run the plain model and every weight on the same prompts and seeds; yield the table after each weight."""
    plain, checker = judged(pipe, specs, how, "plain", workers)
    table: dict[str, Any] = {"plain": {"means": means(plain), "checker": checker}}
    for weight in weights:
        handle = postgen.apply_enhance_a_video(pipe, postgen.EnhanceAVideoConfig(weight=weight))
        with Gains(pipe, handle) as gains:
            rows, checker = judged(pipe, specs, how, f"weight {weight}", workers)
        handle.remove()
        against = compared(rows, plain)
        table[f"{weight}"] = {
            "means": means(rows),
            "checker": checker,
            "against_plain": against,
            "gains": gains.table(),
        }
        for name, interval in against.items():
            print(
                f"{weight!s:5s} {name:24s}{interval['value']:+.5f}  [{interval['low']:+.5f}, {interval['high']:+.5f}]"
            )
        yield table


COLUMNS = {"score": 1, "flicker": 1e3, "flicker_ground": 1e3, "warp_error_ground": 1e3}
"""Column of the table -> the factor of its numbers. The table also has the motion ratio."""


def markdown(table: dict[str, Any]) -> str:
    """Return the table of the documentation: the means of the plain model, then the differences to them."""
    names = [f"{name} x 1000" if factor > 1 else name for name, factor in COLUMNS.items()]
    headings = ["weight", *(name.replace("_", " ") for name in names), "motion ratio"]
    lines = [f"| {' | '.join(headings)} |", f"|{'---|' * len(headings)}"]
    plain = [f"{factor * table['plain']['means'][name]:.3f}" for name, factor in COLUMNS.items()]
    lines.append(f"| off | {' | '.join(plain)} | 1 |")
    for weight, row in table.items():
        if weight != "plain":
            found = row["against_plain"]
            cells = [_cell(found[f"{name}_delta"], factor, "+.3f") for name, factor in COLUMNS.items()]
            lines.append(f"| {weight} | {' | '.join(cells)} | {_cell(found['motion_ratio'], 1, '.3f')} |")
    return "\n".join(lines)


def _cell(interval: dict[str, float], factor: float, form: str) -> str:
    value, low, high = (format(factor * interval[name], form) for name in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=256, help="prompts of each number of bodies (default: 256)")
    parser.add_argument(
        "--weights", type=weight, nargs="+", default=WEIGHTS, metavar="WEIGHT", help="auto or numbers (default: all)"
    )
    parser.add_argument("--model", type=Path, help="model folder (default: the embedded model)")
    parser.add_argument(
        "--workers", type=int, help="additional processes that judge clips (default: 8 on a GPU, none on a CPU)"
    )
    parser.add_argument("--guidance", type=float, help="guidance scale (default: that of the model)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--output", default="enhance_a_video", help="name or path of the result file")
    parser.add_argument("--clips_only", action="store_true", help="measure only the weights, for --merge")
    parser.add_argument("--merge", nargs="+", metavar="FILE", help="merge parts into the result; measures nothing")
    parser.add_argument("--table", action="store_true", help="print the table of the result file; measures nothing")
    parser.add_argument("--quick", action="store_true", help="print the result, but write no file")
    args = parser.parse_args()
    if args.clips_only and args.output == parser.get_default("output"):
        parser.error("--clips_only writes a part of the result: give it another --output")
    return args


def weight(text: str) -> float | str:
    """Parse a weight of the command line: "auto" or a number."""
    return text if text == "auto" else float(text)


def gates(facts: dict[str, Any], table: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the gates; a value that was not measured misses its gate."""
    auto = table.get("auto")
    ratio = auto and auto["against_plain"]["motion_ratio"]["value"]
    return [
        gate("parity_max_abs", max(facts["parity"].values()), "<=", 1e-5),
        gate("families_passing", sum(facts["families"].values()), ">=", 20),
        gate("extra_memory_mib", facts["extra_memory_mib"], "<=", 128),
        gate("motion_ratio_auto", ratio, ">=", 0.9),
        gate("motion_ratio_auto", ratio, "<=", 1.1),
    ]


def facts_of(device: str) -> dict[str, Any]:
    """Measure everything that needs no clips: agreement with the official method, families, memory and time."""
    facts = {
        "parity": {name: parity(name)[0] for name in MODELS},
        "families": passing_families(),
        "extra_memory_mib": extra_memory_mib(device),
        "wan_14b_480p_block": layer_cost() if device == "cuda" else None,
    }
    print(facts)
    return facts


def read_off(table: dict[str, Any]) -> dict[str, Any]:
    """Return the keys of the result file that come from clips."""
    auto = table.get("auto")
    return {"by_weight": table, "flicker_delta_auto": auto and auto["against_plain"]["flicker_delta"]}


def merge(parts: list[dict[str, Any]], output: str) -> None:
    """Replace the weights of the result file by those of the parts.

    Raises:
        UserError: the parts have different settings, or two parts have the same weight.
    """
    found: dict[str, Any] = {}
    for part in parts:
        if part["settings"] != parts[0]["settings"]:
            raise UserError(
                f"cannot merge settings {part['settings']} and {parts[0]['settings']}: measure all parts with the same"
            )
        if twice := (found.keys() & part["by_weight"].keys()) - {"plain"}:
            raise UserError(f"two files have weight {', '.join(sorted(twice))}: give each weight once")
        # The differences of a part are to its own plain model; the table shows the plain model of the first part.
        found = {**part["by_weight"], **found}
    first = {"plain": -2.0, "auto": -1.0}
    table = {name: found[name] for name in sorted(found, key=lambda name: first.get(name) or float(name))}
    old = read_result(output)
    memory = next(row["value"] for row in old["gates"] if row["name"] == "extra_memory_mib")
    rows = gates({**old, "extra_memory_mib": memory}, table)
    amend_result(output, read_off(table), parts[0]["settings"], rows, stamp=parts[0])
    show(rows)


def show(rows: list[dict[str, Any]]) -> None:
    """Print the gates."""
    for row in rows:
        value = "not measured" if row["value"] is None else f"{row['value']:.3g}"
        print(f"{row['name']:20s}{value:>13s} {row['op']} {row['target']:g}  {'ok' if row['ok'] else 'MISSED'}")


def main() -> None:
    """Measure, print and write the result, or do the work of --table or --merge."""
    args = options()
    if args.table:
        print(markdown(read_result(args.output)["by_weight"]))
        return
    if args.merge:
        merge([read_result(name) for name in args.merge], args.output)
        return
    folder = args.model or embedded_model()
    how = Defaults.of(folder)
    how = dataclasses.replace(how, guidance=args.guidance or how.guidance)
    facts = {} if args.clips_only else facts_of(args.device)
    if args.device == "cuda":
        torch.set_float32_matmul_precision("high")
    settings = {
        "prompts": 2 * args.prompts,
        "guidance_scale": how.guidance,
        "steps": how.steps,
        "size": how.size,
        "frames": how.frames,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "first_seed": 0,
    }
    pipe, specs = load(folder, args.device), scenes(args.prompts, how.frames)
    rows: list[dict[str, Any]] = []
    for table in sweep(pipe, specs, how, args.weights, judging(args.workers, args.device)):
        rows = gates(facts, table) if facts else []
        if not args.quick:
            write_result(args.output, {"settings": settings, **facts, **read_off(table), "gates": rows})
    show(rows)


if __name__ == "__main__":
    main()
