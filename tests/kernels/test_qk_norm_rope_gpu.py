"""The Triton kernel of norm and rotation, on a GPU with the sizes of real models."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from postgen.kernels.qk_norm_rope import naive
from postgen.kernels.qk_norm_rope.ops import qk_norm_rope, qk_norm_rope_int8
from tests.kernels.launches import assert_compiles_whole, assert_records, assert_repeats, relative_error
from tests.kernels.norm_rope_cases import KINDS, make
from tests.kernels.poison import poisoned_memory

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

BF16: dict[str, Any] = {"dtype": torch.bfloat16, "affine": torch.bfloat16, "device": "cuda"}


@pytest.mark.parametrize("heads_first", [False, True])
@pytest.mark.parametrize(("heads", "channels"), [(12, 128), (40, 128), (48, 64), (20, 112), (16, 96), (16, 80)])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_float64(kind: str, heads: int, channels: int, heads_first: bool) -> None:
    case = make(kind, (2, 133, heads, channels), **BF16)
    with poisoned_memory():
        found = qk_norm_rope(**case.tensors, **case.options, heads_first=heads_first)
    if heads_first:
        found = tuple(x.transpose(1, 2) for x in found)
    for x, name in zip(found, "qk", strict=False):
        assert relative_error(x, naive.norm_rope(**case.in_float64().of(name))) < 4e-3
    if case.tensors["v"] is not None:
        assert torch.equal(found[2], case.tensors["v"])


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 4992])
def test_any_number_of_tokens(tokens: int) -> None:
    case = make("Wan", (1, tokens, 40, 128), **BF16)
    for x, name in zip(qk_norm_rope(**case.tensors, **case.options), "qk", strict=True):
        assert relative_error(x, naive.norm_rope(**case.in_float64().of(name))) < 4e-3


def test_more_numbers_than_32_bits_count() -> None:
    # The projection holds 2 x 75600 x 3 x 5120 = 2.3e9 numbers, more than 2^31.
    qkv = torch.randn(2, 75_600, 15_360, dtype=torch.bfloat16, device="cuda")
    q, k, v = (x.unflatten(2, (40, 128)) for x in qkv.chunk(3, -1))
    found = qk_norm_rope(q, k, v, norm="rms_norm_across_heads")
    for x, y in zip(found[:2], (q, k), strict=True):
        expected = naive.norm_rope(y[1:, -50:].double(), norm="rms_norm_across_heads")
        assert relative_error(x[1:, -50:], expected) < 4e-3
    assert torch.equal(found[2][1, -50:], v[1, -50:])


@pytest.mark.parametrize("kind", ["Wan", "CogVideoX", "half, shifted"])
def test_int8_holds_the_numbers(kind: str) -> None:
    case = make(kind, (2, 133, 40, 128), **BF16)
    given = {name: x for name, x in case.tensors.items() if name != "v"}
    with poisoned_memory():
        q, q_scale, k, k_scale = qk_norm_rope_int8(**given, **case.options)
    for x, scale, name in ((q, q_scale, "q"), (k, k_scale, "k")):
        exact = naive.norm_rope(**case.in_float64().of(name))
        assert relative_error(scale, exact.abs().amax(-1) / 127) < 1e-5
        assert ((x * scale.unsqueeze(-1) - exact).abs() <= scale.unsqueeze(-1) * 0.502).all()


@pytest.mark.parametrize("kind", ["Wan", "LTX", "half, shifted"])
def test_repeats_records_and_compiles(kind: str) -> None:
    case = make(kind, (2, 1009, 12, 128), **BF16)

    def call(*tensors: Any) -> Any:
        return qk_norm_rope(*tensors, **case.options)

    assert_repeats(lambda: call(*case.tensors.values()))
    assert_records(lambda: call(*case.tensors.values()))
    assert_compiles_whole(call, *case.tensors.values())


def test_gradients_equal_those_of_the_reference() -> None:
    case = make("Wan", (2, 37, 12, 128), device="cuda")
    names = ("q", "k", "q_weight", "k_weight")
    leaves = [case.tensors[name].detach().clone().requires_grad_() for name in names]
    given = {**case.tensors, **dict(zip(names, leaves, strict=True))}
    found = torch.autograd.grad([x.square().sum() for x in qk_norm_rope(**given, **case.options)], leaves)
    exact = case.in_float64()
    exact_leaves = [leaf.detach().double().requires_grad_() for leaf in leaves]
    exact.tensors.update(zip(names, exact_leaves, strict=True))
    outputs = [naive.norm_rope(**exact.of(name)).square().sum() for name in "qk"]
    for x, y in zip(found, torch.autograd.grad(outputs, exact_leaves), strict=True):
        assert relative_error(x, y) < 1e-4
