"""The norms around a layer on the CPU: against diffusers' implementation, and the gradients against autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import library

from postgen.kernels.adaln import naive
from postgen.kernels.adaln.ops import gate_residual, gate_residual_norm_modulate, norm_modulate
from tests.kernels.adaln_cases import KINDS, inputs, norm_only, official


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_is_what_a_block_of_diffusers_computes(kind: str, dtype: torch.dtype) -> None:
    case = inputs(kind, (2, 5, 24), dtype=dtype)
    expected = official(case, 1e-5)
    found = gate_residual_norm_modulate(**case, eps=1e-5)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 8e-3, "atol": 1e-2}
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, **tolerance)
    alone = norm_modulate(**{**norm_only(case), "x": expected[0]}, eps=1e-5)
    torch.testing.assert_close(alone, expected[1], **tolerance)


def test_root_mean_square_norm_is_what_ltx_computes() -> None:
    case = inputs("per token", (2, 5, 24))
    normed = F.rms_norm(case["x"], (24,), None, 1e-5)
    expected = normed * (1 + case["scale"]) + case["shift"]
    torch.testing.assert_close(norm_modulate(**norm_only(case), eps=1e-5, rms=True), expected)


def test_gated_residual_alone_is_that_of_the_pair() -> None:
    case = inputs("per token", (2, 5, 24), dtype=torch.bfloat16)
    total, _ = gate_residual_norm_modulate(**case)
    assert torch.equal(gate_residual(case["x"], case["y"], case["gate"]), total)
    assert torch.equal(gate_residual(case["x"], case["y"]), case["x"] + case["y"])


@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind: str, rms: bool) -> None:
    case: dict[str, Any] = inputs(kind, (2, 3, 5))
    tensors = {k: v.double().requires_grad_() for k, v in case.items() if v is not None}
    names = list(tensors)

    def norm(*values: Any) -> Any:
        given = dict(zip([n for n in names if n not in ("y", "gate")], values, strict=True))
        return norm_modulate(**given, rms=rms)

    def both(*values: Any) -> Any:
        return gate_residual_norm_modulate(**dict(zip(names, values, strict=True)), rms=rms)

    assert torch.autograd.gradcheck(norm, [v for k, v in tensors.items() if k not in ("y", "gate")])
    assert torch.autograd.gradcheck(both, list(tensors.values()))
    assert torch.autograd.gradcheck(gate_residual, [v for k, v in tensors.items() if k in ("x", "y", "gate")])


def test_gradient_of_the_sum_alone() -> None:
    case: dict[str, Any] = inputs("per sample", (1, 3, 5))
    case["y"].requires_grad_()
    total, _ = gate_residual_norm_modulate(**case)
    total.sum().backward()
    assert torch.allclose(case["y"].grad, case["gate"].expand(1, 3, 5))


@pytest.mark.parametrize("kind", ["per sample", "all"])
def test_are_registered_well(kind: str) -> None:
    case: dict[str, Any] = inputs(kind, (2, 3, 5))
    case["x"] = case["x"].transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    library.opcheck(norm_modulate, (), norm_only(case))
    library.opcheck(gate_residual_norm_modulate, (), case)
    library.opcheck(gate_residual, (case["x"], case["y"], case["gate"]))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": torch.ones(3, 5)}, r"x must be \(B, N, C\)"),
        ({"x": torch.ones(2, 0, 5)}, "not empty"),
        ({"scale": torch.ones(2, 2, 5)}, "scale must be"),
        ({"shift": torch.ones(2, 5)}, "shift must be"),
        ({"gate": torch.ones(2, 1, 4)}, "gate must be"),
        ({"weight": torch.ones(4)}, r"weight must be \(C,\)"),
        ({"y": torch.ones(2, 1, 5)}, "same shape"),
    ],
)
def test_shapes_that_do_not_belong_together(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gate_residual_norm_modulate(**{**inputs("all", (2, 3, 5)), **changed})


def test_double_precision_is_kept() -> None:
    case: dict[str, Any] = {k: None if v is None else v.double() for k, v in inputs("all", (1, 2, 7)).items()}
    found = norm_modulate(**norm_only(case))
    assert found.dtype == torch.float64
    assert torch.equal(found, naive.norm_modulate(**norm_only(case)))
