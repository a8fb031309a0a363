"""The Triton kernel of the norms around a layer, in Triton's interpreter. `test_interpreted.py` runs this file."""

from __future__ import annotations

import pytest
import torch

from postgen.kernels.adaln import naive, triton
from tests.kernels.adaln_cases import KINDS, in_float64, inputs, norm_only
from tests.kernels.launches import relative_error
from tests.kernels.poison import poisoned_memory


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.float16, 4e-4)])
@pytest.mark.parametrize("shape", [(2, 3, 5), (1, 1, 128), (2, 5, 80), (1, 4, 1000)])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_reference(kind: str, shape: tuple[int, int, int], dtype: torch.dtype, bound: float) -> None:
    case, options = inputs(kind, shape, dtype=dtype), {"eps": 1e-6, "rms": kind == "per token"}
    with poisoned_memory():
        total, normed = triton.gate_residual_norm_modulate(**case, **options)
        alone = triton.norm_modulate(**norm_only(case), **options)
        assert torch.equal(triton.gate_residual(case["x"], case["y"], case["gate"]), total)
    expected, _ = naive.gate_residual_norm_modulate(**in_float64(case), **options)
    assert total.dtype == normed.dtype == alone.dtype == dtype
    assert relative_error(total, expected) < bound
    # The kernel normalises the rounded sum.
    rounded = in_float64({**case, "x": total})
    assert relative_error(normed, naive.norm_modulate(**norm_only(rounded), **options)) < bound
    assert relative_error(alone, naive.norm_modulate(**norm_only(in_float64(case)), **options)) < bound


def test_any_strides_are_read_and_nothing_beside_them() -> None:
    case = inputs("per token", (2, 6, 24))
    expected = naive.gate_residual_norm_modulate(**case)
    room = torch.full((5, 6, 2, 40), torch.nan)
    views = [room[i].transpose(0, 1)[..., 3:27] for i in range(5)]
    views[4] = torch.full((2, 6, 48), torch.nan)[..., ::2]
    for view, tensor in zip(views, list(case.values())[:5], strict=True):
        view.copy_(tensor)
    found = triton.gate_residual_norm_modulate(*views)
    for x, y in zip(found, expected, strict=True):
        assert x.is_contiguous()
        assert torch.allclose(x, y, atol=1e-5)


def test_a_constant_token_is_its_shift() -> None:
    shift = torch.randn(1, 1, 24)
    assert torch.allclose(triton.norm_modulate(torch.full((1, 2, 24), 7.0), None, shift), shift.expand(1, 2, 24))
