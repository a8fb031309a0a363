"""The sampler: windows, seeds, the shared prefix, the fast solver, and the ratio of a policy that has not changed."""

import pytest
import torch

from postgen.errors import UserError
from postgen.sampling.meter import Meter
from postgen.sampling.sampler import Move, Sample, Sampler, Sampling
from postgen.sampling.schedule import schedule_of
from postgen.sampling.seeds import normal, seed_of
from postgen.sampling.solver import Multistep, coarser
from postgen.sampling.transition import transition
from tests.sampling.toy import PointPipeline, ToyDenoiser

CPU = torch.device("cpu")


def sampler(steps=8, prediction_type="flow", **how) -> Sampler:
    denoiser = ToyDenoiser(PointPipeline(prediction_type))
    # Weights of the net that are not zero, so that predictions are no linear function.
    torch.nn.init.normal_(denoiser.transformers["transformer"].outer.weight, std=0.2)
    how = {"kind": "flow", "noise": 0.7, "size": {"num_frames": 1, "height": 2, "width": 2}, **how}
    return Sampler(denoiser, schedule_of(denoiser, steps), Sampling(**how), Meter(CPU), CPU)


def samples(count=6, group=3, start=2, shared=True) -> list[Sample]:
    return [
        Sample(
            index=index,
            prompt=index // group,
            initial=100 + (index // group if shared else index),
            step_seed=lambda step, index=index: seed_of(0, "step", index, step),
            start=start if isinstance(start, int) else start[index // group],
        )
        for index in range(count)
    ]


def conditions(numbers):
    return {"prompt": torch.tensor([[float(number)] for number in numbers])}


@pytest.mark.parametrize("kind", ["dance", "flow", "exact", "cps"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_sampler_ratio_is_one_before_the_first_update(kind, reduction):
    drawn = sampler(kind=kind, window=3, reduction=reduction)
    paths = drawn.draw(samples(), conditions, 6)
    for place in range(3):
        index = paths.start + place
        x, y = paths.states[:, place], paths.states[:, place + 1]
        # One row at a time here, six at once there.
        for row in range(6):
            one = slice(row, row + 1)
            prediction = drawn.predict(x[one], index[one], conditions([row // 3]))
            log_prob = drawn.step(x[one], prediction, index[one]).log_prob(y[one], reduction)
            assert (log_prob - paths.log_probs[one, place]).abs().max() <= 1e-5


def test_sampler_ratio_suffers_from_latents_in_half_precision():
    """Why latents are kept in float32: rounded to bfloat16, log-probabilities miss by many times the clip range."""
    drawn = sampler(kind="dance", noise=0.3, window=3)
    paths = drawn.draw(samples(), conditions, 6)
    rounded = paths.states.bfloat16().float()
    index = paths.start
    step = drawn.step(rounded[:, 0], drawn.predict(rounded[:, 0], index, conditions([0] * 6)), index)
    assert (step.log_prob(rounded[:, 1]) - paths.log_probs[:, 0]).abs().max() > 1e-3


@pytest.mark.parametrize("how", [{}, {"solver": "dpm++", "fraction": 0.6}], ids=["euler", "dpm++"])
def test_sampler_does_not_depend_on_batches(how):
    drawn = sampler(window=2, **how)
    rows = samples(start=(1, 4))
    together, alone = drawn.draw(rows, conditions, 6), drawn.draw(rows, conditions, 1)
    mixed = drawn.draw([rows[i] for i in (4, 0, 3)], conditions, 2)
    torch.testing.assert_close(together.clean, alone.clean)
    torch.testing.assert_close(together.states, alone.states)
    torch.testing.assert_close(mixed.clean, together.clean[[4, 0, 3]])
    assert mixed.start.tolist() == [4, 1, 4]


def test_sampler_takes_samples_with_different_windows_together():
    drawn, calls = sampler(window=2, solver="dpm++", fraction=0.6), []
    predict = drawn.denoiser.predict
    drawn.denoiser.predict = lambda x, *words: calls.append(len(x)) or predict(x, *words)
    drawn.draw(samples(start=(1, 4)), conditions, 6)
    # Two prompts, then the later one alone; both windows; tails of 3 and 1 steps that end together.
    assert calls == [2, 1, 1, 1, 6, 6, 3, 3, 6]


def test_sampler_shares_noise_and_prefix_of_a_prompt():
    drawn = sampler(window=1)
    paths = drawn.draw(samples(start=4), conditions, 6)
    assert torch.equal(paths.states[0, 0], paths.states[1, 0])
    assert not torch.equal(paths.states[0, 0], paths.states[3, 0])
    # Their noise in the window is their own.
    assert (paths.states[0, 1] - paths.states[1, 1]).abs().min() > 0
    # Four steps for two prompts, four for six samples.
    assert drawn.meter.totals["forwards"] == 4 * 2 + 4 * 6
    apart = sampler(window=1)
    apart.draw(samples(start=4, shared=False), conditions, 6)
    assert apart.meter.totals["forwards"] == 8 * 6


def test_sampler_outside_the_window_is_eulers():
    drawn = sampler(window=0)
    paths = drawn.draw(samples(2, 1, start=0), conditions, 2)
    x, sigmas = normal((3, 1, 2, 2), [100, 101], CPU), drawn.schedule.sigmas
    for index in range(8):
        now = torch.full((2,), index)
        prediction = drawn.predict(x, now, {})
        clean = x - sigmas[index].float() * prediction
        x = x - (sigmas[index] - sigmas[index + 1]).float() * prediction
    torch.testing.assert_close(paths.clean, x)
    # What is decoded is the clean latents that the last step predicts.
    torch.testing.assert_close(x, clean)
    assert paths.states.shape == (2, 0)  # nothing is kept that is not trained on
    assert paths.log_probs.shape == (2, 0)


def test_sampler_keeps_means_when_asked():
    drawn = sampler(window=2, keep_means=True)
    paths = drawn.draw(samples(), conditions, 6)
    step = drawn.step(paths.states[:, 1], drawn.predict(paths.states[:, 1], paths.start + 1, {}), paths.start + 1)
    torch.testing.assert_close(paths.means[:, 1], step.mean)
    assert sampler(window=2).draw(samples(), conditions, 6).means is None


def collected(drawn, rows):
    """What `states` yields, sorted by sample: latents before each step, and after the last."""
    found = [{} for _ in rows]
    for state in drawn.states(rows, conditions):
        for row, owners in enumerate(state.samples):
            for sample in owners:
                found[sample][state.start[row].item()] = state
                found[sample]["x", state.start[row].item()] = state.x[row]
                found[sample]["x", state.stop[row].item()] = state.after[row]
    return found


@pytest.mark.parametrize("how", [{}, {"solver": "dpm++", "fraction": 0.6}], ids=["euler", "dpm++"])
def test_sampler_yields_the_states_that_draw_collects(how):
    drawn = sampler(window=2, keep_means=True, **how)
    rows = samples(start=(4, 1))
    paths, found = drawn.draw(rows, conditions, 6, keep=[0, 1, 8]), collected(drawn, rows)
    for sample, steps in enumerate(found):
        start = rows[sample].start
        assert torch.equal(paths.clean[sample], steps["x", 8])
        for place in range(3):
            assert torch.equal(paths.states[sample, place], steps["x", start + place])
        for place in range(2):
            state = steps[start + place]
            row = next(row for row, owners in enumerate(state.samples) if sample in owners)
            log_prob = state.transition.log_prob(state.after)[row]
            assert torch.equal(paths.log_probs[sample, place], log_prob)
            assert torch.equal(paths.means[sample, place], state.transition.mean[row])
            assert state.stochastic
        for number, step in enumerate((0, 1, 8)):
            assert torch.equal(paths.kept[sample, number], steps["x", step])
        # The whole grid of a sample, one step after the other.
        indices = sorted(step for step in steps if isinstance(step, int))
        assert indices == [*range(start + 2), *coarser(start + 2, 8, drawn.how.fraction)[:-1]]


def test_sampler_tells_who_shares_a_beginning():
    drawn = sampler(window=1)
    found = [state.samples for state in drawn.states(samples(start=(3, 1)), conditions)]
    alone = tuple((sample,) for sample in (3, 4, 5, 0, 1, 2))
    # In the order of the windows: the second prompt's three samples reach theirs first.
    assert found[:3] == [((3, 4, 5), (0, 1, 2)), ((0, 1, 2),), ((0, 1, 2),)]
    assert found[3] == found[-1] == alone


def test_sampler_keeps_states_of_deterministic_samples():
    drawn = sampler(window=0)
    rows = samples(4, 1, start=0)
    paths = drawn.draw(rows, conditions, 4, keep=[8, 0, 3])
    x, sigmas = normal((3, 1, 2, 2), [row.initial for row in rows], CPU), drawn.schedule.sigmas
    states = [x]
    with torch.no_grad():
        for index in range(8):
            prediction = drawn.predict(x, torch.full((4,), index), conditions(range(4)))
            x = x - (sigmas[index] - sigmas[index + 1]).float() * prediction
            states.append(x)
    torch.testing.assert_close(
        paths.kept, torch.stack([states[step] for step in (8, 0, 3)], dim=1), rtol=1e-6, atol=1e-6
    )
    assert torch.equal(paths.kept[:, 0], paths.clean)
    torch.testing.assert_close(drawn.draw(rows, conditions, 2, keep=[3]).kept[:, 0], paths.kept[:, 2])
    assert torch.equal(paths.rows(torch.tensor([2])).kept, paths.kept[2:3])
    assert drawn.draw(rows, conditions, 4).kept is None


def test_sampler_refuses_steps_that_are_not_taken():
    drawn = sampler(window=2, fraction=0.5)
    with pytest.raises(
        UserError,
        match=r"keep has steps \[5, 9\], which the sampler does not take: choose from \[0, 1, 2, 3, 4, 6, 8",
    ):
        drawn.draw(samples(), conditions, 6, keep=[0, 5, 9])
    with pytest.raises(ValueError, match="the last of 8 steps has no noise"):
        sampler(window=2).draw(samples(start=6), conditions, 6)


def test_sampler_refuses_moves_that_do_not_fit():
    drawn, two = sampler(window=1), slice(0, 2)
    x = drawn.noise([1, 2, 3, 4])
    for words, message in (
        ({"rows": two, "start": [0, 0], "stop": [1, 1], "seeds": [5]}, "a move of 2 rows has .* 1 seeds"),
        ({"rows": two, "start": [0], "stop": [1]}, r"2 rows has start \(1,\), stop \(1,\)"),
        ({"rows": two, "start": [0, 0], "stop": [1]}, r"start \(2,\), stop \(1,\)"),
        ({"rows": slice(4, 6), "start": [], "stop": []}, "a move of 0 rows"),
        ({"rows": slice(0, 4, 2), "start": [0, 0], "stop": [1, 1]}, "must be consecutive"),
        ({"rows": slice(2, 4), "start": [0, 0], "stop": [1, 1], "multistep": True}, "begin with the first"),
    ):
        with pytest.raises(UserError, match=message):
            next(drawn.walk(x, [Move(**words)], conditions([0] * 4)))
    assert list(drawn.states([], conditions)) == []
    for rows, batch in (([], 4), (samples(), 0)):
        with pytest.raises(UserError, match="nothing to draw"):
            drawn.draw(rows, conditions, batch)


def test_sampler_leaves_gradients_as_its_caller_has_them():
    drawn = sampler(window=1)
    for state in drawn.states(samples(), conditions):
        assert torch.is_grad_enabled()
        assert not state.after.requires_grad


@pytest.mark.parametrize("count", [5, 12])
def test_solver_equals_diffusers_dpm_solver(count):
    from diffusers import DPMSolverMultistepScheduler

    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, solver_type="midpoint"
    )
    scheduler.set_timesteps(count)
    denoiser = ToyDenoiser(PointPipeline())
    torch.nn.init.normal_(denoiser.transformers["transformer"].outer.weight, std=0.2)
    schedule = type(schedule_of(denoiser, 2))(scheduler.sigmas.double())
    x = other = torch.randn(2, 3, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    solver = Multistep()
    with torch.no_grad():
        for index, timestep in enumerate(scheduler.timesteps):
            now = torch.full((2,), index)
            levels = schedule.levels(now, now + 1)
            step = transition("ode", x, denoiser.predict(x, levels.s.float(), {}), levels, 0.0)
            x = solver.step(x, step.clean, levels)
            prediction = denoiser.predict(other, scheduler.sigmas[index].expand(2), {})
            other = scheduler.step(prediction, timestep, other).prev_sample
            torch.testing.assert_close(x, other, rtol=1e-4, atol=1e-5)


def test_solver_beats_euler_with_as_many_steps():
    truth = sampler(400, window=0).draw(samples(4, 1, start=0), conditions, 4).clean
    errors = {}
    for solver in ("euler", "dpm++"):
        drawn = sampler(24, window=0, solver=solver, fraction=0.5)
        errors[solver] = (drawn.draw(samples(4, 1, start=0), conditions, 4).clean - truth).square().mean().item()
        assert drawn.meter.totals["forwards"] == 4 * 12
    assert errors["dpm++"] < 0.5 * errors["euler"]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("solver", ["euler", "dpm++"])
def test_sampler_of_models_with_alpha_bar(prediction_type, solver):
    """The toy's flow in another parametrisation: deterministic samples agree with the flow's own."""
    how = {"kind": "ddim", "noise": 1.0, "window": 0, "solver": solver}
    fine = sampler(200, prediction_type, **how).draw(samples(4, 1, start=0), conditions, 4).clean
    flow = sampler(200, window=0, solver=solver).draw(samples(4, 1, start=0), conditions, 4).clean
    assert (fine - flow).abs().mean() < 0.1
    drawn = sampler(8, prediction_type, **{**how, "window": 3})
    paths = drawn.draw(samples(), conditions, 6)
    assert torch.isfinite(paths.log_probs).all()
    step = drawn.step(paths.states[:, 0], drawn.predict(paths.states[:, 0], paths.start, {}), paths.start)
    assert (step.log_prob(paths.states[:, 1]) - paths.log_probs[:, 0]).abs().max() <= 1e-5


def test_seeds_are_one_sequence_per_name():
    seeds = {seed_of(1, stream, a, b) for stream in ("step", "initial") for a in range(5) for b in range(5)}
    assert len(seeds) == 50
    first = normal((4,), [3, 4], CPU)
    assert torch.equal(first[1], normal((4,), [4], CPU)[0])


def test_coarser_grids():
    assert coarser(3, 12, 0.4) == [3, 5, 7, 10, 12]
    assert coarser(11, 12, 0.4) == [11, 12]
    assert coarser(0, 4, 1.0) == [0, 1, 2, 3, 4]
