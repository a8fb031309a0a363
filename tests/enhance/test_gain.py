"""The gain as a function of the measured share, number by number."""

import pytest
import torch

from postgen.enhance.gain import frame_gain


def test_the_formula() -> None:
    """Eq. 6-8: CFI is the mean of the T (T - 1) shares that frames give to others, the gain is (T + w) CFI."""
    attention = torch.tensor([[0.5, 0.25, 0.25], [0.125, 0.75, 0.125], [0.25, 0.5, 0.25]])
    share = attention.diagonal().mean()
    cfi = (attention.sum() - attention.trace()) / 6
    assert frame_gain(share[None], 3, 4.0).item() == pytest.approx(float((3 + 4.0) * cfi), abs=1e-6)


def test_bounds_and_reduction() -> None:
    share = torch.tensor([0.0, 0.5, 1.0])
    assert frame_gain(share, 5, 3.0).tolist() == [2.0, 1.0, 1.0]
    assert frame_gain(share, 5, 3.0, max_gain=1.5).tolist() == [1.5, 1.0, 1.0]
    assert frame_gain(share, 5, -5.0).tolist() == [1.0, 1.0, 1.0]
    assert frame_gain(share, 5, 7.0, reduction="batch").tolist() == [1.5, 1.5, 1.5]
