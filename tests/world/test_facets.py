"""The judge distinguishes round and edged bodies at any height, and detects hues of no body."""

from __future__ import annotations

import pytest
import torch

from benchmarks import world_corruptions as spoil
from benchmarks.world_check import Maker
from postgen import world
from postgen.world.check import check_batch
from postgen.world.check.facets import roundness, templates
from postgen.world.check.segment import SHARE, colour_share, hue_of
from postgen.world.check.stains import stained
from postgen.world.spec import COLOURS


@pytest.fixture(scope="module")
def make():
    return Maker("cpu", 80, 1)


@pytest.fixture(scope="module")
def cubes():
    """Return scenes with one cube each, with random rotation and event."""
    found = (world.sample(seed, num_bodies=1, camera="static", split="all", num_frames=9) for seed in range(700, 800))
    return [spec for spec in found if spec.bodies[0].shape == "cube"][:8]


@pytest.fixture(scope="module")
def true(make, cubes):
    return make(cubes, 9)


@pytest.mark.parametrize("shape", ["cube", "cylinder"])
def test_a_view_of_the_bank_is_explained_by_its_own_kind(shape):
    outline, shade, _ = templates("cpu", shape)
    rows = torch.arange(0, outline.shape[2], 17)
    masks, bright = outline[1, :, rows, 0].T.abs(), shade[1, rows].sum(-1)
    value = roundness(masks, bright, torch.ones_like(rows))[:, 1]
    value = -value if shape == "cube" else value
    assert value.min() >= 0
    # From the front at nearly its own height, a box and a cylinder have the same outline.
    assert value.median() > 0.9


def test_only_a_box_as_high_as_wide_is_a_cube_and_a_shift_a_size_or_a_blur_is_no_roundness():
    outline, shade, _ = templates("cpu", "cube")
    views = len(shade[1]) // 5
    for height, cube in enumerate((True, False, False, False, False)):
        rows = torch.arange(height * views + 40, (height + 1) * views, 31)
        value = roundness(outline[1, :, rows, 0].T.abs(), shade[1, rows].sum(-1), torch.ones_like(rows))
        assert (value[:, 1] < 0).all()
        assert bool((value[:, 0] == value[:, 1]).all()) is cube
        assert (value[:, 0] >= value[:, 1]).all()
    rows = torch.arange(40, views, 31)
    for change in range(1, 5):
        moved = outline[1, :, rows, 0].abs() + 0.05 * outline[1, :, rows, change]
        value = roundness(moved.T, shade[1, rows].sum(-1), torch.ones_like(rows))
        assert value.median() < -0.9


def test_cubes_are_edged_and_squat_cylinders_are_not(make, cubes, true):
    right = check_batch(true, cubes)
    assert all(r.all_right for r in right)
    wrong = check_batch(spoil.rounded(cubes, 9, make), cubes)
    assert all(r.bodies[0].shape < 0.5 and not r.all_right for r in wrong)
    assert sum(r.score for r in wrong) < 0.6 * sum(r.score for r in right)


def test_a_foot_of_another_hue_is_no_steady_body(cubes, true):
    own = cubes[0].bodies[0].colour
    other = {"purple": "blue", "pink": "purple"}.get(own, "pink" if own != "red" else "purple")
    clips = torch.stack([spoil.stained(true[0], own, other, part) for part in (0.05, 0.15, 0.35)])
    reports = check_batch(clips, [cubes[0]] * 3)
    # A rim of one or two pixels counts as an edge.
    assert reports[0].all_right
    assert not reports[2].all_right
    values = [r.bodies[0].steady for r in reports]
    assert values[0] >= values[1] >= values[2]
    assert values[2] < 0.5 < values[0]
    assert reports[2].score < 0.5 * reports[0].score


def test_stained_is_what_has_three_pixels_each_way_of_no_bodyshue_of():
    clip = torch.full((1, 3, 20, 20), 0.5)
    clip[:, :, 4:16, 2:10] = torch.tensor([0.9, 0.1, 0.1])[:, None, None]
    clip[:, :, 4:16, 10:18] = torch.tensor([0.12, 0.25, 0.92])[:, None, None]
    for wide, count in ((0, 0), (2, 0), (4, 2 * 10)):
        clip[:, :, 4:16, 10 : 10 + wide] = torch.tensor([0.6, 0.15, 0.6])[:, None, None]
        share, named, _ = colour_share(clip)
        own = hue_of(torch.tensor(list(COLOURS.values()))[:, :, None, None])[:, 0, 0]
        assert int(stained(hue_of(clip), named, share > SHARE, own).sum()) == count
