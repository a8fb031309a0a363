"""Attention with probabilities that are powers of two: exactness of codes, errors, masks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from postgen.kernels.attention import naive as exact
from postgen.kernels.attention_log2.naive import LEAST, attention, powers
from tests.kernels.launches import relative_error


def drawn(keys: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    query = 2 * torch.randn(2, 24, 4, 32, generator=generator)
    key, value = (torch.randn(2, keys, 2, 32, generator=generator) for _ in range(2))
    return query, key, value


@pytest.mark.parametrize("dtype", LEAST)
def test_powers_are_exact_in_fp8(dtype: torch.dtype) -> None:
    u = -30 * torch.rand(1000, generator=torch.Generator().manual_seed(0))
    found = powers(u, 0.0, LEAST[dtype])
    assert torch.equal(found.to(dtype).float(), found)
    near = u > LEAST[dtype] + 0.5
    assert ((found / u.exp2())[near].log2().abs() <= 0.5).all()
    assert (found[u < LEAST[dtype] - 0.5] == 0).all()
    # With a shift that is a power of two, numbers far below it become 0 as well.
    assert (powers(torch.tensor([-40.0]), 2**-6, 0) == 0).all()


@pytest.mark.parametrize("eta", [0.0, 2**-9])
@pytest.mark.parametrize("keys", [16, 2048])
def test_the_error_of_attention(keys: int, eta: float) -> None:
    query, key, value = drawn(keys)
    expected, lse = exact.attention(query, key, value)
    found, found_lse = attention(query, key, value, eta=eta)
    # A rounded exponent changes a probability by up to a factor of 2^.5, .2 on average.
    assert 0.02 < relative_error(found, expected) < 0.2
    assert (found_lse - lse).abs().max() < 0.35
    assert found.dtype == query.dtype


def test_a_shift_that_is_no_power_of_two_fails_with_many_keys() -> None:
    query, key, value = drawn(2048)
    expected, _ = exact.attention(query, key, value)
    assert relative_error(attention(query, key, value, eta=0.01)[0], expected) > 1


def test_key_lengths() -> None:
    query, key, value = drawn(12)
    lengths = torch.tensor([5, 0])
    for eta in (0.0, 2**-6):
        found, lse = attention(query, key, value, eta=eta, key_lengths=lengths)
        short, _ = attention(query[:1], key[:1, :5], value[:1, :5], eta=eta)
        torch.testing.assert_close(found[:1], short)
        assert (found[1] == 0).all()
        assert (lse[1] == -torch.inf).all()
