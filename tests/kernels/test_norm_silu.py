"""The norm before a convolution of Wan's autoencoder, compared to diffusers' layers, and its gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, library
from torch.nn import functional

from postgen.kernels.norm_silu import naive
from postgen.kernels.norm_silu.ops import norm_silu_pad


def case(dtype: torch.dtype = torch.double) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 6, 3, 4, 5, generator=generator, dtype=dtype)
    return x, torch.rand(6, generator=generator, dtype=dtype) + 0.5


def test_equals_the_norm_of_diffusers() -> None:
    from diffusers import AutoencoderKLWan

    vae = AutoencoderKLWan(base_dim=8, z_dim=4, dim_mult=[1], num_res_blocks=1, temperal_downsample=[])
    layer = vae.encoder.norm_out.double()
    x = torch.randn(1, 8, 2, 3, 3, dtype=torch.double)
    with torch.no_grad():
        layer.gamma.uniform_(0.5, 1.5)
        expected = functional.pad(functional.silu(layer(x)), naive.PADDING)
        assert (norm_silu_pad(x, layer.gamma.flatten()) - expected).abs().max() <= 1e-12


def test_gradients() -> None:
    x, gamma = (t.requires_grad_() for t in case())
    assert torch.autograd.gradcheck(norm_silu_pad, (x, gamma))


def test_is_registered_well() -> None:
    x, gamma = (t.requires_grad_() for t in case(torch.float32))
    library.opcheck(norm_silu_pad, (x, gamma))


def test_half_precision_is_computed_in_float32() -> None:
    x, gamma = case(torch.float32)
    found = norm_silu_pad(x.bfloat16(), gamma)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, naive.norm_silu_pad(x.bfloat16().float(), gamma).bfloat16())


@pytest.mark.parametrize(
    ("x", "gamma", "message"),
    [
        (torch.ones(1, 2, 3, 4), torch.ones(2), r"x must be \(B, C, T, H, W\).*got \(1, 2, 3, 4\)"),
        (torch.ones(1, 2, 0, 4, 4), torch.ones(2), "not empty"),
        (torch.ones(1, 2, 1, 4, 4).long(), torch.ones(2), "floating-point.*int64"),
        (torch.ones(1, 2, 1, 4, 4), torch.ones(3), r"gamma must be \(C,\).*got \(3,\)"),
        (torch.ones(1, 2, 1, 4, 4), torch.ones(2, device="meta"), "one device, got cpu and meta"),
    ],
)
def test_what_does_not_belong_together(x: Tensor, gamma: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        norm_silu_pad(x, gamma)
