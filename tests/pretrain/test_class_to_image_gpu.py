"""A DiT of pixels on a GPU: recorded graphs compute what plain calls do, and a student of it is trained by kernels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from postgen.lit.train_config import LitTrainingConfig
from postgen.lit.trainer import LitTrainer
from postgen.pretrain.class_to_image import ClassToImageConfig, ClassToImageTrainer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

TEACHER: dict[str, Any] = {
    **{"size": 64, "patch": 4, "pool_pictures": 64, "num_layers": 2, "max_steps": 4, "eval_pictures": 0},
    **{"per_device_train_batch_size": 16, "report_to": "none", "disable_tqdm": True, "ema_decay": 0.9, "bf16": True},
}


def trained(folder: Path, **more: Any) -> dict[str, torch.Tensor]:
    given = {**TEACHER, "output_dir": str(folder / "run"), "pool_dir": str(folder.parent / "pool"), **more}
    trainer = ClassToImageTrainer(ClassToImageConfig.from_dict(given))
    trainer.train()
    return {name: value.detach().cpu() for name, value in trainer.unwrap("transformer").state_dict().items()}


def test_graphs_are_the_same_function(tmp_path: Path) -> None:
    plain, graphed = trained(tmp_path / "plain"), trained(tmp_path / "graphed", cuda_graphs=True)
    for name, value in plain.items():
        torch.testing.assert_close(graphed[name], value, rtol=0, atol=2e-3)


@pytest.mark.parametrize("merge", [1, 4, 8])
def test_a_student_is_trained(merge: int, tmp_path: Path) -> None:
    """Heads of 32, 128 and 256 channels, with gradients of everything."""
    trained(tmp_path / "teacher")
    conversion = {
        **{"layers": "all:lit", "first_block": True, "inherit": "output"},
        "lit": {"center_keys": False, "conv_time": 0, "conv_init": "default", "merge_heads": merge},
    }
    given = {
        **{"model": str(tmp_path / "teacher" / "run" / "export"), "num_frames": 1, "height": 64, "width": 64},
        **{"train_dataset": str(tmp_path / "pool" / "prompts.jsonl"), "conversion": conversion, "train": "all"},
        **{"latents": str(tmp_path / "pool" / "latents.safetensors"), "output_dir": str(tmp_path / "student")},
        **{"num_inference_steps": 8, "max_steps": 4, "per_device_train_batch_size": 16, "bf16": True},
        **{"report_to": "none", "disable_tqdm": True, "logging_steps": 1},
    }
    trainer = LitTrainer(LitTrainingConfig.from_dict(given))
    result = trainer.train()
    assert result.global_step == 4
    assert all(bool(value.isfinite().all()) for value in trainer.unwrap("distillation").state_dict().values())
