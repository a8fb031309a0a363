"""Arms of `python -m benchmarks.sft` and `python -m benchmarks.merging`: settings on top of `recipes/sft-tiny.yaml`.

All runs have a fixed number of steps and batches of 32 clips. `new` are clips of the new world only, `old` of the
old world only; `mixed` has as many of both (replay).
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from benchmarks import job_queue
from benchmarks.arm_runs import ArmRun, arms_named
from benchmarks.dancegrpo_arms import ROOT, complete
from postgen.files import replacing

RECIPE = ROOT / "recipes" / "sft-tiny.yaml"
STEPS = 400
"""Steps of every run: the stopping rule."""
FORK, EVERY = 200, 25
"""Step after which the merged checkpoints of a run begin, and steps between two of them."""
BASE = "base"
SEEDS = (0, 1, 2)


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """One way of fine-tuning."""

    what: str
    """Description for tables."""
    clips: str
    """`new`, `old` or `mixed`."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings on top of the recipe."""
    forks: str = ""
    """The arm at whose checkpoint of step `FORK` this arm begins; empty for the base model."""


_LORA = {"use_peft": True, "lora_r": 32, "lora_alpha": 32, "learning_rate": 5e-4}
_FULL = {"use_peft": False, "learning_rate": 1e-4}
_KEEP = {**_FULL, "ema_decay": 0.0, "save_steps": EVERY, "save_total_limit": 0}
# A linear schedule over the whole run that has the learning rate of `constant` at step FORK, and 0 at the end.
_ANNEAL = {"lr_scheduler_type": "linear", "warmup_steps": 0, "learning_rate": 1e-4 * STEPS / (STEPS - FORK)}

TUNED = {
    "lora": Arm(what="LoRA of rank 32, new clips only", clips="new", settings=_LORA),
    "lora_replay": Arm(what="LoRA of rank 32, half of the clips of the old world", clips="mixed", settings=_LORA),
    "full": Arm(what="all weights, new clips only", clips="new", settings=_FULL),
    "full_replay": Arm(what="all weights, half of the clips of the old world", clips="mixed", settings=_FULL),
    "full_old": Arm(what="control: all weights, clips of the old world only", clips="old", settings=_FULL),
}
MERGED = {
    "constant": Arm(
        what=f"all weights, constant learning rate, a checkpoint every {EVERY} steps", clips="mixed", settings=_KEEP
    ),
    "annealed": Arm(
        what=f"the same from step {FORK} on, learning rate linearly to 0",
        clips="mixed",
        settings={**_KEEP, **_ANNEAL},
        forks="constant",
    ),
}
GROUPS = {"tuned": TUNED, "merging": MERGED}
ARMS = {name: arm for group in GROUPS.values() for name, arm in group.items()}
GATED = "full_replay"
"""The arm that the gates of sft.json read, named before the runs."""

TINY = {"height": 32, "width": 32, "num_frames": 5, "per_device_train_batch_size": 2, "bf16": False, "eval_clips": 2}
_ONLY_TINY = {"steps": 3, "fork": 1, "every": 1}
OUT = "runs/sft"
"""Default output folder."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Run(ArmRun):
    """Training of an arm with one seed."""

    arms = ARMS

    @property
    def steps(self) -> int:
        """Steps of the run."""
        return _ONLY_TINY["steps"] if self.tiny else STEPS

    @property
    def fork(self) -> int:
        """Step of the first merged checkpoint."""
        return _ONLY_TINY["fork"] if self.tiny else FORK

    @property
    def checkpoints(self) -> list[Path]:
        """Checkpoints that are merged, the oldest first."""
        every = _ONLY_TINY["every"] if self.tiny else EVERY
        return [self.folder / f"checkpoint-{step}" for step in range(self.fork, self.steps + 1, every)]

    def settings(self) -> dict[str, Any]:
        """Return the settings of its training on top of the recipe."""
        arm, data = ARMS[self.arm], self.out / "data"
        fixed: dict[str, Any] = {
            **{"seed": self.seed, "output_dir": self.folder, "resume_from_checkpoint": "auto"},
            **{"train_dataset": data / f"{arm.clips}.jsonl", "eval_dataset": data / "held-out.jsonl"},
            **{"cache_dir": self.out / "cache", "max_steps": self.steps, "eval_steps": 100, "save_seconds": 30},
            **{"eval_samples": 0, "report_to": [], "disable_tqdm": True},
        }
        if not self.tiny:
            return {**arm.settings, **fixed}
        small = {**TINY, "eval_steps": 2, **({"save_steps": 1} if "save_steps" in arm.settings else {})}
        if arm.forks:
            small["learning_rate"] = 1e-4 * self.steps / (self.steps - self.fork)
        return {**arm.settings, **fixed, **small}

    def recipe(self, **more: Any) -> Path:
        """Write the recipe of the run, with further settings, and return its path.

        An empty list, such as that of the rewards of samples, has no spelling on a command line.
        """
        values: dict[str, Any] = {}
        for name, value in yaml.safe_load(RECIPE.read_text(encoding="utf-8")).items():
            values |= value if isinstance(value, dict) else {name: value}
        values |= {"eval_reward_funcs": [], **self.settings(), **more}
        path = self.out / "recipes" / f"{self.name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        # Relative paths in a recipe begin at the recipe.
        plain = {name: str(value.resolve()) if isinstance(value, Path) else value for name, value in values.items()}
        with replacing(path) as part:
            part.write_text(yaml.safe_dump(plain), encoding="utf-8")
        return path

    def prepare(self) -> None:
        """Copy the checkpoint at which the run begins, if it forks from another run and has none of its own."""
        arm = ARMS[self.arm]
        if arm.forks and not [*self.folder.glob("checkpoint-*")]:
            start = Run(arm=arm.forks, seed=self.seed, out=self.out, tiny=self.tiny)
            source = start.folder / f"checkpoint-{self.fork}"
            place = self.folder / source.name
            shutil.copytree(source, place.with_name(f"{place.name}.part"), dirs_exist_ok=True)
            place.with_name(f"{place.name}.part").rename(place)

    def job(self, more: Sequence[str]) -> job_queue.Job:
        """Return the job that trains this run; `more` are options of the command."""
        forks = ARMS[self.arm].forks
        return job_queue.Job(
            name=self.name,
            command=(sys.executable, "-m", "benchmarks.sft_job", self.name, *more),
            log=self.out / "logs" / f"{self.name}.log",
            check=self.done.is_file,
            needs=("data", *((f"{forks}.{self.seed}",) if forks else ())),
            prepare=self.prepare,
        )

    def measure_job(self, more: Sequence[str]) -> job_queue.Job:
        """Return the job that measures this run; `more` are options of the command."""
        return measure_job(self.out, self.name, more, (f"measure.{BASE}", self.name))


def measure_job(out: Path, name: str, more: Sequence[str], needs: tuple[str, ...]) -> job_queue.Job:
    """Return the job that measures a run or, as `base`, the base model."""
    place = out / "measured" / f"{name}.json"
    return job_queue.Job(
        name=f"measure.{name}",
        command=(sys.executable, "-m", "benchmarks.sft_measure", name, *more),
        log=out / "logs" / f"measure.{name}.log",
        check=lambda: complete(place),
        needs=needs,
    )


def data_job(out: Path, more: Sequence[str]) -> job_queue.Job:
    """Return the job that writes the training clips."""
    return job_queue.Job(
        name="data",
        command=(sys.executable, "-m", "benchmarks.sft_job", "data", *more),
        log=out / "logs" / "data.log",
        check=(out / "data" / "ready.json").is_file,
    )


def named_arms(words: Sequence[str]) -> list[str]:
    """Return the arms for names of arms and groups, each once.

    Raises:
        UserError: an unknown name.
    """
    return arms_named(words, ARMS, GROUPS)
