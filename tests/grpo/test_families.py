"""Video and image models of many families train two updates with the same trainer."""

import pytest
import torch

from postgen.errors import UserError
from postgen.grpo.nft import DiffusionNFTConfig, DiffusionNFTTrainer
from postgen.grpo.trainer import DanceGRPOConfig, DanceGRPOTrainer
from tests.families.tiny_pipelines import NO_LORA, PIPELINES, tiny_pipeline
from tests.grpo.toy import lines, near

ROWS = [{"prompt": "a ball"}, {"prompt": "a cube"}]


@pytest.mark.parametrize("name", [name for name in PIPELINES if name not in NO_LORA])
def test_grpo_trains_two_updates_of(name, tmp_path):
    pipe, size = tiny_pipeline(name)
    flow = pipe.scheduler.config.get("prediction_type", "flow_prediction") == "flow_prediction"
    method = name in ("LTX", "Stable Diffusion 3")  # the other families train by policy gradient
    kind, config = (DiffusionNFTTrainer, DiffusionNFTConfig) if method else (DanceGRPOTrainer, DanceGRPOConfig)
    own = {} if method else {"sde_type": "exact" if flow else "ddim", "sde_window_size": 1, "epsilon": 1e-3}
    own |= {} if method else {"check_on_policy_ratio": "raise", "max_ratio_error": 1e-5}
    args = config(
        output_dir=str(tmp_path), num_generations=2, per_device_train_batch_size=2, num_inference_steps=3,
        learning_rate=1e-2, lora_r=2, max_steps=2, logging_steps=1, device="cpu", disable_tqdm=True, report_to=[],
        max_sequence_length=16 if name in ("HunyuanVideo", "FLUX", "LTX") else None, rollout_solver="dpm++",
        save_steps=0, **own, **size,
    )  # fmt: skip
    run = kind(pipe, near, args, ROWS, peft_config=None)
    run.train()
    rows = lines(run)
    assert [row["step"] for row in rows] == [1, 2]
    assert all(row["grad_norm"] > 0 for row in rows)
    moved = {key: value for key, value in run.trained().items() if "lora_B" in key and bool(value.any())}
    assert moved
    before = run.policy.denoiser.predict(*_point(run))
    with run.policy.reference():
        assert not torch.equal(before, run.policy.denoiser.predict(*_point(run)))
    assert (tmp_path / "export" / "pytorch_lora_weights.safetensors").is_file()


@pytest.mark.parametrize("name", NO_LORA)
def test_grpo_trains_all_weights_of(name, tmp_path):
    """Train mode of a loaded model draws no random numbers, so the ratio on the policy's own samples is 1."""
    pipe, size = tiny_pipeline(name)
    pipe.save_pretrained(tmp_path / "model")
    args = DanceGRPOConfig(
        output_dir=str(tmp_path / "run"), num_generations=2, per_device_train_batch_size=2, num_inference_steps=3,
        learning_rate=1e-3, use_peft=False, max_steps=1, logging_steps=1, device="cpu", disable_tqdm=True,
        report_to=[], save_steps=0, sde_type="ddim", sde_window_size=1, check_on_policy_ratio="raise",
        max_ratio_error=1e-5, guidance_scale=2.0, **size,
    )  # fmt: skip
    rows = [{"prompt": "7"}, {"prompt": "8"}]  # a saved DiT pipeline has no labels
    run = DanceGRPOTrainer(str(tmp_path / "model"), near, args, rows)
    run.train()
    assert lines(run)[0]["grad_norm"] > 0
    assert (tmp_path / "run" / "export" / "transformer" / "config.json").is_file()
    args = DanceGRPOConfig(output_dir=str(tmp_path / "lora"), num_generations=2, per_device_train_batch_size=2, **size)
    with pytest.raises(UserError, match=r"diffusers does not support LoRA for.*use_peft: false"):
        DanceGRPOTrainer(pipe, near, args, rows).train()


def _point(run):
    x = run.sampler.noise([1])
    return x, run.sampler.schedule.sigmas[1:2].float(), run.conditions(0)([0])


@pytest.mark.parametrize("name", ["SkyReels-V2", "Stable Diffusion 3"])
def test_grpo_draws_and_trains_on_the_published_noise_levels_with(name, tmp_path):
    pipe, size = tiny_pipeline(name)
    config = pipe.scheduler.config
    shift = config.get("flow_shift", config.get("shift"))
    seen = []
    pipe.transformer.register_forward_pre_hook(
        lambda *given: seen.extend(given[-1]["timestep"].tolist()), with_kwargs=True
    )
    args = DanceGRPOConfig(
        output_dir=str(tmp_path), num_generations=2, per_device_train_batch_size=2, num_inference_steps=4,
        sigma_schedule="linspace", timestep_fraction=1.0, check_on_policy_ratio="raise", max_ratio_error=1e-5,
        learning_rate=1e-2, lora_r=2, max_steps=1, logging_steps=1, device="cpu", disable_tqdm=True, report_to=[],
        save_steps=0, **size,
    )  # fmt: skip
    run = DanceGRPOTrainer(pipe, near, args, ROWS, peft_config=None)
    run.train()
    t = [1, 0.75, 0.5, 0.25]
    levels = [1000 * shift * x / (1 + (shift - 1) * x) for x in t]
    assert lines(run)[0]["grad_norm"] > 0
    assert {round(x, 2) for x in seen} == {round(x, 2) for x in levels}
    # The rollout predicts once at each level, and training predicts at all levels but the last.
    assert seen.count(max(seen)) > seen.count(min(seen))


def test_grpo_flow_shift_holds_where_the_size_would_set_it(tmp_path):
    from postgen.sampling.schedule import schedule_of
    from postgen.training.policy import Policy

    pipe, _ = tiny_pipeline("FLUX")
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, use_dynamic_shifting=True)
    args = DanceGRPOConfig(output_dir=str(tmp_path), flow_shift=3.0, lora_r=2)
    sigmas = schedule_of(Policy(pipe, args, args).denoiser, 4, (4, 2, 4)).sigmas
    t = torch.tensor([1, 0.75, 0.5, 0.25, 0], dtype=torch.float64)
    torch.testing.assert_close(sigmas, 3 * t / (1 + 2 * t), atol=1e-6, rtol=0)
