"""Complete trainers of the toy model, with pipeline, denoiser and rewards."""

from __future__ import annotations

import json
from typing import Any

from torch import Tensor

from postgen.grpo.nft import DiffusionNFTConfig, DiffusionNFTTrainer
from postgen.grpo.trainer import DanceGRPOConfig, DanceGRPOTrainer
from tests.sampling.toy import ClipPipeline, PointPipeline


def near(completions: list[Tensor], **columns: Any) -> list[float]:
    """Return the reward of each clip, minus its mean squared distance to 1."""
    return [-(clip - 1).square().mean().item() for clip in completions]


ROWS = [{"prompt": "a" * length, "number": length} for length in range(1, 9)]
SETTINGS: dict[str, Any] = {
    "height": 2,
    "width": 2,
    "num_frames": 1,
    "num_generations": 8,
    "per_device_train_batch_size": 16,
    "gradient_accumulation_steps": 1,
    "num_inference_steps": 8,
    "learning_rate": 1e-2,
    "use_peft": False,
    "share_initial_noise": False,
    "timestep_fraction": 1.0,
    "epsilon": 1e-2,
    "max_steps": 2,
    "eval_grid": 0,
    "logging_steps": 1,
    "save_steps": 0,
    "device": "cpu",
    "disable_tqdm": True,
    "report_to": [],
}


def settings(folder: Any, config: Any = DanceGRPOConfig, **changes: Any) -> Any:
    """Return the configuration of a toy run; keys of `SETTINGS` that the method does not have are left out."""
    known = {name: value for name, value in SETTINGS.items() if name in config.__dataclass_fields__}
    return config(output_dir=str(folder), **{**known, **changes})


def grpo(folder: Any, *, kind: type = DanceGRPOTrainer, reward: Any = near, rows: Any = ROWS, **changes: Any) -> Any:
    """Return a trainer of the toy model: of clips with `num_frames` 4, else of single points."""
    config = DiffusionNFTConfig if issubclass(kind, DiffusionNFTTrainer) else DanceGRPOConfig
    prediction_type = changes.pop("prediction_type", "flow")
    extra = {name: changes.pop(name) for name in ("eval_dataset", "eval_reward_funcs", "callbacks") if name in changes}
    pipe = ClipPipeline if changes.get("num_frames") == 4 else PointPipeline
    return kind(pipe(prediction_type), reward, settings(folder, config, **changes), rows, **extra)


def lines(trainer: Any) -> list[dict[str, Any]]:
    """Return the rows of the run's log."""
    return lines_of(trainer.args.folder)


def lines_of(folder: Any) -> list[dict[str, Any]]:
    """Return the rows of the log in a run's folder."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
