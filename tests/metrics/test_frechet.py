"""Frechet distance: exact for Gaussians with a known distance, and checks of samples."""

from __future__ import annotations

import pytest
import torch

from postgen.errors import UserError
from postgen.metrics.frechet import Gaussian, frechet_distance


def turned(seed: int, values: list[float]) -> torch.Tensor:
    """Return a covariance matrix with these eigenvalues and random axes."""
    torch.manual_seed(seed)
    vectors = torch.linalg.qr(torch.randn(len(values), len(values), dtype=torch.float64))[0]
    return vectors * torch.tensor(values, dtype=torch.float64) @ vectors.T


def test_covariances_that_commute() -> None:
    """For covariances with equal axes, it is the sum of squared differences of standard deviations and means."""
    a, b = [1.0, 4.0, 9.0, 0.0], [4.0, 4.0, 1.0, 0.25]
    mean = torch.tensor([1.0, -2.0, 0.5, 0.0], dtype=torch.float64)
    first, second = (Gaussian(m, turned(3, v)) for m, v in ((torch.zeros_like(mean), a), (mean, b)))
    wanted = float(mean.square().sum()) + sum((x**0.5 - y**0.5) ** 2 for x, y in zip(a, b, strict=True))
    assert frechet_distance(first, second) == pytest.approx(wanted, abs=1e-7)
    assert frechet_distance(second, first, root=second.root()) == pytest.approx(wanted, abs=1e-7)


def test_covariances_that_do_not_commute() -> None:
    """The distance equals the formula with tr (C1 C2)^1/2 from the eigenvalues of the product."""
    first = Gaussian(torch.zeros(5).double(), turned(0, [1, 2, 3, 4, 5]))
    second = Gaussian(torch.zeros(5).double(), turned(1, [0.5, 1, 1, 6, 2]))
    product = torch.linalg.eigvals(first.covariance_DD @ second.covariance_DD)
    wanted = 15 + 10.5 - 2 * float(product.sqrt().real.sum())
    assert frechet_distance(first, second) == pytest.approx(wanted, abs=1e-9)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-9)


def test_features_of_a_known_gaussian() -> None:
    """Mean and covariance of samples; a shift adds its square; fewer samples than features are allowed."""
    torch.manual_seed(0)
    x = torch.randn(4000, 6)
    made = Gaussian.of(x)
    torch.testing.assert_close(made.covariance_DD, torch.eye(6).double(), atol=0.08, rtol=0)
    assert frechet_distance(made, Gaussian.of(x + 2)) == pytest.approx(24, rel=1e-6)
    few = Gaussian.of(x[:4])
    assert 0 < frechet_distance(made, few) < 20
    assert frechet_distance(few, few) == pytest.approx(0, abs=1e-6)
    one = torch.tensor([[0.0], [2.0], [4.0]])  # a single feature, standard deviations 2 and 4
    assert frechet_distance(Gaussian.of(one), Gaussian.of(2 * one + 1)) == pytest.approx(3**2 + 2**2)
    with pytest.raises(UserError, match="equal numbers of features, got 6 and 1"):
        frechet_distance(made, Gaussian.of(one))
    with pytest.raises(UserError, match=r"features up to 2e\+200 are too large"):
        Gaussian.of(torch.tensor([[1e200], [2e200]], dtype=torch.float64))
    for wrong in (x[:1], x[0], x[:4] / 0, x[:, :0]):
        with pytest.raises(UserError, match="at least 2 rows of finite features"):
            Gaussian.of(wrong)
