"""Exact attention against float64, for many head counts, head dimensions and key lengths."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, library
from torch.nn.attention.flex_attention import flex_attention

from postgen.kernels.attention import naive
from postgen.kernels.attention.backends import key_blocks
from postgen.kernels.attention.ops import attention
from tests.kernels.launches import relative_error


def drawn(
    tokens: int = 37, keys: int = 53, heads: int = 4, key_heads: int = 4, channels: int = 16, batch: int = 2
) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    sizes = (tokens, heads), (keys, key_heads), (keys, key_heads)
    query, key, value = (torch.randn(batch, *size, channels) for size in sizes)
    return query, key, value


def by_hand(query: Tensor, key: Tensor, value: Tensor, scale: float, lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Compute softmax attention and its LSE sample by sample and head by head in float64."""
    out, lse = torch.zeros_like(query, dtype=torch.float64), torch.zeros(*query.shape[:3], dtype=torch.float64)
    group = query.shape[2] // key.shape[2]
    for sample, length in enumerate(lengths):
        for head in range(query.shape[2]):
            k, v = (x[sample, :length, head // group].double() for x in (key, value))
            logits = scale * query[sample, :, head].double() @ k.T
            out[sample, :, head] = logits.softmax(dim=-1) @ v
            lse[sample, :, head] = logits.exp().sum(dim=-1).log()
    return out, lse.transpose(1, 2)


@pytest.mark.parametrize("lengths", [None, [53, 53], [11, 11], [53, 1], [17, 40]])
@pytest.mark.parametrize("key_heads", [4, 2, 1])
def test_equals_the_formula(lengths: list[int] | None, key_heads: int) -> None:
    tensors = drawn(key_heads=key_heads)
    expected, divisor = by_hand(*tensors, 0.3, lengths or [53, 53])
    lengths_B = None if lengths is None else torch.tensor(lengths)
    out, lse = attention(*tensors, scale=0.3, key_lengths=lengths_B, return_lse=True)
    assert relative_error(out, expected) < 1e-6
    assert relative_error(lse, divisor) < 1e-6
    assert relative_error(attention(*tensors, scale=0.3, key_lengths=lengths_B), expected) < 1e-6


@pytest.mark.parametrize("channels", [64, 72, 80, 96, 112, 128])
@pytest.mark.parametrize(("tokens", "keys"), [(1, 1), (1, 130), (129, 63)])
def test_head_dimensions_and_odd_sizes(tokens: int, keys: int, channels: int) -> None:
    tensors = drawn(tokens, keys, channels=channels)
    expected, divisor = by_hand(*tensors, channels**-0.5, [keys, keys])
    out, lse = attention(*tensors, return_lse=True)
    assert relative_error(out, expected) < 1e-6
    assert relative_error(lse, divisor) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_dtypes_and_layout(dtype: torch.dtype) -> None:
    query, key, value = torch.randn(2, 21, 3, 4, 16, dtype=dtype).unbind(2)
    out, lse = attention(query, key, value, return_lse=True)
    assert out.is_contiguous()
    assert lse.is_contiguous()
    assert (out.dtype, out.shape) == (dtype, query.shape)
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected, _ = by_hand(query, key, value, 0.25, [21, 21])
    limits = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 4e-3}
    assert relative_error(out, expected) < limits[dtype]


@pytest.mark.parametrize("return_lse", [False, True])
def test_autocast_acts_as_on_the_attention_of_torch(return_lse: bool) -> None:
    query, key, value = drawn()
    with torch.autocast("cpu", torch.bfloat16):
        found = attention(query, key.bfloat16(), value, return_lse=return_lse)
        own = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, key, value)))
    out = found[0] if isinstance(found, tuple) else found
    assert out.dtype == own.dtype == torch.bfloat16
    assert relative_error(out, own.transpose(1, 2)) < 8e-3


def test_two_halves_of_the_keys_make_the_whole() -> None:
    query, key, value = drawn()
    halves = [
        attention(query, k, v, return_lse=True) for k, v in zip(key.split(20, 1), value.split(20, 1), strict=True)
    ]
    out, lse = naive.merge(halves)
    whole, divisor = attention(query, key, value, return_lse=True)
    assert relative_error(out, whole) < 1e-6
    assert relative_error(lse, divisor) < 1e-6


@pytest.mark.parametrize("lengths", [[5, 5], [5, 60]])
def test_what_lies_beyond_the_keys_is_never_read(lengths: list[int]) -> None:
    query, key, value = drawn(keys=60)
    expected = attention(query, key, value, key_lengths=torch.tensor(lengths))
    for sample, length in enumerate(lengths):
        key[sample, length:], value[sample, length:] = torch.nan, torch.nan
    assert torch.equal(attention(query, key, value, key_lengths=torch.tensor(lengths)), expected)


def test_extreme_logits() -> None:
    query, key, value = drawn()
    peaked = attention(query, key, value, scale=1e4)
    winner = torch.einsum("bnhd,bmhd->bhnm", query, key).argmax(dim=-1)
    expected = value.transpose(1, 2).gather(2, winner.unsqueeze(-1).expand(-1, -1, -1, 16)).transpose(1, 2)
    assert relative_error(peaked, expected) < 1e-4
    even = attention(query, key, value, scale=0.0)
    assert relative_error(even, value.mean(dim=1, keepdim=True).expand_as(query)) < 1e-6


def test_the_reference_takes_few_queries_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = drawn(key_heads=2)
    lengths = torch.tensor([9, 53])
    whole = naive.attention(*tensors, key_lengths=lengths)
    monkeypatch.setattr(naive, "_BUDGET", 1)
    for found, expected in zip(naive.attention(*tensors, key_lengths=lengths), whole, strict=True):
        assert relative_error(found, expected) < 1e-6


def test_a_sample_of_no_keys_is_defined_in_the_reference() -> None:
    out, lse = naive.attention(*drawn(), key_lengths=torch.tensor([0, 3]))
    assert torch.equal(out[0], torch.zeros_like(out[0]))
    assert bool((lse[0] == -torch.inf).all())
    assert bool(lse[1].isfinite().all())


@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_block_masks_show_the_keys_of_each_sample(key_heads: int) -> None:
    query, key, value = drawn(140, 300, key_heads=key_heads)
    lengths = torch.tensor([1, 257])
    blocks = key_blocks(lengths, 140, 300)
    heads_first = (x.transpose(1, 2) for x in (query, key, value))
    found = flex_attention(*heads_first, block_mask=blocks, scale=0.2, enable_gqa=key_heads != 4)
    expected, _ = by_hand(query, key, value, 0.2, [1, 257])
    assert isinstance(found, Tensor)
    assert relative_error(found.transpose(1, 2), expected) < 1e-6
    assert blocks.kv_num_blocks.tolist() == [[[1, 1]], [[3, 3]]]


@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("lengths", [None, [7, 53]])
def test_gradients_are_those_of_the_formula(lengths: list[int] | None, return_lse: bool) -> None:
    tensors = [x.double().requires_grad_() for x in drawn(5, 53, key_heads=2, channels=3)]
    lengths_B = None if lengths is None else torch.tensor(lengths)

    def total(found: Any) -> Tensor:
        return sum((x.square().sum() for x in (found if isinstance(found, tuple) else (found,))), torch.zeros(()))

    found = attention(*tensors, key_lengths=lengths_B, return_lse=return_lse)
    expected = naive.attention(*tensors, key_lengths=lengths_B)
    wanted = total(expected if return_lse else expected[0])
    pairs = zip(torch.autograd.grad(total(found), tensors), torch.autograd.grad(wanted, tensors), strict=True)
    for mine, theirs in pairs:
        torch.testing.assert_close(mine, theirs)


def test_the_reference_passes_gradcheck() -> None:
    tensors = [x.double().requires_grad_() for x in drawn(3, 5, 2, 1, 3)]
    torch.autograd.gradcheck(lambda *x: naive.attention(*x, key_lengths=torch.tensor([2, 5])), tensors)


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("backend", [None, "math"])
def test_compiles_whole(gradient: bool, backend: str | None) -> None:
    tensors = [x.requires_grad_(gradient) for x in drawn()]
    lengths = torch.tensor([7, 53])

    def call(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        plain = attention(query, key, value, backend=backend)
        return plain, *attention(query, key, value, key_lengths=lengths, return_lse=True, backend=backend)

    torch.compiler.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for found, expected in zip(compiled(*tensors), call(*tensors), strict=True):
        torch.testing.assert_close(found, expected)
        assert found.requires_grad is gradient


def test_the_operation_keeps_the_rules_of_torch() -> None:
    lengths = torch.tensor([7, 53])
    for arguments in ((0.3, None, True, None), (0.3, lengths, False, "math")):
        library.opcheck(torch.ops.postgen.attention.default, (*drawn(), *arguments))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.ones(2, 3, 4)}, "query must be"),
        ({"value": torch.ones(2, 52, 4, 16)}, "with H a multiple of Hk"),
        ({"key": torch.ones(2, 53, 3, 16), "value": torch.ones(2, 53, 3, 16)}, "H a multiple of Hk"),
        ({"key": torch.ones(2, 0, 4, 16), "value": torch.ones(2, 0, 4, 16)}, "at least one query and one key"),
        ({"query": torch.ones(2, 37, 4, 16, dtype=torch.float64)}, "the same dtype"),
        ({"key_lengths": torch.tensor([1, 2, 3])}, r"key_lengths must be \(2,\)"),
        ({"key_lengths": torch.tensor([1.0, 2.0])}, "int32 or int64"),
        ({"key_lengths": torch.tensor([0, 2])}, "from 1 to 53"),
        ({"key_lengths": torch.tensor([54, 2])}, "from 1 to 53"),
        ({"backend": "cuda"}, "unknown attention backend 'cuda'. Known: fa4, fa3, cudnn, xformers"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    arguments = dict(zip(("query", "key", "value"), drawn(), strict=True)) | change
    with pytest.raises(ValueError, match=message):
        attention(**arguments)
    if "key_lengths" in change:
        arguments["query"].requires_grad_()
        with pytest.raises(ValueError, match=message):
            attention(**arguments)


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"got torch\.int32"):
        attention(*(x.int() for x in drawn()))
