"""The worked example of a model: a row and three files, from CONTRIBUTING.md."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import diffusers
import pytest
import torch

import postgen.families as families
import postgen.families.attention as attention
import postgen.pipelines as pipelines
from postgen import EnhanceAVideoConfig, UserError, apply_enhance_a_video
from postgen.families import Layout, blocks_of, denoiser_for, layout_of, registry, rows_others, video_tokens_of
from postgen.families.attention.reading import dispatched
from postgen.families.cost import forward_cost
from postgen.families.installed import processor_stack
from postgen.families.linear import find_linears
from postgen.pipelines.names import homes
from tests.contributing import blocks
from tests.tiny_wan import LATENT_CHANNELS, TEXT_DIM, wan_components
from tests.toy_diffusers import ToyTransformer3DModel, ToyVideoPipeline

SIZE = {"num_frames": 9, "height": 32, "width": 48}
"""Inputs with latents of 3 frames of 4 x 6, which are tokens of 3 frames of 2 x 3."""
PROMPTS = ["a red ball", "a blue cube falls"]


@pytest.fixture(scope="module")
def row(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Layout]:
    """Register the row of the example, and put its files in the folders of the repository."""
    entry, *files = blocks("## A model")
    places = {"attention": attention, "families": families, "pipelines": pipelines}
    with pytest.MonkeyPatch.context() as patch:
        for (name, package), code in zip(places.items(), files, strict=True):
            folder = tmp_path_factory.mktemp("toy") / name
            folder.mkdir()
            (folder / "toy.py").write_text(code, encoding="utf-8")
            patch.setattr(package, "__path__", [*package.__path__, str(folder)])
            assert homes(folder) == ({"ToyVideoPipeline": "toy"} if name == "pipelines" else {})
        patch.setattr(diffusers, "ToyVideoPipeline", ToyVideoPipeline, raising=False)
        patch.setattr(registry, "_layouts", dict(registry._layouts))
        made: Layout = eval(entry, dict(vars(rows_others)))
        families.register_layout(made)
        yield made
    for package in places.values():
        if sys.modules.pop(f"{package.__name__}.toy", None):
            del package.toy  # type: ignore[attr-defined]


@pytest.fixture
def components() -> dict[str, Any]:
    made = wan_components()
    torch.manual_seed(0)
    return {**made, "transformer": ToyTransformer3DModel(in_channels=LATENT_CHANNELS, text_dim=TEXT_DIM).eval()}


def video(pipe: Any, **settings: Any) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    call = {**SIZE, "num_inference_steps": 2, "output_type": "pt", **settings}
    frames: torch.Tensor = pipe(PROMPTS, generator=torch.Generator().manual_seed(0), **call).frames
    return frames


@torch.no_grad()
def test_row(row: Layout, components: dict[str, Any]) -> None:
    model = components["transformer"]
    x, text = torch.randn(2, LATENT_CHANNELS, 3, 4, 6), torch.randn(2, 5, TEXT_DIM)
    assert layout_of(model) is row
    assert [block.name for block in blocks_of(model)] == ["layers.0", "layers.1"]
    assert [block.follows for block in blocks_of(model)] == [False, True]
    tokens = video_tokens_of(model)
    assert [*tokens.attention_modules(model)] == ["layers.0.attn1", "layers.1.attn1"]
    seen = []
    hook = model.layers[0].attn1.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    model(x, torch.ones(2), text)
    hook.remove()
    assert seen == [tokens.grid(model, x, torch.ones(2), text).tokens] == [18]  # type: ignore[union-attr]
    cost = forward_cost(model, **SIZE, text_tokens=5, dtype=torch.float32)
    assert cost.grid is not None
    assert cost.grid.tokens == 18
    assert cost.total.weight_bytes == 4 * sum(weight.numel() for weight in model.parameters())
    assert {"layers.1.attn1.to_q", "layers.0.attn2.to_out.0"} <= {*find_linears(model)}


@torch.no_grad()
def test_attention_is_read_and_put_together_again(row: Layout, components: dict[str, Any]) -> None:
    model, compared = components["transformer"], []
    module = model.layers[0].attn1
    reader = attention.attention_of(model).reader(module.processor)

    def read(inner: Any, module: Any, *args: Any, **kwargs: Any) -> Any:
        call = reader.bind(module, *args, **kwargs)
        reading = reader.read(call)
        assert reading is not None
        query, key, value = reading.joined()
        out = reader.finish(call, dispatched(module, query, key, value, reading.mask), query.dtype)
        expected = inner(module, *args, **kwargs)
        compared.append(torch.equal(out, expected))
        return expected

    stack = processor_stack(model)
    stack.push("read", dict.fromkeys(video_tokens_of(model).attention_modules(model), read))
    model(torch.randn(2, LATENT_CHANNELS, 3, 4, 6), torch.ones(2), torch.randn(2, 5, TEXT_DIM))
    stack.pop("read")
    assert compared == [True, True]
    text = torch.randn(2, 5, TEXT_DIM)
    cross = model.layers[0].attn2
    assert reader.read(reader.bind(cross, torch.randn(2, 18, 16), text)) is None


def test_the_denoiser_predicts_what_the_pipeline_does(row: Layout, components: dict[str, Any]) -> None:
    pipe: Any = ToyVideoPipeline(**components)
    denoiser: Any = denoiser_for(pipe)
    assert type(denoiser).__module__ == "postgen.families.toy"
    expected = video(pipe, guidance_scale=3.0)
    condition = denoiser.encode_prompt(PROMPTS)
    x = denoiser.initial_latents(2, **SIZE, generator=torch.Generator().manual_seed(0))
    sigmas = denoiser.sigmas(2, x.shape[1:])
    with torch.no_grad():
        for sigma, lower in itertools.pairwise(sigmas):
            x = x + (lower - sigma) * denoiser.predict(x, sigma.expand(2), condition, guidance=3.0)
        clips = denoiser.decode(x)
        again = denoiser.encode_video(clips)
    assert again.shape == x.shape
    torch.testing.assert_close(clips, torch.as_tensor(expected), atol=2e-4, rtol=0)
    loss = denoiser.predict(x, sigmas[:1].expand(2), condition).square().mean()
    loss.backward()
    assert all(weight.grad is not None for weight in components["transformer"].layers.parameters())
    with pytest.raises(UserError, match="multiple"):
        denoiser.latent_shape(9, 32, 40)


def test_enhance_a_video_and_the_drop_in_class(row: Layout, components: dict[str, Any]) -> None:
    plain: Any = ToyVideoPipeline(**components)
    ours: Any = import_module("postgen.pipelines.toy").ToyVideoPipeline(**components)
    assert (type(ours).__name__, isinstance(ours, ToyVideoPipeline)) == ("ToyVideoPipeline", True)
    stock = video(plain)
    assert torch.equal(video(ours), stock)
    enhanced = video(ours, enhance_a_video=8.0)
    assert not torch.equal(enhanced, stock)
    handle = apply_enhance_a_video(plain, EnhanceAVideoConfig(weight=8.0))
    assert torch.equal(video(plain), enhanced)
    handle.remove()
    assert torch.equal(video(plain), stock)


def test_a_program_of_its_own_registers_the_parts_themselves(row: Layout, components: dict[str, Any]) -> None:
    anatomy = import_module("postgen.families.attention.toy").ANATOMY
    factory = import_module("postgen.families.toy").ToyDenoiser
    mine = dataclasses.replace(row, attention=anatomy, denoisers={"ToyVideoPipeline": factory})
    families.register_layout(mine)
    assert attention.attention_of(components["transformer"]) is anatomy
    assert type(denoiser_for(ToyVideoPipeline(**components))) is factory
    families.register_layout(row)
