"""`WorldWeaverModel`: the inputs of each network, and an untrained model whose RGB is that of the stock model."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import postgen
from postgen.errors import UserError
from postgen.families import denoiser_for
from postgen.worldweaver.embedding import LevelEmbedder
from postgen.worldweaver.levels import FrameLevels, Role
from postgen.worldweaver.model import WorldWeaverModel
from postgen.worldweaver.widen import widen_transformer, widened
from tests.families.test_frame_levels import MAKERS
from tests.families.tiny_models import tiny_model
from tests.families.tiny_pipelines import tiny_pipeline

FRAMES = 4
ROLES = torch.tensor([Role.LONG, Role.SHORT, Role.PREDICT, Role.PREDICT])
SCALAR = ("CogVideoX", "HunyuanVideo")


class Point:
    """A pipeline with predictions before and after widening."""

    def __init__(self, name: str, *, placed: bool = False) -> None:
        self.name, self.mean_level = name, name in SCALAR
        self.pipe: Any = tiny_pipeline(name)[0] if name in SCALAR else MAKERS[name]()
        self.denoiser = denoiser_for(self.pipe)
        source = torch.Generator().manual_seed(3)
        self.z = torch.randn(2, 8, FRAMES, 4, 6, generator=source)
        self.sigma = torch.rand(2, FRAMES, 2, generator=source)
        with torch.no_grad():
            self.condition = self.denoiser.encode_prompt(["a red ball", "a blue cube falls"])
        if name == "Wan image-to-video":
            self.condition["image_latents"] = torch.randn(2, 8, FRAMES, 4, 6, generator=source)
        with torch.no_grad():
            self.stock = {guidance: self.of_rgb(self.sigma[..., 0], guidance) for guidance in (1.0, 3.0)}
            self.uniform = self.of_rgb(torch.tensor([0.8, 0.25]))
        widen_transformer(self.pipe, placed=placed)
        embedder = LevelEmbedder.for_transformer(self.pipe)
        self.model = WorldWeaverModel(self.denoiser, embedder, mean_level=self.mean_level)

    def of_rgb(self, sigma: Tensor, guidance: float = 1.0) -> Tensor:
        """Return the prediction of the stock model for RGB at levels (B, T) or (B,)."""
        if self.mean_level and sigma.dim() == 2:
            sigma = sigma[:, ROLES == Role.PREDICT].double().mean(dim=1).float()
        return self.turned(self.denoiser.predict(self.turned(self.z[:, :4]), sigma, self.condition, guidance))

    def turned(self, latents: Tensor) -> Tensor:
        return latents.transpose(1, 2) if self.denoiser.frame_axis == 1 else latents

    @torch.no_grad()
    def predict(self, sigma: Tensor, guidance: float = 1.0) -> Tensor:
        return self.model.predict(self.z, FrameLevels(sigma=sigma, role=ROLES), self.condition, guidance)


@pytest.fixture(scope="module", params=(*MAKERS, *SCALAR))
def point(request: pytest.FixtureRequest) -> Point:
    return Point(request.param)


@pytest.fixture(scope="module")
def wan() -> Point:
    return Point("Wan")


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_rgb_begins_as_the_stock_models(point: Point, guidance: float) -> None:
    out = point.predict(point.sigma, guidance)
    assert out.dtype == torch.float32
    assert torch.equal(point.model.split(out)["rgb"], point.stock[guidance])
    assert torch.equal(point.model.split(out)["depth"], point.stock[guidance])


def test_equal_levels_are_one_level(point: Point) -> None:
    level = torch.tensor([0.8, 0.25])
    out = point.predict(level[:, None, None].expand(-1, FRAMES, 2))
    assert (out[:, :4] - point.uniform).abs().max() <= 1e-6


def test_levels_and_roles_count_once_the_embedder_is_trained(point: Point) -> None:
    first = point.predict(point.sigma)
    outer = point.model.embedder.outer
    torch.nn.init.normal_(outer.weight, std=0.3)
    trained = point.predict(point.sigma)
    depth, memory = point.sigma.clone(), point.sigma.clone()
    depth[:, -1, 1] = 0.5 - depth[:, -1, 1] / 2  # another level of depth in the last frame
    memory[:, 0, 0] = 0.9  # another level of RGB in memory, which a single timestep does not contain
    others = [point.predict(depth), point.predict(memory)]
    torch.nn.init.zeros_(outer.weight)
    assert not torch.allclose(trained, first, atol=1e-4)
    assert all(not torch.allclose(other, trained, atol=1e-5) for other in others)
    assert torch.equal(point.predict(point.sigma), first)


@pytest.mark.parametrize("name", ["Wan", "Wan image-to-video", "LTX", "CogVideoX"])
def test_placed_memory_is_an_input_of_the_last_frames(name: str) -> None:
    point = Point(name, placed=True)
    model, condition = point.model, point.condition
    memory = torch.randn(2, 9, 2, 4, 6, generator=torch.Generator().manual_seed(5))
    point.condition = {**condition, "placed": memory}
    assert torch.equal(model.split(point.predict(point.sigma, 3.0))["rgb"], point.stock[3.0])
    # Only the weight columns of the placed inputs get random values.
    wide = widened(point.pipe)
    first = model.transformer.get_submodule(wide.widths.first)
    columns = wide.widths.columns[-9:].flatten()
    first.weight.data.flatten(1)[:, columns] = torch.randn(len(first.weight), len(columns)) * 0.2
    told = point.predict(point.sigma)
    point.condition = {**condition, "placed": torch.cat([memory.new_zeros(memory.shape), memory], dim=2)}
    assert torch.equal(point.predict(point.sigma), told)
    point.condition = condition
    unknown = point.predict(point.sigma)
    assert not torch.allclose(told, unknown, atol=1e-3)
    assert torch.equal(model.split(unknown)["rgb"], point.stock[1.0])
    point.condition = {**condition, "placed": memory[:, :8]}
    with pytest.raises(UserError, match=r"placed memory has shape \(2, 8, 2, 4, 6\): give \(2, 9, at most 4, 4, 6\)"):
        point.predict(point.sigma)


def test_shapes_and_the_autoencoder_are_those_of_one_modality(point: Point) -> None:
    size = (9, 32, 64) if point.name in ("LTX", *SCALAR) else (5, 16, 32)
    channels, *others = point.model.latent_shape(*size)
    assert channels == 8
    clips = torch.rand(1, size[0], 3, *size[1:], generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        latents = point.model.encode(clips)
        assert latents.shape == (1, 4, *others)
        assert point.model.decode(latents).shape == clips.shape


def test_summary_says_how_levels_are_told(point: Point) -> None:
    said = str(postgen.summary(point.pipe))
    told = "mean RGB level of the frames in flight as one" if point.mean_level else "RGB level of each frame as its"
    assert f"worldweaver: rgb + depth, 4 channels each; noise levels: {told}" in said


def test_a_network_of_one_timestep_is_asked_for_by_name() -> None:
    pipe = tiny_pipeline("HunyuanVideo")[0]
    widen_transformer(pipe)
    embedder = LevelEmbedder.for_transformer(pipe)
    with pytest.raises(UserError, match=r"takes one noise level for a whole clip, .*LTXPipeline.* or mean_level=True"):
        WorldWeaverModel(denoiser_for(pipe), embedder)


def test_other_models_are_refused(wan: Point) -> None:
    from tests.families.test_frame_levels import two_experts

    embedder = wan.model.embedder
    for pipe, message in (
        (two_experts(), "two experts"),
        (MAKERS["Wan"](), "4 output channels cannot be divided into 3 modalities"),
        (tiny_pipeline("FLUX")[0], "an image model has no frames"),
        (wan.pipe, "this transformer has rgb, depth, but rgb, depth, flow is requested"),
    ):
        with pytest.raises(UserError, match=message):
            WorldWeaverModel(denoiser_for(pipe), LevelEmbedder(width=24, modalities=3))
    with pytest.raises(UserError, match="takes a noise level for each frame: omit mean_level"):
        WorldWeaverModel(wan.denoiser, embedder, mean_level=True)
    with pytest.raises(
        UserError, match="has width 12, the tokens have width 24: the embedder belongs to another model"
    ):
        WorldWeaverModel(wan.denoiser, LevelEmbedder(width=12))
    with pytest.raises(UserError, match="modalities must be 1 to 3, got 4"):
        LevelEmbedder(width=12, modalities=4)


def test_wrong_windows_are_one_line(wan: Point) -> None:
    sigma = wan.sigma
    with pytest.raises(UserError, match="the model has no inputs for it: widen it with placed=True"):
        wan.model.predict(
            wan.z, FrameLevels(sigma=sigma, role=ROLES), {**wan.condition, "placed": wan.z.new_zeros(2, 9, 2, 4, 6)}
        )
    for z, levels, message in (
        (wan.z[:, :4], sigma, r"latents have shape \(2, 4, 4, 4, 6\): give \(batch, 8, latent frames"),
        (wan.z[:, :, :3], sigma, r"levels have shape \(2, 4, 2\) for .* give \(2, 3, 2\)"),
        (wan.z, sigma[..., :1], r"levels have shape \(2, 4, 1\) for .* give \(2, 4, 2\)"),
    ):
        with pytest.raises(UserError, match=message):
            wan.model.predict(z, FrameLevels(sigma=levels, role=ROLES), wan.condition)


def test_a_stock_model_is_one_of_rgb_alone() -> None:
    pipe = MAKERS["Wan"]()
    widened(pipe, ("rgb",))
    model = WorldWeaverModel(denoiser_for(pipe), LevelEmbedder.for_transformer(pipe))
    z, sigma = torch.randn(1, 4, FRAMES, 4, 6), torch.rand(1, FRAMES, 1)
    with torch.no_grad():
        condition = model.denoiser.encode_prompt(["a"])
        out = model.predict(z, FrameLevels(sigma=sigma, role=ROLES), condition)
        assert torch.equal(out, model.denoiser.predict(z, sigma[..., 0], condition))
    assert widen_transformer(pipe.transformer) is pipe.transformer


@pytest.mark.parametrize("name", ["Wan", "CogVideoX 1.0", "CogVideoX 1.5", "LTX", "Mochi"])
def test_a_frame_is_told_of_itself_alone(name: str) -> None:
    """A frame's vector is added to its own tokens only, for 3-D and 2-D convolutions and linear first layers."""
    tiny = tiny_model(name, batch=2)
    model: Any = tiny.transformer
    widened(model, ("rgb",))
    embedder = LevelEmbedder.for_transformer(model, frequencies=4, hidden=8)
    torch.nn.init.normal_(embedder.outer.weight)
    patch = 2 if name == "CogVideoX 1.5" else 1
    sigma = torch.rand(2, tiny.frames, 1).repeat_interleave(patch, dim=1)
    role = torch.full((tiny.frames * patch,), int(Role.PREDICT))
    first = model.get_submodule(widened(model).widths.first)
    seen: list[Tensor] = []

    def see(module: nn.Module, inputs: Any, output: Tensor) -> None:
        seen.append(output)

    with torch.no_grad(), embedder.on(model, FrameLevels(sigma=sigma, role=role)):
        handle = first.register_forward_hook(see)
        tiny()
        handle.remove()
    with torch.no_grad():
        handle = first.register_forward_hook(see)
        tiny()
        handle.remove()
    told = seen[0] - seen[1]
    vectors = embedder(FrameLevels(sigma=sigma[:, ::patch], role=role[::patch])).detach()
    for frame in range(tiny.frames):
        tokens = of_frame(told, frame, tiny.frames)
        expected = vectors[:, frame][:, None].expand(tokens.shape)
        torch.testing.assert_close(tokens, expected, rtol=0, atol=1e-5)
    if patch > 1:
        sigma[:, 1] += 0.1
        with pytest.raises(UserError, match="2 latent frames share one token"):
            embedder.on(model, FrameLevels(sigma=sigma, role=role)).__enter__()


def of_frame(tokens: Tensor, frame: int, frames: int) -> Tensor:
    """Return the features of a frame, (B, tokens, width), from the output of a first layer."""
    if tokens.dim() == 5:
        return tokens[:, :, frame].flatten(2).mT
    if tokens.dim() == 4:
        return tokens.unflatten(0, (-1, frames))[:, frame].flatten(2).mT
    return tokens.unflatten(1, (frames, -1))[:, frame]


def test_calls_of_other_threads_and_other_windows(wan: Point) -> None:
    embedder = LevelEmbedder.for_transformer(wan.pipe)
    torch.nn.init.normal_(embedder.outer.weight)
    levels = FrameLevels(sigma=wan.sigma, role=ROLES)
    call = {"timestep": torch.tensor([500.0, 200.0]), "encoder_hidden_states": wan.condition["prompt"]}
    plain = run(wan.pipe, hidden_states=wan.z, **call)
    with embedder.on(wan.pipe, levels):
        elsewhere: list[Tensor] = []
        thread = threading.Thread(target=lambda: elsewhere.append(run(wan.pipe, hidden_states=wan.z, **call)))
        thread.start()
        thread.join()
        assert torch.equal(elsewhere[0], plain)
        assert not torch.equal(run(wan.pipe, hidden_states=wan.z, **call), plain)
        with pytest.raises(UserError, match="levels of 2 rows with 4 token frames do not fit tokens of shape"):
            run(wan.pipe, hidden_states=wan.z[:, :, :3], **call)
    assert torch.equal(run(wan.pipe, hidden_states=wan.z, **call), plain)


@torch.no_grad()
def run(pipe: Any, **call: Any) -> Tensor:
    out: Tensor = pipe.transformer(**call, return_dict=False)[0]
    return out


def test_the_embedder_is_saved_and_trained_like_any_component(wan: Point, tmp_path: Path) -> None:
    embedder = LevelEmbedder.for_transformer(wan.pipe, frequencies=3, hidden=5)
    model = WorldWeaverModel(wan.denoiser, embedder)
    # A trainer wraps the embedder, and the call must go through the wrapper that averages gradients.
    model.embedder_called = nn.Sequential(embedder)
    called: list[Any] = []
    model.embedder_called.register_forward_hook(lambda *each: called.append(each))
    model.predict(wan.z, FrameLevels(sigma=wan.sigma, role=ROLES), wan.condition).square().mean().backward()
    gradient = embedder.outer.weight.grad
    assert len(called) == 1
    assert gradient is not None
    assert (gradient.abs().sum(dim=0) > 0).all()
    wan.pipe.transformer.zero_grad()
    torch.nn.init.normal_(embedder.outer.weight)
    embedder.save_pretrained(tmp_path)
    loaded = LevelEmbedder.from_pretrained(tmp_path)
    levels = FrameLevels(sigma=wan.sigma, role=ROLES)
    assert torch.equal(loaded(levels), embedder(levels))
    with pytest.raises(UserError, match="levels have 1 modalities, the level embedder needs 2"):
        embedder(FrameLevels(sigma=wan.sigma[..., :1], role=ROLES))


def test_the_embedded_model_takes_windows_of_rgb_and_depth() -> None:
    from diffusers import WanPipeline

    from postgen.assets import embedded_model

    pipe = WanPipeline.from_pretrained(embedded_model())
    denoiser = denoiser_for(pipe)
    z = torch.randn(1, 32, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([[[0.1, 0.0], [0.0, 0.0], [0.7, 0.7]]])
    with torch.no_grad():
        condition = denoiser.encode_prompt(["a red ball rolls left"])
        stock = denoiser.predict(z[:, :16], sigma[..., 0], condition, 3.0)
        widen_transformer(pipe)
        model = WorldWeaverModel(denoiser, LevelEmbedder.for_transformer(pipe))
        out = model.predict(z, FrameLevels(sigma=sigma, role=torch.arange(3)), condition, 3.0)
    assert torch.equal(out, torch.cat([stock, stock], dim=1))
    assert model.latent_shape(33, 128, 128) == (32, 9, 16, 16)
