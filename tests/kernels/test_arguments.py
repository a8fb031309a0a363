"""Arguments that every operation refuses: tensors on several devices, integers, tables that require a gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from postgen.kernels.adaln.ops import gate_residual, gate_residual_norm_modulate, norm_modulate
from postgen.kernels.attention.ops import attention
from postgen.kernels.linear_attention.ops import linear_attention, rope_table
from postgen.kernels.qk_norm_rope.ops import qk_norm_rope, qk_norm_rope_int8
from postgen.kernels.temporal_cfi.ops import temporal_self_share

X, Q, FRAMES = torch.randn(2, 12, 8), torch.randn(2, 12, 2, 6), torch.randn(1, 4, 3, 2, 8)
TABLE = rope_table(*(torch.randn(length, 1) for length in (3, 2, 2)))
GRID = (3, 2, 2)

CALLS: list[tuple[str, Callable[[Any], Any]]] = [
    ("norm_modulate", lambda move: norm_modulate(X, weight=move(torch.ones(8)))),
    ("gate_residual", lambda move: gate_residual(X, X, move(torch.ones(2, 1, 8)))),
    ("gate_residual_norm_modulate", lambda move: gate_residual_norm_modulate(X, X, bias=move(torch.ones(8)))),
    ("qk_norm_rope", lambda move: qk_norm_rope(Q, Q, q_weight=move(torch.ones(6)))),
    ("qk_norm_rope_int8", lambda move: qk_norm_rope_int8(Q, Q, k_shift=move(torch.zeros(1, 2, 6)))),
    ("temporal_self_share", lambda move: temporal_self_share(FRAMES, move(FRAMES))),
    ("linear_attention", lambda move: linear_attention(Q, Q, Q, qk_norm="rms_norm", key_weight=move(torch.ones(6)))),
]


@pytest.mark.parametrize(("name", "call"), CALLS, ids=[name for name, _ in CALLS])
def test_several_devices(name: str, call: Callable[[Any], Any]) -> None:
    """Offloading hooks leave weights on the meta device; without the check the result is uninitialised memory."""
    call(lambda x: x)
    with pytest.raises(ValueError, match=f"{name} needs all tensors on one device, got cpu and meta: move them"):
        call(lambda x: x.to("meta"))


@pytest.mark.parametrize(
    "call",
    [
        lambda: norm_modulate(X.long()),
        lambda: gate_residual(X.long(), X),
        lambda: qk_norm_rope(Q, Q.long()),
        lambda: linear_attention(Q.long(), Q.long(), Q.long()),
        lambda: attention(Q.long(), Q.long(), Q.long()),
    ],
)
def test_integers(call: Callable[[], Any]) -> None:
    """A result has the dtype of the input, and a result that is rounded to integers is useless."""
    with pytest.raises(ValueError, match=r"int64"):
        call()


def test_tables_have_no_gradient() -> None:
    cos = torch.ones(1, 12, 1, 3, requires_grad=True)
    rope = TABLE.clone().requires_grad_()
    with pytest.raises(ValueError, match=r"cos and sin require a gradient.*: detach\(\) them"):
        qk_norm_rope(Q, Q, cos=cos, sin=torch.zeros(1, 12, 1, 3))
    with pytest.raises(ValueError, match=r"rope requires a gradient.*: pass rope\.detach\(\)"):
        linear_attention(Q, Q, Q, grid=GRID, rope=rope, rope_pairs=(1, 1, 1))
    with torch.no_grad():
        rotated = linear_attention(Q, Q, Q, grid=GRID, rope=rope, rope_pairs=(1, 1, 1))
        assert not torch.equal(rotated, linear_attention(Q, Q, Q))
        qk_norm_rope(Q, Q, cos=cos, sin=torch.zeros(1, 12, 1, 3))


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ({"grid": (3, 4)}, r"grid must be three numbers of at least 1.*got \(3, 4\)"),
        ({"grid": (3, 2, 2, 5)}, r"got \(3, 2, 2, 5\)"),
        ({"grid": (-3, -2, 2)}, r"got \(-3, -2, 2\)"),
        ({"grid": GRID, "rope": TABLE, "rope_pairs": (2, 1)}, "rope_pairs must be three numbers of at least 0"),
        ({"grid": GRID, "rope": TABLE, "rope_pairs": (-1, 2, 2)}, r"got \(-1, 2, 2\)"),
        ({"grid": GRID, "conv_space": torch.ones(6, 3)}, r"\(C, s, s\) and \(C, s\).*got \(6, 3\)"),
        ({"grid": GRID, "conv_time": torch.ones(6, 3, 3)}, r"got \(6, 3, 3\)"),
        ({"grid": GRID, "conv_time": torch.tensor(1.0)}, r"got \(\)"),
        ({"key_lengths": torch.ones(2)}, "key_lengths must be int32 or int64, got torch.float32"),
    ],
)
def test_terms_of_the_wrong_kind(terms: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear_attention(Q, Q, Q, **terms)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: linear_attention(Q, Q.double(), Q), "all or none float64"),
        (lambda: temporal_self_share(FRAMES, FRAMES, causal_block=-1), "causal_block must be .* got -1"),
        (lambda: qk_norm_rope(Q, Q, k_shift=torch.tensor(1.0)), r"k_shift must be \(1 or B, Hk, D\).*got \(\)"),
        (lambda: attention(Q, Q[:, :, :0], Q[:, :, :0]), "at least one query and one key"),
    ],
)
def test_others(call: Callable[[], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
