"""Runs of the training method `quant` on tiny pipelines, and those that two processes do together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from postgen.quant.train_config import QuantTrainingConfig
from postgen.quant.trainer import QuantTrainer
from tests.families.tiny_pipelines import tiny_pipeline
from tests.quant.calibrated import TOKENS
from tests.reconstruct.toy import PROMPTS, pipeline

ROWS = [{"prompt": text} for text in PROMPTS]
SPEC = {"weight": "int3:g8:asym", "act": "int8:token"}


def exact(name: str) -> tuple[Any, dict[str, int]]:
    """Return a tiny pipeline and a size of its clips."""
    if name == "Wan":
        return pipeline(name)
    pipe, size = tiny_pipeline(name)
    return pipe, size if size["num_frames"] == 1 else {**size, "height": 32, "num_frames": 9}


def trained(folder: Path, name: str = "Wan", pipe: Any = None, **changes: Any) -> QuantTrainer:
    """Train the scales of a tiny model; return the trainer."""
    made, size = exact(name)
    kept: dict[str, Any] = {"max_steps": 2, "num_inference_steps": 2, "per_device_train_batch_size": 2}
    kept |= {"max_sequence_length": TOKENS}
    kept |= {"device": "cpu", "disable_tqdm": True, "report_to": [], "logging_steps": 1, "batch_size": 2, **size}
    kept |= {"learning_rate": 1e-3, "caption_dropout": 0.2, **({} if "student" in changes else SPEC)}
    args = QuantTrainingConfig(output_dir=str(folder), **{**kept, **changes})
    run = QuantTrainer(args, pipe or made, ROWS, ROWS[:3])
    run.train()
    return run


STAGES: dict[str, Any] = {"branch_rank": 3, "branch_decay_steps": 3, "branch_learning_rate": 1e-3, "max_steps": 4}
"""Settings of a run with branches whose rank falls to 0."""


def in_two(folder: Path) -> None:
    trained(folder / "two", **STAGES)


def in_two_cut(folder: Path) -> None:
    trained(folder / "cut", fully_shard=True, ema_decay=0.9)


JOBS = [in_two, in_two_cut]
