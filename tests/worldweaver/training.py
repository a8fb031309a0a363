"""Tiny runs of method `worldweaver`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from postgen.worldweaver.train_config import WorldWeaverConfig
from postgen.worldweaver.trainer import WorldWeaverTrainer
from tests.families.test_frame_levels import MAKERS

CLIPS = {"num_frames": 29, "height": 16, "width": 16, "pool_clips": 3}
"""Settings of clips with eight latent frames."""
WINDOW = {"history_sizes": [2, 1], "causal_block_size": 1, "groups": 3, "num_inference_steps": 6}
RUN = {"device": "cpu", "report_to": [], "disable_tqdm": True, "logging_steps": 1, "lora_r": 2, "max_steps": 2}
RUN |= {"per_device_train_batch_size": 2, "learning_rate": 1e-2, "save_steps": 0}


def settings(folder: Path | str = "x", **changes: Any) -> WorldWeaverConfig:
    return WorldWeaverConfig(output_dir=str(folder), **{**CLIPS, **WINDOW, **RUN, **changes})


def trained(folder: Path, name: str = "Wan", **changes: Any) -> WorldWeaverTrainer:
    run = WorldWeaverTrainer(settings(folder, **changes), MAKERS[name]())
    run.train()
    return run


def log_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
