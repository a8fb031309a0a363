"""The benchmark's measurements: what it would say of clips whose flaw is known, and the memory it gates."""

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.enhance_a_video import compared, ground, markdown, means, measured, merge
from benchmarks.enhance_cost import extra_memory_mib
from benchmarks.gates import gate, read_result, write_result
from postgen import UserError, world


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


def part(score: float, **weights: float) -> dict[str, Any]:
    """What a process that had these weights found, as motion ratios."""
    rows = {
        name: {"against_plain": {"motion_ratio": {"value": ratio}, "flicker_delta": {"value": ratio - 1}}}
        for name, ratio in weights.items()
    }
    stamp = {"date": "2026-01-01 00:00 UTC", "device": "one", "versions": {}}
    return {**stamp, "settings": {"prompts": 4}, "by_weight": {"plain": {"score": score}, **rows}}


def test_parts_replace_the_weights_and_nothing_else(tmp_path: Path) -> None:
    path = str(tmp_path / "result.json")
    facts = {"parity": {"Wan": 1e-7}, "families": {str(k): True for k in range(20)}}
    gates = [gate("extra_memory_mib", 3.0, "<=", 128)]
    write_result(path, {"settings": {"prompts": 512}, **facts, "by_weight": {"3.0": {}}, "gates": gates})
    merge([part(0.5, **{"8.0": 2.0, "0.5": 1.0}), part(0.6, auto=1.2)], path)
    found = read_result(path)
    assert {name: found[name] for name in facts} == facts
    assert list(found["by_weight"]) == ["plain", "auto", "0.5", "8.0"]
    assert found["by_weight"]["plain"] == {"score": 0.5}
    assert found["flicker_delta_auto"] == {"value": pytest.approx(0.2)}
    assert found["remeasured"]["by_weight"]["device"] == "one"
    assert [(row["value"], row["ok"]) for row in found["gates"]][2:] == [(3.0, True), (1.2, True), (1.2, False)]
    with pytest.raises(UserError, match=r"two files have weight 0\.5"):
        merge([part(0.5, **{"0.5": 1.0}), part(0.5, **{"0.5": 1.0})], path)
    with pytest.raises(UserError, match="measure all parts with the same"):
        merge([part(0.5, auto=1.0), {**part(0.5), "settings": {"prompts": 8}}], path)
