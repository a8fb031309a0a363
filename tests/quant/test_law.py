"""The scaling law: published values, exact recovery, intervals, and what a fit refuses to say."""

from __future__ import annotations

import math
import random

import pytest

from postgen.errors import UserError
from postgen.quant.law import PUBLISHED, LawRun, QatLaw, fit_law

TRUE = QatLaw(k=0.2, parameters=0.25, tokens=0.1, group=0.6)
SIZES, TOKENS, GROUPS = (1e6, 4e6, 2e7), (1e8, 4e8, 1e9), (16, 64, 256)


def made(noise: float = 0.0, law: QatLaw = TRUE, seed: int = 0, **values: tuple[float, ...]) -> list[LawRun]:
    draw = random.Random(seed)
    lists = {"parameters": SIZES, "tokens": TOKENS, "group": GROUPS} | values
    return [
        LawRun(parameters=n, tokens=d, group=g, delta=law.delta(n, d, g) * math.exp(draw.gauss(0, noise)))
        for n in lists["parameters"]
        for d in lists["tokens"]
        for g in lists["group"]
    ]


def test_published_values() -> None:
    found = [PUBLISHED["W4A4"].delta(594e6, 100e9, group) for group in (32, 64, 128, 256)]
    assert found == pytest.approx([0.0441, 0.0508, 0.0573, 0.0636], abs=5e-5)
    for ratio, group, expected in ((100, 32, 1.65), (1000, 32, 1.23), (1000, 256, 1.65)):
        where = (594e6, 594e6 * ratio, group)
        assert PUBLISHED["W16A4"].delta(*where) / PUBLISHED["W4A16"].delta(*where) == pytest.approx(expected, abs=5e-3)


def test_exact_runs_give_the_law_back() -> None:
    fit = fit_law(made(), draws=20)
    for name, value in (("k", 0.2), ("parameters", 0.25), ("tokens", 0.1), ("group", 0.6)):
        assert getattr(fit.law, name) == pytest.approx(value, rel=1e-6)
        assert fit.intervals[name].low == pytest.approx(value, rel=1e-5)
    assert fit.leave_one_out < 1e-6
    assert not fit.warnings
    assert not fit.unidentified
    assert fit.error([LawRun(parameters=1e9, tokens=1e9, group=32, delta=TRUE.delta(1e9, 1e9, 32))]) < 1e-6


def test_noisy_runs_and_one_bad_run() -> None:
    runs = made(0.03)
    fit = fit_law(runs, draws=60)
    bad = [*runs[:5], LawRun(parameters=4e6, tokens=4e8, group=64, delta=50.0), *runs[5:]]
    for found in (fit, fit_law(bad, draws=20)):
        assert found.law.group == pytest.approx(0.6, abs=0.1)
        assert found.law.parameters == pytest.approx(0.25, abs=0.02)
    assert fit.fit_error <= fit.leave_one_out < 0.05
    guess = fit.predict(parameters=2e6, tokens=2e8, group=32)
    assert guess.low < TRUE.delta(2e6, 2e8, 32) < guess.high
    assert guess.outside == ()
    assert fit.predict(parameters=2e6, tokens=2e10, group=512).outside == ("tokens", "group")
    assert fit_law(runs, draws=60).intervals == fit.intervals


def test_intervals_hold_the_true_numbers() -> None:
    held = []
    for seed in range(12):
        fit = fit_law(made(0.03, seed=seed), draws=50)
        for name in ("k", "parameters", "tokens", "group"):
            held.append(fit.intervals[name].low < getattr(TRUE, name) < fit.intervals[name].high)
    assert 0.8 <= sum(held) / len(held) <= 0.99


def test_exponents_are_not_negative() -> None:
    fit = fit_law(made(0.01, QatLaw(k=0.2, parameters=0.25, tokens=-0.1, group=0.6)), draws=20)
    assert fit.law.tokens == 0
    assert fit.law.group == pytest.approx(0.6, abs=0.1)
    assert float(fit.draws[:, 1:].min()) >= 0


def test_a_variable_with_one_value_is_part_of_the_constant() -> None:
    fit = fit_law(made(parameters=(4e6,)), draws=20)
    assert fit.unidentified == {"parameters": "it has one value in all runs"}
    assert fit.law.parameters == 0
    assert fit.law.tokens == pytest.approx(0.1, rel=1e-6)
    assert fit.predict(parameters=4e6, tokens=2e8, group=32).value == pytest.approx(TRUE.delta(4e6, 2e8, 32))
    with pytest.raises(UserError, match=r"do not determine.*parameters: it has one value"):
        fit.predict(parameters=5e6, tokens=2e8, group=32)
    assert "not identified: it has one value" in str(fit)
    assert fit.warnings == ("different values of parameters: 1; a reliable fit has at least 2",)


def test_variables_that_vary_together_are_told() -> None:
    runs = [run for run in made() if run.tokens == {1e6: 1e8, 4e6: 4e8}.get(run.parameters)]
    runs += [
        LawRun(parameters=n, tokens=100 * n, group=g, delta=TRUE.delta(n, 100 * n, g))
        for n in (2e6, 8e6)
        for g in GROUPS
    ]
    fit = fit_law(runs, draws=20)
    assert fit.unidentified == {"tokens": "it varies only together with parameters"}
    assert fit.predict(parameters=3e6, tokens=3e8, group=32).value == pytest.approx(TRUE.delta(3e6, 3e8, 32))
    with pytest.raises(UserError, match="varies only together"):
        fit.predict(parameters=3e6, tokens=9e8, group=32)


def test_runs_without_a_loss_are_left_out() -> None:
    runs = [*made(), LawRun(parameters=1e6, tokens=1e8, group=16, delta=-0.001)]
    fit = fit_law(runs, draws=20)
    assert fit.left_out == (runs[-1],)
    assert "1 runs with a delta of at most 0" in str(fit)
    with pytest.raises(UserError, match="above 0"):
        fit.error(runs)


def test_wrong_runs_are_refused() -> None:
    with pytest.raises(UserError, match=r"at least 5 runs .* got 4 of 4"):
        fit_law([made()[place] for place in (0, 1, 3, 9)])
    for wrong in ({"group": 1}, {"parameters": 0}, {"tokens": math.nan}, {"delta": math.inf}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            LawRun(**{"parameters": 1e6, "tokens": 1e8, "group": 16, "delta": 0.1, **wrong})
