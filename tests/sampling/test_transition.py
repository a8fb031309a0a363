"""Transitions against the published formulas, torch.distributions and diffusers' own schedulers."""

import math

import pytest
import torch
from torch import Tensor

from postgen.errors import UserError
from postgen.sampling.schedule import Schedule, linspace_schedule
from postgen.sampling.transition import KINDS, NOISE_LEVEL, overshooting, split, step_weights, transition
from tests.sampling.toy import PointPipeline, ToyDenoiser

FLOW_KINDS = ("dance", "flow", "flow_wan", "exact", "cps", "ode")


def shifted(steps: int, shift: float = 3.0) -> Schedule:
    s = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    return Schedule(shift * s / (1 + (shift - 1) * s))


def case(batch: int = 3, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """x, prediction and noise in float64."""
    source = torch.Generator().manual_seed(seed)
    x, v, z = torch.randn(3, batch, 4, 2, 3, generator=source, dtype=torch.float64)
    return x, v, z


def at(schedule: Schedule, *indices: int):
    index = torch.tensor(indices)
    return schedule.levels(index, index + 1)


def k1(kind: str, x, v, s: float, after: float, second: float, a: float) -> tuple[Tensor, float]:
    """Mean and std written as the papers do, one row, python floats."""
    delta = s - after
    noise, clean = x + (1 - s) * v, x - s * v
    if kind == "cps":
        std = after * math.sin(a * math.pi / 2)
        return (1 - after) * clean + math.sqrt(after**2 - std**2) * noise, std
    room = 1 - second if s == 1 else 1 - s
    g = {"ode": 0.0, "dance": a, "flow_wan": a * second * s}.get(kind, a * math.sqrt(s / room))
    if kind == "exact" and s < 1:
        g = a * math.sqrt((math.log((1 - after) / (1 - s)) - delta) / delta)
    return x - delta * (v + g**2 / (2 * s) * noise), g * math.sqrt(delta)


@pytest.mark.parametrize("kind", FLOW_KINDS)
def test_transition_equals_the_published_formula(kind):
    x, v, z = case(4)
    steps = shifted(16)
    rows = (0, 1, 7, 14)
    found = transition(kind, x, v, at(steps, *rows), NOISE_LEVEL[kind])
    for row, index in enumerate(rows):
        s, after = steps.sigmas[index].item(), steps.sigmas[index + 1].item()
        mean, std = k1(kind, x[row], v[row], s, after, steps.sigmas[1].item(), NOISE_LEVEL[kind])
        assert (found.mean[row] - mean).abs().max() <= 1e-10
        assert abs(found.std[row].item() - std) <= 1e-10
        assert (found.sample(z)[row] - (mean + std * z[row])).abs().max() <= 1e-10
        assert (found.clean[row] - (x[row] - s * v[row])).abs().max() <= 1e-10


def test_transition_of_dance_is_its_own_drift_with_the_score():
    """dz = (v - eta^2 / 2 * score) dt + eta dw with score = -(x - (1 - s) x0) / s^2, as DanceGRPO's code has it."""
    x, v, _ = case()
    steps = shifted(12)
    levels = at(steps, 2, 5, 8)
    s, delta = (value.view(-1, 1, 1, 1) for value in (levels.s, levels.s - levels.after))
    score = -(x - (1 - s) * (x - s * v)) / s**2
    mean = x - delta * v + 0.5 * 0.3**2 * score * delta
    assert (transition("dance", x, v, levels, 0.3).mean - mean).abs().max() <= 1e-10


def test_transition_of_flow_is_flow_grpos_own_algebra():
    """mean = x (1 + g^2 / (2 s) dt) + v (1 + g^2 (1 - s) / (2 s)) dt, dt < 0, as Flow-GRPO's code has it."""
    x, v, _ = case()
    steps = shifted(10)
    levels = at(steps, 0, 4, 8)
    s, dt = (value.view(-1, 1, 1, 1) for value in (levels.s, levels.after - levels.s))
    g2 = 0.49 * s / (1 - torch.where(s == 1, steps.sigmas[1], s))
    mean = x * (1 + g2 / (2 * s) * dt) + v * (1 + g2 * (1 - s) / (2 * s)) * dt
    assert (transition("flow", x, v, levels, 0.7).mean - mean).abs().max() <= 1e-10


@pytest.mark.parametrize("kind", ["dance", "flow", "flow_wan", "exact", "ddim"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "sqrt"])
def test_transition_log_prob_equals_torch_distributions(kind, reduction):
    x, v, z = case()
    schedule = ddim_schedule("v_prediction") if kind == "ddim" else shifted(8)
    step = transition(kind, x, v, at(schedule, 1, 3, 6), NOISE_LEVEL[kind], schedule.prediction_type)
    y = step.sample(1.3 * z)
    normal = torch.distributions.Normal(step.mean, step.std.view(-1, 1, 1, 1))
    expected = normal.log_prob(y).flatten(1)
    size = expected.shape[1]
    expected = {"mean": expected.mean(1), "sum": expected.sum(1), "sqrt": expected.sum(1) / size**0.5}[reduction]
    assert (step.log_prob(y, reduction) - expected).abs().max() <= 1e-10


def test_transition_log_prob_of_cps_has_no_scale():
    x, v, z = case()
    step = transition("cps", x, v, at(shifted(8), 0, 3, 6), 0.8)
    expected = -(step.std.view(-1, 1, 1, 1) * z).square().mean((1, 2, 3))
    assert (step.log_prob(step.sample(z)) - expected).abs().max() <= 1e-10


@pytest.mark.parametrize("kind", ["dance", "flow", "flow_wan", "exact", "cps"])
def test_transition_without_noise_is_eulers_step(kind):
    x, v, _ = case()
    levels = at(shifted(8), 0, 3, 6)
    euler = x - (levels.s - levels.after).view(-1, 1, 1, 1) * v
    assert (transition(kind, x, v, levels, 0.0).mean - euler).abs().max() <= 1e-12
    assert torch.equal(transition("ode", x, v, levels, 0.7).mean, euler)
    assert transition("ode", x, v, levels, 0.7).std.tolist() == [0, 0, 0]


def test_transition_samples_have_its_mean_and_std():
    x, v, _ = case(1)
    step = transition("exact", x, v, at(shifted(8), 2), 0.7)
    source = torch.Generator().manual_seed(1)
    draws = torch.stack([step.sample(torch.randn(x.shape, generator=source, dtype=x.dtype)) for _ in range(4000)])
    assert (draws.mean(0) - step.mean).abs().max() < 5 * step.std.item() / 4000**0.5
    assert draws.std(0).mean().item() == pytest.approx(step.std.item(), rel=0.02)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("set_alpha_to_one", [True, False])
def test_transition_ddim_equals_diffusers(eta, prediction_type, set_alpha_to_one):
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(
        prediction_type=prediction_type, set_alpha_to_one=set_alpha_to_one, clip_sample=False, steps_offset=1
    )
    schedule = ddim_schedule(prediction_type, in_float64(scheduler))
    x, v, z = case(1)
    for index, timestep in enumerate(scheduler.timesteps):
        out = scheduler.step(v, timestep, x, eta=eta, variance_noise=z)
        step = transition("ddim", x, v, at(schedule, index), eta, prediction_type)
        assert (step.sample(z) - out.prev_sample).abs().max() <= 1e-10
        assert (step.clean - out.pred_original_sample).abs().max() <= 1e-10


def in_float64(scheduler):
    """Ten steps, and the scheduler's tables in our precision, so that only formulas are compared."""
    scheduler.set_timesteps(10)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.double()
    return scheduler


def ddim_schedule(prediction_type: str, scheduler=None) -> Schedule:
    if scheduler is None:
        from diffusers import DDIMScheduler

        scheduler = in_float64(DDIMScheduler())
    times = scheduler.timesteps
    bars = torch.cat([scheduler.alphas_cumprod[times], scheduler.final_alpha_cumprod.reshape(1)]).double()
    sigmas = torch.cat([times + 1, torch.zeros(1)]).double() / 1000
    return Schedule(sigmas, prediction_type, bars)


def test_transition_ddim_starts_where_nothing_is_left():
    """Rescaled to a terminal signal-to-noise of zero, as CogVideoX is: alpha-bar runs from 0 to 1."""
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing", clip_sample=False
    )
    schedule = ddim_schedule("v_prediction", in_float64(scheduler))
    assert schedule.alpha_bars[0] == 0
    assert schedule.alpha_bars[-1] == 1
    x, v, z = case(1)
    first = transition("ddim", x, v, at(schedule, 0), 0.9, "v_prediction")
    expected = scheduler.step(v, scheduler.timesteps[0], x, eta=0.9, variance_noise=z).prev_sample
    assert (first.sample(z) - expected).abs().max() <= 1e-10
    # At 1 all noise is new. diffusers takes the root of a difference that is 0 but for rounding: some processors leave
    # 1e-16 of it, whose root is no rounding any more.
    first = transition("ddim", x, v, at(schedule, 0), 1.0, "v_prediction")
    expected = schedule.alpha_bars[1].sqrt() * first.clean + (1 - schedule.alpha_bars[1]).sqrt() * z
    assert (first.sample(z) - expected).abs().max() <= 1e-10
    last = transition("ddim", x, v, at(schedule, 9), 1.0, "v_prediction")
    assert last.std == 0
    assert torch.equal(last.mean, last.clean)


def test_transition_cps_at_one_equals_diffusers_stochastic_euler():
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True)
    scheduler.set_timesteps(8)
    schedule = Schedule(scheduler.sigmas.double())
    x, v, _ = case(1)
    x, v = x.float(), v.float()
    for index, timestep in enumerate(scheduler.timesteps):
        torch.manual_seed(index)
        expected = scheduler.step(v, timestep, x).prev_sample
        torch.manual_seed(index)
        noise = torch.randn_like(x)
        step = transition("cps", x, v, at(schedule, index), 1.0)
        torch.testing.assert_close(step.sample(noise), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", FLOW_KINDS)
def test_transition_is_finite_at_both_ends(kind):
    x, v, z = case(2)
    step = transition(kind, x, v, at(shifted(8), 0, 7), NOISE_LEVEL[kind])
    assert torch.isfinite(step.sample(z)).all()
    assert step.std[0] < 1
    end = transition("ode", x, v, at(shifted(8), 0, 7), 0.0)
    assert (end.mean[1] - end.clean[1]).abs().max() <= 1e-12


@pytest.mark.parametrize("kind", ["flow", "exact"])
@pytest.mark.parametrize("first", [1.0, 1 - 1e-6, 0.9999])
def test_transition_cuts_its_pole_off(kind, first):
    """Uncut, the first step from 0.9999 would have a std of 9."""
    x, v, _ = case(2)
    levels = at(Schedule(torch.tensor([first, 0.98, 0.96, 0.0]).double()), 0, 1)
    std = transition(kind, x, v, levels, 0.7).std
    assert std[0].item() == pytest.approx(0.7, rel=1e-2)
    assert 0 < std[1] < 1


@pytest.mark.parametrize("kind", ["dance", "flow", "flow_wan", "exact", "cps", "ddim"])
def test_transition_slope_is_the_gradient(kind):
    x, v, z = case()
    schedule = ddim_schedule("epsilon") if kind == "ddim" else shifted(8)
    levels = at(schedule, 0, 3, 6)
    v.requires_grad_(True)
    step = transition(kind, x, v, levels, NOISE_LEVEL[kind], schedule.prediction_type)
    (slope,) = torch.autograd.grad(step.mean.sum(), v, retain_graph=True)
    assert (slope - step.slope.view(-1, 1, 1, 1)).abs().max() <= 1e-12
    y = step.sample(z).detach()
    (gradient,) = torch.autograd.grad(step.log_prob(y, "sum").sum(), v)
    expected = step.gradient_scale().view(-1, 1, 1, 1) * z * torch.sign(step.slope).view(-1, 1, 1, 1)
    assert (gradient - expected).abs().max() <= 1e-9


def test_transition_gradient_scales_are_those_of_the_note():
    """c_t of 20 steps with shift 3, computed from its formula sqrt(D) / g + g sqrt(D) (1 - s) / (2 s)."""
    steps = shifted(20)
    for kind in ("dance", "flow"):
        index = torch.arange(19)
        levels = steps.levels(index, index + 1)
        zero = torch.zeros(19, 1, dtype=torch.float64)
        found = transition(kind, zero, zero, levels, NOISE_LEVEL[kind]).gradient_scale()
        s, root = levels.s, (levels.s - levels.after).sqrt()
        room = 1 - torch.where(s == 1, steps.sigmas[1], s)
        g = NOISE_LEVEL[kind] * (torch.ones_like(s) if kind == "dance" else (s / room).sqrt())
        assert (found - (root / g + g * root * (1 - s) / (2 * s))).abs().max() <= 1e-10
        spread = found.max() / found.min()
        assert (2.5 < spread < 3.5) if kind == "dance" else (35 < spread < 45)


@pytest.mark.parametrize("guard", [False, True])
def test_transition_step_weights(guard):
    steps, used = shifted(12), [1, 2, 5]
    for weighting in ("none", "std", "inv_grad"):
        table = step_weights("flow", steps, 0.7, weighting, used, guard=guard)
        assert table[used].mean().item() == pytest.approx(1)
        assert table.sum().item() == pytest.approx(3)
    index = torch.tensor(used)
    zero = torch.zeros(3, 1, dtype=torch.float64)
    levels = steps.levels(index, index + 1)
    step = transition("flow", zero, zero, levels, 0.7)
    scale = step.gradient_scale() * (step.std / (levels.s - levels.after) if guard else 1)
    assert (table[used] * scale).std() < 1e-12


def test_transition_final_spread_of_a_gaussian():
    """Data N(0, 0.5^2), exact predictions: no transition is unbiased, dance and flow come closer with more steps."""
    source, n = torch.Generator().manual_seed(0), 20000

    def spread(kind: str, count: int) -> float:
        schedule = shifted(count)
        x = torch.randn(n, 1, generator=source, dtype=torch.float64)
        for index in range(count):
            levels = at(schedule, index)
            s = levels.s
            variance = (1 - s) ** 2 * 0.25 + s**2
            v = (s - (1 - s) * 0.25) / variance * x
            last = index == count - 1
            step = transition("ode" if last else kind, x, v, levels, NOISE_LEVEL[kind])
            x = step.sample(torch.randn(n, 1, generator=source, dtype=torch.float64))
        return x.std().item() / 0.5

    for kind, few, many in (("ode", 0.738, 0.942), ("dance", 0.754, 0.948), ("flow", 0.838, 0.970)):
        assert spread(kind, 10) == pytest.approx(few, abs=0.02)
        assert spread(kind, 50) == pytest.approx(many, abs=0.02)
    # On every step cps shrinks the spread however many there are.
    assert spread("cps", 50) < 0.8


def test_transition_split_agrees_with_its_mix():
    x, v, _ = case()
    for schedule in (shifted(8), ddim_schedule("epsilon"), ddim_schedule("v_prediction"), ddim_schedule("sample")):
        levels = at(schedule, 1, 4, 6)
        clean, noise = split(x, v, levels, schedule.prediction_type)
        (a, b), _ = levels.mix()
        assert (a.view(-1, 1, 1, 1) * clean + b.view(-1, 1, 1, 1) * noise - x).abs().max() <= 1e-12


def test_transition_refuses_what_does_not_fit():
    x, v, _ = case()
    with pytest.raises(ValueError, match=r"float32 or float64, got torch\.bfloat16"):
        transition("dance", x.bfloat16(), v, at(shifted(8), 1, 2, 3), 0.3)
    with pytest.raises(UserError, match="'ddim' is not for a model that predicts flow: use dance"):
        transition("ddim", x, v, at(shifted(8), 1, 2, 3), 0.3)
    with pytest.raises(UserError, match=r"'flow' is not for a model that predicts epsilon: use ddim$"):
        transition("flow", x, v, at(ddim_schedule("epsilon"), 1, 2, 3), 0.3, "epsilon")
    with pytest.raises(UserError, match="at least 2 steps"):
        Schedule(torch.tensor([1.0, 0.0]))
    assert set(NOISE_LEVEL) == set(KINDS)


def test_transition_takes_the_published_noise_levels():
    found = linspace_schedule(ToyDenoiser(PointPipeline()), 16, 3.0, torch.device("cpu"))
    assert (found.sigmas - shifted(16).sigmas).abs().max() <= 1e-12
    assert found.sigmas[-2] == pytest.approx(3 / (16 + 3 - 1))


def test_transition_refuses_them_for_a_model_that_is_no_flow():
    with pytest.raises(UserError, match="predicts epsilon: use 'pipeline'"):
        linspace_schedule(ToyDenoiser(PointPipeline("epsilon")), 16, 3.0, torch.device("cpu"))


def test_transition_names_steps_that_add_more_noise_than_the_next_one_believes_in():
    steps = Schedule(torch.tensor([1.0, 0.5, 0.01, 0.0], dtype=torch.float64))
    assert overshooting("dance", steps, 0.3, range(2)) == [1]
    assert overshooting("dance", shifted(16), 0.3, range(15)) == []
    assert overshooting("cps", steps, 1.0, range(2)) == []
