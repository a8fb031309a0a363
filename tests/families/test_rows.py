"""The layout rows against tiny models of the real classes."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from postgen.errors import UserError
from postgen.families import Grid, layout_of, register_layout, registry
from postgen.families.rows_refused import REFUSED
from tests.families.tiny_models import BUILDERS, TinyModel, tiny_model
from tests.families.tiny_parts import COLUMNS, ROWS


@pytest.fixture(scope="module", params=BUILDERS)
def tiny(request: pytest.FixtureRequest) -> TinyModel:
    return tiny_model(request.param)


def test_every_row_has_a_tiny_model() -> None:
    assert {type(tiny_model(name).transformer).__name__ for name in BUILDERS} == registry._layouts.keys()


def test_grid(tiny: TinyModel) -> None:
    grid = layout_of(tiny.transformer).grid(tiny.transformer, **tiny.arguments)
    assert grid == Grid(frames=tiny.frames, height=ROWS, width=COLUMNS)


def test_modules(tiny: TinyModel) -> None:
    layout = layout_of(tiny.transformer)
    attention, blocks = layout.attention_modules(tiny.transformer), layout.block_modules(tiny.transformer)
    assert len(attention) == tiny.attention_layers
    assert all(hasattr(module, "processor") for module in attention.values())
    # Every attention layer stands in a block, and no block is inside another one.
    assert all(any(name.startswith(f"{block}.") for block in blocks) for name in attention)
    assert not any(one.startswith(f"{other}.") for one in blocks for other in blocks)


def timesteps(tiny: TinyModel) -> dict[str, torch.Tensor]:
    shapes = {"B": (1,), "BT": (1, tiny.frames), "B1T11": (1, 1, tiny.frames, 1, 1)}
    shapes["BL"] = (1, tiny.frames * ROWS * COLUMNS)
    return {kind: torch.full(shape, 500.0) for kind, shape in shapes.items()}


def test_timestep_shapes(tiny: TinyModel) -> None:
    """The shapes of the row are accepted, and give the same where all timesteps are the same."""
    layout, extra, outputs = layout_of(tiny.transformer), {}, []
    if layout.transformer == "LTX2VideoTransformer3DModel":
        extra = {"audio_timestep": torch.full((1,), 500.0)}
    for kind in layout.timestep_shapes:
        if layout.transformer == "SkyReelsV2Transformer3DModel":
            extra = {"enable_diffusion_forcing": kind == "BT"}
        outputs.append(tiny(timestep=timesteps(tiny)[kind], **extra))
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0])


def test_block_causal_frames() -> None:
    rule: Any = layout_of(tiny_model("SkyReels-V2").transformer).causal_rule
    assert rule(tiny_model("SkyReels-V2").transformer.config) == 0
    assert rule(tiny_model("SkyReels-V2 block-causal").transformer.config) == 2


@pytest.mark.parametrize("name", ["LTX", "LTX-2"])
def test_packed_tokens_without_sizes(name: str) -> None:
    """Coordinates tell the grid as long as they are one; without them nothing does."""
    tiny = tiny_model(name)
    layout = layout_of(tiny.transformer)
    corners = torch.cartesian_prod(torch.arange(4.0) / 25, torch.arange(2.0) * 32, torch.arange(3.0) * 32).T[None]
    for coordinates in (corners, torch.stack([corners, corners + 1], -1)):
        for sizes in (dict.fromkeys(("num_frames", "height", "width")), {"num_frames": 1, "height": 1, "width": 1}):
            arguments = {**tiny.arguments, **sizes}
            grid = layout.grid(tiny.transformer, **arguments, video_coords=coordinates)
            assert grid == Grid(frames=4, height=2, width=3)
            reference = torch.cat([coordinates[:, :, :2] + 7, coordinates], dim=2)
            assert layout.grid(tiny.transformer, **arguments, video_coords=reference) is None
    nothing = dict.fromkeys(("num_frames", "height", "width"))
    assert layout.grid(tiny.transformer, **{**tiny.arguments, **nothing}) is None


@pytest.mark.parametrize("name", REFUSED)
def test_refused_classes_say_why(name: str) -> None:
    import diffusers

    assert hasattr(diffusers, name)
    with pytest.raises(UserError, match=f"no layout for {name}: .*Known: AllegroTransformer3DModel") as refusal:
        layout_of(model_called(name))
    assert REFUSED[name] in str(refusal.value)


def test_a_registered_row_wins_over_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_layouts", dict(registry._layouts))
    row = dataclasses.replace(layout_of(tiny_model("Wan").transformer), transformer="SanaVideoTransformer3DModel")
    register_layout(row)
    assert layout_of(model_called("SanaVideoTransformer3DModel")) is row


def model_called(name: str) -> torch.nn.Module:
    """Building the real ones would take their sizes and says no more: they are known by name."""
    made: torch.nn.Module = type(name, (torch.nn.Module,), {})()
    return made
