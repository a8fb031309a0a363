"""Timesteps that the network receives: in a call of the pipeline, in rollouts, in training and in evaluation."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from postgen.families import RoundingDenoiser, denoiser_for
from postgen.grpo.nft import DiffusionNFTConfig, DiffusionNFTTrainer
from postgen.grpo.trainer import DanceGRPOConfig, DanceGRPOTrainer
from postgen.sampling.sampler import Sample, Sampler, Sampling
from postgen.sampling.schedule import linspace_schedule, schedule_of
from tests.families.tiny_pipelines import PIPELINES, tiny_pipeline
from tests.grpo.toy import near

SIZE = {"height": 16, "width": 16, "num_frames": 5}
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "UniPC": ("UniPCMultistepScheduler", FLOW),
    "UniPC, shift 1": ("UniPCMultistepScheduler", {**FLOW, "flow_shift": 1.0}),
    "UniPC, Karras": ("UniPCMultistepScheduler", {**FLOW, "use_karras_sigmas": True}),
    "Euler": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    "DPM++": ("DPMSolverMultistepScheduler", FLOW),
}
"""Name -> class and configuration of a scheduler of Wan."""


def wan(folder: Path, scheduler: str) -> Any:
    import diffusers

    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    kind, config = SCHEDULERS[scheduler]
    pipe.scheduler = getattr(diffusers, kind)(num_train_timesteps=1000, **config)
    return pipe


@contextmanager
def heard(network: nn.Module) -> Iterator[list[Tensor]]:
    """Yield a list that receives the timesteps (B,) of every call of a network."""
    found: list[Tensor] = []

    def hear(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        found.append((named["timestep"] if "timestep" in named else given[1]).detach().clone())

    handle = network.register_forward_pre_hook(hear, with_kwargs=True)
    yield found
    handle.remove()


def of_the_pipeline(pipe: Any, steps: int) -> list[float]:
    with heard(pipe.transformer) as found:
        pipe("a ball", num_inference_steps=steps, guidance_scale=1.0, output_type="latent", **SIZE)
    return [float(timestep[0]) for timestep in found]


def test_truncated_levels_come_back_as_the_whole_numbers_that_they_were() -> None:
    levels = torch.arange(1001).double() / 1000
    denoiser = denoiser_for(tiny_pipeline("SkyReels-V2")[0])
    assert torch.equal(denoiser.timestep(levels), torch.arange(1001).float())


# 3 and 9 steps have levels at whole numbers, where rounding to float32 first would give the next whole number.
@pytest.mark.parametrize("steps", [3, 4, 9])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_the_sampler_gives_the_network_the_timesteps_of_the_pipeline(
    tiny_wan: Path, scheduler: str, steps: int
) -> None:
    pipe = wan(tiny_wan, scheduler)
    expected = of_the_pipeline(pipe, steps)
    denoiser = denoiser_for(pipe)
    assert isinstance(denoiser, RoundingDenoiser)
    schedule = schedule_of(denoiser, steps)
    assert (schedule.network_sigmas is None) == (scheduler == "Euler")
    sampler = Sampler(denoiser, schedule, Sampling(size=SIZE))
    condition = denoiser.encode_prompt(["a ball"], guidance=False)
    samples = [Sample(index=0, prompt=0, initial=3, step_seed=int, start=0)]
    with heard(pipe.transformer) as found:
        sampler.draw(samples, lambda prompts: condition, 1)
    assert [float(timestep[0]) for timestep in found] == expected
    # Training predicts rows of several steps at once.
    with heard(pipe.transformer) as found, torch.no_grad():
        index = torch.arange(steps)
        sampler.predict(sampler.noise(range(steps)), index, {"prompt": condition["prompt"].expand(steps, -1, -1)})
    assert found[0].tolist() == expected


@pytest.mark.parametrize("scheduler", ["UniPC", "Euler", "DPM++"])
@pytest.mark.parametrize("nft", [False, True])
def test_rollouts_training_and_evaluation_have_the_timesteps_of_the_pipeline(
    tiny_wan: Path, tmp_path: Path, scheduler: str, nft: bool
) -> None:
    pipe = wan(tiny_wan, scheduler)
    expected, evaluated = of_the_pipeline(pipe, 4), of_the_pipeline(pipe, 3)
    kind, config = (DiffusionNFTTrainer, DiffusionNFTConfig) if nft else (DanceGRPOTrainer, DanceGRPOConfig)
    own = {"train_timesteps": 4} if nft else {"sde_type": "flow_wan", "timestep_fraction": 1.0}
    own |= {} if nft else {"check_on_policy_ratio": "raise"}
    args = config(
        output_dir=str(tmp_path), num_generations=2, per_device_train_batch_size=2, num_inference_steps=4,
        eval_num_inference_steps=3, learning_rate=1e-2, lora_r=2, max_steps=1, logging_steps=1, device="cpu",
        disable_tqdm=True, report_to=[], save_steps=0, max_sequence_length=16, eval_grid=0, **own, **SIZE,
    )  # fmt: skip
    rows = [{"prompt": "a ball"}]
    run = kind(pipe, near, args, rows, rows, peft_config=None)
    with heard(pipe.transformer) as found:
        run.train()
    drawn, trained = found[:4], [float(one) for call in found[4:] for one in call]
    assert [float(timestep[0]) for timestep in drawn] == expected
    assert set(trained) <= set(expected)
    assert len(trained) == (2 * 4 * 3 if nft else 2 * 3)  # NFT: old policy, reference and new policy at 4 levels
    if not nft:
        assert sorted(set(trained), reverse=True) == expected[:-1]
    with heard(pipe.transformer) as found:
        run.evaluator.run(run.eval_prompts.rows)
    assert [float(timestep[0]) for timestep in found] == evaluated


@pytest.mark.parametrize("name", PIPELINES)
def test_the_sampler_of_every_family_has_the_timesteps_of_its_pipeline(name: str) -> None:
    pipe, size = tiny_pipeline(name)
    network = pipe.transformer if getattr(pipe, "transformer", None) is not None else pipe.unet
    asked = [7] if name.startswith("DiT") else "a ball"
    known = inspect.signature(type(pipe).__call__).parameters
    given = {**size, "num_inference_steps": 4, "guidance_scale": 1.0, "output_type": "latent"}
    given |= {"use_resolution_binning": False, "true_cfg_scale": 1.0}
    given["output_type"] = "pt" if name.startswith("DiT") else "latent"
    with heard(network) as expected:
        pipe(asked, **{key: value for key, value in given.items() if key in known})
    denoiser = denoiser_for(pipe)
    schedule = schedule_of(denoiser, 4, denoiser.latent_shape(**size))
    sampler = Sampler(denoiser, schedule, Sampling(size=size))
    with torch.no_grad():
        condition = denoiser.encode_prompt(["a ball"], guidance=False)
    with heard(network) as found:
        sampler.draw([Sample(index=0, prompt=0, initial=3, step_seed=int, start=0)], lambda prompts: condition, 1)
    flat = [[float(call.flatten()[0]) for call in calls] for calls in (found, expected)]
    assert flat[0] == flat[1]


@torch.no_grad()
def test_both_experts_have_the_timesteps_of_the_pipeline(tiny_wan: Path) -> None:
    """Wan 2.2 changes its network by the rounded timestep, as in the pipeline."""
    from diffusers import WanTransformer3DModel

    pipe = wan(tiny_wan, "UniPC")
    pipe.register_modules(transformer_2=WanTransformer3DModel.from_config(pipe.transformer.config).eval())
    # 8 steps have the level 0.83356, whose timestep 833 lies below the boundary.
    pipe.register_to_config(boundary_ratio=0.8334)
    denoiser = denoiser_for(pipe)
    condition = denoiser.encode_prompt(["a ball"], guidance=False)
    sampler = Sampler(denoiser, schedule_of(denoiser, 8), Sampling(size=SIZE))
    assert (sampler.schedule.sigmas - 0.83356).abs().min() < 1e-4
    with heard(pipe.transformer) as high, heard(pipe.transformer_2) as low:
        pipe("a ball", num_inference_steps=8, guidance_scale=1.0, output_type="latent", **SIZE)
        expected = [[float(call[0]) for call in calls] for calls in (high, low)]
        high.clear()
        low.clear()
        sampler.draw([Sample(index=0, prompt=0, initial=3, step_seed=int, start=0)], lambda prompts: condition, 1)
    assert [[float(call[0]) for call in calls] for calls in (high, low)] == expected
    assert max(expected[1]) == 833


def test_levels_of_our_own_schedule_keep_their_fractions(tiny_wan: Path) -> None:
    """DanceGRPO's levels are not those of the pipeline: nothing rounds them."""
    denoiser = denoiser_for(wan(tiny_wan, "UniPC"))
    schedule = linspace_schedule(denoiser, 7, 3.0, torch.device("cpu"))
    assert schedule.network_sigmas is None
    assert torch.equal(schedule.received(torch.arange(7)), schedule.sigmas[:7].float())
