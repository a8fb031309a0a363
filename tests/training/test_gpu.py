"""The training loop on a GPU: fused AdamW, bfloat16 autocast, and steps that do not wait for the device."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from postgen.training import TrainingConfig
from postgen.training.trainer import Trainer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


class WatchedTrainer(Trainer[TrainingConfig]):
    """A trainer that draws data on the device, and raises an error if a step waits for the device."""

    def build(self):
        return {"net": torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.GELU(), torch.nn.Linear(64, 1))}

    def training_step(self):
        x = torch.randn(32, 16, generator=self.generator, device=self.device)
        loss = (self.models["net"](x) - x.sum(1, keepdim=True)).square().mean()
        return loss, {"root": loss.detach().sqrt()}

    def _step(self):
        # The first step may wait, because libraries initialise in it.
        torch.cuda.set_sync_debug_mode("error" if self.global_step else "default")
        try:
            super()._step()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def evaluate(self):
        return {"norm": float(self.unwrap("net")[0].weight.norm())}

    def export(self, folder, weights):
        (folder / "done").touch()


class ExportingTrainer(WatchedTrainer):
    """The same, but steps may wait, and the export has the weights."""

    def _step(self):
        Trainer._step(self)

    def export(self, folder, weights):
        save_file(weights["net"], folder / "net.safetensors")


@pytest.mark.parametrize("bf16", [False, True])
def test_steps_do_not_wait_and_resume(tmp_path, bf16):
    settings = {
        "output_dir": str(tmp_path),
        "device": "cuda",
        "gradient_accumulation_steps": 2,
        "learning_rate": 3e-3,
        "lr_scheduler_type": "cosine",
        "ema_decay": 0.99,
        "eval_steps": 20,
        "save_steps": 20,
        "bf16": bf16,
        "report_to": [],
        "disable_tqdm": True,
    }
    first = WatchedTrainer(TrainingConfig(max_steps=60, **settings))
    losses = [line["loss"] for line in _logged(first)]
    assert losses[-1] < 0.5 * losses[0]
    assert first.optimizer.param_groups[0]["fused"]
    assert first.log.newest["memory/peak_gb"] > 0
    again = WatchedTrainer(TrainingConfig(max_steps=80, **settings, resume_from_checkpoint="latest"))
    result = again.train()
    assert result.global_step == 80
    assert result.metrics["loss"] < losses[0]
    assert torch.get_float32_matmul_precision() == "highest"  # TF32 only while a trainer runs


def _logged(trainer):
    trainer.train()
    return [line for line in trainer.callbacks.state.log_history if "loss" in line]


def test_merged_weights_are_swapped_in_from_the_cpu(tmp_path):
    settings = {"output_dir": str(tmp_path), "device": "cuda", "report_to": [], "disable_tqdm": True, "save_steps": 5}
    settings |= {"merge_last": 2, "merge_metric": "norm", "merge_keep": "always", "rescue_spike": 50.0}
    run = ExportingTrainer(TrainingConfig(max_steps=10, **settings))
    run.train()
    files = [load_file(tmp_path / f"checkpoint-{step}" / "weights.safetensors") for step in (5, 10)]
    found = load_file(tmp_path / "export" / "net.safetensors")
    for name, value in found.items():
        torch.testing.assert_close(value, sum(file[f"net.{name}"] for file in files) / 2)
    for name, parameter in run.unwrap("net").named_parameters():
        assert torch.equal(parameter.detach().cpu(), files[1][f"net.{name}"])
    assert all(not value.is_cuda for value in run._parts.merged.values)
