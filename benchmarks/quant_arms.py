"""Formats, recipes, arms and jobs of `python -m benchmarks.quant`.

An arm is a recipe in a format with a seed, RECIPE-FORMAT.SEED. The embedded model has 256 channels, and 544 in its
feed-forward networks, so groups have 32 numbers. All arms of a format quantise the same layers and inputs. So they
differ in the numbers of the weights alone, and in exact rescaling (OmniQuant, SOS).
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import job_queue
from postgen.errors import UserError

FORMATS: dict[str, dict[str, Any]] = {
    "w8a8": {"weight": "int8", "act": "int8:token"},
    "f8a8": {"weight": "fp8", "act": "fp8:token"},
    "w4a16": {"weight": "int4:g32:asym"},
    "w4a8": {"weight": "int4:g32:asym", "act": "fp8:token"},
    "w4a8i": {"weight": "int4:g32:asym", "act": "int8:token"},
    "w4a4": {"weight": "int4", "act": "int4:token"},
    "w3": {"weight": "int3:g32:asym"},
    "w2": {"weight": "int2:g32:asym"},
    "bp4": {"weight": "bp4:g32"},
    "bp3": {"weight": "bp3:g32"},
    "bp2": {"weight": "bp2:g32"},
    "w4g16": {"weight": "int4:g16:asym"},
    "w3g16": {"weight": "int3:g16:asym"},
    "w2g16": {"weight": "int2:g16:asym"},
    "mxint8": {"weight": "mxint8", "act": "mxint8"},
    "mxfp8": {"weight": "mxfp8", "act": "mxfp8"},
    "mxint4": {"weight": "mxint4", "act": "mxint4"},
    "mxfp4": {"weight": "mxfp4", "act": "mxfp4"},
    "nvint4": {"weight": "nvint4", "act": "nvint4"},
    "nvfp4": {"weight": "nvfp4", "act": "nvfp4"},
    "mxint4_rotated": {"weight": "mxint4", "act": "mxint4", "rotate": 32},
    "mxfp4_rotated": {"weight": "mxfp4", "act": "mxfp4", "rotate": 32},
    "nvint4_rotated": {"weight": "nvint4", "act": "nvint4", "rotate": 16},
    "nvfp4_rotated": {"weight": "nvfp4", "act": "nvfp4", "rotate": 16},
}
"""Short name of a format -> the arguments of its `QuantSpec`."""
WEIGHTS = ("w4a16", "w3", "w2")
INTEGERS = ("w8a8", "w4a16", "w4a8", "w4a4", "w3", "w2")
PLANES = ("bp4", "bp3", "bp2")
CONTROLS = {"bp4": "w4g16", "bp3": "w3g16", "bp2": "w2g16"}
"""Bit planes -> integers with at least as many bits per weight, in which `gptq` is their control."""
BLOCKS = tuple(name for name in FORMATS if name[:2] in ("mx", "nv"))
RECIPES: dict[str, tuple[str, ...]] = {
    "rtn": tuple(FORMATS),
    "ls": INTEGERS,
    "gptq": (*INTEGERS, *CONTROLS.values()),
    "bpdq": PLANES,
    "fdda": ("w4a4", "w2"),
    "omniquant": INTEGERS,
    "omniquant+fdda": ("w4a4", "w2"),
    "sos": ("w8a8", "w4a8i", "w4a4"),
    "block_ap": ("w4a16", "w4a4", "w3", "w2"),
    "e2e_qp": ("w4a8", "w4a4", "w3", "w2"),
}
"""Recipe -> the formats in which it is measured. SOS needs inputs in integers."""
BEGINS = {"w4a8": "omniquant", "w4a4": "omniquant", "w3": "block_ap", "w2": "block_ap"}
"""Format -> the recipe whose weights `e2e_qp` begins with; it trains their scales."""
GROUPS: dict[str, tuple[str, ...]] = {
    "plain": ("rtn", "ls", "gptq", "bpdq", "fdda"),
    "trained": ("omniquant", "omniquant+fdda", "block_ap", "sos"),
    "e2e": ("e2e_qp",),
}
"""Name of a group -> its recipes."""
TRAINED = (*GROUPS["trained"], *GROUPS["e2e"])
"""Recipes that train; they run with three seeds."""
SEEDS = (0, 1, 2)
MODEL_FILES = ("made.json", "transformer/config.json", "transformer/diffusion_pytorch_model.safetensors")
"""Files of the folder of a quantised model."""
CHECKS = ("checks", "advice")
"""Jobs of the group `plain` that are no arms: exact properties, and the advisor on the model's activations."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """A quantised model of the experiment."""

    recipe: str
    format: str
    seed: int = 0

    @property
    def name(self) -> str:
        """RECIPE-FORMAT.SEED."""
        return f"{self.recipe}-{self.format}.{self.seed}"

    @classmethod
    def named(cls, name: str) -> Arm:
        """Return the arm with a name.

        Raises:
            UserError: there is no such arm.
        """
        title, _, seed = name.rpartition(".")
        recipe, _, format = title.partition("-")
        if format not in RECIPES.get(recipe, ()) or not seed.isdecimal():
            raise UserError(f"{name!r} is no arm: give RECIPE-FORMAT.SEED, such as gptq-w3.0; --table lists them")
        return cls(recipe=recipe, format=format, seed=int(seed))

    @property
    def begins(self) -> Arm | None:
        """The arm whose weights this one trains on, or None."""
        return dataclasses.replace(self, recipe=BEGINS[self.format]) if self.recipe == "e2e_qp" else None


def arms_of(group: str, seeds: Sequence[int] = SEEDS) -> list[Arm]:
    """Return the arms of a group, seed by seed; recipes that do not train have the first seed alone."""
    return [
        Arm(recipe=recipe, format=format, seed=seed)
        for place, seed in enumerate(seeds)
        for recipe in GROUPS[group]
        if recipe in TRAINED or not place
        for format in RECIPES[recipe]
    ]


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """The output folder of the experiment and the files of each arm in it."""

    out: Path
    words: tuple[str, ...] = ()
    """Command-line options that all jobs share."""

    def model(self, arm: Arm) -> Path:
        """Folder with the quantised transformer; files that came back from another machine may be incomplete."""
        return self.out / "models" / arm.name

    def has_model(self, arm: Arm) -> bool:
        """Whether the quantised transformer of an arm is complete."""
        return all((self.model(arm) / name).is_file() for name in MODEL_FILES)

    def work(self, arm: Arm) -> Path:
        """Folder of a training that is not finished."""
        return self.out / "work" / arm.name

    def row(self, name: str) -> Path:
        """File with the numbers of an arm, of the exact model (`exact`), or of a job of `CHECKS`."""
        return self.out / "rows" / f"{name}.json"

    def sheet(self, arm: Arm) -> Path:
        """Picture of the first clips, each below the exact clip."""
        return self.out / "sheets" / f"{arm.name}.webp"

    def latents(self, seed: int) -> Path:
        """Folder with the latents on which all scales of a seed are trained."""
        return self.out / "drawn" / f"latents.{seed}"

    @property
    def exact(self) -> Path:
        """Folder with the clips and the calls of the exact model."""
        return self.out / "exact"

    @property
    def prompts(self) -> Path:
        """File of the prompts for the training of scales."""
        return self.out / "prompts.jsonl"

    def jobs(self, arms: Sequence[Arm]) -> dict[str, job_queue.Job]:
        """Return the jobs of arms by name; a job that others need comes before them."""
        complete = (self.exact / "complete").is_file
        found = {"exact": self._job("exact", lambda: complete() and self.row("exact").is_file())}
        found |= {name: self._job(name, self.row(name).is_file) for name in CHECKS}
        for arm in arms:
            begins, needs = arm.begins, tuple[str, ...]()
            if begins is not None:
                self._make(found, begins, ())
                needs = f"make {begins.name}", f"latents {arm.seed}"
                found.setdefault(needs[1], self._job(needs[1], self.latents(arm.seed).is_dir))
            self._make(found, arm, needs)
            name = f"measure {arm.name}"
            found[name] = self._job(name, self.row(arm.name).is_file, ("exact", f"make {arm.name}"))
        return found

    def _make(self, found: dict[str, job_queue.Job], arm: Arm, needs: tuple[str, ...]) -> None:
        found[f"make {arm.name}"] = self._job(f"make {arm.name}", lambda: self.has_model(arm), needs)

    def _job(self, name: str, check: Callable[[], bool], needs: tuple[str, ...] = ()) -> job_queue.Job:
        command = (sys.executable, "-m", "benchmarks.quant_job", *name.split(" "), "--out", str(self.out), *self.words)
        log = self.out / "logs" / f"{name.replace(' ', '.')}.log"
        return job_queue.Job(name=name, command=command, log=log, check=check, needs=needs)


def goals_of(group: str, seeds: Sequence[int] = SEEDS, only: Sequence[str] = ()) -> tuple[list[Arm], list[str]]:
    """Return the arms of a group and the names of the jobs that must be done.

    Args:
        group: key of `GROUPS`.
        seeds: seeds of recipes that train.
        only: names RECIPE or RECIPE-FORMAT of the arms; empty: all.

    Raises:
        UserError: no arm of the group has such a name.
    """
    arms = arms_of(group, seeds)
    if only:
        known = {name for arm in arms for name in (arm.recipe, f"{arm.recipe}-{arm.format}")}
        if unknown := [name for name in only if name not in known]:
            raise UserError(f"--only {unknown[0]} is no arm of the group {group}: {', '.join(sorted(known))}")
        arms = [arm for arm in arms if {arm.recipe, f"{arm.recipe}-{arm.format}"} & {*only}]
    extra = [*CHECKS] if group == "plain" and not only else []
    return arms, [*extra, *(f"measure {arm.name}" for arm in arms)]


def table() -> str:
    """Return the table of recipes, formats and numbers of arms."""
    lines = []
    for group, recipes in GROUPS.items():
        lines.append(f"{group}: {len(arms_of(group))} arms")
        lines += [f"  {recipe:16}{', '.join(RECIPES[recipe])}" for recipe in recipes]
    return "\n".join(lines)
