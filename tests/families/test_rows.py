"""Layout rows, compared with tiny models of the real classes."""

from __future__ import annotations

import dataclasses
from typing import Any, get_args

import pytest
import torch

from postgen.errors import UserError
from postgen.families import (
    Grid,
    layout_named,
    layout_of,
    register_layout,
    registry,
    tokens_named,
    tokens_of,
    video_tokens_named,
    video_tokens_of,
)
from postgen.families.layout import TimestepShape
from postgen.families.rows_refused import NO_LAYOUT, NO_VIDEO_TOKENS
from tests.families.tiny_models import BLOCK_BUILDERS, BUILDERS, IMAGES, TinyModel, tiny_model
from tests.families.tiny_parts import COLUMNS, ROWS


@pytest.fixture(scope="module", params=[*BUILDERS, *IMAGES])
def tiny(request: pytest.FixtureRequest) -> TinyModel:
    return tiny_model(request.param)


def test_every_row_has_a_tiny_model() -> None:
    """Rows with video tokens are in one table, rows without in the other; some of the latter have picture tokens."""
    for table, video in ((BUILDERS, True), (BLOCK_BUILDERS, False)):
        rows = {name for name, row in registry._layouts.items() if (row.video is not None) == video}
        assert {type(tiny_model(name).transformer).__name__ for name in table} == rows
    pictures = {name for name, row in registry._layouts.items() if row.image is not None}
    assert {type(tiny_model(name).transformer).__name__ for name in IMAGES} == pictures


def test_grid(tiny: TinyModel) -> None:
    grid = tokens_of(tiny.transformer).grid(tiny.transformer, **tiny.arguments)
    expected = Grid(frames=1 if tiny.name in IMAGES else tiny.frames, height=ROWS, width=COLUMNS)
    if tiny.name == "DiT":  # makes squares
        expected = Grid(frames=1, height=4, width=4)
    assert grid == expected


def test_tokens_of_pictures_have_a_place_of_their_own(tiny: TinyModel) -> None:
    """`video_tokens_of` refuses picture models; `tokens_of` accepts video and picture models."""
    row = layout_of(tiny.transformer)
    assert tokens_of(tiny.transformer) is (row.image if tiny.name in IMAGES else row.video)
    assert (row.image is None) != (row.video is None)
    if tiny.name in IMAGES:
        with pytest.raises(UserError, match="it generates images, which have no frames to compare"):
            video_tokens_of(tiny.transformer)
        axes, x = tokens_of(tiny.transformer).latent_axes, tiny.arguments["hidden_states"]
        assert x.dim() == (3 if axes == "packed" else len(axes))


def test_modules(tiny: TinyModel) -> None:
    layout = layout_of(tiny.transformer)
    attention = tokens_of(tiny.transformer).attention_modules(tiny.transformer)
    blocks = layout.block_modules(tiny.transformer)
    assert len(attention) == tiny.attention_layers
    assert all(hasattr(module, "processor") for module in attention.values())
    # Every attention layer is inside a block, and no block is inside another block.
    assert all(any(name.startswith(f"{block}.") for block in blocks) for name in attention)
    assert not any(one.startswith(f"{other}.") for one in blocks for other in blocks)


def with_timestep(tiny: TinyModel, kind: str) -> torch.Tensor | None:
    """Return the prediction with a timestep of this shape, with equal elements; None if forward refuses the shape."""
    batch, frames = 2, tiny.frames
    shapes = {"B": (batch,), "BT": (batch, frames), "B1T11": (batch, 1, frames, 1, 1)}
    shapes["BL"] = (batch, frames * ROWS * COLUMNS)
    name = "t" if "t" in tiny.arguments else "timestep"
    timestep = tiny.arguments[name].flatten()[0].expand(shapes[kind]).clone()
    extra: dict[str, Any] = {}
    if tiny.name == "LTX-2":
        extra = {"audio_timestep": torch.full((batch,), 500.0)}
    if tiny.name == "AnyFlow":
        extra = {"r_timestep": timestep - 100}
    if tiny.name.startswith("SkyReels"):
        extra = {"enable_diffusion_forcing": kind == "BT"}
    try:
        return tiny(**{name: timestep}, **extra)
    except (RuntimeError, ValueError, TypeError, IndexError, NameError, AssertionError):
        return None


@pytest.mark.parametrize("name", [*BUILDERS, *BLOCK_BUILDERS])
def test_timestep_shapes(name: str) -> None:
    """Exactly the shapes of the row are accepted, and equal timesteps predict the same in every shape."""
    tiny = tiny_model(name, batch=2)
    kinds: tuple[TimestepShape, ...] = get_args(TimestepShape)
    outputs = {kind: output for kind in kinds if (output := with_timestep(tiny, kind)) is not None}
    assert set(outputs) == set(layout_of(tiny.transformer).timestep_shapes)
    first, *others = outputs.values()
    for output in others:
        torch.testing.assert_close(output, first)


def test_block_causal_frames() -> None:
    rule: Any = video_tokens_of(tiny_model("SkyReels-V2").transformer).causal_rule
    assert rule(tiny_model("SkyReels-V2").transformer.config) == 0
    assert rule(tiny_model("SkyReels-V2 block-causal").transformer.config) == 2


@pytest.mark.parametrize("name", ["LTX", "LTX-2"])
def test_packed_tokens_without_sizes(name: str) -> None:
    """Coordinates determine the grid if they form one; without sizes and coordinates, the grid is unknown."""
    tiny = tiny_model(name)
    video = video_tokens_of(tiny.transformer)
    corners = torch.cartesian_prod(torch.arange(4.0) / 25, torch.arange(2.0) * 32, torch.arange(3.0) * 32).T[None]
    for coordinates in (corners, torch.stack([corners, corners + 1], -1)):
        for sizes in (dict.fromkeys(("num_frames", "height", "width")), {"num_frames": 1, "height": 1, "width": 1}):
            arguments = {**tiny.arguments, **sizes}
            grid = video.grid(tiny.transformer, **arguments, video_coords=coordinates)
            assert grid == Grid(frames=4, height=2, width=3)
            reference = torch.cat([coordinates[:, :, :2] + 7, coordinates], dim=2)
            assert video.grid(tiny.transformer, **arguments, video_coords=reference) is None
    nothing = dict.fromkeys(("num_frames", "height", "width"))
    assert video.grid(tiny.transformer, **{**tiny.arguments, **nothing}) is None


def test_places_of_packed_pictures() -> None:
    """FLUX: `img_ids` with a batch axis (older programs), with those of a given picture appended, and omitted."""
    tiny = tiny_model("Flux")
    tokens, places = tokens_of(tiny.transformer), tiny.arguments["img_ids"]
    assert tokens.grid(tiny.transformer, img_ids=places[None]) == Grid(frames=1, height=ROWS, width=COLUMNS)
    given = places[: COLUMNS - 1] + torch.tensor([1.0, 0, 0])
    assert tokens.grid(tiny.transformer, img_ids=torch.cat([places, given])) is None
    assert tokens.grid(tiny.transformer) is None


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("SanaTransformer2DModel", r"its self-attention is linear \(ReLU\)"),
        ("SanaVideoTransformer3DModel", r"its self-attention is linear \(ReLU\)"),
        ("QwenImageTransformer2DModel", "its layout does not describe the tokens of its picture"),
        ("UNet2DConditionModel", "it is a U-Net"),
    ],
)
def test_no_tokens_of_video_or_picture(kind: str, reason: str) -> None:
    with pytest.raises(UserError, match=f"no tokens of a video or picture in {kind}: {reason}.*Known: .*DiTTransf"):
        tokens_named(kind)
    with pytest.raises(UserError, match=r"no layout for Mine\. Known: .*register_layout"):
        tokens_named("Mine")


@pytest.mark.parametrize("name", NO_VIDEO_TOKENS)
def test_classes_without_video_tokens_say_why(name: str) -> None:
    import diffusers

    assert hasattr(diffusers, name)
    with pytest.raises(UserError, match=f"no video tokens in {name}: .*Known: AllegroTransformer3DModel") as refusal:
        video_tokens_of(model_called(name))
    assert NO_VIDEO_TOKENS[name] in str(refusal.value)


@pytest.mark.parametrize("name", NO_LAYOUT)
def test_classes_without_a_layout_say_why(name: str) -> None:
    """The reason concerns the blocks of the class, not the frames."""
    with pytest.raises(UserError, match=f"no layout for {name}: .*Known: AllegroTransformer3DModel") as refusal:
        layout_of(model_called(name))
    assert NO_LAYOUT[name] in str(refusal.value)
    assert name in NO_VIDEO_TOKENS


def test_every_class_has_video_tokens_or_a_reason() -> None:
    without = {name for name, row in registry._layouts.items() if row.video is None}
    assert NO_VIDEO_TOKENS.keys() == without | NO_LAYOUT.keys()
    assert not NO_LAYOUT.keys() & registry._layouts.keys()


def test_a_subclass_has_what_its_parent_has() -> None:
    assert video_tokens_named("Mine", "WanTransformer3DModel") is layout_named("WanTransformer3DModel").video
    with pytest.raises(UserError, match="no video tokens in Mine: its self-attention is linear"):
        video_tokens_named("Mine", "SanaVideoTransformer3DModel")
    with pytest.raises(UserError, match=r"no layout for Mine\. Known: .*register_layout"):
        video_tokens_named("Mine")


def test_a_registered_row_wins_over_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_layouts", dict(registry._layouts))
    wan = layout_of(tiny_model("Wan").transformer)
    for name in ("SanaVideoTransformer3DModel", "Cosmos3OmniTransformer"):
        row = dataclasses.replace(wan, transformer=name)
        register_layout(row)
        assert layout_of(model_called(name)) is row
        assert video_tokens_of(model_called(name)) is wan.video


def test_a_row_of_blocks_alone_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_layouts", dict(registry._layouts))
    row = dataclasses.replace(layout_of(tiny_model("Wan").transformer), transformer="Mine", video=None)
    register_layout(row)
    assert layout_of(model_called("Mine")) is row
    with pytest.raises(UserError, match="no video tokens in Mine: its layout does not describe them"):
        video_tokens_of(model_called("Mine"))


def model_called(name: str) -> torch.nn.Module:
    """Return a module whose class has this name. A real model is not needed, because the registry uses only names."""
    made: torch.nn.Module = type(name, (torch.nn.Module,), {})()
    return made
