"""Presence of bodies in frames in which they were removed, moved, recoloured or doubled."""

from __future__ import annotations

import math

import pytest
import torch

from postgen.metrics import drift
from postgen.metrics.drift import TrueClip
from tests.metrics.planted import BLUE, FRAMES, GONE, GREEN, RED, erased, permanence, planted


@pytest.fixture
def true() -> TrueClip:
    return planted()


@pytest.mark.parametrize("body", [0, 1])
def test_a_removed_body_lowers_permanence_by_its_share(true: TrueClip, body: int) -> None:
    gone = range(30, 37)
    found = permanence(erased(true, body, gone), true)
    seen = 2 * FRAMES - len(GONE)
    assert found.always == found.always_anywhere == pytest.approx(1 - len(gone) / seen)
    back = FRAMES - GONE.stop
    assert found.returns == back
    assert found.after_absence == pytest.approx(1 - (len(gone) / back if body == 1 else 0))
    assert found.wrong_count == pytest.approx(len(gone) / FRAMES)
    assert (found.spurious, found.swapped) == (0, 0)
    assert (found.present_FJ[:, body] == 0).nonzero()[:, 0].tolist() == list(gone)


def test_a_body_that_never_returns_or_is_never_away(true: TrueClip) -> None:
    assert permanence(erased(true, 1, range(GONE.stop, FRAMES)), true).after_absence == 0
    kinds = drift.detect(true.frames, true.palette)
    assert math.isnan(drift.object_permanence(kinds, true.ids, gap=len(GONE) + 1).after_absence)
    assert drift.object_permanence(kinds, true.ids, gap=len(GONE)).returns == FRAMES - GONE.stop
    # A body that appears for the first time does not count as returned.
    late = drift.object_permanence(kinds[20:], true.ids[20:], gap=4)
    assert late.returns == 0


def test_a_body_elsewhere_is_present_anywhere_only(true: TrueClip) -> None:
    frames = true.frames.clone()
    moved = torch.roll(true.ids, 10, dims=1) == 1
    frames[:, :, 2:9] = erased(true, 0, range(FRAMES))[:, :, 2:9]
    frames = torch.where((moved & (true.ids != 2))[:, None], torch.tensor(RED)[:, None, None], frames)
    found = permanence(frames, true)
    assert found.always < found.always_anywhere
    assert found.present_FJ[:, 0].sum() == 0


def test_a_body_that_returns_elsewhere() -> None:
    """A piece of 5 x 6 pixels returns two thirds of its width beside its place: only `anywhere` counts it."""
    ids = torch.zeros(20, 15, 25, dtype=torch.uint8)
    ids[:, 5:10, 6:12] = 1
    ids[4:12] = 0
    kinds = ids.long() - 1
    kinds[12:] = torch.roll(kinds[12:], 4, dims=2)
    found = drift.object_permanence(kinds, ids, least=0.02)
    assert (found.returns, found.after_absence, found.after_absence_anywhere) == (8, 0, 1)
    kinds[12:] = torch.roll(kinds[12:], -1, dims=2)  # three of six columns: a third of the union
    assert drift.object_permanence(kinds, ids, least=0.02).after_absence == 1


def test_pieces_of_about_the_least_size_may_be_found_or_not() -> None:
    ids = torch.zeros(1, 20, 25, dtype=torch.uint8)
    ids[0, 2:6, 2:6] = 1
    kinds = ids.long() - 1
    kinds[0, 2:6, 6:8] = 0
    for one in (kinds, torch.full_like(kinds, -1)):
        found = drift.object_permanence(one, ids, least=0.04)
        assert (found.spurious, found.wrong_count) == (0, 0)
    assert drift.object_permanence(torch.full_like(kinds, -1), ids, least=0.01).wrong_count == 1
    kinds[0, 12:18, 12:18] = 0
    assert drift.object_permanence(kinds, ids, least=0.04).spurious == 1


def test_a_swapped_colour_and_a_body_too_many(true: TrueClip) -> None:
    frames = true.frames.clone()
    frames[:10] = torch.where((true.ids == 1)[:10, None], torch.tensor(GREEN)[:, None, None], frames[:10])
    found = permanence(frames, true)
    assert found.swapped == pytest.approx(10 / (2 * FRAMES - len(GONE)))
    assert found.wrong_count == pytest.approx(10 / FRAMES)
    assert found.spurious == pytest.approx(10 / FRAMES), "a green piece where there should be none"
    frames = true.frames.clone()
    frames[:5, :, 16:20, 1:5] = torch.tensor(RED)[:, None, None]
    found = permanence(frames, true)
    assert (found.always, found.swapped) == (1, 0)
    assert found.spurious == found.wrong_count == pytest.approx(5 / FRAMES)


def test_shades_and_colours_that_are_no_body() -> None:
    dark = torch.tensor(RED) * 0.4
    frames = dark[None, :, None, None].expand(1, 3, 3, 3)
    palette = torch.tensor([BLUE, RED])
    assert (drift.detect(frames, palette) == -1).all()
    shades = torch.stack([palette * light for light in (1.0, 0.7, 0.45)], 1)
    assert (drift.detect(frames, shades) == 1).all()
    assert (drift.detect(frames, shades, others=dark[None] * 0.99) == -1).all()
    assert (drift.detect(frames, shades, others=torch.tensor([BLUE])) == 1).all()


def test_depth_that_disagrees_with_the_bodies(true: TrueClip) -> None:
    assert true.disparity is not None
    depth = 1 / true.disparity
    wrong = torch.where(true.ids == 2, depth * 1.2, depth)
    kinds = drift.detect(true.frames, true.palette)
    found = drift.object_depth_error(wrong, true.disparity, kinds, true.ids)
    expected = [0.0 if frame in GONE else 0.1 for frame in range(FRAMES)]
    assert found.tolist() == pytest.approx(expected, abs=1e-6)
    assert drift.object_depth_error(depth, true.disparity, torch.full_like(kinds, -1), true.ids).isnan().all()
