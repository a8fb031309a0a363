"""The clean estimate of a step equals the scheduler's own formula, told from the latents around the step alone."""

import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

from postgen.sampling.clean import clean_estimate, estimates_clean

CLEAN = torch.randn(1, 4, 2, 3, 3, generator=torch.Generator().manual_seed(1))


def guess(x, level):
    """What the network makes of a state: a clean estimate that depends on both, so that every step has another."""
    return CLEAN + 0.1 * torch.tanh(x) * level


def flow(scheduler, x, step):
    sigma = scheduler.sigmas[step]
    clean = guess(x, sigma)
    return clean, (x - clean) / sigma


def epsilon(scheduler, x, step):
    alpha_bar = scheduler.alphas_cumprod[scheduler.timesteps[step]]
    clean = guess(x, 1 - alpha_bar)
    return clean, (x - alpha_bar.sqrt() * clean) / (1 - alpha_bar).sqrt()


def karras(scheduler, x, step):
    sigma = scheduler.sigmas[step]
    clean = guess(x, sigma / (1 + sigma))
    return clean, (x - clean) / sigma


@pytest.mark.parametrize(
    ("scheduler", "network"),
    [
        (FlowMatchEulerDiscreteScheduler(shift=3.0), flow),
        (UniPCMultistepScheduler(use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction"), flow),
        (DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"), flow),
        (DDIMScheduler(clip_sample=False), epsilon),
        (CogVideoXDDIMScheduler(prediction_type="epsilon", clip_sample=False), epsilon),
        (EulerDiscreteScheduler(), karras),
    ],
    ids=lambda value: type(value).__name__ if hasattr(value, "step") else "",
)
def test_estimate_is_what_the_step_used(scheduler, network):
    scheduler.set_timesteps(5)
    x = torch.randn(CLEAN.shape, generator=torch.Generator().manual_seed(2)) * getattr(
        scheduler, "init_noise_sigma", 1.0
    )
    assert estimates_clean(scheduler)
    for step, time in enumerate(scheduler.timesteps):
        scheduler.scale_model_input(x, time) if network is karras else None
        clean, prediction = network(scheduler, x, step)
        after = scheduler.step(prediction, time, x).prev_sample
        found = clean_estimate(scheduler, x, after, step)
        torch.testing.assert_close(found, clean, rtol=1e-3, atol=1e-3)
        x = after


def test_bfloat16_latents_keep_their_type_and_lose_little():
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(4)
    before = CLEAN + torch.ones_like(CLEAN)
    _, velocity = flow(scheduler, before, 0)
    after = scheduler.step(velocity, scheduler.timesteps[0], before).prev_sample
    found = clean_estimate(scheduler, before.bfloat16(), after.bfloat16(), 0)
    assert found.dtype == torch.bfloat16
    assert (found.float() - guess(before, scheduler.sigmas[0])).abs().mean() < 0.05


def test_steps_that_add_noise_and_the_first_have_none():
    noisy = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    noisy.set_timesteps(4)
    assert clean_estimate(noisy, CLEAN, CLEAN, 0) is None
    assert not estimates_clean(noisy)
    assert not estimates_clean(DDPMScheduler())
    plain = FlowMatchEulerDiscreteScheduler()
    plain.set_timesteps(4)
    assert clean_estimate(plain, None, CLEAN, 0) is None
