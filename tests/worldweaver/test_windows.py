"""Training windows equal those of rollouts: frames, levels, counted losses, and the model's own memory."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from postgen.errors import UserError
from postgen.worldweaver.levels import Role
from postgen.worldweaver.segments import Segments
from postgen.worldweaver.selection import POLICIES
from postgen.worldweaver.window_config import WindowConfig
from postgen.worldweaver.window_loss import window_loss
from postgen.worldweaver.windows import Layout, Window, Windows
from tests.worldweaver.oracle import Oracle, begun, clean, rollout, schedule

ONE_LEVEL = {"independent_share": 0.0, "split_share": 0.0, "drop_share": 0.0, "mem_noise": 0.0, "mem_noise_max": 0.0}
ONE_LEVEL |= {"short_noise_max": 0.0}


def config(**changes: Any) -> WindowConfig:
    kept = {"causal_block_size": 2, "groups": 3, "num_inference_steps": 6, "history_sizes": [3, 2]}
    return WindowConfig(**{**kept, **changes})


def windows(frames: int = 20, **changes: Any) -> Windows:
    made = config(**changes)
    return Windows(made, schedule(made.num_inference_steps), frames)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def looking(video: Tensor) -> Tensor:
    """Return cameras that rotate a little with every frame."""
    poses = torch.zeros(len(video), video.shape[2], 3, 4)
    for frame in range(video.shape[2]):
        angle = torch.tensor(0.1 * frame)
        c, s = angle.cos(), angle.sin()
        poses[:, frame, :, :3] = torch.tensor([[c, s, 0], [0, 0, 1], [-s, c, 0]])
    return poses


@pytest.mark.parametrize("policy", POLICIES)
def test_training_sees_what_a_rollout_sees(policy: str) -> None:
    """Every forward pass of a rollout has the memory, roles, levels and latents of a training window."""
    video = clean(20, rows=2)
    poses = looking(video) if policy == "camera" else None
    made = windows(memory_policy=policy, **ONE_LEVEL)
    oracle = Oracle(video)
    run = rollout(oracle, poses=None if poses is None else lambda start, stop: poses[:, start:stop])
    state = oracle.state = begun(run, rows=2, bank=made.config.bank(2), num_latents=20)
    shifts = made.segments.shifts(10)
    for _ in run.groups(state):
        pass
    calls = iter(oracle.calls)
    kinds = set()
    for shift in shifts:
        layout = Layout(ages=shift.ages, start=2 * shift.oldest)
        kinds.add(len(shift.ages))
        for step in range(made.segments.length):
            z, levels = next(calls)
            window = made.at(layout, video, step / made.segments.length, torch.zeros(2), poses)
            assert torch.equal(window.levels.sigma, levels.sigma)
            assert torch.equal(window.levels.role, levels.role)
            memory = int((levels.role != Role.PREDICT).sum())
            # The memory of the rollout holds its own results, which equal the video up to rounding.
            assert torch.allclose(window.clean[:, :, :memory], z[:, :, :memory], atol=1e-5)
    assert next(calls, None) is None
    assert kinds == {1, 2, 3}


@pytest.mark.parametrize("policy", ["depth_sim", "camera"])
def test_a_large_batch_may_choose_other_memory_for_each_row(policy: str) -> None:
    video = clean(20, rows=64)
    made = windows(memory_policy=policy, **ONE_LEVEL)
    window = made.at(Layout(ages=(0, 1, 2), start=14), video, 0.0, torch.zeros(64), looking(video))
    assert len(window.clean) == 64


def test_drawn_windows_are_those_of_rollouts() -> None:
    """With one phase for all groups, the levels of a drawn window lie between those of a shift's start and end."""
    video, made = clean(20, rows=4), windows(**ONE_LEVEL)
    for seed in range(30):
        layout = made.layout(seeded(seed))
        window = made.draw(layout, video, seeded(seed))
        level = window.levels.sigma[:, window.levels.predicted]
        assert torch.equal(level, level[..., :1].expand_as(level))
        memory = window.levels.sigma[:, ~window.levels.predicted]
        assert not memory[..., 0].any()
        assert layout.start == 1 or not memory.any()
        assert window.counted.all()
        below, above = (made.at(layout, video, phase, torch.zeros(4), None).levels.sigma for phase in (1.0, 0.0))
        assert ((window.levels.sigma >= below) & (window.levels.sigma <= above) | (memory.shape[1] == 1)).all()
        assert torch.equal(window.clean, made.at(layout, video, 0.0, torch.zeros(4), None).clean)


def test_shares() -> None:
    made = windows(40)
    layouts = [made.layout(seeded(seed)) for seed in range(2000)]
    count = Counter(len(layout.ages) for layout in layouts)
    assert count[3] / 2000 == pytest.approx(0.8, abs=0.03)
    full = [layout.start for layout in layouts if len(layout.ages) == 3]
    assert full.count(0) / len(full) == pytest.approx(0.1, abs=0.02)
    # Start 1 is also one of the 34 starts of windows with memory.
    assert full.count(1) / len(full) == pytest.approx(0.1 + 0.8 / 34, abs=0.02)
    assert max(full) == 34
    fill = [layout.start for layout in layouts if layout.ages in ((0,), (1, 0))]
    assert fill.count(0) / len(fill) == pytest.approx(0.5, abs=0.15)
    window = made.draw(Layout(ages=(2, 1, 0), start=20), torch.zeros(4000, 4, 40, 1, 1), seeded())
    rgb, depth = window.levels.sigma[:, 5:].unbind(-1)
    counted = window.counted
    dropped = ~counted[..., 1].any(1)
    assert float(dropped.float().mean()) == pytest.approx(0.1, abs=0.02)
    assert (window.levels.sigma[dropped][..., 1] == 1).all()
    still = (rgb == 0).all(1)
    assert float(still.float().mean()) == pytest.approx(0.05, abs=0.015)
    assert not counted[still][..., 0].any()
    assert counted[still][..., 1].all()
    # With clean RGB, depth has a single level for all frames.
    assert torch.equal(depth[still], depth[still][:, :1].expand(-1, 6))
    assert float((rgb == depth).all(1).float().mean()) == pytest.approx(0.8, abs=0.03)
    memory = window.levels.sigma[:, :5]
    assert 0.28 < memory[:, :3, 0].max() <= 0.3
    assert 0.045 < memory[:, 3:, 0].max() <= 0.05
    assert not memory[~dropped][..., 1].any()


def test_arms() -> None:
    """Settings of the arms: a disabled part has no effect on a window."""
    video, layout = clean(20, rows=8), Layout(ages=(2, 1, 0), start=10)
    plain = windows(**{**ONE_LEVEL, "aux": []}).draw(layout, video[:, :2], seeded())
    assert plain.levels.sigma.shape == (8, 11, 1)
    assert not plain.levels.sigma[:, :5].any()
    blind = windows(depth_in_memory=False).draw(layout, video, seeded())
    assert (blind.levels.sigma[:, :5, 1] == 1).all()
    apart = windows(**{**ONE_LEVEL, "independent_share": 1.0}).draw(layout, video, seeded()).levels.sigma[:, 5:, 0]
    segments = Segments(steps=6, groups=3)
    phase = [float(made) for made in apart[0, ::2]]
    bounds = schedule(6).sigmas[list(segments.bounds)].tolist()[::-1]
    assert all(low <= one <= high for one, low, high in zip(phase, bounds, bounds[1:], strict=False))
    one = windows(groups=1, history_sizes=[0, 0])
    assert one.layout(seeded()) == Layout(ages=(0,), start=0)
    assert one.draw(one.layout(seeded()), video, seeded()).clean.shape[2] == 2
    flow = windows(aux=["depth", "flow"]).draw(layout, clean(20, shape=(6, 2, 3)), seeded())
    assert (flow.levels.sigma[:, :3, 2] == 0.5).all()
    assert flow.counted.shape == (1, 6, 3)


def test_corrupted_memory_is_rgb_alone() -> None:
    video, layout = clean(20, rows=64), Layout(ages=(2, 1, 0), start=10)
    wrong = torch.full((64, 2, 20, 2, 3), 7.0)
    made = windows()
    plain, other = (made.draw(layout, video, seeded(), corrupted=each) for each in (None, wrong))
    changed = (other.clean != plain.clean).flatten(3).any(3)
    rows = changed.any(2).any(1)
    assert 8 < int(rows.sum()) < 32
    assert changed[rows][:, :2, :5].all()
    assert not changed[:, 2:].any()
    assert not changed[:, :, 5:].any()


def drawn(**changes: Any) -> tuple[Window, Tensor]:
    made = windows(**changes)
    video = clean(20, rows=4)
    window = made.draw(Layout(ages=(2, 1, 0), start=10), video, seeded(3))
    return window, torch.randn(window.clean.shape, generator=seeded(4))


def test_an_oracle_has_no_loss_and_memory_carries_none() -> None:
    window, noise = drawn()
    z, target = window.noised(noise), window.target(noise)
    sigma = window.levels.sigma[:, -6:].movedim(2, 1).repeat_interleave(2, 1)[..., None, None]
    velocity = torch.full_like(z, torch.nan)  # NaN shows any use of the velocity of memory
    velocity[:, :, -6:] = (z - window.clean)[:, :, -6:] / sigma.clamp_min(1e-9)
    velocity[:, :, -6:] = torch.where(sigma > 0, velocity[:, :, -6:], 1e9)  # frames without noise have no loss either
    loss, terms = window_loss(velocity, target, window.counted, (1, 0.5, 0.25))
    assert float(loss) < 1e-9
    assert terms.keys() == {"rgb_loss", "depth_loss"}
    exact = torch.cat([torch.full_like(z[:, :, :5], torch.nan), target], 2)
    assert float(window_loss(exact, target, window.counted, (1, 0.5, 0.25))[0]) == 0


def test_one_group_without_memory_and_depth_is_flow_matching() -> None:
    made = windows(groups=1, history_sizes=[0, 0], aux=[])
    video = clean(20, rows=3, shape=(2, 2, 3))
    window = made.draw(made.layout(seeded()), video, seeded())
    noise = torch.randn(window.clean.shape, generator=seeded(1))
    level = window.levels.sigma[:, :1, 0, None, None]
    x = (1 - level[:, None]) * video[:, :, :2] + level[:, None] * noise
    assert torch.equal(window.noised(noise), x)
    answer = torch.randn(x.shape, generator=seeded(2))
    expected = (answer - (noise - video[:, :, :2])).square().mean()
    loss, _ = window_loss(answer, window.target(noise), window.counted, (1, 0.5, 0.25))
    torch.testing.assert_close(loss, expected)


def test_weights_and_counts_of_the_loss() -> None:
    window, noise = drawn()
    answer = torch.randn(window.clean.shape, generator=seeded(5), requires_grad=True)
    loss, terms = window_loss(answer, window.target(noise), window.counted, (1, 0.5, 0.25))
    torch.testing.assert_close(loss, terms["rgb_loss"] + 0.5 * terms["depth_loss"])
    loss.backward()
    used = answer.grad[:, :, -6:].unflatten(1, (2, 2)).abs().amax((2, 4, 5)) > 0  # type: ignore[index]
    assert torch.equal(used, window.counted.movedim(2, 1))
    assert not answer.grad[:, :, :5].any()  # type: ignore[index]
    nothing = torch.zeros_like(window.counted)
    assert float(window_loss(answer.detach(), window.target(noise), nothing, (1, 1, 1))[0]) == 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"aux": ["flow"]}, r"aux is \['flow'\], it must be \[\], \[depth\] or \[depth, flow\]"),
        ({"num_inference_steps": 7}, r"num_inference_steps is 7, it must be n \* groups \(3\)"),
        ({"history_sizes": [1]}, "history_sizes is .1., it must be two numbers"),
        ({"memory_policy": "best"}, "memory_policy is 'best', it must be one of recent, logspace"),
        ({"fill_share": 0.7, "drain_share": 0.5}, "drain_share is 0.5, it must be at most 1 together with fill_share"),
        ({"split_share": 1.5}, "split_share is 1.5, it must be from 0 to 1"),
        ({"loss_weights": [0.0, 1.0, 1.0]}, "RGB above 0"),
        ({"aux": [], "depth_in_memory": False}, "depth_in_memory is False, it must be true with aux"),
        ({"aux": [], "memory_policy": "depth_sim"}, "another policy than depth_sim"),
        ({"depth_in_memory": False, "memory_policy": "depth_sim"}, "another policy than depth_sim"),
    ],
)
def test_wrong_settings(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        config(**changes)


def test_clips_that_are_too_short() -> None:
    assert windows(7)
    with pytest.raises(UserError, match="clips of 6 latent frames are too short for 3 groups of 2 and memory"):
        windows(6)
