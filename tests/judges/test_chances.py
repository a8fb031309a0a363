"""Which kinds of spoiling `world_judge` is shown."""

import random
from collections import Counter

import pytest

from postgen.judges.chances import KindChances


def test_chances_follow_errors_by_half():
    chances = KindChances(["a", "b", "c", "d"], 0.5)
    assert [chances.chance(kind) for kind in "abcd"] == [0.25] * 4
    chances.load({"a": 0.3, "b": 0.1, "c": 0.0, "d": 0.0, "unknown": 1.0})
    assert [chances.chance(kind) for kind in "abcd"] == pytest.approx([0.5, 0.25, 0.125, 0.125])
    even = KindChances(["a", "b"], 0.0)
    even.load({"a": 1.0, "b": 0.0})
    assert even.chance("a") == even.chance("b") == 0.5
    nothing_wrong = KindChances(["a", "b"], 1.0)
    nothing_wrong.load({"a": 0.0, "b": 0.0})
    assert nothing_wrong.chance("a") == 0.5


def test_kinds_are_drawn_by_their_chances_and_once_a_step():
    random.seed(0)
    chances = KindChances(["a", "b", "c", "d"], 0.5)
    chances.load({"a": 0.3, "b": 0.1, "c": 0.0, "d": 0.0})
    drawn = [chances.draw(1)[0] for _ in range(4000)]
    # Three standard deviations of a share are below 0.024.
    assert [drawn.count(kind) / 4000 for kind in "abcd"] == pytest.approx([0.5, 0.25, 0.125, 0.125], abs=0.024)
    assert sorted(chances.draw(4)) == sorted(chances.draw(9)) == list("abcd")
    assert len(set(chances.draw(3))) == 3


def test_errors_are_those_of_late():
    chances = KindChances(["a", "b"], 0.5)
    chances.note("a", 0.0)
    assert chances.errors == {"a": pytest.approx(0.45), "b": 0.5}
    for _ in range(60):
        chances.note("a", 0.2)
    assert chances.errors["a"] == pytest.approx(0.2, abs=1e-3)


def test_kinds_with_tiny_probabilities_are_drawn_alike():
    random.seed(0)
    chances = KindChances(list("abcdef"), 1.0)
    chances.load({"a": 0.5, **dict.fromkeys("bcdef", 1e-12)})
    second = Counter(chances.draw(2)[1] for _ in range(2000))
    assert set(second) == set("bcdef")
    assert max(second.values()) < 1.3 * min(second.values())
