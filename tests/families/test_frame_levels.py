"""Noise levels per latent frame: the timesteps of each network, and the denoisers that refuse them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from postgen.errors import UserError
from postgen.families import Denoiser, denoiser_for
from postgen.families.registry import pipelines_per_frame
from tests.families.tiny_pipelines import PIPELINES, tiny_pipeline
from tests.tiny_wan import LATENT_CHANNELS, wan_components

FRAMES, ROWS, COLUMNS = 4, 4, 6
LEVELS = torch.tensor([[0.1, 0.9, 0.5, 0.3], [0.7, 0.0, 0.2, 1.0]])


def wan(**config: Any) -> Any:
    from diffusers import WanPipeline

    torch.manual_seed(2)
    return WanPipeline(**wan_components(), **config)


def wan_image() -> Any:
    from diffusers import WanImageToVideoPipeline

    torch.manual_seed(2)
    return WanImageToVideoPipeline(**wan_components(in_channels=2 * LATENT_CHANNELS + 4))


def two_experts() -> Any:
    from diffusers import WanTransformer3DModel

    pipe = wan(boundary_ratio=0.5)
    pipe.register_modules(transformer_2=WanTransformer3DModel.from_config(pipe.transformer.config).eval())
    return pipe


MAKERS = {
    "Wan": wan,
    "Wan 2.2 5B": lambda: wan(expand_timesteps=True),
    "Wan image-to-video": wan_image,
    "SkyReels-V2": lambda: tiny_pipeline("SkyReels-V2")[0],
    "LTX": lambda: tiny_pipeline("LTX")[0],
}


@pytest.fixture(scope="module", params=MAKERS)
def point(request: pytest.FixtureRequest) -> tuple[Any, Denoiser, Tensor, dict[str, Tensor]]:
    """Return a pipeline, its denoiser, noisy latents and a condition; tests must not change them."""
    pipe = MAKERS[request.param]()
    denoiser = denoiser_for(pipe)
    source = torch.Generator().manual_seed(3)
    x = torch.randn(2, 4, FRAMES, ROWS, COLUMNS, generator=source)
    with torch.no_grad():
        condition = denoiser.encode_prompt(["a red ball", "a blue cube falls"])
    if getattr(denoiser, "takes_image", False):
        condition["image_latents"] = torch.randn(2, 8, FRAMES, ROWS, COLUMNS, generator=source)
    return pipe, denoiser, x, condition


def by_hand(pipe: Any, x: Tensor, condition: dict[str, Tensor], text: str) -> Tensor:
    """Return the network's prediction with timesteps per frame or per token that the test computes itself."""
    kind = type(pipe).__name__
    patch = 1 if kind == "LTXPipeline" else 2
    per_frame = ROWS // patch * (COLUMNS // patch)
    tokens = torch.tensor([[1000 * float(row[n // per_frame]) for n in range(FRAMES * per_frame)] for row in LEVELS])
    call: dict[str, Any] = {"encoder_hidden_states": condition[text], "timestep": tokens, "return_dict": False}
    if kind == "LTXPipeline":
        space, time = pipe.vae_spatial_compression_ratio, pipe.vae_temporal_compression_ratio
        call |= {"hidden_states": x.flatten(2).transpose(1, 2), "encoder_attention_mask": condition[f"{text}_mask"]}
        call |= {"num_frames": FRAMES, "height": ROWS, "width": COLUMNS}
        out = pipe.transformer(**call, rope_interpolation_scale=(time / 25, space, space))[0]
        return out.transpose(1, 2).reshape(x.shape)
    if kind == "SkyReelsV2Pipeline":
        call |= {"timestep": LEVELS * 1000, "enable_diffusion_forcing": True}
    if kind == "WanImageToVideoPipeline":
        x = torch.cat([x, condition["image_latents"]], dim=1)
    return pipe.transformer(hidden_states=x, **call)[0]


@torch.no_grad()
def test_denoiser_tells_every_frame_its_level(point: Any) -> None:
    pipe, denoiser, x, condition = point
    with_text, without = (by_hand(pipe, x, condition, text) for text in ("prompt", "negative"))
    # Not bitwise: on some processors, the order of sums depends on the memory layout of the latents.
    torch.testing.assert_close(denoiser.predict(x, LEVELS, condition), with_text, rtol=1e-5, atol=1e-6)
    guided = denoiser.predict(x, LEVELS, condition, 3.0)
    torch.testing.assert_close(guided, without + 3.0 * (with_text - without), rtol=1e-5, atol=1e-5)
    assert guided.dtype == torch.float32
    # The last frame's own prediction depends on its level.
    other = LEVELS.clone()
    other[:, -1] = 0.6
    assert not torch.allclose(denoiser.predict(x, other, condition)[:, :, -1], with_text[:, :, -1], atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_denoiser_equal_levels_of_frames_are_one_level_of_the_row(point: Any, guidance: float) -> None:
    _, denoiser, x, condition = point
    level = torch.tensor([0.8, 0.25])
    expected = denoiser.predict(x, level, condition, guidance)
    found = denoiser.predict(x, level[:, None].expand(-1, FRAMES), condition, guidance)
    # Guidance weights the rounding errors of the two passes by g and g - 1.
    assert (found - expected).abs().max() <= 1e-6 * (2 * guidance - 1)


def test_denoiser_levels_of_frames_let_gradients_through(point: Any) -> None:
    pipe, denoiser, x, condition = point
    x = x.clone().requires_grad_()
    denoiser.predict(x, LEVELS, condition, 2.0).square().mean().backward()
    assert x.grad is not None
    assert (x.grad.abs().amax(dim=(1, 3, 4)) > 0).all()
    weights = dict(pipe.transformer.named_parameters())
    embedders = [value for name, value in weights.items() if "time_embed" in name and name.endswith("weight")]
    assert embedders
    assert all(value.grad is not None and value.grad.abs().sum() > 0 for value in embedders)
    pipe.transformer.zero_grad()


def test_denoiser_refuses_levels_of_other_frames(point: Any) -> None:
    _, denoiser, x, condition = point
    for wrong in (LEVELS[:, :3], LEVELS[:1], LEVELS[:, :, None]):
        with pytest.raises(UserError, match=r"sigma must have the shape \(2,\) or \(2, 4\), got"):
            denoiser.predict(x, wrong, condition)


def test_denoiser_names_the_pipelines_that_take_levels_of_frames() -> None:
    taking = {"WanPipeline", "WanImageToVideoPipeline"}
    assert all(denoiser_for(MAKERS[name]()).per_frame for name in MAKERS)
    for name in PIPELINES:
        pipe, size = tiny_pipeline(name)
        denoiser = denoiser_for(pipe)
        if denoiser.per_frame:
            taking.add(type(pipe).__name__)
            continue
        x = denoiser.initial_latents(1, **size)
        levels = torch.full((1, 1 if denoiser.frame_axis is None else x.shape[denoiser.frame_axis]), 0.5)
        with pytest.raises(UserError, match=r"one noise level per row.*use one of LTXPipeline, .*WanPipeline$"):
            denoiser.predict(x, levels, {"prompt": x})
    assert taking == set(pipelines_per_frame())


@torch.no_grad()
def test_two_experts_choose_per_row_and_refuse_a_row_on_both_sides() -> None:
    pipe = two_experts()
    denoiser = denoiser_for(pipe)
    x = torch.randn(2, 4, FRAMES, ROWS, COLUMNS, generator=torch.Generator().manual_seed(3))
    condition = denoiser.encode_prompt(["a", "b"], guidance=False)
    levels = torch.tensor([[0.5, 0.9, 0.7, 0.6], [0.4, 0.0, 0.2, 0.3]])
    together = denoiser.predict(x, levels, condition)
    for row, network in enumerate((pipe.transformer, pipe.transformer_2)):
        one = slice(row, row + 1)
        tokens = (levels[one] * 1000).repeat_interleave(6, dim=1)
        alone = network(x[one], tokens, condition["prompt"][one], return_dict=False)[0]
        assert torch.equal(together[one], alone)
    levels[0, 2] = 0.49
    with pytest.raises(UserError, match=r"both sides of the noise level 0.5 at which Wan 2.2 changes its expert"):
        denoiser.predict(x, levels, condition)


@torch.no_grad()
def test_skyreels_blocks_do_not_see_the_levels_of_later_ones() -> None:
    pipe, _ = tiny_pipeline("SkyReels-V2")
    pipe.transformer.register_to_config(num_frame_per_block=2)
    denoiser = denoiser_for(pipe)
    x = torch.randn(2, 4, FRAMES, ROWS, COLUMNS, generator=torch.Generator().manual_seed(3))
    condition = denoiser.encode_prompt(["a", "b"], guidance=False)
    later = LEVELS.clone()
    later[:, 2:] = torch.tensor([0.8, 0.6])
    one, other = (denoiser.predict(x, levels, condition) for levels in (LEVELS, later))
    assert torch.equal(one[:, :, :2], other[:, :, :2])
    assert not torch.allclose(one[:, :, 2:], other[:, :, 2:], atol=1e-4)


def test_skyreels_that_is_told_the_frame_rate_is_refused() -> None:
    pipe, _ = tiny_pipeline("SkyReels-V2")
    pipe.transformer.register_to_config(inject_sample_info=True)
    with pytest.raises(UserError, match="inject_sample_info"):
        denoiser_for(pipe)


@torch.no_grad()
def test_frames_of_one_token_have_one_level() -> None:
    from diffusers import WanTransformer3DModel

    pipe = wan()
    config = {name: value for name, value in pipe.transformer.config.items() if not name.startswith("_")}
    pipe.register_modules(transformer=WanTransformer3DModel(**{**config, "patch_size": (2, 2, 2)}).eval())
    denoiser = denoiser_for(pipe)
    x = torch.randn(2, 4, FRAMES, ROWS, COLUMNS, generator=torch.Generator().manual_seed(3))
    condition = denoiser.encode_prompt(["a", "b"], guidance=False)
    pairs = LEVELS[:, :2].repeat_interleave(2, dim=1)
    tokens = (LEVELS[:, :2] * 1000).repeat_interleave(6, dim=1)
    expected = pipe.transformer(x, tokens, condition["prompt"], return_dict=False)[0]
    assert torch.equal(denoiser.predict(x, pairs, condition), expected)
    with pytest.raises(UserError, match="every 2 latent frames are one token in time"):
        denoiser.predict(x, LEVELS, condition)
