"""The benchmark's measurements: what it would say of clips whose flaw is known, and the memory it gates."""

import pytest
import torch

from benchmarks.enhance_a_video import compared, ground, markdown, means, measured
from benchmarks.enhance_cost import extra_memory_mib
from postgen import world


@pytest.fixture(scope="module")
def scenes() -> world.Frames:
    specs = [world.sample(seed, num_bodies=1, camera="static") for seed in range(6)]
    return world.render(specs, size=64, num_frames=9)


def test_ground_is_where_no_body_is(scenes: world.Frames) -> None:
    assert scenes.ids_BFHW is not None
    found = ground(scenes.rgb_BF3HW)
    assert not (found & (scenes.ids_BFHW > 0)).any()
    assert found.float().mean() > 0.5


def test_flicker_is_told_from_less_motion(scenes: world.Frames) -> None:
    score = torch.linspace(0, 1, len(scenes.rgb_BF3HW))
    plain = {**measured(scenes.rgb_BF3HW), "score": score}
    noise = 0.01 * torch.randn(scenes.rgb_BF3HW.shape, generator=torch.Generator().manual_seed(0))
    noisy = compared({**measured((scenes.rgb_BF3HW + noise).clamp(0, 1)), "score": score}, plain)
    assert noisy["flicker_ground_delta"]["low"] > 0.005
    assert noisy["warp_error_ground_delta"]["low"] > 0.005
    assert noisy["motion_ratio"]["value"] == pytest.approx(1, abs=0.1)
    row = {"against_plain": noisy}
    table = markdown({"plain": {"means": means(plain)}, "auto": row}).splitlines()
    assert [line.split(" | ")[0] for line in table] == ["| weight", "|---|---|---|---|---|---|", "| off", "| auto"]
    assert f"{1e3 * noisy['flicker_delta']['value']:+.3f}" in table[-1]
    frozen = compared(measured(scenes.rgb_BF3HW[:, :1].expand_as(scenes.rgb_BF3HW)), plain)
    assert frozen["flicker_delta"]["value"] < 0
    assert frozen["motion_ratio"]["value"] == 0


@pytest.mark.slow
def test_the_measurement_takes_little_memory() -> None:
    # At the shape of Wan 14B; a temporal map of every location would take 1 GiB.
    assert 0 < extra_memory_mib("cpu") <= 128
