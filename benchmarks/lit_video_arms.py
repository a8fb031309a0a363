"""Layer types, arms and jobs of `python -m benchmarks.lit_video`.

Each job is one process. `teacher` generates the teacher's clips. `latents.SEED` samples the latents for the training
of students. `s1.TYPE.SEED` trains layers of one type in every block by attention transfer and scores them.
`TYPE.ARM.SEED` trains a student and measures it; `postgen.lit.plan` chooses the blocks of the student by these scores.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import job_queue
from benchmarks.lit_models import KINDS, THREE_QUARTERS, density
from benchmarks.lit_models import PLANS as TIMED
from postgen.errors import UserError, shown
from postgen.families import Grid
from postgen.lit import CostTable, LitConfig, Scores, plan
from postgen.lit.layers.anchor import Anchor
from postgen.lit.layers.base import LitLayer
from postgen.lit.layers.chunk import Chunk
from postgen.reading import read_json

TYPES = {
    "lit": "lit",
    "mhla": "mhla",
    "delta_r0": "window_delta radius 0",
    "delta_r1": "window_delta radius 1",
    "linear_r0": "window_linear radius 0",
    "chunk": "chunk",
    "anchor": "anchor",
}
"""Short name of a layer type -> its name in `lit_models.KINDS`, under which `lit_speed.json` has its times."""
SHARED = "delta_r0_shared"
"""`delta_r0` with one factor per channel after its memory instead of a matrix, to fit into a small adapter."""
DENSEST = 0.35
"""Largest share of all pairs that the shown plan may compute by softmax, including softmax blocks."""
SEEDS = (0, 1, 2)
EMBEDDED_MODEL = "embedded"
"""Name by which jobs get the embedded model as their teacher."""
MEASURED = 1024
"""Number of prompts of the measurement in the whole experiment."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """An arm of the experiment: the share of converted blocks, and the stages that train them."""

    what: str
    """Description for tables."""
    share: float
    """Share of the blocks that are converted, 0 to 1."""
    s1: bool = True
    """Whether the layers start from the weights of attention transfer (stage 1)."""
    s2: bool = True
    """Whether the student is trained end to end (stage 2)."""
    train: str = "attention"
    """Trained weights in stage 2, see `LitTrainingConfig.train`."""
    seeds: tuple[int, ...] = (0,)
    """Training seeds of the experiment."""


ARMS = {
    "half": Arm(what="half of the blocks, S1 and S2", share=0.5, seeds=SEEDS),
    "quarter": Arm(what="a quarter, S1 and S2", share=0.25, seeds=SEEDS),
    "three_quarters": Arm(what="three quarters, S1 and S2", share=0.75, seeds=SEEDS),
    "half-s1": Arm(what="half, S1 alone", share=0.5, s2=False, seeds=SEEDS),
    "half-s2": Arm(what="half, S2 alone", share=0.5, s1=False, seeds=SEEDS),
    "half-none": Arm(what="half, not trained", share=0.5, s1=False, s2=False),
    "half-new": Arm(what="half, S2 trains the new layers alone", share=0.5, train="new"),
    "all": Arm(what="all blocks, the first one too, S1 and S2", share=1.0),
}
"""All arms. Only `all` converts block 0."""
ALL_LINEAR = ("lit", "mhla")
"""Layer types for which the arm `all` is measured, a model whose attention is all linear."""
GROUPS = ("teacher", "types", "winner", "embedded")


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One process of the experiment."""

    name: str
    out: Path
    words: tuple[str, ...] = ()
    """Command-line options of its process."""

    @property
    def parts(self) -> tuple[str, str, int]:
        """Layer type, arm and seed of a student; the arm is empty for an attention transfer."""
        kind, arm, seed = self.name.split(".")
        return (arm, "", int(seed)) if kind == "s1" else (kind, arm, int(seed))

    @property
    def log(self) -> Path:
        """File of its printed output."""
        return self.out / "jobs" / f"{self.name}.log"

    @property
    def result(self) -> Path:
        """Result file, which exists when the job is finished."""
        return self.out / "jobs" / f"{self.name}.json"

    @property
    def lasting(self) -> Path:
        """Folder of its other output, which other jobs read."""
        return self.out / ("work" if self.name.count(".") == 2 else "drawn") / self.name

    @property
    def done(self) -> bool:
        """Whether the job is finished and its output for other jobs exists; packed results lack clips and latents."""
        return self.result.is_file() and (self.is_student or self.lasting.exists())

    @property
    def is_student(self) -> bool:
        """Whether the job trains a student."""
        return self.name.count(".") == 2 and not self.name.startswith("s1.")

    @property
    def needs(self) -> tuple[str, ...]:
        """Names of the jobs that must be finished before this one."""
        if not self.is_student:
            return ()
        kind, arm, seed = self.parts
        return ("teacher", f"s1.{kind}.{seed}", *([f"latents.{seed}"] if ARMS[arm].s2 else []))

    def queued(self) -> job_queue.Job:
        """Return the job with its command, for the queue."""
        return job_queue.Job(
            name=self.name,
            command=(sys.executable, "-m", "benchmarks.lit_video_job", self.name, *self.words),
            check=lambda: self.done,
            log=self.log,
            needs=self.needs,
            keep_log=False,
        )


def jobs_of(group: str, winner: str, out: Path, words: Sequence[str]) -> list[Job]:
    """Return the jobs of a group. Jobs that others need come first.

    Raises:
        UserError: an unknown group or layer type.
    """
    if group == "teacher":
        return [Job(name="teacher", out=out, words=tuple(words))]
    if group not in GROUPS or (group != "types" and winner not in (*TYPES, SHARED)):
        raise UserError(
            f"unknown group {group!r} or layer type {winner!r}: groups are {', '.join(GROUPS)}, layer types are"
            f" {', '.join(TYPES)}"
        )
    students = [*_students(group, winner)]
    transfers = dict.fromkeys(f"s1.{name.split('.')[0]}.{name.split('.')[2]}" for name in students)
    # Transfers take longest. Students of the first transfers start while the last transfers run.
    drawn = dict.fromkeys(f"latents.{name.split('.')[2]}" for name in students)
    return [Job(name=name, out=out, words=tuple(words)) for name in ("teacher", *drawn, *transfers, *students)]


def _students(group: str, winner: str) -> Iterator[str]:
    if group == "types":
        yield from (f"{kind}.half.0" for kind in TYPES)
        yield from (f"{kind}.all.0" for kind in ALL_LINEAR)
    elif group == "winner":
        for name, arm in ARMS.items():
            yield from (f"{winner}.{name}.{seed}" for seed in arm.seeds if name != "all")
    else:
        yield f"{winner}.half-new.0"
        # Trained projections of the base model take more space in an adapter than new layers.
        yield f"{SHARED if winner == 'delta_r0' else winner}.half.0"


def conversion(kind: str, layers: str | tuple[str, ...], grid: Grid, seed: int) -> LitConfig:
    """Return the conversion of some blocks to a type of `TYPES`.

    Args:
        kind: key of `TYPES`, or `SHARED`.
        layers: "all" for every block including block 0, or the layer type of each block.
        grid: the token grid of the clip.
        seed: seed of the new layers.
    """
    name = TYPES[kind.removesuffix("_shared")]
    config = KINDS[name].config("all:{}", grid)
    window = dataclasses.replace(config.window, output="shared" if kind == SHARED else "full")
    first = layers[0] != "softmax" if isinstance(layers, tuple) else True
    text = f"all:{KINDS[name].kind}" if layers == "all" else layers
    return dataclasses.replace(config, layers=text, window=window, seed=seed, first_block=first)


def chosen_blocks(scores: Scores, costs: CostTable, share: float) -> tuple[str, ...]:
    """Return the layer type of each block, with the given share of blocks converted and the least sum of errors.

    The cost of a plan is the number of softmax blocks, because FLOPs mean little at the size of a tiny model.
    """
    (kind, errors), *_ = scores.errors.items()
    count = len(errors)
    if share == 1:
        return (kind,) * count
    blocks = dataclasses.replace(costs, base=count, changes={kind: (-1,) * count})
    return plan(scores, blocks, budget=1 - round(share * count) / count).types


def softmax_pairs(layer: LitLayer, grid: Grid) -> float:
    """Return the share of (query, key) pairs that a layer computes by softmax."""
    if isinstance(layer, Anchor):
        return len(range(0, grid.tokens, layer.options.every)) / grid.tokens
    if isinstance(layer, Chunk):
        each, before = layer.options.frames, layer.options.overlap
        firsts = range(0, grid.frames, each)
        ends = [(first, min(first + each, grid.frames)) for first in firsts]
        return sum((stop - first) * (stop - max(0, first - before)) for first, stop in ends) / grid.frames**2
    return density(layer, grid) or 0.0


def plan_density(layers: Mapping[str, LitLayer], blocks: int, grid: Grid) -> float:
    """Return the share of pairs that softmax computes, over all blocks; softmax blocks count 1."""
    found = [softmax_pairs(layer, grid) for layer in layers.values()]
    return (sum(found) + blocks - len(found)) / blocks


def timed_plan(kind: str, share: float) -> str | None:
    """Return the name of the plan in `lit_speed.json` for a type and a share of blocks; None without such a plan."""
    where = {0.5: "every 2nd:{}", 0.75: THREE_QUARTERS}.get(share)
    return next((each.name for each in TIMED if (each.kind, each.where) == (TYPES.get(kind), where)), None)


def best_of(results: Sequence[Mapping[str, Any]]) -> str | None:
    """Return the best of the layer types that have been measured so far; None if none of them may win.

    The rule was written down before any run. Candidates are the types whose plan of three quarters computes at most
    the share `DENSEST` of pairs by softmax. The best one has the most right clips at half of the blocks; if several
    have the same number, the one with the higher PSNR.
    """
    found = []
    for row in results:
        kind, arm, seed = row["job"].split(".")
        dense = 1 - 0.75 * (1 - row["layer_density"])
        if kind in TYPES and (arm, seed) == ("half", "0") and dense <= DENSEST:
            found.append((row["right"].count("1"), row["psnr"]["value"], kind))
    return max(found)[2] if found else None


def winner_of(results: Sequence[Mapping[str, Any]], types: Iterable[str] = TYPES) -> str:
    """Return the layer type for the second group, the best one (`best_of`) of all types.

    Args:
        results: results of students.
        types: the types that must have been measured.

    Raises:
        UserError: a type has not been measured at half of the blocks, or none of them may win.
    """
    there = {row["job"] for row in results}
    if missing := [kind for kind in types if f"{kind}.half.0" not in there]:
        raise UserError(
            f"{', '.join(missing)} have not been measured at half of the blocks, so the winner is not known: run"
            " --group types first, or give --winner TYPE"
        )
    if (best := best_of(results)) is None:
        raise UserError(
            f"no measured type computes at most {DENSEST} of all pairs at three quarters: measure another type, or"
            " give --winner TYPE"
        )
    return best


def read_results(out: Path) -> list[dict[str, Any]]:
    """Return the results of the students in a folder.

    Raises:
        UserError: a file is damaged, or the results have different settings.
    """
    found = read_jobs(out)
    for row in [*found.values()][:1]:
        check_settings(out, found, row["settings"])
    return [row for name, row in found.items() if Job(name=name, out=out).is_student]


def read_jobs(out: Path) -> dict[str, dict[str, Any]]:
    """Return the results of all jobs in a folder by name.

    Raises:
        UserError: a file is damaged.
    """
    found = {}
    for file in sorted((out / "jobs").glob("*.json")):
        row = read_json(file, f"{file} cannot be read: remove it and run the job again")
        if not isinstance(row, dict) or row.get("job") != file.stem or not isinstance(row.get("settings"), dict):
            raise UserError(f"{file} is not the result of the job {file.stem}: remove it and run the job again")
        found[file.stem] = row
    return found


def check_settings(out: Path, results: Mapping[str, Mapping[str, Any]], now: Mapping[str, Any]) -> None:
    """Check that results have the same settings, so that they can be compared.

    Raises:
        UserError: a result has another setting.
    """
    now = _comparable(now)
    for name, row in results.items():
        before = _comparable(row["settings"])
        if changed := sorted(key for key in before.keys() & now.keys() if before[key] != now[key]):
            told = ", ".join(f"{key}: {shown(before[key])} and {shown(now[key])}" for key in changed)
            raise UserError(f"{out} has {name} with other settings ({told}): use a folder for each setting")


def _comparable(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings without those that may differ on another machine: the device, and the folder of a teacher."""
    found = {key: value for key, value in settings.items() if key != "device"}
    if found.get("model", EMBEDDED_MODEL) != EMBEDDED_MODEL:
        found["model"] = "another folder"
    return found


def table() -> str:
    """Return the arms as a Markdown table."""
    rows = [f"| `{name}` | {arm.what} | {', '.join(map(str, arm.seeds))} |" for name, arm in ARMS.items()]
    return "\n".join(["| Arm | | Seeds |", "|---|---|---|", *rows])
