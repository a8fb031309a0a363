"""Linear attention on the CPU: the reference against the explicit N x N form and models, and the operation."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor, library

from postgen.kernels.linear_attention import naive, ops
from postgen.kernels.linear_attention.ops import linear_attention, linear_attention_with_state
from tests.kernels.linear_attention_cases import CASES, in_float64, inputs, pairs, rope, terms

SHAPE, GRID = (2, 12, 2, 6), (3, 2, 2)


def given(case: str, shape: tuple[int, int, int, int] = SHAPE) -> dict[str, Any]:
    """Return the terms of a case as arguments in float64."""
    chosen = in_float64(terms(case, shape, GRID))
    return {field.name: getattr(chosen, field.name) for field in fields(chosen)}


def exact_inputs(shape: tuple[int, int, int, int] = SHAPE) -> tuple[Tensor, ...]:
    return tuple(x.double() for x in inputs(shape))


@pytest.mark.parametrize("case", ["plain", "elu", "rope"])
def test_is_attention_with_weights_of_features(case: str) -> None:
    """The explicit N x N form has the weights R phi(q) . R phi(k), divided by the sum of the unrotated weights."""
    q, k, v = exact_inputs()
    chosen = naive.Terms(**given(case))
    q_map, k_map = (naive.feature(x, chosen.feature_map) for x in (q, k))
    scores = torch.einsum("bihd,bjhd->bhij", naive.rotate(q_map, chosen), naive.rotate(k_map, chosen))
    divisor = torch.einsum("bihd,bjhd->bhi", q_map, k_map)
    expected = torch.einsum("bhij,bjhd->bihd", scores / divisor[..., None], v)
    assert torch.allclose(linear_attention(q, k, v, **given(case)), expected, rtol=1e-10)


def test_text_is_neither_turned_nor_convolved() -> None:
    """In the explicit N x N form text tokens are not rotated, and only video tokens are convolved."""
    q, k, v = exact_inputs()
    options = given("text before and after")
    chosen = naive.Terms(**options)
    first, video = chosen.text_first, slice(chosen.text_first, 12 - chosen.text_last)
    alone = replace(chosen, text_first=0, text_last=0)
    turned = [x.relu().clone() for x in (q, k)]
    for x in turned:
        x[:, video] = naive.rotate(x[:, video], alone)
    scores = torch.einsum("bihd,bjhd->bhij", *turned)
    divisor = torch.einsum("bihd,bjhd->bhi", q.relu(), k.relu())
    expected = torch.einsum("bhij,bjhd->bihd", scores / divisor[..., None], v)
    expected[:, video] += naive.convolve(v[:, video], alone)
    assert torch.allclose(linear_attention(q, k, v, **options), expected, rtol=1e-10)
    # The values of the text do not affect the convolution.
    v = v.clone()
    v[:, :first] = torch.nan
    assert torch.equal(naive.convolve(v, chosen)[:, video], naive.convolve(v[:, video], alone))
    assert torch.equal(naive.convolve(v, chosen)[:, :first], torch.zeros_like(v[:, :first]))


def test_rotation_is_that_of_wan() -> None:
    transformer_wan = pytest.importorskip("diffusers.models.transformers.transformer_wan")
    channels, size = 24, (3, 4, 5)
    embed = transformer_wan.WanRotaryPosEmbed(channels, (1, 1, 1), 16)
    cosine, sine = embed(torch.zeros(1, 1, *size))
    x = torch.randn(1, 60, 2, channels)
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cosine, sine = cosine[..., 0::2], sine[..., 1::2]
    expected = torch.stack((even * cosine - odd * sine, even * sine + odd * cosine), dim=-1).flatten(-2)
    chosen = naive.Terms(grid=size, rope=rope(size, channels), rope_pairs=pairs(channels))
    assert torch.allclose(naive.rotate(x, chosen), expected, atol=1e-5)
    assert torch.allclose(naive.rotate(naive.rotate(x, chosen), chosen, back=True), x, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_gradients(case: str) -> None:
    options = given(case)
    q, k, v = (x.clone().requires_grad_() for x in exact_inputs())
    names = [n for n, x in options.items() if isinstance(x, Tensor) and x.is_floating_point() and n != "rope"]
    tensors = [options[name].requires_grad_() for name in names]

    def call(q: Tensor, k: Tensor, v: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        return linear_attention_with_state(q, k, v, **{**options, **dict(zip(names, values, strict=True))})

    assert torch.autograd.gradcheck(call, (q, k, v, *tensors), fast_mode=True)


def test_formulas_equal_autograd_of_the_reference() -> None:
    chosen = in_float64(terms("all", SHAPE, GRID))
    q, k, v = (x.clone().requires_grad_() for x in exact_inputs())
    out, *_ = linear_attention_with_state(q, k, v, **given("all"))
    gradient = torch.randn_like(out)
    found = torch.autograd.grad(out, (q, k, v), gradient)
    expected = torch.autograd.grad(naive.linear_attention(q, k, v, chosen)[0], (q, k, v), gradient)
    for x, y in zip(found, expected, strict=True):
        assert torch.allclose(x, y, rtol=1e-9, atol=1e-12)


def test_chunks_of_a_stream_see_what_was_before() -> None:
    """The recurrent form equals attention with a mask that is causal by chunk."""
    q, k, v = exact_inputs((1, 12, 2, 6))
    state: dict[str, Any] = {}
    chunks = []
    for i in range(0, 12, 4):
        out, total, key_sum = linear_attention_with_state(*(x[:, i : i + 4] for x in (q, k, v)), **state)
        state = {"state": total, "key_sum": key_sum}
        chunks.append(out)
    weights = torch.einsum("bihd,bjhd->bhij", q.relu(), k.relu())
    chunk = torch.arange(12) // 4
    weights = weights * (chunk[None, :] <= chunk[:, None])
    expected = torch.einsum("bhij,bjhd->bihd", weights / weights.sum(dim=-1, keepdim=True), v)
    assert torch.allclose(torch.cat(chunks, dim=1), expected, rtol=1e-10)


def test_a_query_without_features_gets_nothing_and_gives_finite_gradients() -> None:
    q, k, v = (x.clone() for x in inputs((1, 5, 1, 4)))
    q[:, 2] = -q[:, 2].abs()
    q.requires_grad_()
    out = linear_attention(q, k, v)
    assert torch.equal(out[:, 2], torch.zeros(1, 1, 4))
    out.sum().backward()
    assert q.grad is not None
    assert q.grad.isfinite().all()
    assert torch.equal(q.grad[:, 2], torch.zeros(1, 1, 4))


def test_nothing_beyond_the_lengths_counts() -> None:
    q, k, v = (x.clone() for x in inputs((2, 12, 2, 6)))
    options = {"grid": GRID, "conv_space": torch.randn(12, 3, 3)}
    expected = linear_attention(q, k, v, key_lengths=torch.tensor([12, 5]), **options)
    for x in (k, v):
        x[1, 5:] = torch.nan
    assert torch.equal(linear_attention(q, k, v, key_lengths=torch.tensor([12, 5]), **options), expected)
    short = linear_attention(q[1:], k[1:, :5], v[1:, :5])
    assert torch.allclose(
        linear_attention(q, k.nan_to_num(), v.nan_to_num(), key_lengths=torch.tensor([12, 5]))[1:], short
    )


def test_no_convolution_weight_changes_nothing_and_samples_do_not_mix() -> None:
    q, k, v = inputs((2, 12, 2, 6))
    zero = {"grid": GRID, "conv_space": torch.zeros(6, 5, 5), "conv_time": torch.zeros(6, 3)}
    assert torch.equal(linear_attention(q, k, v, **zero), linear_attention(q, k, v))
    conv = {"grid": GRID, "conv_space": torch.randn(12, 5, 5), "conv_time": torch.randn(12, 3)}
    both = linear_attention(q, k, v, **conv)
    assert torch.allclose(both[1:], linear_attention(q[1:], k[1:], v[1:], **conv), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_maths_is_done_in_float32(dtype: torch.dtype) -> None:
    q, k, v = inputs((1, 12, 2, 6), dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, state, key_sum = linear_attention_with_state(q, k, v)
    assert (out.dtype, state.dtype, key_sum.dtype) == (dtype, torch.float32, torch.float32)
    assert torch.equal(out, linear_attention(q.float(), k.float(), v.float()).to(dtype))


def test_weights_and_states_of_another_dtype_are_taken_in_that_of_the_sums() -> None:
    q, k, v = exact_inputs()
    exact, rounded = given("all"), terms("all", SHAPE, GRID)
    single = {name: getattr(rounded, name) for name in exact}
    for x, y in zip(
        linear_attention_with_state(q, k, v, **single), linear_attention_with_state(q, k, v, **exact), strict=True
    ):
        assert torch.equal(x, y)
    for x in linear_attention_with_state(q.float(), k.float(), v.float(), **exact):
        assert x.dtype == torch.float32


@pytest.mark.parametrize("case", ["plain", "all"])
def test_is_registered_well(case: str) -> None:
    q, k, v = (x.clone().requires_grad_() for x in inputs(SHAPE))
    chosen = terms(case, SHAPE, GRID)
    arguments = ops._arguments(q, k, v, chosen)
    library.opcheck(ops._forward, arguments)
    q, k, v = (x.detach() for x in (q, k, v))
    out, *sums = (x.detach() for x in ops._forward(*arguments))
    gradients = (out, *sums) if case == "all" else (out, None, None)
    library.opcheck(ops.linear_attention_backward, (*gradients, *sums, q, k, v, *arguments[3:9], *arguments[11:]))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"feature_map": "gelu"}, "feature_map must be one of .* got 'gelu'"),
        ({"qk_norm": "layer_norm"}, "qk_norm must be one of .* got 'layer_norm'"),
        ({"query_weight": torch.ones(6)}, "need qk_norm"),
        ({"qk_norm": "rms_norm", "query_weight": torch.ones(12)}, r"query_weight must have the shape \(6,\)"),
        ({"key_lengths": torch.ones(3)}, r"key_lengths must have the shape \(2,\)"),
        ({"state": torch.ones(2, 2, 6, 6)}, "belong together"),
        ({"conv_time": torch.ones(6, 3)}, "needs the grid"),
        ({"conv_time": torch.ones(6, 3), "grid": (3, 2, 3)}, "18 tokens"),
        ({"conv_time": torch.ones(6, 3), "grid": (3, 2, 1), "text_last": 5}, "11 tokens.* and 5 of text .* got 12"),
        ({"text_first": 2}, "need the grid"),
        ({"text_first": -1, "grid": GRID}, "must be at least 0, got -1 and 0"),
        ({"conv_time": torch.ones(6, 4), "grid": GRID}, "s odd"),
        ({"conv_space": torch.ones(5, 3, 3), "grid": GRID}, "the same C, 6 or 12"),
        ({"rope": torch.ones(7, 3, 2), "grid": GRID}, "rope_pairs"),
    ],
)
def test_terms_that_do_not_belong_together(changed: dict[str, Any], message: str) -> None:
    q, k, v = inputs(SHAPE)
    with pytest.raises(ValueError, match=message):
        linear_attention(q, k, v, **changed)


def test_shapes_that_do_not_belong_together() -> None:
    q, k, v = inputs(SHAPE)
    with pytest.raises(ValueError, match="not empty"):
        linear_attention(q[:, :0], k, v)
    with pytest.raises(ValueError, match="except that the number of queries may differ"):
        linear_attention(q, k[:, 1:], v)


def test_compiles_whole() -> None:
    q, k, v = (x.clone().requires_grad_() for x in inputs(SHAPE))
    chosen = terms("all", SHAPE, GRID)
    options = {field.name: getattr(chosen, field.name) for field in fields(chosen)}

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return linear_attention(q, k, v, **options) * 2

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    gradients = [torch.autograd.grad(f(q, k, v).square().sum(), (q, k, v)) for f in (call, compiled)]
    for x, y in zip(*gradients, strict=True):
        assert torch.allclose(x, y)
