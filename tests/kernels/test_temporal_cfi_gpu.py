"""The Triton kernel of the temporal self-attention share, on a GPU with the sizes of real models."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from postgen.kernels.temporal_cfi import naive
from postgen.kernels.temporal_cfi.ops import temporal_self_share
from tests.kernels.launches import assert_compiles_whole, assert_records, assert_repeats

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def fused(
    frames: int, places: int, heads: int, channels: int, *, batch: int = 1, dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensor, Tensor]:
    """Return queries and keys as views of one fused projection, in token order."""
    generator = torch.Generator("cuda").manual_seed(frames)
    shape = (batch, frames, places, 3, heads, channels)
    qkv = torch.randn(shape, generator=generator, dtype=dtype, device="cuda")
    return qkv[:, :, :, 0], qkv[:, :, :, 1]


@pytest.mark.parametrize(
    ("frames", "channels", "dtype"),
    [
        (2, 64, torch.bfloat16),
        (13, 64, torch.bfloat16),
        (21, 72, torch.bfloat16),
        (21, 128, torch.bfloat16),
        (33, 80, torch.bfloat16),
        (33, 96, torch.bfloat16),
        (40, 112, torch.bfloat16),
        (64, 128, torch.bfloat16),
        (21, 128, torch.float16),
        (13, 64, torch.float32),
        (21, 128, torch.float32),
    ],
)
def test_equals_float64(frames: int, channels: int, dtype: torch.dtype) -> None:
    query, key = fused(frames, 37, 3, channels, batch=2, dtype=dtype)
    found = temporal_self_share(query, key)
    expected = naive.temporal_self_share(query.double(), key.double())
    assert torch.allclose(found.double(), expected, rtol=1e-4, atol=0)


def test_grouped_keys_masks_and_odd_strides() -> None:
    query, key = fused(10, 31, 4, 96)
    query, key = query[:, :, ::3, :, 1:81], key[:, :, ::3, ::2, 1:81]
    found = temporal_self_share(query, key, 0.3, 2)
    expected = naive.temporal_self_share(query.double(), key.double(), scale=0.3, causal_block=2)
    assert torch.allclose(found.double(), expected, rtol=1e-4, atol=0)


def test_wan_14b_at_720p_takes_no_memory_and_fits_64_bit_offsets() -> None:
    # The fused projection of two samples with 21 frames of 3600 locations holds 2.3e9 numbers, more than 2^31.
    query, key = fused(21, 3600, 40, 128, batch=2)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = temporal_self_share(query, key)
    assert torch.cuda.max_memory_allocated() - before <= 2**20
    places = slice(3500, 3600)
    last = temporal_self_share(query[1:, :, places], key[1:, :, places])
    expected = naive.temporal_self_share(query[1:, :, places].float(), key[1:, :, places].float())
    assert torch.allclose(last, expected, rtol=1e-4)
    # The inputs are independent normal numbers, so the means of any hundred locations differ by chance only.
    assert torch.allclose(found, expected.expand(2), rtol=2e-2)


def test_repeats_records_and_compiles() -> None:
    query, key = fused(21, 157, 12, 128, batch=2)
    assert_repeats(lambda: temporal_self_share(query, key))
    assert_records(lambda: temporal_self_share(query, key))
    assert_compiles_whole(lambda q, k: temporal_self_share(q, k) * 2, query, key)
    # The result of a sample does not depend on the other samples of the batch.
    assert torch.equal(temporal_self_share(query, key)[1:], temporal_self_share(query[1:], key[1:]))


def test_what_does_not_fit_is_said_and_measured_in_plain_torch() -> None:
    query, key = fused(200, 2, 1, 128)
    with pytest.warns(UserWarning, match="plain torch.*200 frames"):
        found = temporal_self_share(query, key)
    expected = naive.temporal_self_share(query.double(), key.double())
    assert torch.allclose(found.double(), expected, rtol=1e-4)
