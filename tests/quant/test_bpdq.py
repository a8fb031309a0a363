"""Bit planes with fitted coefficients: reference vector, invariant, and the order against GPTQ."""

import pytest
import torch

from postgen.errors import UserError
from postgen.quant import Hessian, format_of, quantize_tensor, solve
from postgen.quant.rounding import levels_of
from postgen.quant.solvers.bpdq import solve_group
from postgen.quant.solvers.planes import design, first_coefficients, first_patterns, fitted
from tests.quant.solved import example

WEIGHT, HESSIAN = example()
VECTOR = torch.tensor([[-1, -0.9, -0.2, 0.1, 0.15, 0.9, 1.1, 2]])


def test_reference_vector():
    coefficients = first_coefficients(VECTOR, 2)
    assert coefficients[0].tolist() == pytest.approx([-0.957018, 0.978460, 1.964132], abs=2e-6)
    found = solve_group(VECTOR, torch.eye(8), 2, 10)
    assert torch.equal(found.patterns, first_patterns(VECTOR, 2))
    numbers = torch.take_along_dim(levels_of(coefficients), found.patterns.long(), -1)
    assert float((VECTOR - numbers).square().mean()) == pytest.approx(0.0121429, abs=1e-7)
    affine = quantize_tensor(VECTOR, format_of("int2:asym")).numbers()
    assert float((VECTOR - affine).square().mean()) == pytest.approx(0.0128125, abs=1e-7)


@pytest.mark.parametrize("planes", [2, 3])
def test_errors_times_the_factor_give_back_the_group(planes):
    group, upper = WEIGHT[:, :64], HESSIAN.upper[:64, :64]
    last = float("inf")
    for steps in (1, 4, 10):
        found = solve_group(group, upper, planes, steps)
        numbers = torch.take_along_dim(levels_of(found.coefficients), found.patterns.long(), -1)
        torch.testing.assert_close(found.errors @ upper, group - numbers, atol=1e-4, rtol=1e-4)
        assert float(found.errors.square().sum()) <= last
        last = float(found.errors.square().sum())


@pytest.mark.parametrize(("text", "error"), [("bp2:g128", 0.0177069), ("bp3", 0.00269899), ("bp4", 0.000681443)])
def test_rows_that_no_longer_change_are_left_out_without_loss(text, error):
    # These are the errors with all rounds for all rows, and the nearest levels by comparison with every level.
    found = solve(WEIGHT, format_of(text), "bpdq", HESSIAN)
    assert float(HESSIAN.error(WEIGHT, found.numbers())) == pytest.approx(error, rel=1e-4)


def test_rows_do_not_influence_each_other():
    group, upper = WEIGHT[:, :64], HESSIAN.upper[:64, :64]
    together, alone = solve_group(group, upper, 2, 10), solve_group(group[3:4], upper, 2, 10)
    assert torch.equal(together.patterns[3:4], alone.patterns)
    torch.testing.assert_close(together.errors[3:4], alone.errors)


def test_coefficients_are_those_of_least_squares():
    patterns = torch.randint(0, 8, (16, 64), generator=torch.Generator().manual_seed(0)).float()
    columns = design(patterns, 3)
    expected = torch.linalg.lstsq(columns, WEIGHT[:16, :64, None]).solution[..., 0]
    torch.testing.assert_close(fitted(columns, WEIGHT[:16, :64]), expected, atol=1e-4, rtol=1e-4)
    # A plane without ones has the coefficient 0.
    assert fitted(design(patterns % 4, 3), WEIGHT[:16, :64])[:, 3].abs().max() < 1e-6


@pytest.mark.parametrize("planes", [2, 3, 4])
def test_fewer_errors_than_gptq_with_as_many_bits(planes):
    free = solve(WEIGHT, format_of(f"bp{planes}"), "bpdq", HESSIAN)
    for text in (f"int{planes}:g64:asym", f"bp{planes}"):
        even = solve(WEIGHT, format_of(text), "gptq", HESSIAN)
        assert HESSIAN.error(WEIGHT, free.numbers()) < 0.5 * HESSIAN.error(WEIGHT, even.numbers())
    assert torch.equal(free.scales.scale.bfloat16().float(), free.scales.scale)


def test_the_order_of_groups_keeps_their_places():
    weight = WEIGHT.clone()
    weight[:, 64:128] *= 100  # codes and coefficients in the wrong place would be noticed
    for order in ("none", "groups"):
        found = solve(weight, format_of("bp4"), "bpdq", HESSIAN, order=order)
        assert HESSIAN.error(weight, found.numbers()) < 0.01


def test_uncorrelated_channels_give_least_squares_of_each_group():
    identity = Hessian.of(torch.eye(256), 0.0)
    weight = WEIGHT[:32]
    found = solve(weight, format_of("bp2:g128"), "bpdq", identity, order="none", steps=30).numbers()
    alone = solve(weight, format_of("bp2:g128"), "ls").numbers()
    ratio = (weight - found).square().sum() / (weight - alone).square().sum()
    assert float(ratio) == pytest.approx(1, abs=0.02)


def test_the_scale_of_the_inputs_does_not_change_the_result():
    group, upper = WEIGHT[:, :64], HESSIAN.upper[:64, :64]
    plain = solve_group(group, upper, 2, 3)
    assert torch.equal(solve_group(group, 2**10 * upper, 2, 3).patterns, plain.patterns)
    # Channels without inputs keep numbers that are near their weights.
    silent = Hessian.of(torch.diag((torch.arange(256) >= 64).float()), 0.0)
    found = solve(WEIGHT, format_of("bp4"), "bpdq", silent).numbers()
    assert (WEIGHT - found)[:, :64].square().mean() < 0.02


def test_wrong_choices_are_refused():
    with pytest.raises(UserError, match=r"bit planes such as bp2:g64, not for int4"):
        solve(WEIGHT, format_of("int4"), "bpdq", HESSIAN)
    with pytest.raises(UserError, match="needs calibration"):
        solve(WEIGHT, format_of("bp2"), "bpdq")
    with pytest.raises(UserError, match="Allowed: none, groups"):
        solve(WEIGHT, format_of("bp2"), "bpdq", HESSIAN, order="channels")
