"""Noise levels per frame: the same formulas as per row, frame by frame."""

import pytest
import torch

from postgen.families import denoiser_for
from postgen.sampling.meter import Meter
from postgen.sampling.sampler import Move, Sampler, Sampling
from postgen.sampling.schedule import Schedule, schedule_of
from postgen.sampling.solver import Multistep
from postgen.sampling.transition import NOISE_LEVEL, split, transition, wide
from tests.families.tiny_pipelines import tiny_pipeline
from tests.sampling.toy import FrameDenoiser, PointPipeline

CPU = torch.device("cpu")
FRAMES = 4
START = torch.tensor([[0, 3, 6, 2], [7, 1, 4, 5]])


def schedule(kind="flow", axis=2) -> Schedule:
    s = torch.linspace(1, 0, 9, dtype=torch.float64)
    s = 3 * s / (1 + 2 * s)
    return Schedule(s, kind, None if kind == "flow" else (1 - s) ** 2 / ((1 - s) ** 2 + s**2), axis)


def case(axis=2):
    shape = [2, 3, 2, 2]
    shape.insert(axis, FRAMES)
    return torch.randn(3, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def kinds():
    flow = [(kind, "flow") for kind in ("dance", "flow", "flow_wan", "exact", "cps", "ode")]
    # epsilon says nothing at alpha-bar 0, where the schedule above begins.
    return flow + [(kind, meaning) for kind in ("ddim", "ode") for meaning in ("v_prediction", "sample")]


@pytest.mark.parametrize(("kind", "meaning"), kinds())
@pytest.mark.parametrize("axis", [1, 2])
def test_frames_of_one_level_are_a_row_of_it(kind, meaning, axis):
    (x, v, z), steps = case(axis), schedule(meaning, axis)
    index = torch.tensor([2, 5])
    row = transition(kind, x, v, steps.levels(index, index + 1), NOISE_LEVEL[kind], meaning)
    each = index[:, None].expand(2, FRAMES)
    frame = transition(kind, x, v, steps.levels(each, each + 1), NOISE_LEVEL[kind], meaning)
    assert torch.equal(frame.mean, row.mean)
    assert torch.equal(frame.clean, row.clean)
    assert torch.equal(frame.std, row.std[:, None].expand(2, FRAMES))
    assert torch.equal(frame.slope, row.slope[:, None].expand(2, FRAMES))
    assert torch.equal(frame.sample(z), row.sample(z))
    if kind != "ode":
        y = row.sample(z)
        for reduction in ("mean", "sum", "sqrt"):
            torch.testing.assert_close(frame.log_prob(y, reduction), row.log_prob(y, reduction), rtol=1e-13, atol=0)


@pytest.mark.parametrize(("kind", "meaning"), kinds())
@pytest.mark.parametrize("axis", [1, 2])
def test_each_frame_steps_as_it_does_alone(kind, meaning, axis):
    (x, v, z), steps = case(axis), schedule(meaning, axis)
    together = transition(kind, x, v, steps.levels(START, START + 1), NOISE_LEVEL[kind], meaning)
    scores = []
    for frame in range(FRAMES):
        one = [tensor.narrow(axis, frame, 1) for tensor in (x, v, z)]
        levels = steps.levels(START[:, frame], START[:, frame] + 1)
        alone = transition(kind, *one[:2], levels, NOISE_LEVEL[kind], meaning)
        assert torch.equal(together.mean.narrow(axis, frame, 1), alone.mean)
        assert torch.equal(together.sample(z).narrow(axis, frame, 1), alone.sample(one[2]))
        assert torch.equal(together.std[:, frame], alone.std)
        scores.append(alone.log_prob(alone.sample(one[2]), "sum"))
    if kind != "ode":
        # The last step has no noise and thus no density: the second row's first frame takes no part.
        scores[0][1] = 0 if kind == "ddim" else scores[0][1]
        expected = torch.stack(scores).sum(0)
        torch.testing.assert_close(together.log_prob(together.sample(z), "sum"), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("kind", "meaning"), kinds())
def test_clean_frames_are_left_alone_and_out_of_the_probability(kind, meaning):
    (x, v, z), steps = case(), schedule(meaning)
    start, stop = torch.tensor([[8, 8, 2, 3], [8, 1, 2, 3]]), torch.tensor([[8, 8, 3, 4], [8, 2, 3, 4]])
    v.requires_grad_(True)
    step = transition(kind, x, v, steps.levels(start, stop), NOISE_LEVEL[kind], meaning)
    y = step.sample(z).detach()
    still = (start == 8)[:, None, :, None, None].expand_as(x)
    assert torch.equal(y[still], x[still])
    assert torch.equal(step.clean[still], x[still])
    assert torch.isfinite(y).all()
    assert torch.isfinite(step.slope).all()
    if kind == "ode":
        return
    found = step.log_prob(y, "mean")
    (gradient,) = torch.autograd.grad(found.sum(), v)
    assert torch.isfinite(gradient).all()
    assert not gradient[still].any()
    alone = transition(
        kind, x[:1, :, 2:], v[:1, :, 2:], steps.levels(start[:1, 2:], stop[:1, 2:]), NOISE_LEVEL[kind], meaning
    )
    torch.testing.assert_close(found[0], alone.log_prob(y[:1, :, 2:], "mean")[0], rtol=1e-13, atol=0)


def test_solver_takes_frames_as_it_takes_rows():
    x, steps = case()[0], schedule()
    rows, frames, alone = Multistep(), Multistep(), [Multistep() for _ in range(FRAMES)]
    a = b = x
    singles = list(x.split(1, 2))
    # Every frame two steps behind the one before it: those to come wait at 1, those that are done at 0.
    for tick in range(8 + 2 * (FRAMES - 1)):
        start = (tick - 2 * torch.arange(FRAMES)).clamp(0, 8).expand(2, FRAMES)
        stop = (tick + 1 - 2 * torch.arange(FRAMES)).clamp(0, 8).expand(2, FRAMES)
        levels = steps.levels(start, stop)
        b = frames.step(b, split(b, b.sin(), levels, "flow")[0], levels)
        for frame in range(FRAMES):
            if start[0, frame] < stop[0, frame]:
                one = steps.levels(start[:, frame], stop[:, frame])
                clean = split(singles[frame], singles[frame].sin(), one, "flow")[0]
                singles[frame] = alone[frame].step(singles[frame], clean, one)
    assert torch.equal(b, torch.cat(singles, 2))
    for index in range(8):
        levels = steps.levels(torch.tensor([index] * 2), torch.tensor([index + 1] * 2))
        a = rows.step(a, split(a, a.sin(), levels, "flow")[0], levels)
    assert torch.equal(a, b)


def test_walk_with_levels_per_frame():
    """Frames that start later end as they do alone, whatever the others do meanwhile."""
    denoiser = FrameDenoiser(PointPipeline())
    torch.nn.init.normal_(denoiser.transformers["transformer"].outer.weight, std=0.2)
    how = Sampling(kind="ode", size={"num_frames": FRAMES, "height": 2, "width": 2})
    sampler = Sampler(denoiser, schedule_of(denoiser, 6), how, Meter(CPU), CPU)
    x = sampler.noise([1, 2])
    together = [Move(rows=slice(0, 2), start=[index] * 2, stop=[index + 1] * 2) for index in range(6)]
    lag = torch.arange(FRAMES)
    pyramid = [
        Move(
            rows=slice(0, 2),
            start=(tick - lag).clamp(0, 6).expand(2, FRAMES),
            stop=(tick + 1 - lag).clamp(0, 6).expand(2, FRAMES),
        )
        for tick in range(6 + FRAMES - 1)
    ]
    one, other = (list(sampler.walk(x, moves, {})) for moves in (together, pyramid))
    torch.testing.assert_close(other[-1].after, one[-1].after, rtol=1e-5, atol=1e-6)
    assert other[2].levels.s.shape == (2, FRAMES)
    assert other[0].levels.s[0].tolist() == [1.0] * FRAMES
    assert torch.equal(other[0].after[:, :, 1:], x[:, :, 1:])


def test_levels_that_do_not_fit_are_refused():
    x, v, _ = case()
    with pytest.raises(ValueError, match="need a schedule with a frame_axis"):
        transition("ode", x, v, schedule(axis=None).levels(START, START + 1), 0.0)
    with pytest.raises(ValueError, match=r"must be \(B, 4\) for these latents, got \(2, 3\)"):
        transition("ode", x, v, schedule().levels(START[:, :3], START[:, :3] + 1), 0.0)
    assert wide(torch.ones(2), x).shape == (2, 1, 1, 1, 1)
    assert wide(torch.ones(2, 4), x, 2).shape == (2, 1, 4, 1, 1)


@pytest.mark.parametrize("name", ["LTX", "SkyReels-V2"])
def test_walk_of_a_video_model_with_levels_per_frame(name):
    """A clean first frame is left bit by bit while the others are drawn; equal levels are a row's."""
    pipe, size = tiny_pipeline(name)
    denoiser = denoiser_for(pipe)
    shape = denoiser.latent_shape(**size)
    frames = shape[denoiser.frame_axis - 1]
    how = Sampling(kind="ode", size=size)
    sampler = Sampler(denoiser, schedule_of(denoiser, 3, shape), how, Meter(CPU), CPU)
    condition, x = denoiser.encode_prompt(["a ball"], guidance=False), sampler.noise([1])
    end = {}
    for each in (False, True):
        moves = [
            Move(
                rows=slice(0, 1),
                start=torch.full((1, frames) if each else (1,), step),
                stop=torch.full((1, frames) if each else (1,), step + 1),
            )
            for step in range(3)
        ]
        end[each] = list(sampler.walk(x, moves, condition))[-1].after
    torch.testing.assert_close(end[True], end[False], rtol=1e-4, atol=1e-5)
    first = torch.arange(frames) == 0
    moves = [
        Move(rows=slice(0, 1), start=torch.where(first, 3, step)[None], stop=torch.where(first, 3, step + 1)[None])
        for step in range(3)
    ]
    states = list(sampler.walk(x, moves, condition))
    assert states[0].levels.s[0, :2].tolist() == [0.0, sampler.schedule.sigmas[0]]
    history = x.narrow(denoiser.frame_axis, 0, 1)
    for state in states:
        assert torch.equal(state.after.narrow(denoiser.frame_axis, 0, 1), history)
    assert not torch.allclose(states[-1].after, end[True])
