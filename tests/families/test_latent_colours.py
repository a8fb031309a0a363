"""Previews of latents: a linear map that is fitted to the autoencoder, grey before it learns from a clip."""

import pytest
import torch

from postgen.families.latent_colours import LatentColours, latent_colours
from tests.tiny_wan import LATENT_CHANNELS, wan_components


@pytest.fixture(scope="module")
def vae():
    return wan_components()["vae"]


def linear_pair(seed, bias):
    """Return latents, their colours, and a clip in which every pixel is a linear function of its latent pixel."""
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(1, LATENT_CHANNELS, 3, 6, 8, generator=generator)
    weights = torch.randn(LATENT_CHANNELS, 3, generator=torch.Generator().manual_seed(9)) * 0.05
    colours = torch.einsum("bcthw,cd->tdhw", latents, weights) + bias
    frames = torch.cat([colours[:1], colours[1:].repeat_interleave(4, dim=0)])
    return latents, colours, frames.repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)


def test_a_linear_relation_is_found(vae):
    colours = LatentColours(vae)
    for seed in range(6):
        latents, _, clip = linear_pair(seed, 0.5)
        colours.learn(latents, clip)
    latents, expected, _ = linear_pair(99, 0.5)
    torch.testing.assert_close(colours.clip(latents), expected.clamp(0, 1), atol=0.02, rtol=0)


def test_before_a_clip_was_seen_it_is_grey_and_has_contrast(vae):
    colours = LatentColours(vae)
    clip = colours.clip(torch.randn(1, LATENT_CHANNELS, 3, 6, 8, generator=torch.Generator().manual_seed(3)))
    assert clip.shape == (3, 3, 6, 8)
    assert not colours.learnt
    assert torch.equal(clip[:, 0], clip[:, 1])
    assert clip.std() > 0.05


def test_a_clip_of_other_frames_is_not_learnt_of(vae):
    colours = LatentColours(vae)
    colours.learn(torch.zeros(1, LATENT_CHANNELS, 3, 6, 8), torch.zeros(8, 3, 48, 64))
    assert not colours.learnt


def test_latents_of_another_form_do_not_fit(vae):
    colours = LatentColours(vae)
    assert colours.fits(torch.zeros(1, LATENT_CHANNELS, 3, 6, 8))
    assert not colours.fits(torch.zeros(1, 20, LATENT_CHANNELS))
    assert not colours.fits(torch.zeros(1, LATENT_CHANNELS + 1, 3, 6, 8))


def test_one_map_for_each_autoencoder_and_none_for_unknown_ones():
    from diffusers import WanPipeline

    pipe = WanPipeline(**wan_components())
    assert latent_colours(pipe) is latent_colours(pipe)
    assert latent_colours(torch.nn.Identity()) is None
