"""Denoisers of DiT and PixArt-Sigma: the learned variance, class conditions and sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from postgen.errors import UserError
from postgen.families import VarianceDenoiser, denoiser_for
from tests.families.tiny_pipelines import drawn, tiny_pipeline

WITH_VARIANCE = ("DiT", "PixArt-Sigma")


def noise_source() -> torch.Generator:
    return torch.Generator().manual_seed(3)


@pytest.mark.parametrize("name", WITH_VARIANCE)
@torch.no_grad()
def test_the_variance_is_kept(name: str) -> None:
    """The second result is the other half of the network's channels; the first is the result of `predict`."""
    pipe, size = tiny_pipeline(name)
    denoiser: Any = denoiser_for(pipe)
    assert isinstance(denoiser, VarianceDenoiser)
    assert denoiser.predicts_variance
    assert denoiser.prediction_type == "epsilon"
    x = denoiser.initial_latents(2, **size, generator=noise_source())
    levels, condition = torch.tensor([0.7, 0.2]), denoiser.encode_prompt(["a", "b"])
    whole = denoiser.forward(pipe.transformer, x, denoiser.timestep(levels), denoiser.told("prompt", condition))
    assert whole.shape[1] == 2 * x.shape[1]
    for guidance in (1.0, 3.0):
        prediction, variance = denoiser.predict_with_variance(x, levels, condition, guidance)
        assert torch.equal(prediction, denoiser.predict(x, levels, condition, guidance))
        assert torch.equal(variance, whole[:, 4:])
        assert torch.equal(prediction, whole[:, :4]) == (guidance == 1)
    with pytest.raises(UserError, match="sigma must have the shape"):
        denoiser.predict_with_variance(x, levels[:1], condition)
    del condition["negative"]
    with pytest.raises(UserError, match="guidance above 1 needs"):
        denoiser.predict_with_variance(x, levels, condition, 2.0)


def test_other_denoisers_predict_none() -> None:
    assert not isinstance(denoiser_for(tiny_pipeline("Stable Diffusion")[0]), VarianceDenoiser)


@torch.no_grad()
def test_a_network_without_variance() -> None:
    pipe, size = tiny_pipeline("DiT")
    config = {**pipe.transformer.config, "out_channels": 4, "_use_default_values": []}
    pipe.transformer = type(pipe.transformer).from_config(config).eval()
    denoiser: Any = denoiser_for(drawn(pipe))
    assert not denoiser.predicts_variance
    x, condition = denoiser.initial_latents(1, **size, generator=noise_source()), denoiser.encode_prompt(["a"])
    level, told = torch.tensor([0.5]), denoiser.told("prompt", condition)
    expected = denoiser.forward(pipe.transformer, x, denoiser.timestep(level), told)
    assert torch.equal(denoiser.predict(x, level, condition), expected)
    with pytest.raises(UserError, match="DiTTransformer2DModel predicts no variance"):
        denoiser.predict_with_variance(x, level, condition)


@torch.no_grad()
def test_dit_is_told_classes() -> None:
    denoiser = denoiser_for(tiny_pipeline("DiT")[0])
    condition = denoiser.encode_prompt([" a red ball", "207", "blurry"])
    assert condition["prompt"].tolist() == [7, 207, 9]
    assert condition["negative"].tolist() == [1000] * 3
    assert denoiser.encode_prompt(["a"], ["8"])["negative"].tolist() == [8]
    for wrong in ("a red bal", "1000", "-1", "1.5"):
        with pytest.raises(UserError, match="is no class of this DiTPipeline: give a number from 0 to 999 or one of"):
            denoiser.encode_prompt([wrong])
    with pytest.raises(UserError, match="perhaps 'a red ball'"):
        denoiser.encode_prompt(["a red bal"])


@torch.no_grad()
def test_dit_makes_squares() -> None:
    denoiser = denoiser_for(tiny_pipeline("DiT")[0])
    with pytest.raises(UserError, match="makes squares: height and width are 16 and 32"):
        denoiser.latent_shape(1, 16, 32)
    wide = denoiser.initial_latents(1, num_frames=1, height=32, width=32)  # the position table is interpolated
    assert denoiser.predict(wide, torch.tensor([0.5]), denoiser.encode_prompt(["a"])).shape == wide.shape


@torch.no_grad()
def test_dit_forgets_no_class_in_train_mode() -> None:
    """The denoiser switches class dropout off, because each block of diffusers would drop it for other samples."""
    pipe, size = tiny_pipeline("DiT")
    assert pipe.transformer.transformer_blocks[0].norm1.emb.class_embedder.dropout_prob > 0
    denoiser = denoiser_for(pipe)
    x, condition = denoiser.initial_latents(64, **size), denoiser.encode_prompt(["a"] * 64)
    level = torch.full((64,), 0.5)
    expected = denoiser.predict(x, level, condition)
    pipe.transformer.train()
    assert torch.equal(denoiser.predict(x, level, condition), expected)


@torch.no_grad()
def test_pixart_reads_the_mask_of_the_text() -> None:
    pipe, size = tiny_pipeline("PixArt-Sigma")
    denoiser = denoiser_for(pipe)
    x, condition = denoiser.initial_latents(2, **size), denoiser.encode_prompt(["a", "a longer text"])
    first, second = condition["prompt_mask"].sum(1).tolist()
    assert 0 < first < second < 300
    padded = condition["prompt_mask"] == 0
    poisoned = {**condition, "prompt": condition["prompt"].masked_fill(padded[:, :, None], 1e3)}
    levels = torch.tensor([0.7, 0.2])
    assert torch.equal(denoiser.predict(x, levels, poisoned), denoiser.predict(x, levels, condition))


def test_pixart_that_is_told_its_size_is_refused() -> None:
    pipe, _ = tiny_pipeline("PixArt-Sigma")
    config = {**pipe.transformer.config, "use_additional_conditions": True, "_use_default_values": []}
    pipe.transformer = type(pipe.transformer).from_config(config)
    with pytest.raises(UserError, match=r"takes the picture size as input \(Alpha at 1024\) has no denoiser"):
        denoiser_for(pipe)
