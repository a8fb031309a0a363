"""The kernels of linear attention on a GPU, with the sizes of real models."""

from __future__ import annotations

import itertools
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor

from postgen.kernels.linear_attention import naive
from postgen.kernels.linear_attention.ops import linear_attention, linear_attention_with_state
from tests.kernels.launches import assert_compiles_whole, assert_records, assert_repeats, relative_error
from tests.kernels.linear_attention_cases import CASES, in_float64, inputs, off_mean, terms, worst_head
from tests.kernels.poison import poisoned_memory

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

GRID = (5, 11, 13)
TOKENS = 5 * 11 * 13
BOUNDS = {torch.bfloat16: 4e-3, torch.float16: 1e-3, torch.float32: 5e-5}


def fused(shape: tuple[int, int, int, int], dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    return inputs(shape, dtype=dtype, device="cuda")


def options(given: naive.Terms) -> dict[str, Any]:
    return {field.name: getattr(given, field.name) for field in fields(given)}


def exact(qkv: tuple[Tensor, Tensor, Tensor], given: naive.Terms) -> Tensor:
    return naive.linear_attention(*(x.double() for x in qkv), in_float64(given))[0]


@pytest.mark.parametrize("channels", [64, 80, 96, 112, 128, 200, 256])
@pytest.mark.parametrize("case", CASES)
def test_equals_float64(case: str, channels: int) -> None:
    shape = (2, TOKENS, 3, channels)
    qkv, given = fused(shape), terms(case, shape, GRID, "cuda")
    with poisoned_memory():
        out, state, key_sum = linear_attention_with_state(*qkv, **options(given))
    expected, exact_state, exact_key_sum = naive.linear_attention(*(x.double() for x in qkv), in_float64(given))
    assert worst_head(out, expected) < 4e-3
    assert relative_error(state, exact_state) < 4e-3
    # Features that bfloat16 cannot represent are rounded before they are summed.
    rounded = given.rope is None and (given.qk_norm is not None or given.feature_map != "relu")
    assert relative_error(key_sum, exact_key_sum) < (4e-4 if rounded else 1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("case", ["plain", "all"])
def test_other_dtypes(case: str, dtype: torch.dtype) -> None:
    shape = (2, TOKENS, 3, 128)
    qkv, given = fused(shape, dtype), terms(case, shape, GRID, "cuda")
    assert worst_head(linear_attention(*qkv, **options(given)), exact(qkv, given)) < BOUNDS[dtype]


@pytest.mark.parametrize(
    ("case", "channels", "dtype"),
    [
        *itertools.product(CASES, (64, 112, 128), (torch.bfloat16,)),
        *itertools.product(("plain", "rope", "text and all"), (200, 256), (torch.bfloat16,)),
        *itertools.product(("plain", "all"), (128,), (torch.float16, torch.float32)),
    ],
)
def test_gradients_equal_float64(case: str, channels: int, dtype: torch.dtype) -> None:
    shape = (2, TOKENS, 2, channels)
    given = terms(case, shape, GRID, "cuda")
    chosen = options(given)
    gradient = torch.randn(shape, device="cuda").to(dtype)
    leaves = {n: x for n, x in chosen.items() if isinstance(x, Tensor) and x.is_floating_point() and n != "rope"}
    qkv = fused(shape, dtype)
    tensors = [x.detach().clone().requires_grad_() for x in (*qkv, *leaves.values())]
    with poisoned_memory():
        out = linear_attention(*tensors[:3], **{**chosen, **dict(zip(leaves, tensors[3:], strict=True))})
        found = torch.autograd.grad(out, tensors, gradient)
    doubled = [x.detach().double().requires_grad_() for x in tensors]
    exact_terms = naive.Terms(**{**options(in_float64(given)), **dict(zip(leaves, doubled[3:], strict=True))})
    reference, *_ = naive.linear_attention(*doubled[:3], exact_terms)
    expected = torch.autograd.grad(reference, doubled, gradient.double())
    names = ["query", "key", "value", *leaves]
    for name, x, y in zip(names, found, expected, strict=True):
        # The terms of a gradient nearly cancel, so the relative error in float32 is larger than that of the terms.
        bound = 5e-4 if dtype == torch.float32 else 1.5 * BOUNDS[dtype]
        assert relative_error(x, y) < bound, name


@pytest.mark.parametrize(
    ("case", "channels", "cut"),
    [
        *itertools.product(("plain", "rope", "norm", "lengths", "text before and after"), (64, 128), [(64, 8, 3)]),
        *itertools.product(("plain", "rope"), (128,), [(64, 4, 2), (32, 4, 3), (128, 8, 1)]),
    ],
)
def test_tiles_that_are_copied_whole(
    case: str, channels: int, cut: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    from postgen.kernels.linear_attention.triton_descriptors import described
    from postgen.kernels.linear_attention.triton_launch import LAUNCHES, Launch

    tokens, warps, stages = cut
    how = Launch(tokens=tokens, warps=warps, stages=stages, described=True)
    for name in ("keys", "queries", "grad_queries", "grad_sums", "grad_keys"):
        monkeypatch.setitem(LAUNCHES, (name, channels), how)
        monkeypatch.setitem(LAUNCHES, (f"turned_{name}", channels), how)
    shape = (2, TOKENS, 3, channels)
    qkv, given = fused(shape), terms(case, shape, GRID, "cuda")
    assert described(how, *qkv)[1].described == (torch.cuda.get_device_capability()[0] == 9)
    gradient = torch.randn(shape, device="cuda").bfloat16()
    leaves = [x.detach().requires_grad_() for x in qkv]
    with poisoned_memory():
        out = linear_attention(*leaves, **options(given))
        found = torch.autograd.grad(out, leaves, gradient)
    doubled = [x.detach().double().requires_grad_() for x in qkv]
    expected, *_ = naive.linear_attention(*doubled, in_float64(given))
    assert worst_head(out.detach(), expected.detach()) < 4e-3
    for x, y in zip(found, torch.autograd.grad(expected, doubled, gradient.double()), strict=True):
        assert relative_error(x, y) < 6e-3
    assert_records(lambda: linear_attention(*qkv, **options(given)))
    assert_repeats(lambda: linear_attention(*qkv, **options(given)), times=3)


@pytest.mark.parametrize("tokens", [1, 2, 63, 64, 65, 127, 128, 129, 4992, 32760])
@pytest.mark.parametrize("channels", [64, 128])
def test_any_number_of_tokens(tokens: int, channels: int) -> None:
    qkv = fused((1, tokens, 2, channels))
    with poisoned_memory():
        out = linear_attention(*qkv)
    assert worst_head(out, exact(qkv, naive.Terms())) < 4e-3


@pytest.mark.parametrize(("queries", "keys"), [(1, 1000), (1000, 1), (77, 4001)])
def test_queries_and_keys_differ_in_number(queries: int, keys: int) -> None:
    qkv = inputs((2, queries, 3, 128), keys=keys, dtype=torch.bfloat16, device="cuda")
    assert worst_head(linear_attention(*qkv), exact(qkv, naive.Terms())) < 4e-3


@pytest.mark.parametrize(("tokens", "heads"), [(75_600, 2), (119_056, 2)])
def test_what_differs_from_the_mean_value_is_right_too(tokens: int, heads: int) -> None:
    qkv = fused((1, tokens, heads, 128))
    out, expected = linear_attention(*(x.clone() for x in qkv)), exact(qkv, naive.Terms())
    assert worst_head(out, expected) < 4e-3
    # Attention over so many independent keys is nearly uniform: the deviation from the mean value is about 0.5 % of
    # the result, which is as large as the bfloat16 rounding of the result. Float32 results show the error of the sums.
    upcast = linear_attention(*(x.float() for x in qkv))
    assert worst_head(off_mean(upcast, qkv[2]), off_mean(expected, qkv[2])) < 2e-3
    centred = (qkv[0], qkv[1], (qkv[2].float() - qkv[2].float().mean(dim=1, keepdim=True)).to(torch.bfloat16))
    assert worst_head(linear_attention(*centred), exact(centred, naive.Terms())) < 6e-3


def test_one_key_that_matches_each_query() -> None:
    tokens, channels = 128, 128
    own = torch.eye(tokens, channels, device="cuda", dtype=torch.bfloat16)[None, :, None]
    value = torch.randn(1, tokens, 1, channels, device="cuda", dtype=torch.bfloat16)
    assert torch.allclose(linear_attention(own, own, value), value, rtol=1e-2, atol=1e-2)


def test_dead_queries_and_nan() -> None:
    q, k, v = (x.clone() for x in fused((2, 300, 2, 64)))
    q[0, 7] = -q[0, 7].abs()
    q.requires_grad_()
    out = linear_attention(q, k, v)
    assert torch.equal(out[0, 7], torch.zeros_like(out[0, 7]))
    (gradient,) = torch.autograd.grad(out.float().sum(), q)
    assert gradient.isfinite().all()
    k[1, 5, 0, 0] = torch.nan
    found = linear_attention(q.detach(), k, v)
    assert found[0].isfinite().all()
    assert found[1, :, 0].isnan().any()


def test_more_numbers_than_32_bits_count() -> None:
    # The fused projection of two samples of Wan 14B at 720p holds 2.3e9 numbers, more than 2^31.
    shape = (2, 75_600, 3, 40, 128)
    generator = torch.Generator("cuda").manual_seed(0)
    qkv = torch.randn(shape, generator=generator, dtype=torch.bfloat16, device="cuda").unbind(dim=2)
    out = linear_attention(*qkv)
    last = tuple(x[1:, :, -1:] for x in qkv)
    assert worst_head(out[1:, :, -1:], exact(last, naive.Terms())) < 6e-3
    gradient = out.detach()
    leaves = [x.detach().requires_grad_() for x in qkv]
    found = torch.autograd.grad(linear_attention(*leaves), leaves, gradient)
    doubled = [x.double().requires_grad_() for x in last]
    reference, *_ = naive.linear_attention(*doubled, naive.Terms())
    expected = torch.autograd.grad(reference, doubled, gradient[1:, :, -1:].double())
    for x, y in zip(found, expected, strict=True):
        assert relative_error(x[1:, :, -1:], y) < 8e-3


@pytest.mark.parametrize("case", ["plain", "all"])
def test_repeats_records_and_compiles(case: str) -> None:
    shape = (2, TOKENS, 3, 128)
    qkv, given = fused(shape), terms(case, shape, GRID, "cuda")
    chosen = options(given)

    def forward(*tensors: Tensor) -> Tensor:
        return linear_attention(*tensors, **chosen)

    def backward(*tensors: Tensor) -> tuple[Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in tensors]
        return torch.autograd.grad(linear_attention(*leaves, **chosen), leaves, tensors[2])

    assert_repeats(lambda: forward(*qkv))
    assert_repeats(lambda: backward(*qkv))
    assert_records(lambda: forward(*qkv))
    assert_compiles_whole(forward, *qkv)
    # The result of a sample does not depend on the other samples of the batch.
    if case == "plain":
        assert torch.equal(forward(*qkv)[1:], forward(*(x[1:] for x in qkv)))


def test_gradients_under_compile() -> None:
    shape = (1, TOKENS, 3, 128)
    given = options(terms("rope", shape, GRID, "cuda"))
    qkv = [x.clone().requires_grad_() for x in fused(shape)]

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return linear_attention(q, k, v, **given).float().square().sum()

    expected = torch.autograd.grad(loss(*qkv), qkv)
    torch.compiler.reset()
    found = torch.autograd.grad(torch.compile(loss, fullgraph=True)(*qkv), qkv)
    for x, y in zip(found, expected, strict=True):
        assert relative_error(x, y) < 4e-3


def test_what_the_kernel_cannot_take_is_said() -> None:
    for channels, dtype in ((258, torch.bfloat16), (160, torch.float32)):
        qkv = fused((1, 33, 1, channels), dtype)
        with pytest.warns(UserWarning, match=f"plain torch.*{channels} channels"):
            out = linear_attention(*qkv)
        assert worst_head(out, exact(qkv, naive.Terms())) < 4e-3
