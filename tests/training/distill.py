"""A method whose loss needs two networks, computed by a module that contains both; its runs in two processes."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from postgen.training import Trainer, TrainingConfig
from postgen.training.sharding import prepare, repeated_blocks, uncut
from tests.families.tiny_models import tiny_model
from tests.grpo.killed import Whole
from tests.grpo.toy import ROWS, near, settings
from tests.sampling.toy import PointPipeline

ROWS_IN_ALL = 4


class Distillation(nn.Module):
    """A student and its teacher; returns the squared error between their predictions for the same noisy clip."""

    def __init__(self, student: Any, teacher: Any) -> None:
        super().__init__()
        self.student, self.teacher = student, teacher.requires_grad_(False)

    def forward(self, **arguments: Tensor) -> Tensor:
        with torch.no_grad():
            target = self.teacher(**arguments, return_dict=False)[0]
        found: Tensor = self.student(**arguments, return_dict=False)[0]
        return (found - target).square().mean()


class DistillTrainer(Trainer[TrainingConfig]):
    def build(self):
        tiny = tiny_model("Wan", batch=ROWS_IN_ALL, frames=2)
        self.arguments = tiny.arguments
        return {"distillation": Distillation(tiny.transformer, tiny_model("Wan", frames=2, seed=1).transformer)}

    def build_optimizer(self, groups):
        return torch.optim.SGD(groups, lr=self.args.learning_rate, momentum=0.9)

    def batch(self):
        """Return the rows of this process. The rows of all processes together are those of a single process."""
        mine = slice(self.accelerator.process_index, None, self.accelerator.num_processes)
        return {name: value[mine] for name, value in self.arguments.items()}

    def training_step(self):
        return self.models["distillation"](**self.batch()), {}

    def evaluate(self):
        return {"loss": float(self.models["distillation"](**self.batch()))}

    def export(self, folder, weights):
        student = uncut(self.unwrap("distillation").student, weights["distillation"], "student.")
        student.save_pretrained(folder / "student")


class SpikingTrainer(DistillTrainer):
    """Its loss is wrong from the eighth step on."""

    def training_step(self):
        loss, metrics = super().training_step()
        return loss * (1e6 if self.global_step >= 7 else 1), metrics


def distill(folder: Path, kind: type[DistillTrainer] = DistillTrainer, **changes: Any) -> DistillTrainer:
    """Run the training; return the trainer."""
    values = {"max_steps": 4, "learning_rate": 0.05, "max_grad_norm": 0.0, "save_steps": 3, "save_total_limit": None}
    values |= {"device": "cpu", "disable_tqdm": True, "report_to": [], "logging_steps": 1, **changes}
    run = kind(TrainingConfig(output_dir=str(folder), **values))
    run.train()
    return run


CUT = {"ema_decay": 0.9, "eval_steps": 1}
"""Settings with EMA and an evaluation after every step, so EMA weights are swapped in between all steps."""


def averaged(folder: Path) -> None:
    distill(folder / "averaged")


def cut(folder: Path) -> None:
    from torch.distributed.fsdp import FSDPModule

    run = distill(folder / "cut", fully_shard=True, **CUT)
    pieces = [name for name, part in run.unwrap("distillation").named_modules() if isinstance(part, FSDPModule)]
    (folder / f"pieces-{run.accelerator.process_index}.json").write_text(json.dumps(pieces))


def resumed(folder: Path) -> None:
    source = str(folder / "cut" / "checkpoint-3")
    distill(folder / "resumed", fully_shard=True, resume_from_checkpoint=source, **CUT)


MERGED = {"save_steps": 1, "merge_last": 3, "merge_metric": "loss", "merge_keep": "always", "ema_decay": 0.9}


def merged(folder: Path) -> None:
    distill(folder / "merged", fully_shard=True, **MERGED)


RESCUED = {"max_steps": 8, "rescue_spike": 9.0, "rescue_patience": 1, "rescue_window": 5, "rescue_last": 2}


def rescued(folder: Path) -> None:
    distill(folder / "rescued", SpikingTrainer, fully_shard=True, **RESCUED, **CUT)


def cut_by_accelerate(folder: Path) -> None:
    """Shard two models with different block classes by accelerate's function for FSDP2, which it skips on CPUs."""
    from accelerate.utils import FullyShardedDataParallelPlugin
    from torch.distributed.fsdp import FSDPModule

    torch.distributed.init_process_group("gloo")
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="TRANSFORMER_BASED_WRAP", cpu_ram_efficient_loading=False
    )
    accelerator = SimpleNamespace(
        num_processes=2,
        is_fsdp2=True,
        state=SimpleNamespace(fsdp_plugin=plugin),
        torch_device_mesh=None,
        mixed_precision="no",
        is_main_process=True,
        prepare_model=lambda module, evaluation_mode: module,
    )
    pieces = []
    for name in ("Wan", "LTX"):
        tiny, teacher = tiny_model(name, frames=2), tiny_model(name, frames=2, seed=1).transformer
        whole = Distillation(tiny.transformer, teacher)
        net = prepare(whole, accelerator, fully=False, blocks=partial(repeated_blocks, whole, name))
        net(**tiny.arguments).backward()
        pieces += [name for name, part in net.named_modules() if isinstance(part, FSDPModule)]
    (folder / f"accelerate-{torch.distributed.get_rank()}.json").write_text(json.dumps(pieces))
    torch.distributed.destroy_process_group()


def nft(folder: Path, **changes: Any) -> None:
    """Train all weights with DiffusionNFT, with an old policy, a reference and EMA."""
    from postgen.grpo.nft import DiffusionNFTConfig, DiffusionNFTTrainer

    class WholeNFT(Whole, DiffusionNFTTrainer):
        pass

    values = {"per_device_train_batch_size": 8, "num_generations": 4, "steps_per_generation": 2, "max_steps": 4}
    values |= {"beta": 0.1, "old_decay_rate": 0.1, "eval_steps": 1, "eval_prompts": 4, "ema_decay": 0.9}
    values |= {"save_steps": 1, "save_total_limit": None, **changes}
    WholeNFT(PointPipeline(), near, settings(folder, DiffusionNFTConfig, **values), ROWS, ROWS).train()


def nft_cut(folder: Path) -> None:
    nft(folder / "nft", fully_shard=True)


def nft_resumed(folder: Path) -> None:
    nft(folder / "nft-resumed", fully_shard=True, resume_from_checkpoint=str(folder / "nft" / "checkpoint-3"))


def two_models_cut(folder: Path) -> None:
    """Train a denoiser and its text encoder with sharded weights. `folder / "vae"` must exist."""
    from postgen.pretrain.text_to_video import TextToVideoConfig, TextToVideoTrainer

    sizes = {"size": 16, "lengths": [5], "length_weights": [1.0], "pool_clips": 2, "captions_per_clip": 1}
    sizes |= {"num_layers": 1, "num_heads": 2, "head_dim": 12, "ffn_dim": 16, "text_width": 16, "text_layers": 1}
    values = {
        "whole_words": True,
        "eval_prompts": 0,
        "max_steps": 2,
        "ema_decay": 0.9,
        "fully_shard": True,
        "learning_rate": 1e-2,
    }
    values |= {"device": "cpu", "disable_tqdm": True, "report_to": []}
    config = TextToVideoConfig(output_dir=str(folder / "two"), autoencoder=str(folder), **sizes, **values)
    TextToVideoTrainer(config).train()


JOBS = [averaged, cut, resumed, merged, rescued, cut_by_accelerate, nft_cut, nft_resumed, two_models_cut]
