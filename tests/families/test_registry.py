"""The registries of layouts and of denoisers."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from postgen.errors import UserError
from postgen.families import (
    Grid,
    denoiser_for,
    layout_of,
    register_denoiser,
    register_layout,
    registry,
    video_tokens_of,
)


@pytest.fixture
def transformer(tiny_wan: Path) -> Any:
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel.from_pretrained(tiny_wan, subfolder="transformer")


def test_wan_layout(transformer: Any) -> None:
    layout, video = layout_of(transformer), video_tokens_of(transformer)
    assert list(video.attention_modules(transformer)) == ["blocks.0.attn1", "blocks.1.attn1"]
    assert list(layout.block_modules(transformer)) == ["blocks.0", "blocks.1"]
    x, text = torch.zeros(1, 4, 3, 4, 6), torch.zeros(1, 8, 16)
    assert video.grid(transformer, x, torch.ones(1), text) == Grid(frames=3, height=2, width=3)
    assert video.grid(transformer, hidden_states=x).tokens == 18


def test_grid_is_what_attention_sees(transformer: Any) -> None:
    video, seen = video_tokens_of(transformer), []
    first = next(iter(video.attention_modules(transformer).values()))
    first.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    x = torch.zeros(1, 4, 3, 4, 6)
    transformer(hidden_states=x, timestep=torch.ones(1), encoder_hidden_states=torch.zeros(1, 8, 16))
    assert seen == [video.grid(transformer, hidden_states=x).tokens]


def test_tokens_are_ordered_frame_by_frame(transformer: Any) -> None:
    video, seen = video_tokens_of(transformer), []
    first = next(iter(video.attention_modules(transformer).values()))
    first.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    x = torch.zeros(1, 4, 3, 4, 6)
    changed = x.clone()
    changed[:, :, 1] += 1
    for clip in (x, changed):
        transformer(hidden_states=clip, timestep=torch.ones(1), encoder_hidden_states=torch.zeros(1, 8, 16))
    grid = video.grid(transformer, hidden_states=x)
    differs = (seen[0] != seen[1]).any(-1).view(grid.frames, -1).any(-1)
    assert differs.tolist() == [False, True, False]


def test_wrapped_transformers_are_recognised(transformer: Any) -> None:
    from peft import LoraConfig, get_peft_model

    layout = layout_of(transformer)
    assert layout_of(torch.compile(transformer, backend="eager")) is layout
    assert layout_of(get_peft_model(transformer, LoraConfig(target_modules=["to_q"]))) is layout


def test_stale_row_is_an_error(transformer: Any) -> None:
    stale = dataclasses.replace(video_tokens_of(transformer), self_attention=r"blocks\.\d+\.attn")
    with pytest.raises(UserError, match="no self-attention modules named"):
        stale.attention_modules(transformer)


def test_unknown_classes_list_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"no layout for Linear. Known: .*WanTransformer3DModel.*register_layout"):
        layout_of(torch.nn.Linear(1, 1))
    with pytest.raises(UserError, match=r"no denoiser for object. Known: .*WanPipeline.*register_denoiser"):
        denoiser_for(object())


def test_third_parties_can_register(transformer: Any, tiny_wan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import WanPipeline

    monkeypatch.setattr(registry, "_layouts", dict(registry._layouts))
    monkeypatch.setattr(registry, "_denoisers", dict(registry._denoisers))
    register_layout(dataclasses.replace(layout_of(transformer), transformer="Linear"))
    assert layout_of(torch.nn.Linear(1, 1)).transformer == "Linear"
    register_denoiser("Mine", lambda pipe: ("mine", pipe))

    class Mine(WanPipeline):
        pass

    pipe = object.__new__(Mine)
    assert denoiser_for(pipe) == ("mine", pipe)
