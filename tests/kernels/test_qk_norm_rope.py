"""Norm and rotation on the CPU: against diffusers' implementation, and the gradients against finite differences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor, library

from postgen.kernels.qk_norm_rope import naive
from postgen.kernels.qk_norm_rope.ops import _qk_norm_rope, qk_norm_rope, qk_norm_rope_int8
from tests.kernels.launches import relative_error
from tests.kernels.norm_rope_cases import KINDS, Case, make

SHAPE = (2, 8, 3, 8)


def official(case: Case, name: str) -> Tensor:
    """Compute the norm and the rotation of "q" or "k" with torch's norms and diffusers' rotation."""
    arguments = case.of(name)
    x, weight, bias, norm = (arguments[key] for key in ("x", "weight", "bias", "norm"))
    if norm == "layer_norm":
        x = F.layer_norm(x, x.shape[-1:], weight, bias, arguments["eps"])
    elif norm != "none":
        rows = x.flatten(2) if norm == "rms_norm_across_heads" else x
        x = F.rms_norm(rows, rows.shape[-1:], weight, arguments["eps"]).reshape(x.shape)
    if arguments["cos"] is not None:
        half, first = arguments["half"], arguments["first_token"]
        tables = [
            torch.cat([t, t], -1) if half else t.repeat_interleave(2, -1) for t in (arguments[k] for k in TABLES)
        ]
        # This function of diffusers takes one table for all heads, so it rotates one head at a time here.
        turned = []
        for head in range(x.shape[2]):
            cos, sin = (t[0, :, head if t.shape[2] > 1 else 0] for t in tables)
            own = x[:, first:, head : head + 1]
            turned.append(apply_rotary_emb(own, (cos, sin), use_real_unbind_dim=-2 if half else -1, sequence_dim=1))
        x = torch.cat([x[:, :first], torch.cat(turned, 2)], 1)
    return x if arguments["shift"] is None else x - arguments["shift"].unsqueeze(1)


TABLES = ("cos", "sin")


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 8e-3)])
@pytest.mark.parametrize("kind", KINDS)
def test_is_what_diffusers_computes(kind: str, dtype: torch.dtype, bound: float) -> None:
    case = make(kind, SHAPE, dtype=dtype, affine=dtype)
    found = qk_norm_rope(**case.tensors, **case.options)
    assert len(found) == (2 if case.tensors["v"] is None else 3)
    for x, name in zip(found, "qk", strict=False):
        assert x.dtype == dtype
        assert x.is_contiguous()
        assert relative_error(x, official(case, name)) < bound
    if len(found) == 3:
        assert torch.equal(found[2], case.tensors["v"])


@pytest.mark.parametrize("kind", KINDS)
def test_equals_float64(kind: str) -> None:
    case = make(kind, SHAPE, dtype=torch.bfloat16, affine=torch.bfloat16)
    for name in "qk":
        expected = official(case.in_float64(), name)
        assert relative_error(naive.norm_rope(**case.of(name)), expected) < 4e-3
        assert relative_error(naive.norm_rope(**case.in_float64().of(name)), expected) < 1e-6


@pytest.mark.parametrize("heads_first", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind: str, heads_first: bool) -> None:
    case = make(kind, (2, 4, 2, 4)).in_float64()
    constants = {name: case.tensors[name] for name in ("cos", "sin", "k_shift")}
    learned = {name: x for name, x in case.tensors.items() if x is not None and name not in constants}
    leaves = [x.detach().clone().requires_grad_() for x in learned.values()]

    def call(*values: Tensor) -> Any:
        given = dict(zip(learned, values, strict=True))
        return qk_norm_rope(**given, **constants, **case.options, heads_first=heads_first)

    assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize("kind", ["Wan", "half, shifted"])
def test_are_registered_well(kind: str) -> None:
    case = make(kind, (1, 4, 2, 4))
    case.tensors["q"] = case.tensors["q"].detach().requires_grad_()
    library.opcheck(_qk_norm_rope, (*case.tensors.values(), *case.options.values(), True))
    given = {name: x for name, x in case.tensors.items() if name != "v"}
    library.opcheck(qk_norm_rope_int8, (), {**given, **case.options, "q": case.tensors["q"].detach()})


def test_heads_first() -> None:
    case = make("half, shifted", SHAPE)
    plain = qk_norm_rope(**case.tensors, **case.options)
    for x, y in zip(qk_norm_rope(**case.tensors, **case.options, heads_first=True), plain, strict=True):
        assert x.is_contiguous()
        assert torch.equal(x.transpose(1, 2), y)


def test_int8_holds_the_numbers() -> None:
    case = make("half, shifted", (1, 6, 2, 64))
    given = {name: x for name, x in case.tensors.items() if name != "v"}
    q, q_scale, k, k_scale = qk_norm_rope_int8(**given, **case.options)
    exact_q, exact_k, _ = qk_norm_rope(**case.tensors, **case.options)
    for x, scale, exact in ((q, q_scale, exact_q), (k, k_scale, exact_k)):
        assert x.dtype == torch.int8
        assert x.abs().amax(-1).eq(127).all()
        assert ((x * scale.unsqueeze(-1) - exact).abs() <= 0.5001 * scale.unsqueeze(-1)).all()


def test_a_row_of_zeros_has_scale_0() -> None:
    q = torch.zeros(1, 1, 1, 4)
    k = torch.tensor([2.5, -2.5, 127.0, 0.0]).view(1, 1, 1, 4)
    x, scale, y, key_scale = qk_norm_rope_int8(q, k, norm="none")
    assert not x.any()
    assert scale.item() == 0
    # Halves are rounded away from 0.
    assert (y.flatten().tolist(), key_scale.item()) == ([3, -3, 127, 0], 1.0)


def test_attention_does_not_see_the_shift() -> None:
    case = make("half, shifted", SHAPE)
    shifted, plain = (
        qk_norm_rope(**{**case.tensors, "k_shift": shift}, **case.options, heads_first=True)
        for shift in (case.tensors["k_shift"], None)
    )
    attention = [F.scaled_dot_product_attention(*qkv) for qkv in (shifted, plain)]
    assert torch.allclose(*attention, atol=1e-5)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"norm": "batch_norm"}, "norm must be one of none, rms_norm, .* got 'batch_norm'"),
        ({"q": torch.ones(8, 3, 8)}, r"q must be \(B, N, H, D\)"),
        ({"k": torch.ones(2, 7, 3, 8)}, "only in the number of heads"),
        ({"v": torch.ones(2, 8, 1, 8)}, "same shape"),
        ({"q_weight": torch.ones(8)}, r"q_weight must be \(24,\) with rms_norm_across_heads"),
        ({"q_weight": None, "norm": "none"}, "k_weight needs a norm"),
        ({"sin": None}, "given together"),
        ({"first_token": 1}, "must lie within the 8"),
        ({"cos": torch.ones(1, 8, 1, 8), "sin": torch.ones(1, 8, 1, 8)}, "cos and sin must be"),
        ({"k_shift": torch.ones(2, 3, 4)}, "k_shift must be"),
    ],
)
def test_arguments_that_do_not_belong_together(changed: dict[str, Any], message: str) -> None:
    case = make("Wan", SHAPE)
    with pytest.raises(ValueError, match=message):
        qk_norm_rope(**{**case.tensors, **case.options, **changed})
