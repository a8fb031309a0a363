"""Measures of clips with known results."""

import pytest
import torch
from torch import Tensor

from postgen import UserError, world
from postgen.metrics.bootstrap import bootstrap, ratio_of_means
from postgen.metrics.video_measures import flicker, motion, warp_error


def pictures(frames: int = 6) -> Tensor:
    """Return two clips that repeat one smooth random picture each."""
    coarse = torch.rand(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    picture = torch.nn.functional.interpolate(coarse, size=48, mode="bicubic").clamp(0, 1)
    return picture[:, None].expand(-1, frames, -1, -1, -1).clone()


@pytest.fixture(scope="module")
def scenes() -> world.Frames:
    specs = [world.sample(seed, num_bodies=1, camera="static") for seed in range(6)]
    return world.render(specs, size=48, num_frames=7)


def test_flicker_is_what_reverses() -> None:
    still = pictures()
    assert torch.equal(flicker(still), torch.zeros(2))
    fade = still * torch.linspace(1, 0.5, 6)[None, :, None, None, None]
    assert flicker(fade).max() < 1e-6
    jumping = still * 0.5
    jumping[:, ::2] += 0.1
    assert torch.allclose(flicker(jumping), torch.full((2,), 0.1))


def test_flicker_where_asked() -> None:
    clip = pictures()
    clip[:, 3, :, :10] += 0.2
    mask = torch.ones(2, 6, 48, 48, dtype=torch.bool)
    mask[:, 3, :10] = False
    assert flicker(clip, mask).max() == 0
    assert flicker(clip).min() > 0
    assert flicker(clip, torch.zeros_like(mask)).isnan().all()


def test_exact_flow_leaves_nothing_of_a_shift() -> None:
    still = pictures()
    clip = torch.stack([torch.roll(still[:, t], (2 * t, t), dims=(-2, -1)) for t in range(6)], dim=1)
    flow = torch.tensor([1.0, 2.0])[None, None, :, None, None].expand(2, 5, 2, 48, 48)
    # Pixels that roll over the edge do not follow the flow, so the mask leaves the border out.
    mask = torch.zeros(2, 5, 48, 48, dtype=torch.bool)
    mask[:, :, 12:36, 12:36] = True
    assert warp_error(clip, flow, mask).max() < 1e-5
    assert warp_error(clip, torch.zeros_like(flow), mask).min() > 0.01
    away = flow + 100
    assert warp_error(clip, away).isnan().all()


def test_exact_flow_of_the_world(scenes: world.Frames) -> None:
    assert scenes.flow_BF2HW is not None
    error = warp_error(scenes.rgb_BF3HW, scenes.flow_BF2HW)
    assert (error < warp_error(scenes.rgb_BF3HW, torch.zeros_like(scenes.flow_BF2HW)) + 1e-6).all()
    assert error.max() < 0.02


def test_motion_is_that_of_the_world(scenes: world.Frames) -> None:
    assert scenes.flow_BF2HW is not None
    true = scenes.flow_BF2HW.norm(dim=2).mean(dim=(1, 2, 3))
    found = motion(scenes.rgb_BF3HW, reach=6)
    assert torch.corrcoef(torch.stack([true, found]))[0, 1] > 0.8
    assert (found[true > 0.05] > 0).all()
    frozen = scenes.rgb_BF3HW[:, :1].expand_as(scenes.rgb_BF3HW)
    noise = 0.01 * torch.randn(frozen.shape, generator=torch.Generator().manual_seed(0))
    assert motion(frozen + noise, reach=2).max() == 0


def test_motion_of_a_shift() -> None:
    still = pictures(5)
    clip = torch.stack([torch.roll(still[:, t], t, dims=-1) for t in range(5)], dim=1)
    # All blocks except those that roll over the edge move by one pixel per frame.
    assert motion(clip, reach=5) == pytest.approx(torch.ones(2), abs=0.2)
    assert motion(clip, gap=1, reach=2) == pytest.approx(torch.ones(2), abs=0.1)


def test_clips_of_another_form() -> None:
    with pytest.raises(UserError, match="at least 3 frames"):
        flicker(torch.zeros(1, 2, 3, 8, 8))
    with pytest.raises(UserError, match="flow must be"):
        warp_error(torch.zeros(1, 2, 3, 8, 8), torch.zeros(1, 2, 2, 8, 8))
    with pytest.raises(UserError, match="at least one block high and wide"):
        motion(torch.zeros(1, 5, 3, 8, 8), block=9)


def test_bootstrap_intervals() -> None:
    values = torch.randn(400, generator=torch.Generator().manual_seed(1)) + 3
    interval = bootstrap(values)
    # The interval is about 1.96 standard errors of the mean on either side.
    error = float(values.std()) / 20
    assert interval.value == pytest.approx(float(values.mean()))
    assert interval.low == pytest.approx(interval.value - 1.96 * error, abs=0.03)
    assert interval.high == pytest.approx(interval.value + 1.96 * error, abs=0.03)
    assert bootstrap(values) == interval
    pairs = torch.stack([2 * values, values], dim=1)
    ratio = bootstrap(pairs, ratio_of_means)
    assert (ratio.low, ratio.value, ratio.high) == pytest.approx((2.0, 2.0, 2.0))
    with pytest.raises(UserError, match="finite"):
        bootstrap(torch.tensor([1.0, torch.nan]))
