"""Errors of disparity after fitting one scale and shift."""

import math

import pytest
import torch

from postgen.errors import UserError
from postgen.metrics.disparity import aligned, disparity_errors


@pytest.fixture
def true():
    return 0.2 + torch.rand(3, 6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_a_scale_and_shift_are_no_error(true):
    valid = true > 0.5
    errors = disparity_errors(7 * true - 3, true, valid)
    assert errors.abs_rel == pytest.approx(0, abs=1e-12)
    assert errors.flicker == pytest.approx(0, abs=1e-12)
    assert errors.within_125 == 1
    assert errors.rank == pytest.approx(1)
    assert disparity_errors(true**3, true, valid).rank == pytest.approx(1)
    # For depth instead of disparity the scale is negative, and so is the rank correlation.
    assert disparity_errors(1 / true, true, valid).rank == pytest.approx(-1)


def test_numbers_by_hand():
    true = torch.tensor([[[1.0, 2.0]], [[1.0, 4.0]]])
    everywhere = torch.ones_like(true, dtype=torch.bool)
    errors = disparity_errors(torch.zeros_like(true), true, everywhere)
    # The fit is the mean 2: depth 1/2 for true depths 1, 1/2, 1 and 1/4.
    assert errors.abs_rel == pytest.approx((0.5 + 0 + 0.5 + 1) / 4)
    assert errors.within_125 == 0.25
    assert errors.rank == 0
    # The error changes by 0 and by -2, relative to a mean of 2.
    assert errors.flicker == pytest.approx(0.5)
    assert math.isnan(disparity_errors(true[:1], true[:1], everywhere[:1]).flicker)


def test_equal_values_share_a_rank():
    true, estimate = torch.tensor([[[1.0, 2.0, 3.0]]]), torch.tensor([[[1.0, 1.0, 2.0]]])
    # The ranks are 1, 2, 3 and 1.5, 1.5, 3.
    assert disparity_errors(estimate, true, true > 0).rank == pytest.approx(math.sqrt(3) / 2)


def test_what_is_not_valid_counts_nowhere(true):
    valid = true > 0.6
    broken = torch.where(valid, true, torch.inf)
    assert disparity_errors(2 * true, broken, valid).abs_rel == pytest.approx(0, abs=1e-12)
    other = torch.where(valid, true, 100.0)
    torch.testing.assert_close(aligned(other, true, valid)[valid], true[valid])


def test_fitted_disparity_has_a_least_value():
    true = torch.tensor([[[1.0, 1.0, 1.0, 9.0]]])
    estimate = torch.tensor([[[0.0, 9.0, 9.0, 9.0]]])
    # The fit is 1 and three times 11/3; `least` raises the first value to 11/3.
    errors = disparity_errors(estimate, true, true > 0, least=11 / 3)
    assert errors.abs_rel == pytest.approx((3 * (1 - 3 / 11) + (27 / 11 - 1)) / 4)


def test_wrong_input_is_told(true):
    valid = true > 0
    with pytest.raises(UserError, match="three tensors of the same shape"):
        aligned(true[:1], true, valid)
    with pytest.raises(UserError, match="no pixel is valid"):
        disparity_errors(true, true, ~valid)
    with pytest.raises(UserError, match="not positive and finite"):
        disparity_errors(true, true - 0.5, valid)
