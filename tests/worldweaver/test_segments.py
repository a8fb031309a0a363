"""The segmented schedule: steps of all groups in each forward pass, and the levels that training draws."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from postgen.errors import UserError
from postgen.worldweaver.segments import Segments
from tests.worldweaver.oracle import schedule


@pytest.mark.parametrize(("steps", "groups", "count"), [(30, 3, 7), (6, 1, 4), (6, 6, 3), (8, 4, 2), (8, 2, 1)])
def test_every_group_walks_all_steps_once(steps, groups, count):
    segments = Segments(steps=steps, groups=groups)
    calls = list(segments.walk(count))
    assert len(calls) == segments.calls(count) == steps + (count - 1) * steps // groups
    for group in range(count):
        first = group * segments.length
        own = [call[group] for call in calls if group in call]
        assert own == list(range(steps))
        assert list(calls[first]).count(group) == 1
    for call in calls:
        assert len(call) <= groups
        # Consecutive groups are one whole segment apart.
        indices = list(call.values())
        assert all(a - b == segments.length for a, b in pairwise(indices))


def test_fill_and_drain():
    segments = Segments(steps=6, groups=3)
    assert segments.bounds == (0, 2, 4, 6)
    ages = [shift.ages for shift in segments.shifts(4)]
    assert ages == [(0,), (1, 0), (2, 1, 0), (2, 1, 0), (2, 1), (2,)]
    assert ages[:2] == [segments.filling(1), segments.filling(2)]
    assert ages[-2:] == [segments.draining(2), segments.draining(1)]
    assert segments.filling(3) == segments.draining(3) == (2, 1, 0)
    endless = segments.shifts(None)
    assert [next(endless).oldest for _ in range(6)] == [0, 0, 0, 1, 2, 3]


def test_steps_are_raised_and_told():
    with pytest.warns(UserWarning, match="28 steps cannot be divided into 3 equal segments: 30 steps are used"):
        assert Segments.of(28, 3) == Segments(steps=30, groups=3)
    with pytest.warns(UserWarning, match="30 steps cannot be divided into 5 equal segments: 35 steps are used"):
        assert Segments.staggered(30, 7) == Segments(steps=35, groups=5)
    assert Segments.staggered(30, 10) == Segments.of(30, 3)
    # `ar_step=0` generates one group after the other.
    assert Segments.staggered(30, 0) == Segments.staggered(30, 30) == Segments(steps=30, groups=1)


def test_levels_of_training_are_those_of_the_rollout():
    """Levels are bitwise equal at the phases of a rollout, and training draws all windows of a rollout."""
    segments, levels = Segments(steps=12, groups=3), schedule(12)
    visited = {(tuple(shift.ages), step) for shift in segments.shifts(5) for step in range(segments.length)}
    drawn = set()
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        drawn.add(segments.draw_ages(generator, fill=0.3, drain=0.3))
    assert {ages for ages, _ in visited} == drawn
    for ages, step in visited:
        phase = torch.full((2, len(ages)), step / segments.length)
        expected = levels.sigmas[torch.tensor(ages) * segments.length + step].expand(2, -1)
        assert torch.equal(segments.levels(levels, ages, phase), expected)


def test_phases_in_between_are_straight_lines_in_sigma():
    segments, levels = Segments(steps=6, groups=3), schedule(6)
    found = segments.levels(levels, (2, 1, 0), torch.tensor([[0.25, 0.75, 1.0]], dtype=torch.float64))
    s = levels.sigmas
    torch.testing.assert_close(found[0], torch.stack([(s[4] + s[5]) / 2, (s[3] + s[4]) / 2, s[2]]), rtol=1e-14, atol=0)
    # Segments have equal numbers of steps: with shift 5 that of the oldest group covers the widest noise range.
    tops = segments.levels(levels, (2, 1, 0), torch.zeros(1, 3))[0]
    torch.testing.assert_close(tops, torch.tensor([5 / 7, 10 / 11, 1.0], dtype=torch.float64))


def test_phases_are_tied_but_for_a_share():
    segments = Segments(steps=12, groups=3)
    generator = torch.Generator().manual_seed(0)
    phase = segments.draw_phase(4000, (2, 1, 0), generator)
    tied = (phase == phase[:, :1]).all(1)
    assert abs(float(tied.double().mean()) - 0.75) < 0.03
    assert 0 <= phase.min() < 0.01
    assert 0.99 < phase.max() < 1
    assert not (phase[~tied][:, 1] == phase[~tied][:, 2]).any()
    ages = [segments.draw_ages(generator) for _ in range(2000)]
    assert abs(ages.count((2, 1, 0)) / 2000 - 0.8) < 0.03
    assert {len(each) for each in ages if each[-1] == 0} == {1, 2, 3}
    one = Segments(steps=6, groups=1)
    assert {one.draw_ages(generator, 0.5, 0.5) for _ in range(20)} == {(0,)}


def test_what_is_impossible_is_refused():
    for words, message in (
        ({"steps": 1, "groups": 1}, "steps must be at least 2"),
        ({"steps": 6, "groups": 0}, "groups must be at least 1 and at most 6"),
        ({"steps": 6, "groups": 7}, "groups must be at least 1 and at most 6"),
        ({"steps": 7, "groups": 3}, "7 steps cannot be divided into 3 equal segments: give a multiple of 3"),
    ):
        with pytest.raises(UserError, match=message):
            Segments(**words)
    with pytest.raises(UserError, match="groups must be at least 1 and at most 4"):
        Segments.of(4, 5)
    with pytest.raises(UserError, match="ar_step must be at least 0 and at most 4"):
        Segments.staggered(4, 5)
    segments = Segments(steps=6, groups=3)
    with pytest.raises(UserError, match="the schedule has 5 steps and the segments have 6"):
        segments.levels(schedule(5), (0,), torch.zeros(1, 1))
    with pytest.raises(UserError, match=r"phase has shape \(1, 2\): give \(batch, 1\), one value from 0 to 1"):
        segments.levels(schedule(6), (0,), torch.zeros(1, 2))
    with pytest.raises(UserError, match="drain must be at least 0"):
        segments.draw_ages(torch.Generator(), 0.7, 0.5)
