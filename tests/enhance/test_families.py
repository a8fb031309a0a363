"""Enhance-A-Video on every family: the checks of the benchmark, and that they notice what they are there to notice."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import postgen
from benchmarks.enhance_families import (
    CHECKS,
    frames_are_where_we_think,
    gains_are_at_least_one,
    layers_are_found,
    passing_families,
)
from postgen.enhance.state import NAME
from postgen.families import Layout, layout_of, register_layout, registry, video_tokens_of
from postgen.families.installed import installed
from postgen.families.video_tokens import grid_btchw
from tests.families.tiny_models import BUILDERS, TinyModel, tiny_model
from tests.families.tiny_parts import COLUMNS, ROWS

pytestmark = pytest.mark.filterwarnings("ignore:Enhance-A-Video")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """More threads than one only wait for each other in models this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_family(name: str, check: Callable[[TinyModel], None]) -> None:
    check(tiny_model(name, batch=2))


def with_references() -> TinyModel:
    """LTX-2 with the tokens of a reference frame behind those of the video, and coordinates for all of them."""
    tiny = tiny_model("LTX-2", batch=2)
    latents = tiny.arguments["hidden_states"]
    tiny.arguments["hidden_states"] = torch.cat([latents, torch.randn_like(latents[:, : ROWS * COLUMNS])], dim=1)
    begin = torch.rand(2, 3, tiny.arguments["hidden_states"].shape[1], 1)
    tiny.arguments["video_coords"] = torch.cat([begin, begin + 1], dim=-1)
    return tiny


@pytest.mark.parametrize("name", [*BUILDERS, "with references"])
@pytest.mark.parametrize("which", [0, -1], ids=["first", "last"])
def test_the_video_is_scaled_and_nothing_else(name: str, which: int) -> None:
    """Tokens of text, history and references leave the attention as they were, those of the video times the gain."""
    tiny = tiny_model(name, batch=2) if name in BUILDERS else with_references()
    video = video_tokens_of(tiny.transformer)
    layer = list(video.attention_modules(tiny.transformer))[which]
    handle = postgen.apply_enhance_a_video(tiny.transformer, postgen.EnhanceAVideoConfig(weight={layer: 8.0}))
    place = layer if video.scale_target == "attention" else f"{layer.rpartition('.')[0]}.{video.scale_target}"
    outputs: list[tuple[torch.Tensor, ...]] = []

    def keep(module: Any, args: Any, output: Any) -> None:
        outputs.append(tuple(x for x in (output if isinstance(output, tuple) else (output,)) if x is not None))

    tiny.transformer.get_submodule(place).register_forward_hook(keep)
    for enabled in (True, False):
        handle.enable() if enabled else handle.disable()
        tiny()
    (scaled, *others), (plain, *others_before) = outputs
    gain = torch.tensor(handle.stats()[layer])
    assert min(gain) > 1.5
    if video.factorised:
        gain = gain.repeat_interleave(len(plain) // len(gain))
    tokens = tiny.frames if video.factorised else tiny.frames * ROWS * COLUMNS
    more = {"HunyuanVideo Framepack", "Helios", "with references"}
    assert (plain.shape[1] > tokens) == (name in more)
    first = plain.shape[1] - tokens if video.token_order.startswith("history") else 0
    wanted = plain.clone()
    wanted[:, first : first + tokens] *= gain.view(-1, 1, 1)
    torch.testing.assert_close(scaled, wanted, atol=1e-5, rtol=1e-4)
    assert all(torch.equal(*pair) for pair in zip(others, others_before, strict=True))


def test_a_frame_that_cannot_see_a_later_block_is_not_measured_against_it() -> None:
    """Block-causal attention, two frames a block: the gain from queries and keys by the formula with that mask."""
    tiny = tiny_model("SkyReels-V2 block-causal")
    handle = postgen.apply_enhance_a_video(tiny.transformer, postgen.EnhanceAVideoConfig(weight=3.0))
    enhancement: Any = installed(tiny.transformer).plug_ins[NAME]
    locate, seen = enhancement.call.locate, []

    def look(*arguments: Any) -> Any:
        seen.append(locate(*arguments))
        return seen[-1]

    enhancement.call.locate = look
    tiny()
    (query, key), *_ = seen  # (B, T, S, heads, D)
    logits = torch.einsum("btshd,bushd->bshtu", query, key) * query.shape[-1] ** -0.5
    block = torch.arange(tiny.frames) // 2
    hidden = block[None] > block[:, None]
    assert hidden.any()
    shares = [
        x.softmax(-1).diagonal(dim1=-2, dim2=-1).mean() for x in (logits.masked_fill(hidden, -torch.inf), logits)
    ]
    wanted, without = ((tiny.frames + 3.0) / (tiny.frames - 1) * (1 - share) for share in shares)
    assert abs(wanted - without) > 0.05
    assert next(iter(handle.stats().values())) == pytest.approx([float(wanted)], abs=1e-5)


WRONG: list[tuple[str, dict[str, Any], Callable[[TinyModel], None]]] = [
    ("CogVideoX 1.0", {"token_order": "video-text"}, frames_are_where_we_think),
    ("HunyuanVideo", {"token_order": "text-video"}, frames_are_where_we_think),
    ("HunyuanVideo", {"self_attention": r"transformer_blocks\.\d+\.attn"}, layers_are_found),
    ("HunyuanVideo Framepack", {"token_order": "video-text"}, frames_are_where_we_think),
    ("Helios", {"token_order": "video-reference"}, frames_are_where_we_think),
    ("LTX-2", {"self_attention": r"transformer_blocks\.\d+\.audio_attn1"}, layers_are_found),
    ("Latte", {"self_attention": r"transformer_blocks\.\d+\.attn1"}, layers_are_found),
    ("Mochi", {"scale_target": "attention"}, gains_are_at_least_one),
    ("Wan", {"self_attention": r"blocks\.\d+\.attn2"}, layers_are_found),
    ("Wan", {"grid_rule": grid_btchw}, layers_are_found),
]
"""A tiny model, what is changed in its row, the check that must fail."""


def with_video(row: Layout, **changes: Any) -> Layout:
    assert row.video is not None
    return dataclasses.replace(row, video=dataclasses.replace(row.video, **changes))


@pytest.mark.parametrize(("name", "wrong", "check"), WRONG)
def test_a_wrong_row_is_noticed(
    name: str, wrong: dict[str, Any], check: Callable[[TinyModel], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "_layouts", dict(registry._layouts))
    tiny = tiny_model(name, batch=2)
    register_layout(with_video(layout_of(tiny.transformer), **wrong))
    with pytest.raises(AssertionError):
        check(tiny)


def test_passing_families_counts_classes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Several models of one class count once, and one that fails fails the class."""
    wan = [name for name in BUILDERS if name.startswith("Wan ") or name == "Wan"]
    few = {name: BUILDERS[name] for name in (*wan, "Mochi")}
    monkeypatch.setattr("benchmarks.enhance_families.BUILDERS", few)
    assert passing_families() == {"WanTransformer3DModel": True, "MochiTransformer3DModel": True}
    row = with_video(layout_of(tiny_model("Mochi").transformer), scale_target="attention")
    monkeypatch.setattr(registry, "_layouts", {**registry._layouts, row.transformer: row})
    assert passing_families() == {"WanTransformer3DModel": True, "MochiTransformer3DModel": False}
    assert "Mochi: gains_are_at_least_one: nothing changes" in capsys.readouterr().out
