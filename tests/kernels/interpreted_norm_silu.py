"""The norm before a convolution and its gradients in Triton's interpreter, against the reference in float64.

`test_interpreted.py` runs this file.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from postgen.kernels.norm_silu import naive, triton
from tests.kernels.poison import poisoned_memory


def case(channels: int, frames: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(channels)
    x = torch.randn(2, channels, frames, 3, 5, generator=generator).to(dtype)
    gradient = torch.randn(2, channels, frames + 2, 5, 7, generator=generator).to(dtype)
    return x, torch.rand(channels, generator=generator) + 0.5, gradient


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("channels", "frames"), [(16, 1), (64, 4), (24, 3), (700, 2)])
def test_equals_the_reference(channels: int, frames: int, dtype: torch.dtype, last: bool) -> None:
    x, gamma, gradient = case(channels, frames, dtype)
    layout = torch.channels_last_3d if last else torch.contiguous_format
    given = x.contiguous(memory_format=layout)
    with poisoned_memory():
        out = triton.norm_silu_pad(given, gamma)
        of_x, of_gamma = triton.norm_silu_pad_backward(gradient.contiguous(memory_format=layout), given, gamma)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-3, "atol": 2e-3}
    assert torch.allclose(out.double(), naive.norm_silu_pad(x.double(), gamma.double()), **tolerance)
    expected = naive.norm_silu_pad_backward(gradient.double(), x.double(), gamma.double())
    assert torch.allclose(of_x.double(), expected[0], **tolerance)
    assert torch.allclose(of_gamma.double(), expected[1], rtol=1e-4, atol=1e-4)
    assert (out.dtype, of_x.dtype, of_gamma.dtype) == (dtype, dtype, torch.float32)
