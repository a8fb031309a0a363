"""The Triton kernel of the norms around a layer, on a GPU with the sizes of real models."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from postgen.kernels.adaln import naive
from postgen.kernels.adaln.ops import gate_residual, gate_residual_norm_modulate, norm_modulate
from tests.kernels.adaln_cases import KINDS, in_float64, inputs, norm_only
from tests.kernels.launches import assert_compiles_whole, assert_records, assert_repeats, relative_error
from tests.kernels.poison import poisoned_memory

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.mark.parametrize("channels", [1536, 2048, 3072, 5120])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_float64(kind: str, channels: int) -> None:
    case = inputs(kind, (2, 131, channels), dtype=torch.bfloat16, device="cuda")
    with poisoned_memory():
        total, normed = gate_residual_norm_modulate(**case)
        alone = norm_modulate(**norm_only(case))
    expected, _ = naive.gate_residual_norm_modulate(**in_float64(case))
    assert relative_error(total, expected) < 4e-3
    rounded = in_float64({**case, "x": total})
    assert relative_error(normed, naive.norm_modulate(**norm_only(rounded))) < 4e-3
    assert relative_error(alone, naive.norm_modulate(**norm_only(in_float64(case)))) < 4e-3


def test_root_mean_square_norm_and_residual_alone() -> None:
    case = inputs("per token", (2, 131, 2048), dtype=torch.bfloat16, device="cuda")
    with poisoned_memory():
        total, normed = gate_residual_norm_modulate(**case, rms=True)
        alone = gate_residual(case["x"], case["y"], case["gate"])
    assert torch.equal(alone, total)
    rounded = in_float64({**case, "x": total})
    assert relative_error(normed, naive.norm_modulate(**norm_only(rounded), rms=True)) < 4e-3


def test_more_numbers_than_32_bits_count() -> None:
    # x holds 2 x 4.5e5 x 3072 = 2.8e9 numbers, more than 2^31.
    x = torch.randn(2, 450_000, 3072, dtype=torch.bfloat16, device="cuda")
    found = norm_modulate(x)[:, -50:].double()
    assert relative_error(found, naive.norm_modulate(x[:, -50:].double())) < 4e-3


def test_repeats_records_and_compiles() -> None:
    case: dict[str, Any] = inputs("per sample", (2, 1009, 1536), dtype=torch.bfloat16, device="cuda")
    assert_repeats(lambda: gate_residual_norm_modulate(**case))
    assert_records(lambda: gate_residual_norm_modulate(**case))
    assert_compiles_whole(lambda *tensors: gate_residual_norm_modulate(*tensors), *case.values())


def test_gradients_equal_those_of_the_reference() -> None:
    case: dict[str, Any] = inputs("all", (2, 37, 1536), dtype=torch.float32, device="cuda")
    tensors = [tensor.requires_grad_() for tensor in case.values()]
    found = torch.autograd.grad([x.square().sum() for x in gate_residual_norm_modulate(*tensors)], tensors)
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    expected = torch.autograd.grad([x.square().sum() for x in naive.gate_residual_norm_modulate(*exact)], exact)
    for x, y in zip(found, expected, strict=True):
        assert relative_error(x, y) < 1e-4
