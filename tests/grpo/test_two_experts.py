"""Two processes (gloo) train a model with two experts, of which a process calls only those that its samples need."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from postgen.errors import UserError
from postgen.grpo.guards import check_experts
from postgen.grpo.nft import DiffusionNFTConfig, DiffusionNFTTrainer
from postgen.grpo.trainer import DanceGRPOConfig, DanceGRPOTrainer
from tests.grpo.toy import grpo, near
from tests.training.pair import run_pair

RUN: dict[str, Any] = {
    **{"height": 16, "width": 16, "num_frames": 5, "num_generations": 4, "per_device_train_batch_size": 2},
    **{"num_inference_steps": 4, "max_sequence_length": 16, "max_steps": 3, "save_steps": 1, "save_total_limit": None},
    **{"device": "cpu", "report_to": [], "disable_tqdm": True, "eval_grid": 0, "share_initial_noise": False},
    **{"use_peft": False, "learning_rate": 1e-4},
}
CLIPS = {"data_beta": 0.5, "data_source": "samples", "data_clips": 4}
METHODS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "nft": (DiffusionNFTTrainer, DiffusionNFTConfig, {"train_timesteps": 2}),
    "dance": (DanceGRPOTrainer, DanceGRPOConfig, {"sde_window_size": 1, "sde_window_per": "sample", **CLIPS}),
    "graphs": (DanceGRPOTrainer, DanceGRPOConfig, {"sde_window_size": 1, "reuse_graph": "retain", **CLIPS}),
}


def train(folder: Path, name: str, run: str, parts: int = 1) -> None:
    kind, config, own = METHODS[name]
    args = config(output_dir=str(folder / f"{name}-{run}"), gradient_accumulation_steps=parts, **{**RUN, **own})
    kind(str(folder / "model"), near, args, [{"prompt": f"a {colour} ball"} for colour in ("red", "blue")]).train()


class Counting(DiffusionNFTTrainer):
    """Counts how often DDP averages the gradients of the toy, which fit into one bucket."""

    averaged = 0

    def on_models_ready(self) -> None:
        super().on_models_ready()
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

        def counted(group, bucket):  # DDP checks annotations
            self.averaged += 1
            return allreduce_hook(group, bucket)

        model: Any = self.models["transformer"]
        model.register_comm_hook(None, counted)


def count(folder: Path) -> None:
    """Make two updates, and write how often gradients were averaged."""
    changes = {"gradient_accumulation_steps": 2, "train_timesteps": 3, "old_decay": 0.0}
    run = grpo(folder / "count", kind=Counting, max_steps=2, **changes, **CLIPS)
    run.train()
    (folder / f"averaged-{run.accelerator.process_index}").write_text(str(run.averaged))


JOBS = [*(partial(train, name=name, run="two") for name in METHODS), count]


@pytest.fixture(scope="module")
def folder(tiny_wan: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a run in two processes for each method."""
    from diffusers import DiffusionPipeline, WanTransformer3DModel

    found = tmp_path_factory.mktemp("experts")
    pipe: Any = DiffusionPipeline.from_pretrained(tiny_wan, boundary_ratio=0.5)
    torch.manual_seed(1)
    pipe.register_modules(transformer_2=WanTransformer3DModel.from_config(pipe.transformer.config).eval())
    pipe.save_pretrained(found / "model")
    run_pair("tests.grpo.test_two_experts:JOBS", found, seconds=100)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_two_processes_do_what_one_does_with_two_experts(folder: Path, name: str) -> None:
    train(folder, name, "one", parts=2)
    found, expected = (load_file(folder / f"{name}-{run}/checkpoint-3/weights.safetensors") for run in ("two", "one"))
    before = load_file(folder / f"{name}-one/checkpoint-1/weights.safetensors")
    assert max(float((found[key] - expected[key]).abs().max()) for key in expected) <= 1e-6
    for expert in ("transformer.", "transformer_2."):
        moved = [float((before[key] - expected[key]).abs().max()) for key in expected if key.startswith(expert)]
        assert max(moved) >= 1e-5, expert


@pytest.mark.slow
def test_ddp_averages_gradients_once_per_update(folder: Path) -> None:
    assert [(folder / f"averaged-{rank}").read_text() for rank in (0, 1)] == ["2", "2"]


def test_sharded_experts_need_the_same_levels_everywhere() -> None:
    check_experts(True)
    with pytest.raises(UserError, match="two experts needs the same noise levels in all processes: use method"):
        check_experts(False)
