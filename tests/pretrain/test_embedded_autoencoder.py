"""The autoencoder of the embedded model, as any user of diffusers loads it."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKLWan

from postgen import world
from postgen.assets import embedded_model
from postgen.pretrain.measure import masked_psnr
from postgen.pretrain.pool import dilated, to_model

FOLDER = embedded_model() / "vae"


def test_it_keeps_two_bodies_of_an_unseen_scene():
    vae = AutoencoderKLWan.from_pretrained(FOLDER)
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 6.2e6
    pictures = world.render([world.sample(3, num_frames=17, num_bodies=2, split="held_out")], num_frames=9, size=128)
    x = to_model(pictures.rgb_BF3HW)
    with torch.no_grad():
        z = vae.encode(x).latent_dist.mode()
        y = vae.decode(z).sample
    assert z.shape == (1, 16, 3, 16, 16)
    mask = dilated((pictures.ids_BFHW > 0).float())[:, None]
    # 32.9 and 34.9 on this clip.
    assert masked_psnr(x, y, mask) >= 32.6
    assert masked_psnr(x[:, :, :1], y[:, :, :1], mask[:, :, :1]) >= 34.6
    mean, std = (
        torch.tensor(values).view(1, -1, 1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    # The statistics that the denoiser is trained with: about standard normal on any scene.
    normal = (z - mean) / std
    assert normal.mean().abs() <= 0.5
    assert 0.6 <= normal.std() <= 1.5
