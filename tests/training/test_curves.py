"""Weights of averages, and the decays that they emulate."""

import math

import pytest
import torch

from postgen.errors import UserError
from postgen.training.curves import KINDS, curve_of, decay, normalised, weights_of, weights_of_curve

COSINE = [0.024, 0.071, 0.111, 0.139, 0.155, 0.155, 0.139, 0.111, 0.071, 0.024]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 2, 3, 10, 57])
def test_an_average_is_the_run_with_its_increments_scaled(kind: str, count: int) -> None:
    run = torch.randn(count, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(count)).cumsum(0)
    weights = weights_of(kind, count)
    curve = torch.tensor(curve_of(weights), dtype=torch.float64)
    average = torch.tensor(weights, dtype=torch.float64) @ run
    torch.testing.assert_close(average, run[0] + curve @ run.diff(dim=0), atol=1e-6, rtol=0)
    assert len(weights) == count
    assert min(weights) >= 0
    assert abs(math.fsum(weights) - 1) < 1e-12
    assert weights_of_curve(curve_of(weights)) == pytest.approx(weights, abs=1e-12)


def test_known_curves() -> None:
    assert curve_of(weights_of("sma", 5)) == pytest.approx([0.8, 0.6, 0.4, 0.2]) == decay("linear", 5)
    assert weights_of("cosine", 10) == pytest.approx(COSINE, abs=6e-4)
    n = 7  # of the paper's note: w_i = 1 - i (i - 1) / (N (N + 1)) for the increment into checkpoint i = 2..N
    assert curve_of(weights_of("wma", n)) == pytest.approx([1 - i * (i - 1) / (n * (n + 1)) for i in range(2, n + 1)])
    assert decay("1-sqrt", 4) == pytest.approx([0.5, 1 - math.sqrt(0.5), 1 - math.sqrt(0.75)])


def test_the_exponential_average_is_the_recursion_of_the_paper() -> None:
    values = [3.0, -1.0, 4.0, 1.0, 5.0]
    average = values[0]
    for value in values[1:]:
        average = 0.1 * value + 0.9 * average
    weights = weights_of("ema", 5, alpha=0.1)
    assert math.fsum(c * value for c, value in zip(weights, values, strict=True)) == pytest.approx(average)
    assert weights_of("ema", 3, alpha=1) == [0, 0, 1]


def test_one_checkpoint_is_itself() -> None:
    assert [weights_of(kind, 1) for kind in KINDS] == [[1.0]] * len(KINDS)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: weights_of("smaa", 3), "kind must be one of sma.*Did you mean 'sma'"),
        (lambda: weights_of(3, 3), "kind must be one of"),  # type: ignore[arg-type]
        (lambda: weights_of("sma", 0), "count must be at least 1"),
        (lambda: weights_of("ema", 3, alpha=0), "alpha must be above 0 and at most 1, got 0"),
        (lambda: weights_of("ema", 3, alpha=math.nan), "alpha must be above 0 and at most 1, got nan"),
        (lambda: weights_of_curve([0.5, 0.6]), "must not increase: number 2 is 0.6, the one before it 0.5"),
        (lambda: weights_of_curve([1.2]), "from 0 to 1, number 1 is 1.2"),
        (lambda: curve_of([0.5, 0.6]), "sum 1, it is 1.1"),
        (lambda: normalised([1, 2], 3), "must be 3 numbers, one for each source; got 2"),
        (lambda: normalised([1, -2], 2), "must not be negative, got -2"),
        (lambda: normalised([0, 0], 2), "must not all be 0"),
        (lambda: normalised([1, math.nan], 2), "must be numbers, got nan"),
        (lambda: normalised([1e308, 1e308], 2), "must have a finite sum"),
    ],
)
def test_wrong_input(call: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        call()  # type: ignore[operator]
