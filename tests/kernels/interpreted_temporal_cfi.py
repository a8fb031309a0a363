"""The Triton kernel of the temporal self-attention share in Triton's interpreter, against the reference in float64.

`test_interpreted.py` runs this file.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from postgen.kernels.temporal_cfi import naive, triton
from tests.kernels.poison import poisoned_memory


def pair(
    frames: int, places: int, channels: int, *, batch: int = 1, heads: int = 2, key_heads: int = 2
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(frames)
    query = torch.randn(batch, frames, places, heads, channels, generator=generator)
    return query, torch.randn(batch, frames, places, key_heads, channels, generator=generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("frames", "places", "channels"), [(1, 1, 16), (2, 3, 64), (5, 2, 80), (13, 1, 112), (21, 3, 24), (33, 1, 7)]
)
def test_equals_the_reference(frames: int, places: int, channels: int, dtype: torch.dtype) -> None:
    query, key = (x.to(dtype) for x in pair(frames, places, channels, batch=2))
    with poisoned_memory():
        found = triton.temporal_self_share(query, key)
    expected = naive.temporal_self_share(query.double(), key.double())
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("causal_block", [0, 1, 2])
@pytest.mark.parametrize("key_heads", [4, 2, 1])
def test_grouped_keys_and_masks(key_heads: int, causal_block: int) -> None:
    query, key = pair(5, 3, 16, heads=4, key_heads=key_heads)
    found = triton.temporal_self_share(query, key, scale=0.7, causal_block=causal_block)
    expected = naive.temporal_self_share(query, key, scale=0.7, causal_block=causal_block)
    assert torch.allclose(found, expected, rtol=1e-5, atol=0)


def test_any_strides_are_read_and_nothing_beside_them() -> None:
    query, key = pair(6, 7, 24)
    expected = naive.temporal_self_share(query[:, :, ::2], key[:, :, ::2])
    # Queries and keys are views of one fused projection, every second channel is used, and the rest is NaN.
    fused = torch.full((1, 6, 7, 3, 2, 50), torch.nan)
    fused[:, :, ::2, 0, :, 1:49:2] = query[:, :, ::2]
    fused[:, :, ::2, 1, :, 1:49:2] = key[:, :, ::2]
    views = fused[:, :, ::2, 0, :, 1:49:2], fused[:, :, ::2, 1, :, 1:49:2]
    assert torch.allclose(triton.temporal_self_share(*views), expected, rtol=1e-5, atol=0)


def test_more_tiles_than_programs_and_equal_bits_in_any_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "_PROGRAMS", 3)
    query, key = pair(3, 5, 16, batch=2)
    both = triton.temporal_self_share(query, key)
    assert torch.allclose(both, naive.temporal_self_share(query, key), rtol=1e-5, atol=0)
    assert torch.equal(both[1:], triton.temporal_self_share(query[1:], key[1:]))


def test_large_logits_and_nan() -> None:
    query, key = pair(4, 2, 16, batch=2)
    own = torch.eye(4, 16)[None, :, None, None].expand(1, 4, 2, 2, 16)
    assert torch.allclose(triton.temporal_self_share(own, own, scale=1e4), torch.ones(1))
    query[1, 0, 0, 0, 0] = torch.nan
    found = triton.temporal_self_share(query, key)
    assert found[0].isfinite()
    assert found[1].isnan()
