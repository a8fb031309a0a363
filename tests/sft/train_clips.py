"""Small real clips and pictures with captions, and runs of method sft on them with tiny models."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image

from postgen.sft.config import SftConfig
from postgen.sft.trainer import SftTrainer
from postgen.training import checkpoint
from postgen.video import write_video

COLOURS = {"red": (1.0, 0.1, 0.1), "green": (0.1, 0.9, 0.2), "blue": (0.1, 0.2, 1.0), "grey": (0.5, 0.5, 0.5)}
RUN: dict[str, Any] = {
    **{"height": 16, "width": 32, "num_frames": 5, "aspects": [], "max_sequence_length": 16, "max_steps": 2},
    **{"per_device_train_batch_size": 2, "lora_r": 2, "lora_alpha": 4, "learning_rate": 1e-2, "device": "cpu"},
    **{"save_steps": 0, "logging_steps": 1, "report_to": [], "disable_tqdm": True, "eval_num_inference_steps": 2},
}


def write_clips(folder: Path, *, videos: int = 4, pictures: int = 2, size: tuple[int, int] = (16, 32)) -> Path:
    """Write videos of 5 frames and pictures with captions, each of a colour, and return the folder."""
    folder.mkdir(parents=True)
    names = list(COLOURS)
    for number in range(videos + pictures):
        name = names[number % len(names)]
        frames = torch.tensor(COLOURS[name]).view(1, 3, 1, 1).expand(5, 3, *size) * torch.linspace(0.5, 1, 5).view(
            5, 1, 1, 1
        )
        frames = frames * torch.linspace(1 - 0.1 * number, 1, size[1])
        if number < videos:
            write_video(folder / f"{number}.mp4", frames, fps=8)
        else:
            pixels = (frames[0].permute(1, 2, 0) * 255).round().byte().numpy()
            Image.fromarray(pixels).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"a {name} wall")
    return folder


def settings(folder: Path, clips: Path, **changes: Any) -> SftConfig:
    """Return the configuration of a run in `folder`."""
    return SftConfig(output_dir=str(folder), **{**RUN, "train_dataset": str(clips), **changes})


def trained(model: Any, folder: Path, clips: Path, **changes: Any) -> SftTrainer:
    """Return the trainer of a finished run."""
    run = SftTrainer(settings(folder, clips, **changes), model)
    run.train()
    return run


def lines_of(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of the log in a run's folder, without times."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in ("step_time", "seconds")} for row in rows]


def two_experts(folder: Path) -> Any:
    """Return a Wan pipeline with two experts, whose noise levels meet at 0.9."""
    from diffusers import DiffusionPipeline, WanTransformer3DModel

    pipe: Any = DiffusionPipeline.from_pretrained(folder, boundary_ratio=0.9)
    torch.manual_seed(1)
    pipe.register_modules(transformer_2=WanTransformer3DModel.from_config(pipe.transformer.config).eval())
    return pipe


@dataclass(kw_only=True)
class KilledConfig(SftConfig):
    may_change: ClassVar[tuple[str, ...]] = ("kill_at", "kill_step")

    kill_at: str = ""
    """Point of the kill: step or checkpoint."""

    kill_step: int = 0
    """Number of updates before the kill."""


class KilledSft(SftTrainer):
    """A run that kills itself with signal 9 at a named point."""

    config_class = KilledConfig

    def _maybe(self, point: str) -> None:
        if (self.args.kill_at, self.args.kill_step) == (point, self.global_step):
            os.kill(os.getpid(), signal.SIGKILL)

    def backward(self, loss: torch.Tensor) -> None:
        super().backward(loss)
        self._maybe("step")

    def _save(self) -> None:
        write = checkpoint._save_tensors

        def dying(path: Path, tensors: Any) -> None:
            write(path, tensors)
            if path.name == "optimizer.safetensors":
                self._maybe("checkpoint")

        checkpoint._save_tensors = dying
        super()._save()
        checkpoint._save_tensors = write
