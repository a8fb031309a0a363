"""Rollouts with exact oracles: recovered latents, number of forward passes, content of the state."""

from __future__ import annotations

import gc
from dataclasses import replace

import pytest
import torch

from postgen.errors import UserError
from postgen.families import denoiser_for
from postgen.sampling.meter import Meter
from postgen.sampling.sampler import Move, Sampler, Sampling
from postgen.sampling.schedule import schedule_of
from postgen.worldweaver.levels import FrameLevels, Role
from postgen.worldweaver.memory import MemoryBank
from postgen.worldweaver.rollout import Rollout
from postgen.worldweaver.segments import Segments
from tests.families.tiny_pipelines import tiny_pipeline
from tests.worldweaver.oracle import SHAPE, Mixer, Oracle, begun, clean, generators, prompt, rollout, schedule


def video(made, state, **words):
    return torch.cat([group.latents for group in made.groups(state, **words)], 2)


def test_an_oracle_recovers_the_clean_latents():
    """7 groups with 30 steps and 3 segments take 90 forward passes, and the result is the clean video."""
    truth = clean(21, rows=2)
    oracle = Oracle(truth)
    made = rollout(oracle, steps=30, groups=3, frames=3)
    oracle.state = state = begun(made, rows=2, num_latents=21)
    starts = []
    found = video(made, state, on_group=lambda group: starts.append(group.start_frame))
    assert (found - truth).abs().max() <= 2e-7 * truth.abs().max()
    assert starts == [0, 3, 6, 9, 12, 15, 18]
    assert len(oracle.calls) == state.calls == made.segments.calls(7) == 90
    assert state.finished == state.next_frame == 21


@pytest.mark.parametrize("count", [1, 2, 5, 7])
def test_odd_numbers_of_frames(count):
    truth = clean(count)
    oracle = Oracle(truth)
    made = rollout(oracle)
    oracle.state = begun(made, num_latents=count)
    found = [group.latents for group in made.groups(oracle.state)]
    assert [z.shape[2] for z in found] == [2] * (count // 2) + [1] * (count % 2)
    torch.testing.assert_close(torch.cat(found, 2), truth, rtol=0, atol=1e-6)


def test_the_network_sees_the_levels_of_the_schedule_and_the_memory_in_front():
    oracle = Oracle(clean(8))
    made = rollout(oracle)
    oracle.state = state = begun(made, num_latents=8)
    video(made, state)
    sigmas = schedule(6).sigmas.float()
    for (z, levels), flight in zip(oracle.calls, made.segments.walk(4), strict=True):
        expected = [float(sigmas[index]) for index in flight.values() for _ in range(2)]
        assert levels.rgb[0, levels.predicted].tolist() == expected
        assert torch.equal(levels.sigma[..., 0][:, levels.predicted], levels.sigma[..., 1][:, levels.predicted])
        shown = min(5, 2 * next(iter(flight)))
        assert (~levels.predicted).sum() == shown
        assert z.shape[2] == shown + len(expected)
        assert levels.role.tolist() == sorted(levels.role.tolist())
        long = levels.role == Role.LONG
        assert torch.equal(levels.sigma[0, long], torch.tensor([[0.12, 0.0]]).expand(int(long.sum()), 2))
        assert not levels.sigma[0, levels.role == Role.SHORT].any()


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_one_chunk_without_memory_is_the_stock_sampler(guidance):
    """With K = 1 and no memory, the result is bitwise that of `Sampler.walk`, also with guidance."""
    mixer = Mixer()
    made = rollout(mixer, groups=1, frames=5, guidance=guidance)
    state = begun(made, rows=2, bank=MemoryBank(0, 0, 0), num_latents=10)
    found = list(made.groups(state))

    class Alone:
        def predict(self, x, sigma, condition, guidance):
            levels = sigma[:, None, None].expand(-1, x.shape[2], 2)
            role = torch.full((x.shape[2],), Role.PREDICT)
            return mixer.predict(x, FrameLevels(sigma=levels, role=role), condition, guidance)

    sampler = Sampler(Alone(), schedule(6), Sampling(guidance=guidance), Meter(torch.device("cpu")))
    again = generators(7, 8)
    for group in found:
        x = torch.stack([torch.randn(1, SHAPE[0], 5, *SHAPE[1:], generator=each)[0] for each in again])
        moves = [Move(rows=slice(0, 2), start=[index] * 2, stop=[index + 1] * 2) for index in range(6)]
        *_, last = sampler.walk(x, moves, prompt(rows=2))
        assert torch.equal(group.latents, last.after)


def test_rows_do_not_depend_on_each_other():
    made = rollout(Mixer())
    both = video(made, begun(made, rows=2, num_latents=13))
    for row, seed in enumerate((7, 8)):
        alone = video(made, begun(made, generators=generators(seed), num_latents=13))
        assert torch.equal(both[row : row + 1], alone)


def test_guidance_and_memory_matter():
    """The mixer depends on guidance and memory; otherwise the other tests of this file would show nothing."""
    plain, guided = rollout(Mixer()), rollout(Mixer(), guidance=3.0)
    first = video(plain, begun(plain, num_latents=12))
    assert not torch.allclose(first, video(guided, begun(guided, num_latents=12)))
    other = video(plain, begun(plain, bank=MemoryBank(3, 2, capacity=8, mem_noise=0.0), num_latents=12))
    # Short memory has 2 frames without noise, so the first group does not see noise on memory.
    assert torch.equal(first[:, :, :2], other[:, :, :2])
    assert not torch.allclose(first, other)


def test_epsilon_models_step_by_ddim():
    def alpha_bar(sigma):
        return (1 - 0.98 * sigma).square()

    truth, steps = clean(10), schedule(6)
    steps = replace(steps, prediction_type="epsilon", alpha_bars=alpha_bar(steps.sigmas))

    class Noise(Oracle):
        def predict(self, z, levels, condition, guidance):
            start, count = self.state.finished, int(levels.predicted.sum())
            bar = alpha_bar(levels.rgb[:, None, levels.predicted, None, None].double()).to(z)
            return torch.cat([torch.zeros_like(z[:, :, :-count]), self._noise(z, bar, start, count)], 2)

        def _noise(self, z, bar, start, count):
            return (z[:, :, -count:] - bar.sqrt() * self.video[:, :, start : start + count]) / (1 - bar).sqrt()

    oracle = Noise(truth)
    made = Rollout(oracle, steps, Segments(steps=6, groups=3), frames=2, alpha_bar=alpha_bar)
    oracle.state = begun(made, num_latents=10)
    torch.testing.assert_close(video(made, oracle.state), truth, rtol=0, atol=2e-6)
    with pytest.raises(UserError, match="give alpha_bar for every model but a flow model"):
        Rollout(oracle, steps, Segments(steps=6, groups=3))


def test_a_prompt_switches_where_a_group_begins():
    mixer = Mixer()
    made = rollout(mixer)
    schedule_of_prompts = [(0, prompt(1.0)), (3, prompt(2.0)), (8, prompt(3.0))]
    video(made, begun(made, prompts=schedule_of_prompts, num_latents=12))
    # A shift has 2 forward passes. Groups join at frames 0, 2, 4, 6, 8 and 10, then the window drains.
    assert mixer.told == [value for value in (1, 1, 2, 2, 3, 3, 3, 3) for _ in range(2)]


def test_a_given_beginning_is_memory():
    truth = clean(9)
    oracle = Oracle(truth)
    made = rollout(oracle)
    oracle.state = state = begun(made, num_latents=6, given=truth[:, :, :3], unknown=["depth"])
    assert (state.next_frame, state.end, len(state.bank)) == (3, 9, 3)
    torch.testing.assert_close(video(made, state), truth[:, :, 3:], rtol=0, atol=1e-6)
    z, levels = oracle.calls[0]
    assert levels.sigma[0, :3].tolist() == [[pytest.approx(0.12), 1.0], [0.0, 1.0], [0.0, 1.0]]
    assert torch.equal(z[:, :2, 1:3], truth[:, :2, 1:3])
    assert not torch.allclose(z[:, 2:, 1:3], truth[:, 2:, 1:3])


def test_callbacks_see_every_call_and_may_change_the_latents():
    made = rollout(Mixer())
    seen = []
    state = begun(made, num_latents=6)
    found = video(made, state, on_step=lambda step: seen.append(step))
    assert [step.call for step in seen] == list(range(made.segments.calls(3)))
    assert seen[2].index.tolist() == [2, 2, 0, 0]
    assert torch.equal(seen[5].latents[:, :, :2], found[:, :, :2])
    assert torch.equal(seen[5].clean[:, :, :2], seen[5].latents[:, :, :2])
    zeroed = video(made, begun(made, num_latents=6), on_step=lambda step: torch.zeros_like(step.latents))
    assert not zeroed.any()
    with pytest.raises(UserError, match=r"on_step returned latents of shape \(1,\): return shape \(1, 4, 2, 2, 3\)"):
        video(made, begun(made, num_latents=6), on_step=lambda step: torch.zeros(1))


def test_an_exception_leaves_the_state_at_the_beginning_of_its_shift():
    made = rollout(Mixer())
    expected = video(made, begun(made, num_latents=14))

    def stop(step):
        if step.call == 11:
            raise KeyboardInterrupt

    state, found = begun(made, num_latents=14), []
    stopped = made.groups(state, on_step=stop, on_group=lambda group: found.append(group.latents))
    with pytest.raises(KeyboardInterrupt):
        list(stopped)
    assert len(found) == 3
    found += [group.latents for group in made.groups(state)]
    assert torch.equal(torch.cat(found, 2), expected)


@pytest.mark.parametrize("groups", [1, 3])
def test_a_group_that_a_callback_did_not_take_comes_again(groups):
    made, seen = rollout(Mixer(), groups=groups), []
    expected = video(made, begun(made, num_latents=8))

    def full(group):
        seen.append(group.start_frame)
        if seen.count(2) == 1 and group.start_frame == 2:
            raise OSError("no space left")

    state = begun(made, num_latents=8)
    first, second = made.groups(state, on_group=full), made.groups(state, on_group=full)
    found = [next(first).latents]
    with pytest.raises(OSError, match="no space left"):
        next(first)
    found += [group.latents for group in second]
    assert seen == [0, 2, 2, 4, 6]
    assert torch.equal(torch.cat(found, 2), expected)


def test_memory_is_flat_over_200_groups():
    """In a video without end, live tensors and their bytes are equal after 20, 100 and 200 groups."""
    made = rollout(Mixer(), steps=3)
    state = begun(made, bank=MemoryBank(long=4, short=2, capacity=16))
    widths, alive = set(), {}
    made._steps.predictor.predict = watched(made._steps.predictor.predict, widths)
    for number, _ in enumerate(made.groups(state), 1):
        assert len(state.bank) <= 16
        if number == 20:
            widths.clear()
        if number in (20, 100, 200):
            gc.collect()
            alive[number] = tensors_alive()
        if number == 200:
            break
    assert widths == {4 + 2 + 3 * 2}
    assert alive[20] == alive[100] == alive[200]
    assert {group.z.untyped_storage().nbytes() for group in state.flight} == {4 * 4 * 2 * 2 * 3}
    assert state.bank.frame_index[0] == 0
    assert state.bank.frame_index[-1] == 399


def watched(predict, widths):
    def watching(z, *rest):
        widths.add(z.shape[2])
        return predict(z, *rest)

    return watching


def tensors_alive():
    found = [thing for thing in gc.get_objects() if type(thing) is torch.Tensor]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in found}
    return len(found), sum(storages.values())


def test_what_does_not_fit_is_refused():
    made = rollout(Mixer())
    with pytest.raises(UserError, match="the prompt schedule is empty: give a prompt for frame 0"):
        begun(made, prompts=[])
    with pytest.raises(UserError, match="begins at latent frame 2: give a prompt for frame 0"):
        begun(made, prompts=[(2, prompt())])
    with pytest.raises(UserError, match=r"start frames \[0, 4, 4\]"):
        begun(made, prompts=[(0, prompt()), (4, prompt()), (4, prompt())])
    with pytest.raises(UserError, match="2 rows of 'prompt': give 1 rows"):
        begun(made, prompts=[(0, prompt(rows=2))])
    with pytest.raises(UserError, match="no generators given"):
        begun(made, generators=[])
    with pytest.raises(UserError, match="num_latents must be at least 1"):
        begun(made, num_latents=0)
    with pytest.raises(UserError, match="5 channels cannot be divided into 2 modalities"):
        begun(made, shape=(5, 2, 3))
    with pytest.raises(UserError, match=r"given latents have shape \(1, 4, 1, 2, 2\): give \(1, 4, frames, 2, 3\)"):
        begun(made, given=clean(1, shape=(4, 2, 2)))
    with pytest.raises(UserError, match="given frames need a memory"):
        begun(made, given=clean(1), bank=MemoryBank(0, 0, 0))
    used = MemoryBank()
    used.add(clean(1), 0)
    with pytest.raises(UserError, match="the memory bank holds 1 frames"):
        begun(made, bank=used)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_video_model_of_diffusers(guidance):
    """RGB through a denoiser: one group is bitwise the stock sampler; several groups use memory, with two rows."""
    pipe, size = tiny_pipeline("LTX")
    denoiser = denoiser_for(pipe)
    channels, frames, height, width = shape = denoiser.latent_shape(**size)
    condition = denoiser.encode_prompt(["a ball", "a cube"], guidance=guidance > 1)

    class OnlyColour:
        def predict(self, z, levels, condition, guidance):
            return denoiser.predict(z, levels.rgb, condition, guidance)

    steps = schedule_of(denoiser, 3, shape)
    made = Rollout(OnlyColour(), steps, Segments(steps=3, groups=1), frames=frames, guidance=guidance)
    nothing = MemoryBank(0, 0, 0, modalities=1)
    told = {"prompts": [(0, condition)], "shape": (channels, height, width)}
    (group,) = made.groups(begun(made, rows=2, bank=nothing, num_latents=frames, **told))
    sampler = Sampler(denoiser, steps, Sampling(guidance=guidance, size=size), Meter(torch.device("cpu")))
    moves = [
        Move(rows=slice(0, 2), start=torch.full((2, frames), step), stop=torch.full((2, frames), step + 1))
        for step in range(3)
    ]
    *_, last = sampler.walk(sampler.noise([7, 8]), moves, condition)
    assert torch.equal(group.latents, last.after)
    made = Rollout(OnlyColour(), steps, Segments(steps=3, groups=3), frames=2, guidance=guidance)
    bank = MemoryBank(long=2, short=1, modalities=1)
    long = video(made, begun(made, rows=2, bank=bank, num_latents=7, **told))
    assert long.shape == (2, channels, 7, height, width)
    assert torch.isfinite(long).all()
