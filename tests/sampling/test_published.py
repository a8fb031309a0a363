"""Transitions against numbers of published training code: recorded outputs and loss weights."""

import pytest
import torch
from torch import Tensor

from postgen.grpo.loss import gaussian_kl
from postgen.sampling.schedule import Schedule
from postgen.sampling.transition import NOISE_LEVEL, step_weights, transition


def unipc(steps: int) -> Schedule:
    """Return the noise levels of Wan's scheduler."""
    from diffusers import UniPCMultistepScheduler

    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    scheduler.set_timesteps(steps)
    return Schedule(scheduler.sigmas.double())


def wave(number: int) -> Tensor:
    """Return latents (4, 2, 1, 2, 2) from a formula, so that recorded outputs need no random generator."""
    angle = torch.arange(32, dtype=torch.float64) * (0.7 + 0.3 * number) + number
    return angle.sin().view(4, 2, 1, 2, 2).float()


# Outputs of `sde_step_with_logprob` of Flow-GRPO's Wan pipeline (github.com/yifan123/flow_grpo, MIT) with 20 steps of
# UniPC, for the rows x = wave(0), y = x - 0.05 wave(1) + 0.1 wave(3), at the steps WAN_STEPS.
WAN_STEPS = [0, 1, 9, 18]
WAN_STD = [0.12897415459156036, 0.1312008649110794, 0.1458447277545929, 0.08326760679483414]
WAN_LOG_PROBS = {
    1: [0.9518448114395142, 0.9253888726234436, 0.8914278745651245, 0.878572940826416],
    2: [0.9310802221298218, 0.8863272070884705, 0.8251871466636658, 1.0392240285873413],
}
"""Log-probabilities for the predictions wave(1) and wave(2)."""
WAN_MEANS = [
    [-0.014492260292172432, -0.3430534601211548],
    [-0.6334050297737122, 0.29787522554397583],
    [-0.9288758635520935, 0.8346444368362427],
    [-0.8590112328529358, 1.1010788679122925],
]
"""Values 0 and 5 of the means for the prediction wave(1)."""
WAN_KL = [0.013144566677510738, 0.010807866230607033, 0.013173969462513924, 1.8966565132141113]
"""The training script's KL divergence of the predictions wave(1) and wave(2)."""


def test_flow_wan_equals_recorded_outputs_of_flow_grpo() -> None:
    index = torch.tensor(WAN_STEPS)
    x = wave(0)
    y = x - 0.05 * wave(1) + 0.1 * wave(3)
    levels = unipc(20).levels(index, index + 1)
    steps = {number: transition("flow_wan", x, wave(number), levels, NOISE_LEVEL["flow_wan"]) for number in (1, 2)}
    assert steps[1].std.tolist() == pytest.approx(WAN_STD, rel=1e-6)
    assert (steps[1].mean.flatten(1)[:, [0, 5]] - torch.tensor(WAN_MEANS)).abs().max() <= 1e-6
    for number, expected in WAN_LOG_PROBS.items():
        assert steps[number].log_prob(y).tolist() == pytest.approx(expected, rel=1e-5)
    # The KL is that of two Gaussians, without a factor.
    assert gaussian_kl(steps[1], steps[2]).tolist() == pytest.approx(WAN_KL, rel=1e-5)


def test_inv_grad_is_the_step_weight_of_genrl() -> None:
    """GenRL (LongCat) multiplies the loss of a step of `flow` by sqrt(s / (1 - s)) / sqrt(D).

    Its product with the gradient scale is 1 / a + a / 2 at each step, so after normalisation it equals `inv_grad`.
    """
    schedule, a, used = unipc(16), 0.7, list(range(1, 15))
    s, after = schedule.sigmas[used], schedule.sigmas[[step + 1 for step in used]]
    published = (s / (1 - s)).sqrt() / (s - after).sqrt()
    index = torch.tensor(used)
    nothing = torch.zeros(len(used), 1, dtype=torch.float64)
    scale = transition("flow", nothing, nothing, schedule.levels(index, index + 1), a).gradient_scale()
    assert (published * scale - (1 / a + a / 2)).abs().max() <= 1e-12
    ours = step_weights("flow", schedule, a, "inv_grad", used, guard=False)[used]
    assert (ours - published / published.mean()).abs().max() <= 1e-12
