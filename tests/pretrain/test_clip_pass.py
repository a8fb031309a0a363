"""A training pass of the autoencoder: what its loss weighs, and that it is the autoencoder's own function."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from postgen.pretrain.autoencoder import AutoencoderConfig, AutoencoderTrainer, new_autoencoder
from postgen.pretrain.clip_loss import clip_loss, edges
from postgen.pretrain.clip_pass import ClipPass, pixel_weight
from postgen.pretrain.pool import dilated, to_model
from postgen.pretrain.whole_clip import WholeClip

PLAIN = {
    "object_weight": 0.0,
    "edge_weight": 0.0,
    "first_frame_weight": 1.0,
    "mse_weight": 2.0,
    "gradient_weight": 0.0,
    "gradient_scales": 1,
    "kl_weight": 0.0,
}


def settings(**values):
    return SimpleNamespace(**{**PLAIN, **values})


def batch(frames, size=16):
    generator = torch.Generator().manual_seed(frames)
    rgb = torch.randint(0, 256, (2, frames, 3, size, size), dtype=torch.uint8, generator=generator)
    mask = torch.zeros(2, frames, size, size, dtype=torch.uint8)
    mask[:, :, 5:9, 6:10] = 1
    noise = torch.randn(2, 4, 1 + (frames - 1) // 4, size // 8, size // 8, generator=generator)
    return rgb, mask, noise


def training_pass(**values):
    torch.manual_seed(0)
    options = {name: values.pop(name) for name in ("every_gradient", "align") if name in values}
    return ClipPass(new_autoencoder(4, [1, 2, 2], 4), settings(**values), **options)


def test_loss_and_measures_are_those_of_the_reconstruction():
    found = training_pass(kl_weight=0.1, object_weight=3.0)
    rgb, mask, noise = batch(5)
    with torch.no_grad():
        loss, kl, mse, mse_objects, first = found(rgb, mask, noise)
        x, around = to_model(rgb), dilated(mask)[:, None]
        mean, logvar = found.encode(x)
        error = found.decode(mean + noise * (0.5 * logvar).exp()) - x
        weight = 1 + 3 * around
        expected = (weight * (error.abs() + 2 * error**2)).mean() / weight.mean()
    inside = around.expand_as(error) > 0
    torch.testing.assert_close(mse, error.square().mean())
    torch.testing.assert_close(mse_objects, error[inside].square().mean())
    torch.testing.assert_close(first, error[:, :, :1][inside[:, :, :1]].square().mean())
    torch.testing.assert_close(kl, (0.5 * (mean**2 + logvar.exp() - 1 - logvar)).mean())
    torch.testing.assert_close(loss, expected + 0.1 * kl)


@pytest.mark.parametrize("every", [False, True])
def test_one_frame_leaves_convolutions_over_time_alone(every):
    found = training_pass(every_gradient=every)
    found(*batch(1))[0].backward()
    over_time = {name: p.grad for name, p in found.named_parameters() if "time_conv" in name}
    assert len(over_time) == 8
    assert all(torch.equal(grad, torch.zeros_like(grad)) if every else grad is None for grad in over_time.values())
    assert all(p.grad is not None for name, p in found.named_parameters() if "time_conv" not in name)


def test_channels_filled_up_change_no_value():
    vae = new_autoencoder(4, [1, 2, 2], 4).double()
    x = torch.rand(1, 3, 5, 16, 16, generator=torch.Generator().manual_seed(0)).double() * 2 - 1
    plain, filled = WholeClip(vae), WholeClip(vae, align=32)
    with torch.no_grad():
        z = plain.encode(x)[0]
        assert (filled.encode(x)[0] - z).abs().max() <= 1e-12
        assert (filled.decode(z) - plain.decode(z)).abs().max() <= 1e-12


def test_pixels_are_weighted_as_asked():
    x = -torch.ones(1, 3, 3, 12, 12)
    x[..., 6:] = 1
    mask = torch.zeros(1, 1, 3, 12, 12)
    mask[..., 2:10, 2:10] = 1
    weight = pixel_weight(x, mask, settings(object_weight=2.0, edge_weight=4.0, first_frame_weight=3.0))[0, 0]
    assert weight.mean() == pytest.approx(1)
    away, body, edge = weight[1, 0, 0], weight[1, 4, 3], weight[1, 4, 5]
    assert body / away == pytest.approx(3)
    assert edge / away == pytest.approx(7)
    torch.testing.assert_close(weight[0], 3 * weight[1])
    # An edge that is on no body counts as any other pixel, and a single frame has no other to stand beside.
    assert weight[1, 0, 5] == away
    alone = pixel_weight(x[:, :, :1], mask[:, :, :1], settings(first_frame_weight=3.0))
    assert torch.equal(alone, torch.ones_like(alone))


def test_edges_are_where_the_picture_changes():
    x = torch.zeros(1, 3, 2, 6, 6)
    x[:, 1, 0, :, 3:] = 0.1
    found = edges(x)
    assert found.shape == (1, 1, 2, 6, 6)
    torch.testing.assert_close(found[0, 0, 0, 0], torch.tensor([0.0, 0.0, 0.25, 0.25, 0.0, 0.0]))
    assert not found[0, 0, 1].any()
    assert edges(x * 10).max() == 1


def test_differences_are_taken_at_every_scale():
    x, weight = torch.zeros(1, 3, 1, 8, 8), torch.ones(1, 1, 1, 8, 8)
    stripes = x.clone()
    stripes[..., ::2] = 1
    plain = clip_loss(x, stripes, weight, 0.0, 0.0, 1)
    torch.testing.assert_close(clip_loss(x, stripes, weight, 0.0, 0.5, 1) - plain, torch.tensor(0.5))
    # Halved, fine stripes are even; broad ones are not.
    torch.testing.assert_close(clip_loss(x, stripes, weight, 0.0, 0.5, 3) - plain, torch.tensor(0.5))
    broad = x.clone()
    broad[..., :4] = 1
    at = [float(clip_loss(x, broad, weight, 0.0, 1.0, scales)) for scales in (1, 2, 3)]
    assert at[1] - at[0] == pytest.approx(1 / 3)
    assert at[2] - at[1] == pytest.approx(1)


def test_batches_of_every_kind_cost_about_the_same(tmp_path):
    config = AutoencoderConfig(
        output_dir=str(tmp_path),
        device="cpu",
        report_to=[],
        per_device_train_batch_size=8,
        size=128,
        lengths=[33, 17, 33],
        sizes=[128, 96, 160],
        length_weights=[0.5, 0.3, 0.2],
        pool_shares=[1.0, 0.5, 0.5],
    )
    kinds = AutoencoderTrainer(config)._kinds()
    assert kinds == [(0, 184, 1), (0, 32, 9), (0, 8, 33), (1, 27, 17), (2, 5, 33)]
    costs = [clips * frames * config.sizes[kind] ** 2 for kind, clips, frames in kinds]
    assert max(costs) / min(costs) < 1.7
