"""Applying, switching, changing and removing; and what happens where it cannot act."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import postgen
from postgen.enhance import OTHERS, RECOMMENDED, handle_of, recommended_weight
from postgen.families import Grid, video_tokens_of
from tests.families.tiny_models import TinyModel, tiny_model

CONFIG = postgen.EnhanceAVideoConfig(relative_weight=0.4)


@pytest.fixture
def wan() -> TinyModel:
    return tiny_model("Wan", batch=2)


def test_comes_off_to_the_bit(wan: TinyModel) -> None:
    off = wan()
    processors = [block.attn1.processor for block in wan.transformer.blocks]
    keys = list(wan.transformer.state_dict())
    handle = postgen.apply_enhance_a_video(wan.transformer, CONFIG)
    on = wan()
    assert not torch.equal(on, off)
    assert list(wan.transformer.state_dict()) == keys
    handle.disable()
    assert torch.equal(wan(), off)
    handle.enable()
    assert torch.equal(wan(), on)
    postgen.remove_enhance_a_video(wan.transformer)
    assert torch.equal(wan(), off)
    assert all(block.attn1.processor is p for block, p in zip(wan.transformer.blocks, processors, strict=True))
    assert not wan.transformer._forward_pre_hooks
    assert not wan.transformer._forward_hooks


def test_says_what_it_did(wan: TinyModel) -> None:
    handle = postgen.apply_enhance_a_video(wan.transformer)
    assert handle.stats() == {}
    wan()
    assert list(handle.stats()) == ["blocks.0.attn1", "blocks.1.attn1"]
    assert all(len(gains) == 2 and min(gains) >= 1 for gains in handle.stats().values())
    text = str(postgen.summary(wan.transformer))
    assert "WanTransformer3DModel" in text
    assert "on, weight 0.0952 x latent frames, 2 of 2 layers, last gains 1." in text
    assert "diffusers < enhance_a_video" in text
    handle.remove()
    assert "nothing is on" in str(postgen.summary(wan.transformer))


def test_twice_raises(wan: TinyModel) -> None:
    postgen.apply_enhance_a_video(wan.transformer, CONFIG)
    with pytest.raises(postgen.UserError, match="on this transformer already: update or remove it"):
        postgen.apply_enhance_a_video(wan.transformer, CONFIG)
    postgen.remove_enhance_a_video(wan.transformer)
    with pytest.raises(postgen.UserError, match="not on this WanTransformer3DModel"):
        postgen.remove_enhance_a_video(wan.transformer)


def test_a_removed_handle_is_of_no_use(wan: TinyModel) -> None:
    handle = postgen.apply_enhance_a_video(wan.transformer, CONFIG)
    handle.remove()
    for call in (handle.enable, handle.disable, handle.update, handle.remove):
        with pytest.raises(postgen.UserError, match="was removed"):
            call()


def test_an_unknown_model() -> None:
    with pytest.raises(postgen.UserError, match=r"no layout for Linear\. Known: .*WanTransformer3DModel"):
        postgen.apply_enhance_a_video(nn.Linear(2, 2))
    with pytest.raises(postgen.UserError, match="str has no transformer"):
        postgen.apply_enhance_a_video("a path")


def test_one_frame_is_left_alone() -> None:
    tiny = tiny_model("Wan", frames=1)
    off = tiny()
    handle = postgen.apply_enhance_a_video(tiny.transformer, CONFIG)
    assert torch.equal(tiny(), off)
    assert handle.stats() == {}
    longer = tiny_model("Wan", frames=3).arguments
    handle.update(min_frames=4)
    assert handle.stats() == {}
    tiny(**longer)
    assert handle.stats() == {}
    handle.update(min_frames=3)
    tiny(**longer)
    assert len(handle.stats()) == 2


def test_a_gain_of_one_is_no_change(wan: TinyModel) -> None:
    off = wan()
    handle = postgen.apply_enhance_a_video(wan.transformer, postgen.EnhanceAVideoConfig(weight=-100.0))
    assert torch.equal(wan(), off)
    assert all(gain == 1 for gains in handle.stats().values() for gain in gains)


def test_the_gain_is_bounded(wan: TinyModel) -> None:
    handle = postgen.apply_enhance_a_video(wan.transformer, postgen.EnhanceAVideoConfig(weight=50.0, max_gain=1.25))
    wan()
    assert all(gain == 1.25 for gains in handle.stats().values() for gain in gains)


def test_a_strong_weight_is_warned_of_once(wan: TinyModel) -> None:
    postgen.apply_enhance_a_video(wan.transformer, postgen.EnhanceAVideoConfig(weight=4.0))
    with pytest.warns(UserWarning, match="weight 4 is strong for 4 latent frames"):
        wan()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wan()


def test_tokens_that_do_not_match_switch_it_off() -> None:
    """Tokens that a pipeline puts before the video, as LTX does with a condition."""
    tiny = tiny_model("LTX")
    x = tiny.arguments["hidden_states"]
    coordinates = torch.rand(1, 3, x.shape[1] + 6)
    extended = {"hidden_states": torch.cat([x[:, :6], x], dim=1), "video_coords": coordinates}
    off = tiny(**extended)
    postgen.apply_enhance_a_video(tiny.transformer, CONFIG)
    with pytest.warns(UserWarning, match="tokens do not match 4 frames of 6 tokens"):
        assert torch.equal(tiny(**extended), off)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(tiny(**extended), off)


def test_a_changed_processor_is_noticed(wan: TinyModel) -> None:
    from diffusers.models.transformers.transformer_wan import WanAttnProcessor

    off = wan()
    postgen.apply_enhance_a_video(wan.transformer, CONFIG)
    foreign = WanAttnProcessor()
    wan.transformer.blocks[0].attn1.set_processor(foreign)
    with pytest.warns(UserWarning, match="processors of 1 of 2 layers were replaced"):
        wan()
    postgen.remove_enhance_a_video(wan.transformer)
    assert wan.transformer.blocks[0].attn1.processor is foreign
    assert torch.equal(wan(), off)


def test_a_processor_that_hides_its_attention_is_noticed(wan: TinyModel) -> None:
    class Silent:
        def __call__(self, attention: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            return hidden_states

    for block in wan.transformer.blocks:
        block.attn1.set_processor(Silent())
    off = wan()
    postgen.apply_enhance_a_video(wan.transformer, CONFIG)
    with pytest.warns(UserWarning, match="no attention call was seen"):
        assert torch.equal(wan(), off)


def test_frames_that_the_call_does_not_tell() -> None:
    tiny = tiny_model("LTX")
    handle = postgen.apply_enhance_a_video(tiny.transformer, CONFIG)
    expected = tiny()
    untold = {"num_frames": None, "height": None, "width": None, "video_coords": torch.rand(1, 3, 24)}
    with pytest.warns(UserWarning, match="the call does not contain the number of frames"):
        tiny(**untold)
    for num_frames in (4, lambda arguments: 4, lambda arguments: Grid(frames=4, height=2, width=3)):
        handle.update(num_frames=num_frames)
        assert torch.equal(tiny(), expected)
        handle._parts[""][1].layers["transformer_blocks.0.attn1"].gain = None
        tiny(**untold)
        assert len(handle.stats()) == 2


def test_frames_that_do_not_divide_the_tokens() -> None:
    tiny = tiny_model("Wan")
    postgen.apply_enhance_a_video(tiny.transformer, postgen.EnhanceAVideoConfig(num_frames=5))
    with pytest.raises(postgen.UserError, match="num_frames=5 does not divide the 24 video tokens"):
        tiny()


def test_weights_by_layer(wan: TinyModel) -> None:
    handle = postgen.apply_enhance_a_video(
        wan.transformer, postgen.EnhanceAVideoConfig(weight={r"blocks\.1\..*": 1.5})
    )
    wan()
    assert list(handle.stats()) == ["blocks.1.attn1"]
    assert "1 of 2 layers" in str(postgen.summary(wan.transformer))
    before = handle.config
    with pytest.raises(postgen.UserError, match=r"no layer matches 'layers.*'. Layers of this model: blocks.0.attn1"):
        handle.update(weight={r"layers.*": 1.0})
    assert handle.config is before


def test_a_few_locations_are_measured(wan: TinyModel) -> None:
    handle = postgen.apply_enhance_a_video(wan.transformer, CONFIG)
    wan()
    every = handle.stats()
    handle.update(max_locations=2)
    wan()
    assert handle.stats() != every
    handle.update(max_locations=6, chunk_size=1)
    wan()
    for layer, gains in handle.stats().items():
        assert gains == pytest.approx(every[layer], abs=1e-6)


def test_training_is_left_alone_unless_asked(wan: TinyModel) -> None:
    wan.transformer.train()
    off = wan()
    handle = postgen.apply_enhance_a_video(wan.transformer, CONFIG)
    with pytest.warns(UserWarning, match="no gain is applied in training mode"):
        assert torch.equal(wan(), off)
    handle.update(train=True)
    assert not torch.equal(wan(), off)


def test_gradients_pass_with_checkpointing_too(wan: TinyModel) -> None:
    postgen.apply_enhance_a_video(wan.transformer, dataclasses.replace(CONFIG, train=True))
    found = []
    for checkpointing in (False, True):
        wan.transformer.train()
        wan.transformer.zero_grad()
        if checkpointing:
            wan.transformer.enable_gradient_checkpointing()
        output = wan.transformer(**wan.arguments, return_dict=False)[0]
        output.square().sum().backward()
        found.append(wan.transformer.blocks[0].attn1.to_q.weight.grad.clone())
    assert found[0].abs().max() > 0
    assert torch.allclose(found[0], found[1])


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_has_its_own(wan: TinyModel, duplicate: Any) -> None:
    off = wan()
    handle = postgen.apply_enhance_a_video(wan.transformer, CONFIG)
    on = wan()
    twin = dataclasses.replace(wan, transformer=duplicate(wan.transformer))
    assert torch.equal(twin(), on)
    handle.remove()
    assert torch.equal(twin(), on)
    postgen.remove_enhance_a_video(twin.transformer)
    assert torch.equal(twin(), off)
    assert handle_of(twin.transformer) is None


def test_a_compiled_or_adapted_model_is_seen_through(wan: TinyModel) -> None:
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(wan.transformer, LoraConfig(target_modules=["to_q"]))
    postgen.apply_enhance_a_video(torch.compile(wrapped, backend="eager"), CONFIG)
    wrapped(**wan.arguments)
    assert handle_of(wan.transformer) is not None
    assert len(handle_of(wan.transformer).stats()) == 2  # type: ignore[union-attr]


def test_recommended_weights_keep_their_strength() -> None:
    for name, row in RECOMMENDED.items():
        assert recommended_weight(name) is row
        assert 0.05 <= row.relative_weight <= 0.3
        assert row.source
    assert recommended_weight("Another") is OTHERS
    for frames in (3, 5):
        tiny = tiny_model("Wan", frames=frames)
        handle = postgen.apply_enhance_a_video(tiny.transformer)
        by_auto = tiny()
        handle.update(weight=2.0 * frames / 21)
        assert torch.allclose(tiny(), by_auto, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": "strong"}, "finite number, auto"),
        ({"weight": float("nan")}, "finite number, auto"),
        ({"weight": {}}, "weight is an empty mapping"),
        ({"weight": {"a": "auto"}}, "finite number, auto"),
        ({"weight": 1.0, "relative_weight": 0.1}, "one of them"),
        ({"relative_weight": float("inf")}, "finite"),
        ({"start": 0.5, "stop": 0.5}, "start < stop"),
        ({"stop": 1.5}, "start < stop"),
        ({"reduction": "mean"}, "Known: sample, batch"),
        ({"max_gain": 1.0}, "above 1"),
        ({"min_frames": 1}, "at least 2"),
        ({"chunk_size": 0}, "at least 1"),
        ({"max_locations": 2.5}, "whole number"),
        ({"num_frames": 0}, "at least 1"),
        ({"progress": 0.5}, "function"),
    ],
)
def test_settings_that_are_wrong(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(postgen.UserError, match=message):
        postgen.EnhanceAVideoConfig(**settings)


def test_updates_that_are_wrong(wan: TinyModel) -> None:
    handle = postgen.apply_enhance_a_video(wan.transformer, CONFIG)
    with pytest.raises(postgen.UserError, match="unknown settings strength"):
        handle.update(strength=1.0)
    with pytest.raises(postgen.UserError, match="give a pipeline, or a function as progress="):
        handle.update(start=0.5)
    assert handle.config is CONFIG
    handle.update(start=0.5, progress=lambda: 0.25)
    off = wan()
    handle.update(progress=lambda: 0.75)
    assert not torch.equal(wan(), off)
    handle.update(weight=1.0)
    assert (handle.config.weight, handle.config.relative_weight) == (1.0, None)
    handle.update(relative_weight=0.1)
    assert (handle.config.weight, handle.config.relative_weight) == ("auto", 0.1)


def test_a_frame_that_attends_to_itself_alone_has_gain_one(wan: TinyModel) -> None:
    """Keys and queries that a wrapper makes the same in a frame, and orthogonal between frames."""
    handle = postgen.apply_enhance_a_video(wan.transformer, CONFIG)
    own = torch.eye(4, 16).repeat_interleave(6, dim=0)[None, :, None].expand(2, -1, 2, -1) * 100
    for name in video_tokens_of(wan.transformer).attention_modules(wan.transformer):
        attention: Any = wan.transformer.get_submodule(name)
        attention.norm_q = Replace(own)
        attention.norm_k = Replace(own)
    wan.transformer.rope.forward = lambda hidden_states: None  # type: ignore[method-assign,assignment]
    wan()
    assert all(gain == 1 for gains in handle.stats().values() for gain in gains)


class Replace(nn.Module):
    def __init__(self, tokens: torch.Tensor) -> None:
        super().__init__()
        self.tokens = tokens.flatten(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.tokens


def test_the_page_says_what_is_recommended() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "enhance_a_video.md").read_text(encoding="utf-8")
    rows = {f"`{name}`": row for name, row in RECOMMENDED.items()} | {"others": OTHERS}
    for name, row in rows.items():
        assert f"| {name} | {row.weight:g} | {row.frames} | {row.source} |" in page
    for field in postgen.EnhanceAVideoConfig.__dataclass_fields__:
        assert f"`{field}`" in page
