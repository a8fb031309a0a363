"""Post-hoc EMA: an average that the run did not keep is rebuilt from two stored ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from postgen.errors import UserError
from postgen.merging import MergeConfig, PowerAverage, merge
from postgen.merging.posthoc_ema import Profile, beta, gamma_of, inner, power_weights, sigma_rel_of, solve


def run(gammas: list[float], steps: int, every: int) -> tuple[dict[tuple[float, int], torch.Tensor], torch.Tensor]:
    """Average a run with each exponent; return the averages every few steps, and the weights of the run."""
    weights = torch.randn(steps, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).cumsum(0)
    kept = {}
    for gamma in gammas:
        average = torch.zeros(30, dtype=torch.float64)
        for step in range(1, steps + 1):
            average = beta(step, gamma) * average + (1 - beta(step, gamma)) * weights[step - 1]
            if step % every == 0:
                kept[gamma, step] = average.clone()
    return kept, weights


def test_the_recursion_has_the_power_profile() -> None:
    kept, weights = run([gamma_of(0.1)], 400, 400)
    ages = torch.arange(1, 401, dtype=torch.float64)
    gamma = gamma_of(0.1)
    profile = (ages / 400) ** (gamma + 1) - ((ages - 1) / 400) ** (gamma + 1)
    torch.testing.assert_close(kept[gamma, 400], profile @ weights)
    assert power_weights(list(range(1, 401)), gamma) == pytest.approx(profile.tolist())


def test_an_average_is_rebuilt_from_two_others() -> None:
    stored, wanted = [gamma_of(0.05), gamma_of(0.1)], gamma_of(0.07)
    kept, weights = run([*stored, wanted], 1600, 100)
    profiles = [Profile(gamma, step) for gamma in stored for step in range(100, 1601, 100)]
    found = solve(profiles, Profile(wanted, 1600))
    assert sum(found) == pytest.approx(1)
    rebuilt = sum(weight * kept[one.gamma, int(one.step)] for weight, one in zip(found, profiles, strict=True))
    true = kept[wanted, 1600]
    nearest = min(float((kept[gamma, 1600] - true).norm()) for gamma in stored)
    assert float((rebuilt - true).norm()) < 0.05 * nearest
    assert float((weights[-1] - true).norm()) > nearest


def test_stored_averages_of_a_training_give_one_that_was_not_kept(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = torch.nn.Linear(4, 4)
    net.bias.requires_grad_(False)
    kept = [PowerAverage(net, width) for width in (0.05, 0.1)]
    wanted = PowerAverage(net, 0.07)
    files = []
    for step in range(1, 201):
        with torch.no_grad():
            net.weight += 0.1 * torch.randn(4, 4)
        for average in (*kept, wanted):
            average.update()
        if step % 20 == 0:
            files += [average.save(tmp_path) for average in kept]
    assert files[0].name == "ema-0.05-20.safetensors"
    merge(files, tmp_path / "out.safetensors", MergeConfig(method="posthoc_ema", sigma_rel=0.07))
    found = load_file(tmp_path / "out.safetensors")
    assert found.keys() == {"weight"}
    error = (found["weight"] - wanted.values["weight"]).norm()
    nearest = min((average.values["weight"] - wanted.values["weight"]).norm() for average in kept)
    assert error < 0.2 * nearest
    again = PowerAverage(net, 0.1)
    again.load(tmp_path / "ema-0.1-200.safetensors")
    again.update()
    kept[1].update()
    assert again.step == 201
    assert torch.equal(again.values["weight"], kept[1].values["weight"])
    with pytest.raises(UserError, match=r"is no average with sigma_rel 0\.05"):
        kept[0].load(tmp_path / "ema-0.1-200.safetensors")
    with pytest.raises(UserError, match=r"holds other parameters: 0\.weight is in one only"):
        PowerAverage(torch.nn.Sequential(net), 0.1).load(tmp_path / "ema-0.1-200.safetensors")
    with pytest.raises(UserError, match="step must be at least 1"):
        PowerAverage(net, 0.1).save(tmp_path)
    with pytest.raises(UserError, match="no trained parameters"):
        PowerAverage(torch.nn.Identity(), 0.1)


def test_a_stored_average_is_itself() -> None:
    stored = [Profile(6.94, 100), Profile(16.97, 100), Profile(6.94, 50)]
    assert solve(stored, stored[1]) == pytest.approx([0, 1, 0], abs=1e-8)
    assert solve(stored[:1], Profile(10, 100)) == pytest.approx([1])


@pytest.mark.parametrize(("a", "b"), [((3, 10), (5, 20)), ((0, 7), (4, 7)), ((30, 2), (0.5, 9))])
def test_the_inner_product_is_the_integral(a: tuple[float, float], b: tuple[float, float]) -> None:
    time = torch.linspace(0, min(a[1], b[1]), 200_001, dtype=torch.float64)
    first, second = ((g + 1) * time**g / t ** (g + 1) for g, t in (a, b))
    wanted = float(torch.trapezoid(first * second, time))
    assert inner(Profile(*a), Profile(*b)) == pytest.approx(wanted, rel=1e-6)
    assert inner(Profile(*b), Profile(*a)) == pytest.approx(wanted, rel=1e-6)


def test_width_and_exponent_are_inverse() -> None:
    for width in (0.01, 0.05, 0.1, 0.2, 0.28):
        assert sigma_rel_of(gamma_of(width)) == pytest.approx(width)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gamma_of(0), "sigma_rel must be from 0.0001"),
        (lambda: gamma_of(0.3), "got 0.3"),
        (lambda: Profile(-1, 3), "gamma must be at least 0"),
        (lambda: Profile(1, 0), "step must be above 0"),
        (lambda: solve([], Profile(1, 1)), "no average is stored"),
        (lambda: solve([Profile(1, 1), Profile(1, 1)], Profile(1, 1)), "two of the stored averages"),
        (lambda: solve([Profile(1, 5)], Profile(1, 1)), "no average was stored up to step 1"),
        (lambda: power_weights([1, 1], 1), "must be above 0 and increase"),
        (lambda: power_weights([0, 1], 1), "must be above 0 and increase"),
    ],
)
def test_wrong_input(call: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        call()  # type: ignore[operator]
