"""The temporal self-attention share of Enhance-A-Video: the chunked operation against the reference."""

import pytest
import torch
from torch import Tensor, library

from postgen.kernels.temporal_cfi import naive
from postgen.kernels.temporal_cfi.ops import temporal_self_share


def pair(
    batch: int = 2, frames: int = 4, places: int = 7, heads: int = 4, key_heads: int = 4, channels: int = 6
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(batch, frames, places, heads, channels, generator=generator)
    return query, torch.randn(batch, frames, places, key_heads, channels, generator=generator)


@pytest.mark.parametrize("chunk_size", [None, 1, 3, 7, 100])
@pytest.mark.parametrize("key_heads", [4, 2, 1])
@pytest.mark.parametrize(("frames", "causal_block"), [(2, 0), (5, 0), (5, 1), (5, 2)])
def test_equals_the_reference(chunk_size: int | None, key_heads: int, frames: int, causal_block: int) -> None:
    query, key = pair(frames=frames, key_heads=key_heads)
    found = temporal_self_share(query, key, None, causal_block, chunk_size)
    expected = naive.temporal_self_share(query, key, causal_block=causal_block)
    assert found.shape == (2,)
    assert torch.allclose(found, expected, atol=1e-6)


def test_a_frame_may_attend_evenly_or_to_itself_alone() -> None:
    query, key = pair()
    assert torch.allclose(temporal_self_share(query, key, 0.0), torch.full((2,), 1 / 4))
    own = torch.eye(4, 6)[None, :, None, None].expand(2, 4, 7, 4, 6)
    assert torch.allclose(temporal_self_share(own, own, 1000.0), torch.ones(2))


def test_any_strides_are_read() -> None:
    query, key = pair()
    expected = naive.temporal_self_share(query[:, :, ::2], key[:, :, ::2], scale=0.7)
    heads_first = [x.permute(0, 3, 1, 2, 4).contiguous().permute(0, 2, 3, 1, 4)[:, :, ::2] for x in (query, key)]
    assert torch.allclose(temporal_self_share(*heads_first, 0.7), expected, atol=1e-6)
    padded = [torch.full((2, 4, 7, 4, 9), torch.nan) for _ in range(2)]
    for room, x in zip(padded, (query, key), strict=True):
        room[..., 2:8] = x
    views = [room[:, :, ::2, :, 2:8] for room in padded]
    assert torch.allclose(temporal_self_share(*views, 0.7), expected, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_maths_is_done_in_float32_at_least(dtype: torch.dtype) -> None:
    query, key = (x.to(dtype) for x in pair(channels=16))
    found = temporal_self_share(query, key)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.allclose(found.double(), naive.temporal_self_share(query.double(), key.double()), atol=1e-6)


def test_autocast_does_not_round() -> None:
    query, key = pair(channels=16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = temporal_self_share(query, key)
    assert torch.equal(found, temporal_self_share(query, key))


def test_is_registered_well() -> None:
    query, key = pair(key_heads=2)
    library.opcheck(temporal_self_share, (query, key, None, 2, 3))


@pytest.mark.parametrize(
    ("query", "key", "chunk_size", "message"),
    [
        ((1, 2, 3, 4), (1, 2, 3, 4), None, "must be"),
        ((1, 2, 3, 4, 5), (1, 2, 2, 4, 5), None, "number of heads"),
        ((1, 2, 3, 4, 5), (1, 2, 3, 4, 6), None, "number of heads"),
        ((1, 2, 3, 4, 5), (1, 2, 3, 3, 5), None, "must be a multiple"),
        ((1, 2, 0, 4, 5), (1, 2, 0, 4, 5), None, "not be empty"),
        ((1, 2, 3, 4, 5), (1, 2, 3, 4, 5), 0, "at least 1"),
    ],
)
def test_shapes_that_do_not_belong_together(
    query: tuple[int, ...], key: tuple[int, ...], chunk_size: int | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        temporal_self_share(torch.ones(query), torch.ones(key), chunk_size=chunk_size)
