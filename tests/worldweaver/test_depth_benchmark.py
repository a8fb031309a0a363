"""`benchmarks.world_depth`: its scenes, rows and gates, and the real picture if it is installed."""

import pytest
import torch

from benchmarks import world_depth as bench
from postgen.worldweaver.depth_net import WorldDepth, WorldDepthNet
from postgen.worldweaver.depth_training import Takes
from tests.offline_assets import installed


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("net")
    torch.manual_seed(0)
    WorldDepthNet(channels=(8, 8, 12), blocks=(1, 1, 1)).save_pretrained(folder)
    return WorldDepth(folder)


def test_scenes_are_of_one_sort_of_camera():
    moving, still = bench.scenes(3, moving=True), bench.scenes(3, moving=False)
    assert all(spec.camera != "static" and spec.held_out for spec in moving)
    assert all(spec.camera == "static" and spec.held_out for spec in still)


def test_a_row_of_a_new_network_flickers_as_its_frames_alone(source):
    generator = torch.Generator().manual_seed(0)
    rgb = (torch.rand(2, 4, 3, 32, 32, generator=generator) * 255).to(torch.uint8)
    row = bench.measure("some", Takes(rgb, 0.1 + torch.rand(2, 4, 32, 32, generator=generator).half()), source)
    # An untrained network does not mix frames.
    assert row["flicker_ratio"] == pytest.approx(1, abs=1e-4)
    assert row["abs_rel_low"] <= row["abs_rel"] <= row["abs_rel_high"]


def test_gates_take_the_worse_camera_and_miss_what_was_not_measured():
    keys = {"abs_rel": 0.01, "within_125": 0.99, "rank": 0.99, "flicker_ratio_high": 0.5}
    rows = [{"clips": "camera at rest", **keys}, {"clips": "camera moves", **keys, "abs_rel": 0.06}]
    real = [
        {"estimate": name, "abs_rel": value} for name, value in zip(bench.ESTIMATES, (0.1, 0.2, 0.08), strict=True)
    ]
    judged = {gate["name"]: gate for gate in bench.gates(rows, real, 0.97)}
    assert judged["world_abs_rel"]["value"] == 0.06
    missed = {name for name, gate in judged.items() if not gate["ok"]}
    assert missed == {"world_abs_rel", "softened_abs_rel", "stereo_over_lower_is_nearer"}
    assert judged["stereo_over_constant"]["value"] == pytest.approx(0.5)
    assert bench.gates(rows, [], 0.97)[-2]["value"] is None


def test_the_real_picture_is_measured_beside_two_that_see_nothing(source):
    installed("stereo-left")
    rows, estimate = bench.stereo(source)
    assert estimate.shape == (500, 741)
    named = {row["estimate"]: row for row in rows}
    assert tuple(named) == bench.ESTIMATES
    assert named["constant"]["rank"] == 0
    # The floor before the motorcycle is nearer than the wall behind it.
    assert named["lower is nearer"]["rank"] > 0.3
    assert named["lower is nearer"]["abs_rel"] < named["constant"]["abs_rel"] < 0.5
