"""Layer types, arms and jobs of `python -m benchmarks.lit_video`.

A job is one process. `teacher` makes the teacher's clips, `latents.SEED` draws what students are trained on,
`s1.TYPE.SEED` trains layers of one type in every block by attention transfer and scores them, `TYPE.ARM.SEED` trains a
student and measures it. Which blocks a student converts is `postgen.lit.plan`'s choice by those scores.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import job_queue
from benchmarks.lit_models import KINDS, THREE_QUARTERS, density
from benchmarks.lit_models import PLANS as TIMED
from postgen.errors import UserError
from postgen.families import Grid
from postgen.lit import CostTable, LiTConfig, Scores, plan
from postgen.lit.layers.anchor import Anchor
from postgen.lit.layers.base import LitLayer
from postgen.lit.layers.chunk import Chunk

TYPES = {
    "lit": "lit",
    "mhla": "mhla",
    "delta_r0": "window_delta radius 0",
    "delta_r1": "window_delta radius 1",
    "linear_r0": "window_linear radius 0",
    "chunk": "chunk",
    "anchor": "anchor",
}
"""Short name of a layer type -> its name among the `KINDS` that `lit_speed.json` has times of."""
SHARED = "delta_r0_shared"
"""`delta_r0` with one factor a channel behind its memory instead of a matrix: what fits into a small adapter."""
DENSEST = 0.35
"""The shown plan may compute at most so many of all pairs by softmax, those of softmax blocks included."""
SEEDS = (0, 1, 2)


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """How many blocks are converted, and which stages train them."""

    what: str
    """For tables."""
    share: float
    """Of the blocks."""
    s1: bool = True
    """Whether layers begin with what attention transfer trained."""
    s2: bool = True
    """Whether they are trained end to end."""
    train: str = "attention"
    """What stage 2 trains, as `LitTrainingConfig.train`."""
    seeds: tuple[int, ...] = (0,)
    """That the experiment has."""


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
"""All of them but `all` leave block 0 as it is."""
ALL_LINEAR = ("lit", "mhla")
"""Types of which models are all linear."""
GROUPS = ("teacher", "types", "winner", "embedded")


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One process of the experiment."""

    name: str
    out: Path
    words: tuple[str, ...] = ()
    """That its process gets."""

    @property
    def parts(self) -> tuple[str, str, int]:
        """Layer type, arm and seed of a student; arm is empty for a transfer."""
        kind, arm, seed = self.name.split(".")
        return (arm, "", int(seed)) if kind == "s1" else (kind, arm, int(seed))

    @property
    def log(self) -> Path:
        """What it prints."""
        return self.out / "jobs" / f"{self.name}.log"

    @property
    def result(self) -> Path:
        """What it found; there when it is done."""
        return self.out / "jobs" / f"{self.name}.json"

    @property
    def lasting(self) -> Path:
        """What other jobs read of it, besides the result."""
        return self.out / ("work" if self.name.count(".") == 2 else "drawn") / self.name

    @property
    def done(self) -> bool:
        """Whether it has run to its end, and what others read of it is there: clips and latents are not carried."""
        return self.result.is_file() and (self.is_student or self.lasting.exists())

    @property
    def is_student(self) -> bool:
        """Whether it trains a student."""
        return self.name.count(".") == 2 and not self.name.startswith("s1.")

    @property
    def needs(self) -> tuple[str, ...]:
        """Names of jobs that must be done before."""
        if not self.is_student:
            return ()
        kind, arm, seed = self.parts
        return ("teacher", f"s1.{kind}.{seed}", *([f"latents.{seed}"] if ARMS[arm].s2 else []))

    def queued(self) -> job_queue.Job:
        """Return its command."""
        return job_queue.Job(
            name=self.name,
            command=(sys.executable, "-m", "benchmarks.lit_video_job", self.name, *self.words),
            check=lambda: self.done,
            log=self.log,
            needs=self.needs,
            keep_log=False,
        )


def jobs_of(group: str, winner: str, out: Path, words: Sequence[str]) -> list[Job]:
    """Return the jobs of a group, those that others need first.

    Raises:
        UserError: a group or layer type that there is not.
    """
    if group == "teacher":
        return [Job(name="teacher", out=out, words=tuple(words))]
    if group not in GROUPS or (group != "types" and winner not in (*TYPES, SHARED)):
        raise UserError(f"no group {group} of {winner}: groups are {', '.join(GROUPS)}, types {', '.join(TYPES)}")
    students = [*_students(group, winner)]
    transfers = dict.fromkeys(f"s1.{name.split('.')[0]}.{name.split('.')[2]}" for name in students)
    # A transfer takes longest; students of the first ones begin while the last ones run.
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
        # What stage 2 changes of the base's projections takes more of an adapter than new layers do.
        yield f"{SHARED if winner == 'delta_r0' else winner}.half.0"


def conversion(kind: str, layers: str | tuple[str, ...], grid: Grid, seed: int) -> LiTConfig:
    """Return the conversion of some blocks to a type of `TYPES`, block 0 included where `layers` says so."""
    name = TYPES[kind.removesuffix("_shared")]
    config = KINDS[name].config("all:{}", grid)
    window = dataclasses.replace(config.window, output="shared" if kind == SHARED else "full")
    first = layers[0] != "softmax" if isinstance(layers, tuple) else True
    text = f"all:{KINDS[name].kind}" if layers == "all" else layers
    return dataclasses.replace(config, layers=text, window=window, seed=seed, first_block=first)


def chosen_blocks(scores: Scores, costs: CostTable, share: float) -> tuple[str, ...]:
    """Return the types of a model's blocks of which a share is converted, those with the least sum of errors.

    Costs count blocks here: at the size of a tiny model FLOPs say little.
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
    """Return the share of pairs of all blocks that softmax computes; blocks that stay softmax count 1."""
    found = [softmax_pairs(layer, grid) for layer in layers.values()]
    return (sum(found) + blocks - len(found)) / blocks


def timed_plan(kind: str, share: float) -> str | None:
    """Return the name that `lit_speed.json` has for a type in a share of the blocks; None where it times none such."""
    where = {0.5: "every 2nd:{}", 0.75: THREE_QUARTERS}.get(share)
    return next((each.name for each in TIMED if (each.kind, each.where) == (TYPES.get(kind), where)), None)


def winner_of(results: Sequence[Mapping[str, Any]]) -> str:
    """Return the layer type that the second group goes on with: the rule was written down before any run.

    Of the types whose plan of three quarters keeps to `DENSEST`, the one with most clips right at half of the blocks;
    among equals the one with the higher PSNR.

    Raises:
        UserError: no type was measured at half of the blocks.
    """
    found = []
    for row in results:
        kind, arm, seed = row["job"].split(".")
        dense = 1 - 0.75 * (1 - row["layer_density"])
        if kind in TYPES and (arm, seed) == ("half", "0") and dense <= DENSEST:
            found.append((row["right"].count("1"), row["psnr"]["value"], kind))
    if not found:
        raise UserError("no layer type was measured at half of the blocks: run --group types first")
    return max(found)[2]


def read_results(out: Path) -> list[dict[str, Any]]:
    """Return what the students of a folder have found."""
    files = sorted((out / "jobs").glob("*.json"))
    return [json.loads(file.read_text(encoding="utf-8")) for file in files if file.stem.count(".") == 2
            and not file.stem.startswith("s1.")]  # fmt: skip


def table() -> str:
    """Return the arms as a table of the documentation."""
    rows = [f"| `{name}` | {arm.what} | {', '.join(map(str, arm.seeds))} |" for name, arm in ARMS.items()]
    return "\n".join(["| Arm | | Seeds |", "|---|---|---|", *rows])
