"""Training on the graphs of the rollout: the same gradients as with forward passes of training, and fewer passes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from postgen.errors import UserError
from postgen.grpo.trainer import DanceGRPOConfig, DanceGRPOTrainer
from postgen.sampling.sampler import Sampler
from tests.families.tiny_pipelines import tiny_pipeline
from tests.grpo.toy import grpo, lines, near

MODES: dict[str, dict[str, Any]] = {
    "retain": {"reuse_graph": "retain"},
    "reweight": {"reuse_graph": "reweight", "rollout_batch_size": 1},
}


class Double(DanceGRPOTrainer):
    """A trainer of the toy in float64 that keeps the gradients of its updates."""

    def build(self) -> Any:
        models = super().build()
        models["transformer"].double()
        sampler = self.sampler
        sampler.noise = lambda seeds: Sampler.noise(sampler, seeds).double()  # type: ignore[method-assign]
        self.gradients: list[dict[str, Tensor]] = []
        return models

    def build_optimizer(self, groups: Any) -> Any:
        optimizer = super().build_optimizer(groups)
        optimizer.register_step_pre_hook(
            lambda *_: self.gradients.append({name: p.grad.clone() for name, p in self.trained().items()})
        )
        return optimizer


def gradients(folder: Path, **changes: Any) -> tuple[list[dict[str, Tensor]], list[dict[str, Any]]]:
    run = grpo(folder, kind=Double, max_grad_norm=0.0, learning_rate=1e-3, **changes)
    run.train()
    return run.gradients, lines(run)


@pytest.mark.parametrize("ratio_norm", [False, True])
@pytest.mark.parametrize("kind", ["dance", "flow", "exact", "flow_wan"])
def test_reused_graphs_give_the_gradient_of_the_clipped_loss(tmp_path: Path, kind: str, ratio_norm: bool) -> None:
    changes = {"sde_type": kind, "ratio_norm": ratio_norm, "step_weighting": "inv_grad", "log_prob_reduction": "sqrt"}
    expected, rows = gradients(tmp_path / "off", **changes)
    assert len(expected) == 2
    assert all(
        value.abs().max() > 1e-6 for value in expected[1].values()
    )  # the first update starts from a layer of zeros
    retained, kept = gradients(tmp_path / "retain", **changes, reuse_graph="retain")
    scored, told = gradients(tmp_path / "reweight", **changes, **MODES["reweight"])
    for step, gradient in enumerate(expected):
        for name, value in gradient.items():
            assert torch.equal(retained[step][name], value)
            assert (scored[step][name] - value).abs().max() <= 1e-12 * value.abs().max()
    for name in ("policy_loss", "ratio/mean", "clip_ratio/region_mean", "reward", "grad_norm", "approx_kl"):
        assert [row[name] for row in kept] == pytest.approx([row[name] for row in rows], abs=1e-6), name
        assert [row[name] for row in told] == pytest.approx([row[name] for row in rows], abs=1e-6), name
    assert kept[0]["logp_diff/max"] == 0


@pytest.mark.parametrize("mode", MODES)
def test_reused_graphs_of_few_steps_in_several_micro_batches(tmp_path: Path, mode: str) -> None:
    """Each sample trains other steps of its own window, and the batches of rollout and training differ."""
    changes = {
        "timestep_fraction": 0.5, "sde_window_size": 4, "sde_window_per": "sample", "sde_type": "flow",
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "guidance_scale": 2.0,
        "share_initial_noise": True,
    }  # fmt: skip
    expected, rows = gradients(tmp_path / "off", **changes)
    batch = {"rollout_batch_size": 3} if mode == "retain" else {}
    found, told = gradients(tmp_path / mode, **changes, **MODES[mode], **batch)
    for step, gradient in enumerate(expected):
        for name, value in gradient.items():
            assert (found[step][name] - value).abs().max() <= 1e-12 * value.abs().max()
    assert [row["reward"] for row in told] == pytest.approx([row["reward"] for row in rows], abs=1e-12)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_reused_graphs_save_the_forward_passes_of_training(tmp_path: Path, mode: str, checkpointing: bool) -> None:
    changes = {"sde_window_size": 3, "sde_window_range": [2, 5], "timestep_fraction": 0.7, "guidance_scale": 2.0}
    off = grpo(tmp_path / "off", **changes)
    off.train()
    guess = grpo(tmp_path / "guess", dry_run=True, **changes, **MODES[mode]).train()
    run = grpo(tmp_path / "run", **changes, **MODES[mode])
    run.train()
    assert guess.metrics["forward_equivalents/run"] == pytest.approx(run.meter.forward_equivalents)
    # 2 trained steps of 16 samples in 2 updates, with guidance.
    assert off.meter.forward_equivalents - run.meter.forward_equivalents == 2 * 16 * 2 * 2
    row = lines(run)[0]
    assert (row["nfe/train"], row["nfe/rollout"]) == (2 * 2, 2 * (8 - 2))
    weights = guess.metrics["trained_parameters"] * 4
    assert guess.metrics["bytes/training"] == weights * (3 + (16 if mode == "reweight" else 0))


def test_reused_graphs_are_freed(tmp_path: Path) -> None:
    run = grpo(tmp_path, reuse_graph="retain", max_steps=1)
    run.train()
    assert not run.graphs._kept
    assert not run.graphs._place
    scores = grpo(tmp_path / "scores", max_steps=1, **MODES["reweight"])
    scores.train()
    assert not scores.graphs._gradients


@pytest.mark.parametrize("mode", MODES)
def test_reused_graphs_resume_bit_by_bit(tmp_path: Path, mode: str) -> None:
    changes = {**MODES[mode], "gradient_accumulation_steps": 2, "per_device_train_batch_size": 8}
    straight = grpo(tmp_path / "straight", max_steps=4, **changes)
    straight.train()
    grpo(tmp_path / "resumed", max_steps=2, save_steps=2, **changes).train()
    resumed = grpo(tmp_path / "resumed", max_steps=4, resume_from_checkpoint="latest", **changes)
    resumed.train()
    assert all(torch.equal(value, resumed.trained()[name]) for name, value in straight.trained().items())


# With other batches in the rollout than in training, bfloat16 rounds otherwise, so only `retain` is compared there.
@pytest.mark.parametrize(
    ("mode", "changes"),
    [
        *(("retain", changes) for changes in ({"beta": 0.1}, {"gradient_checkpointing": True}, {"bf16": True})),
        ("reweight", {"gradient_checkpointing": True}),
    ],
)
def test_reused_graphs_of_a_lora_with_its_reference(tmp_path: Path, mode: str, changes: dict[str, Any]) -> None:
    """The reference policy turns the adapters off while the graphs of the rollout are kept."""

    def trained(folder: str, **more: Any) -> dict[str, Tensor]:
        pipe, size = tiny_pipeline("Stable Diffusion 3")
        torch.manual_seed(0)
        args = DanceGRPOConfig(
            output_dir=str(tmp_path / folder), num_generations=2, per_device_train_batch_size=2, num_inference_steps=3,
            learning_rate=1e-2, lora_r=2, max_steps=2, logging_steps=1, device="cpu", disable_tqdm=True, report_to=[],
            save_steps=0, sde_type="exact", sde_window_size=1, eval_grid=0, **changes, **more, **size,
        )  # fmt: skip
        run = DanceGRPOTrainer(pipe, near, args, [{"prompt": "a ball"}, {"prompt": "a cube"}], peft_config=None)
        run.train()
        return {name: value.detach() for name, value in run.trained().items()}

    expected, found = trained("off"), trained(mode, **MODES[mode])
    moved = max(float(value.abs().max()) for name, value in expected.items() if "lora_B" in name)
    assert moved > 1e-3
    exact = {"rtol": 0.0, "atol": 0.0} if mode == "retain" else {"rtol": 1e-2, "atol": 1e-3}
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, **exact)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"num_iterations": 2},
            "reuse_graph retain is for one update per rollout, this run has 2: later updates need",
        ),
        ({"steps_per_generation": 3}, "reuse_graph retain is for one update per rollout, this run has 3"),
        ({"best_of_n": 4}, "best_of_n is 4, it must be left out with reuse_graph retain, which would pay for"),
        ({"old_log_prob": "self"}, "old_log_prob is 'self', it must be rollout with reuse_graph retain"),
        ({"beta": 0.1}, "reuse_graph with beta or a guard needs new LoRA adapters: another reference policy"),
        ({"norm_guard": 1.0}, "reuse_graph with beta or a guard needs new LoRA adapters.* Set them to 0"),
        ({"reuse_graph": "reweight"}, "rollout_batch_size is None, it must be 1 with reuse_graph reweight"),
        (
            {**MODES["reweight"], "beta": 0.1},
            "beta is 0.1, it must be 0 with reuse_graph reweight: advantages do not multiply it",
        ),
        ({"reuse_graph": "on"}, "reuse_graph"),
    ],
)
def test_reused_graphs_are_refused_where_they_do_not_fit(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        grpo(tmp_path, **{"reuse_graph": "retain", **changes}).train()


def test_reused_graphs_are_refused_for_sharded_models(tmp_path: Path) -> None:
    run = grpo(tmp_path, reuse_graph="retain")
    run.sharded = True
    with pytest.raises(UserError, match="reuse_graph retain is not for sharded models: set reuse_graph off"):
        run.build()
