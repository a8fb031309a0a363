"""Runs that are resumed with another number of processes."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from postgen.errors import UserError
from postgen.grpo.nft import DiffusionNFTConfig, DiffusionNFTTrainer
from postgen.grpo.trainer import DanceGRPOConfig, DanceGRPOTrainer
from tests.grpo.killed import Whole
from tests.grpo.toy import ROWS, near, settings
from tests.sampling.toy import PointPipeline

MIDDLE = 3
"""Number of updates before the resume, in the middle of the second rollout."""
COMMON = {"num_generations": 4, "max_steps": 4, "save_steps": 1, "save_total_limit": None, "ema_decay": 0.9}
COMMON |= {"beta": 0.1, "logging_steps": 4}
OWN: dict[str, dict[str, Any]] = {
    # Only some samples of each prompt are kept.
    "dance": {"per_device_train_batch_size": 4, "best_of_n": 2, "sde_window_size": 2, "sde_window_per": "sample"},
    # Groups of 4 with 6 samples per process span processes.
    "nft": {"per_device_train_batch_size": 6, "old_decay_rate": 0.1},
    "awm": {"per_device_train_batch_size": 6, "old_decay_rate": 0.1, "forward_loss": "awm"},
    "crd": {"per_device_train_batch_size": 6, "old_decay_rate": 0.1, "forward_loss": "crd", "crd_decay_first": 0.9},
    "dgpo": {"per_device_train_batch_size": 6, "old_decay_rate": 0.1, "forward_loss": "dgpo", "dgpo_clip": 1e-3},
    # Only pairs are trained on.
    "dpo": {"per_device_train_batch_size": 4, "forward_loss": "dpo", "best_of_n": 2},
}
ONE = {"gradient_accumulation_steps": 2, "steps_per_generation": 4}
TWO = {"gradient_accumulation_steps": 1, "steps_per_generation": 2}
CUT: dict[str, dict[str, Any]] = {name: {"fully_shard": name in ("nft", "crd")} for name in OWN}


class WholeDance(Whole, DanceGRPOTrainer):
    pass


class WholeNFT(Whole, DiffusionNFTTrainer):
    pass


KINDS: dict[str, tuple[Any, Any]] = dict.fromkeys(OWN, (WholeNFT, DiffusionNFTConfig))
KINDS["dance"] = (WholeDance, DanceGRPOConfig)


def configuration(folder: Path, name: str, **changes: Any) -> Any:
    """Return the configuration of a method."""
    return settings(folder, KINDS[name][1], **{**COMMON, **OWN[name], **changes})


def train(folder: Path, name: str, run: str, source: str = "", **changes: Any) -> None:
    """Train `folder / name-run`; with `source`, resume from the middle of `folder / name-source`, without rollout."""
    if source:
        changes["resume_from_checkpoint"] = str(folder / f"{name}-{source}" / f"checkpoint-{MIDDLE}")
    made = configuration(folder / f"{name}-{run}", name, **changes)
    KINDS[name][0](PointPipeline(), unasked if source else near, made, ROWS).train()


def unasked(completions: Any, **columns: Any) -> list[float]:
    """Reward of a resumed run, which must not be called: the samples of the checkpoint are scored already."""
    raise AssertionError("a rollout was drawn that was there")


def straight(folder: Path, name: str) -> None:
    train(folder, name, "two", **TWO, **CUT[name])


def on_in_two(folder: Path, name: str) -> None:
    train(folder, name, "one-to-two", "one", **TWO, **CUT[name])


def another_run(folder: Path) -> None:
    """Try a second run in the same processes, and write the error message."""
    on_in_two(folder, "dance")
    told(folder / "another-run", partial(on_in_two, folder, "dance"))


def another_batch(folder: Path) -> None:
    told(folder / "another-batch", partial(train, folder, "dance", "refused", "one", **ONE))
    torch.distributed.destroy_process_group()


def told(path: Path, run: Callable[[], None]) -> None:
    """Write the error message of a run that is refused."""
    try:
        run()
    except UserError as error:
        Path(f"{path}-{os.environ['RANK']}.txt").write_text(str(error))


JOBS = [
    *(partial(straight, name=name) for name in OWN),
    another_run,
    *(partial(on_in_two, name=name) for name in OWN if name != "dance"),
    another_batch,
]
