"""Factors of the methods, and the calculation of a merge."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from postgen.errors import UserError
from postgen.merging import METHODS, MergeConfig, Rule, merge_tensors
from postgen.merging.lora import MERGERS
from postgen.merging.methods import LORA_ONLY, slerp_factors, source_factors
from postgen.training.curves import KINDS, weights_of
from postgen.training.weighted import combined
from tests.merging.models import tensors


@pytest.mark.parametrize("kind", KINDS)
def test_the_average_is_the_sum_of_weights_times_tensors(kind: str) -> None:
    sources = [tensors(seed) for seed in range(5)]
    factors = source_factors(MergeConfig(method=kind), 5)
    assert factors == weights_of(kind, 5)
    merged = merge_tensors(sources, Rule(factors=factors))
    for name in ("in.weight", "scale"):
        wanted = sum(factor * source[name].double() for factor, source in zip(factors, sources, strict=True))
        torch.testing.assert_close(merged[name].double(), wanted, atol=1e-6, rtol=1e-6)
    assert merged["number"].tolist() == [3, 4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_what_is_equal_stays_bit_by_bit(dtype: torch.dtype) -> None:
    one = tensors(1, dtype)
    for count in (1, 3, 7):
        for config in (MergeConfig(), MergeConfig(method="wma"), MergeConfig(method="cosine")):
            merged = merge_tensors([one] * count, Rule(factors=source_factors(config, count)))
            assert all(torch.equal(merged[name], value) for name, value in one.items())


def test_frozen_tensors_stay_while_others_are_merged() -> None:
    sources = [tensors(seed, torch.bfloat16, frozen=True) for seed in range(3)]
    merged = merge_tensors(sources, Rule(factors=[1 / 3] * 3))
    assert torch.equal(merged["out.weight"], sources[0]["out.weight"])
    assert not torch.equal(merged["in.weight"], sources[0]["in.weight"])


def test_interpolation_and_task_vectors() -> None:
    base, one, two = (tensors(seed) for seed in (9, 1, 2))
    name = "in.weight"

    def found(factors: list[float]) -> torch.Tensor:
        return merge_tensors([one, two], Rule(factors=[1 - sum(factors), *factors]), base)[name]

    half = source_factors(MergeConfig(method="sma", eta=0.5), 2)
    mean = (one[name] + two[name]) / 2
    torch.testing.assert_close(found(half), base[name] + 0.5 * (mean - base[name]))
    added = source_factors(MergeConfig(method="add", weights=(1.0, 0.5)), 2)
    torch.testing.assert_close(
        found(added), base[name] + (one[name] - base[name]) + 0.5 * (two[name] - base[name]), atol=1e-5, rtol=1e-5
    )
    assert source_factors(MergeConfig(method="negate"), 2) == [-1, -1]
    assert torch.equal(merge_tensors([one], Rule(factors=[1.0, 0.0]), base)[name], base[name])
    assert torch.equal(merge_tensors([one], Rule(factors=[0.0, 1.0]), base)[name], one[name])


def test_slerp_keeps_the_length_and_meets_the_ends() -> None:
    one, two = torch.randn(2, 50, dtype=torch.float64)
    one, two = one / one.norm(), two / two.norm()
    for t in (0.0, 0.3, 1.0):
        low, high = slerp_factors(t, 1.0, 1.0, float(one @ two))
        between = low * one + high * two
        assert float(between.norm()) == pytest.approx(1)
        assert math.acos(min(1, float(between @ one))) == pytest.approx(t * math.acos(float(one @ two)), abs=1e-6)
    assert slerp_factors(0.25, 0.0, 1.0, 0.0) == (0.75, 0.25)
    assert slerp_factors(0.25, 1.0, 1.0, -1.0) == (0.75, 0.25)


def test_slerp_of_task_vectors_per_tensor() -> None:
    base, one, two = (tensors(seed) for seed in (9, 1, 2))
    merged = merge_tensors([one, two], Rule(factors=[], slerp=0.5), base)
    for name in ("in.weight", "out.weight"):
        first, second = one[name] - base[name], two[name] - base[name]
        dot = float((first * second).sum())
        low, high = slerp_factors(0.5, float(first.norm()), float(second.norm()), dot)
        torch.testing.assert_close(merged[name], base[name] + low * first + high * second, atol=1e-5, rtol=1e-5)
    assert torch.equal(merge_tensors([one, one], Rule(factors=[], slerp=0.3))["in.weight"], one["in.weight"])


def test_the_calculation_does_not_depend_on_the_place_in_a_block() -> None:
    values = list(torch.randn(3, 1003))
    whole = combined(values, [0.2, 0.3, 0.5])
    parts = [combined([value[start : start + 7] for value in values], [0.2, 0.3, 0.5]) for start in range(0, 1003, 7)]
    assert torch.equal(whole, torch.cat(parts))


def test_the_methods_of_loras_are_those_of_the_merge() -> None:
    assert {*LORA_ONLY} == MERGERS.keys() - {"exact"}
    assert all("weights" in METHODS[name] for name in LORA_ONLY)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "smaa"}, "method must be one of sma.*Did you mean 'sma'"),
        ({"method": 3}, "method must be one of"),
        ({"method": "sma", "weights": (1.0,)}, "weights is not used by method sma, only by soup, add, negate"),
        ({"method": "wma", "alpha": 0.5}, "alpha is not used by method wma, only by ema"),
        ({"method": "ema", "alpha": 2.0}, "alpha must be above 0 and at most 1"),
        ({"method": "slerp", "t": 1.5}, "t must be at least 0 and at most 1"),
        ({"method": "slerp", "eta": 0.5}, "eta is not used by method slerp"),
        ({"eta": math.nan}, "eta must be at least -10"),
        ({"method": "curve"}, "curve is missing: method curve needs it"),
        ({"method": "power"}, "sigma_rel is missing"),
        ({"method": "power", "sigma_rel": 0.5}, "sigma_rel must be from 0.0001 to 0.2887, got 0.5"),
        ({"method": "soup", "weights": (1.0, math.inf)}, "weights must be numbers"),
        ({"method": "curve", "curve": ("a",)}, "curve must be numbers"),
        ({"dtype": "int8"}, "dtype must be one of float32, bfloat16, float16, got 'int8'"),
        ({"rank": 0}, "rank must be at least 1"),
        ({"method": "ties", "density": 0.0}, "density must be above 0 and at most 1"),
        ({"method": "ties", "seed": 1}, "seed is not used by method ties"),
        ({"method": "dare_ties", "seed": -1}, "seed must be at least 0"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        MergeConfig(**settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "count", "message"),
    [
        (MergeConfig(method="soup", weights=(1.0, 2.0)), 3, "weights must be 3 numbers, one for each source; got 2"),
        (MergeConfig(method="add", weights=(1.0,)), 2, "weights must be 2 numbers"),
        (MergeConfig(method="curve", curve=(0.5,)), 3, "curve must have 2 numbers for 3 sources"),
        (MergeConfig(method="power", sigma_rel=0.1), 2, "needs checkpoints of a run"),
    ],
)
def test_settings_that_do_not_fit_the_sources(config: MergeConfig, count: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        source_factors(config, count)


def _with(**changed: torch.Tensor) -> dict[str, torch.Tensor]:
    return {**tensors(1), **changed}


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"in.weight": torch.zeros(7, 5)}, "source 1 and source 2 do not fit: 4 tensors are only in the first"),
        (_with(more=torch.zeros(1)), "1 only in the second, such as more"),
        ({**tensors(1), "in.bias": torch.zeros(8)}, r"in.bias is \[7\] and \[8\]"),
        ({**tensors(1), "in.bias": torch.zeros(7).half()}, "in.bias is F32 and F16 .--dtype merges"),
        ({**tensors(1), "in.bias": torch.full((7,), math.nan)}, "source 2 holds NaN in in.bias"),
        ({**tensors(1), "in.bias": torch.full((7,), math.inf)}, "in.bias holds infinite values that differ"),
        (_with(number=torch.tensor([3, 5])), "differs between source 1 and source 2: only floating-point"),
        ({}, "4 tensors are only in the first|5 tensors are only"),
    ],
)
def test_sources_that_do_not_fit(other: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(UserError, match=message):
        merge_tensors([tensors(0), other], Rule(factors=[0.5, 0.5]))


def test_infinite_values_that_are_equal_are_kept() -> None:
    mask = torch.tensor([0.0, -math.inf, 1.0])
    merged = merge_tensors([{"mask": mask}, {"mask": mask.clone()}], Rule(factors=[0.5, 0.5]))
    assert torch.equal(merged["mask"], mask)


def test_a_result_that_overflows_is_refused() -> None:
    big = {"a": torch.full((2,), 60000.0, dtype=torch.float16)}
    with pytest.raises(UserError, match=r"a overflows torch\.float16"):
        merge_tensors([big, big], Rule(factors=[2.0, 2.0]))
