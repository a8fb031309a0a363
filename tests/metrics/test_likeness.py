"""Colours, appearance, distances of samples and similarity of pictures, compared with closed forms."""

from __future__ import annotations

import math

import pytest
import torch

from postgen import UserError
from postgen.metrics.colour import appearance, lab, wasserstein
from postgen.metrics.likeness import psnr, ssim


def test_colours_are_those_of_the_tables() -> None:
    grey = 128 / 255
    colours = torch.tensor([[1.0, 0, 0], [0, 0, 1.0], [1, 1, 1], [0, 0, 0], [grey] * 3])
    known = torch.tensor([[53.24, 80.09, 67.20], [32.30, 79.19, -107.86], [100, 0, 0], [0, 0, 0], [53.585, 0, 0]])
    assert (lab(colours, dim=1) - known).abs().max() < 0.02
    assert torch.equal(lab(colours.T[None, :, :, None])[0, :, :, 0], lab(colours, dim=1).T)


def test_wasserstein_is_a_distance_of_samples_of_any_size() -> None:
    a, b = torch.randn(101, generator=torch.Generator().manual_seed(1)), torch.rand(37)
    assert wasserstein(a, b) == pytest.approx(wasserstein(b, a))
    assert wasserstein(a, a.repeat(3)) == pytest.approx(0, abs=1e-9)
    assert wasserstein(a, a + 0.5) == pytest.approx(0.5, abs=1e-6)
    with pytest.raises(UserError, match="101 and 0"):
        wasserstein(a, b[:0])


def test_appearance_in_closed_form() -> None:
    checks = (torch.arange(7)[:, None] + torch.arange(9)) % 2
    board = checks.float().expand(1, 3, -1, -1)
    found = {name: float(value) for name, value in appearance(board).items()}
    inner = board[0, 0, 1:-1, 1:-1] * -8 + 4
    assert found["sharpness"] == pytest.approx(float(inner.var(correction=0)), rel=1e-5)
    assert found["luma_std"] == pytest.approx(float(board[0, 0].std(correction=0)), rel=1e-5)
    assert (found["saturation"], found["colourfulness"]) == (0, pytest.approx(0, abs=1e-6))
    red = torch.tensor([1.0, 0, 0])[None, :, None, None].expand(1, 3, 3, 5)
    assert float(appearance(red)["colourfulness"]) == pytest.approx(0.3 * math.hypot(1, 0.5), rel=1e-5)
    assert float(appearance(red)["saturation"]) == 1


def test_structural_similarity() -> None:
    a, b = torch.rand(2, 3, 3, 15, 19, generator=torch.Generator().manual_seed(2))
    assert torch.equal(ssim(a, a), torch.ones(3, dtype=torch.float64))
    assert torch.allclose(ssim(a, b), ssim(b, a))
    assert ssim(a, b).abs().max() < 0.5
    mask = torch.zeros(3, 15, 19, dtype=torch.bool)
    mask[0], mask[1, 2:14, 3:15] = True, True
    half = b.clone()
    half[1, :, 2:14, 3:15] = a[1, :, 2:14, 3:15]
    found = ssim(a, half, mask)
    assert found[0] == pytest.approx(float(ssim(a, b)[0]))
    assert found[1] == 1
    assert found[2].isnan()
    x, y = (t[:1, :, :11, :11].double() for t in (a, b))
    offset = torch.arange(11.0, dtype=torch.float64) - 5
    weight = torch.exp(-(offset[:, None] ** 2 + offset**2) / (2 * 1.5**2))
    weight = weight / weight.sum()
    u, v = ((t * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1)[0] for t in (x, y))
    mu, mv = (weight * u).sum(), (weight * v).sum()
    var_u, var_v = (weight * (u - mu) ** 2).sum(), (weight * (v - mv) ** 2).sum()
    both = (weight * (u - mu) * (v - mv)).sum()
    alike = (2 * mu * mv + 1e-4) * (2 * both + 9e-4) / ((mu**2 + mv**2 + 1e-4) * (var_u + var_v + 9e-4))
    assert float(ssim(x, y)) == pytest.approx(float(alike), rel=1e-6)
    grey = torch.full((1, 3, 4, 4), 0.5)
    brighter = (2 * 0.5 * 0.6 + 1e-4) / (0.5**2 + 0.6**2 + 1e-4)
    assert float(ssim(grey, grey + 0.1)) == pytest.approx(brighter, rel=1e-3)
    assert psnr(a, a).tolist() == [100] * 3
