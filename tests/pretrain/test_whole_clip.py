"""The whole-clip passes compute what diffusers computes chunk by chunk."""

from __future__ import annotations

import pytest
import torch

from postgen.errors import UserError
from postgen.pretrain.autoencoder import new_autoencoder
from postgen.pretrain.whole_clip import WholeClip, norm_silu


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    model = new_autoencoder(8, [1, 2, 2], 4).double().eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "gamma" in name:
                value.uniform_(0.5, 1.5)
        # A quiet decoder, so that the stock clamp hides no difference.
        model.decoder.conv_out.weight.mul_(0.1)
    return model


def clip(frames, size=16):
    return torch.rand(2, 3, frames, size, size, generator=torch.Generator().manual_seed(frames)).double() * 2 - 1


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("frames", [1, 5, 9, 17])
def test_same_values_as_diffusers(vae, frames, folded):
    whole, x = WholeClip(vae, folded=folded), clip(frames)
    with torch.no_grad():
        expected = vae.encode(x).latent_dist
        mean, logvar = whole.encode(x)
        assert mean.shape == (2, 4, 1 + (frames - 1) // 4, 2, 2)
        assert (mean - expected.mean).abs().max() <= 1e-10
        assert (logvar - expected.logvar).abs().max() <= 1e-10
        z = torch.randn(mean.shape, dtype=torch.double, generator=torch.Generator().manual_seed(1))
        stock = vae.decode(z).sample
        assert stock.abs().max() < 1
        assert (whole.decode(z) - stock).abs().max() <= 1e-10


def test_beyond_the_clamp_values_go_on_and_gradients_flow(vae):
    whole = WholeClip(vae)
    z = torch.randn(1, 4, 2, 2, 2, dtype=torch.double, generator=torch.Generator().manual_seed(2), requires_grad=True)
    bias = vae.decoder.conv_out.bias
    saved = bias.detach().clone()
    try:
        with torch.no_grad():
            bias.add_(5.0)
        y = whole.decode(z)
        assert (y > 1).all()
        assert torch.equal(vae.decode(z).sample, torch.ones_like(y))
        y.sum().backward()
    finally:
        with torch.no_grad():
            bias.copy_(saved)
    assert z.grad.abs().min() > 0
    assert bias.grad.abs().min() > 0
    vae.zero_grad()


def test_folded_gradients_are_the_same(vae):
    x, gradients = clip(5), []
    for folded in (False, True):
        vae.zero_grad()
        whole = WholeClip(vae, folded=folded)
        mean, logvar = whole.encode(x)
        (whole.decode(mean).square().mean() + logvar.mean()).backward()
        gradients.append([p.grad.clone() for p in whole.parameters() if p.grad is not None])
    vae.zero_grad()
    assert len(gradients[0]) == len(gradients[1]) > 50
    for plain, folded in zip(*gradients, strict=True):
        assert (plain - folded).abs().max() <= 1e-9


def test_forward_draws_from_the_latents(vae):
    whole, x = WholeClip(vae), clip(5)
    with torch.no_grad():
        torch.manual_seed(0)
        first, mean, _ = whole(x)
        second, again, _ = whole(x)
    assert first.shape == x.shape
    assert torch.equal(mean, again)
    assert not torch.equal(first, second)


def test_norm_is_the_stock_norm(vae):
    layer = vae.encoder.norm_out
    x = torch.randn(1, layer.gamma.shape[0], 2, 3, 3, dtype=torch.double)
    assert torch.allclose(norm_silu(x, layer.gamma), torch.nn.functional.silu(layer(x)), atol=1e-12)
    assert norm_silu(x.bfloat16(), layer.gamma).dtype == torch.bfloat16


def test_parameters_are_the_autoencoders_own(vae):
    whole = WholeClip(vae)
    own = dict(vae.named_parameters())
    assert {name for name, _ in whole.named_parameters()} == set(own)
    assert all(value is own[name] for name, value in whole.named_parameters())


@pytest.mark.parametrize("frames", [2, 4, 16])
def test_other_lengths_are_refused(vae, frames):
    with pytest.raises(UserError, match=f"4n\\+1 frames, got {frames}"):
        WholeClip(vae).encode(clip(frames))


def test_residual_autoencoders_are_refused():
    from diffusers import AutoencoderKLWan

    residual = AutoencoderKLWan(
        base_dim=8,
        decoder_base_dim=8,
        z_dim=4,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        in_channels=12,
        out_channels=12,
        patch_size=2,
        is_residual=True,
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    with pytest.raises(UserError, match="is_residual=False"):
        WholeClip(residual)
