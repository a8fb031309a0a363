"""Applying, switching, changing and removing fused operations, and refusals."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import postgen
from postgen.families.installed import installed
from postgen.fused import fused_for_call
from postgen.fused.blocks import is_fused
from postgen.fused.known import FusedBlock, fused_blocks_of
from postgen.kernels.dispatch import TOLD
from tests.families.tiny_models import TinyModel, tiny_model
from tests.fused.counted import count_operations


@pytest.fixture(scope="module")
def shared() -> TinyModel:
    return tiny_model("Wan")


@pytest.fixture
def wan(shared: TinyModel) -> Iterator[TinyModel]:
    yield shared
    if "fused_ops" in installed(shared.transformer).plug_ins:
        postgen.remove_fused_ops(shared.transformer)


def runs(tiny: TinyModel) -> set[str]:
    with count_operations() as run:
        tiny()
    return set(run.counts)


EVERYTHING = {"qk_norm_rope", "norm_modulate", "gate_residual_norm_modulate", "gate_residual", "attention"}


def test_switched_and_changed(wan: TinyModel) -> None:
    stock = wan()
    handle = postgen.apply_fused_ops(wan.transformer)
    assert runs(wan) == EVERYTHING
    assert handle.enabled
    handle.disable()
    assert runs(wan) == set()
    assert torch.equal(wan(), stock)
    handle.update(adaln=False)
    assert not handle.enabled
    assert runs(wan) == set()
    handle.enable()
    handle.enable()
    assert runs(wan) == {"qk_norm_rope", "attention"}
    handle.update(postgen.FusedOpsConfig(norm_rope=False, attention=None))
    assert runs(wan) == EVERYTHING - {"qk_norm_rope", "attention"}
    assert handle.config == postgen.FusedOpsConfig(norm_rope=False, attention=None)
    handle.remove()
    assert torch.equal(wan(), stock)
    with pytest.raises(postgen.UserError, match="were removed: apply them again"):
        handle.disable()


def test_says_what_is_on(wan: TinyModel) -> None:
    handle = postgen.apply_fused_ops(wan.transformer)
    text = str(postgen.summary(wan.transformer))
    assert "fused_ops: on, norm_rope in 2 layers, adaln in 2 blocks, attention auto in 2 layers" in text
    assert "diffusers < fused_ops" in text
    handle.update(norm_rope=False, attention=None)
    handle.disable()
    assert "fused_ops: off, adaln in 2 blocks" in str(postgen.summary(wan.transformer))


def test_says_which_kernel_computed_attention(wan: TinyModel) -> None:
    def line() -> str:
        return postgen.summary(wan.transformer).transformers[0].plug_ins["fused_ops"]

    handle = postgen.apply_fused_ops(wan.transformer)
    assert line().endswith("attention auto in 2 layers")
    wan()
    assert line().endswith("attention auto in 2 layers (last call: sdpa)")
    handle.disable()
    assert line().endswith("attention auto in 2 layers")
    handle.enable()
    handle.update(attention="cudnn")
    assert line().endswith("attention cudnn in 2 layers")
    TOLD.clear()
    with pytest.warns(UserWarning, match="attention runs on sdpa, not on cudnn: needs a CUDA GPU"):
        wan()
    assert line().endswith("attention cudnn in 2 layers (last call: sdpa)")
    handle.remove()


def test_whole_pipelines(tiny_wan: Path) -> None:
    from diffusers import WanPipeline

    pipe = WanPipeline.from_pretrained(tiny_wan)
    pipe.set_progress_bar_config(disable=True)
    call: dict[str, Any] = {"height": 32, "width": 32, "num_frames": 9, "num_inference_steps": 2, "output_type": "pt"}

    def clip() -> torch.Tensor:
        frames: torch.Tensor = pipe("a ball", generator=torch.Generator().manual_seed(0), **call).frames
        return frames

    stock = clip()
    with fused_for_call(pipe, True):
        assert postgen.summary(pipe).transformers[0].plug_ins
        assert (clip() - stock).abs().max() < 1e-4
    assert not postgen.summary(pipe).transformers[0].plug_ins
    assert postgen.apply_fused_ops(pipe).stats() == {"transformer": {"norm_rope": 2, "adaln": 2, "attention": 2}}


def test_for_a_call_only(wan: TinyModel) -> None:
    for before in (None, postgen.FusedOpsConfig(adaln=False)):
        handle = before and postgen.apply_fused_ops(wan.transformer, before)
        usual = runs(wan)
        for setting, expected in ((None, usual), (False, set()), (True, EVERYTHING)):
            with fused_for_call(wan.transformer, setting):
                assert runs(wan) == expected
            assert runs(wan) == usual
        if handle:
            handle.disable()
            with fused_for_call(wan.transformer, True):
                assert runs(wan) == EVERYTHING
            assert not handle.enabled
            assert handle.config == before


def test_copies_have_their_own(wan: TinyModel) -> None:
    stock = wan()
    postgen.apply_fused_ops(wan.transformer)
    fused = wan()
    for copied in (copy.deepcopy(wan.transformer), pickle.loads(pickle.dumps(wan.transformer))):
        twin = dataclasses.replace(wan, transformer=copied)
        assert runs(twin) == EVERYTHING
        assert torch.equal(twin(), fused)
        postgen.remove_fused_ops(copied)
        assert not any(map(is_fused, copied.blocks))
        assert torch.equal(twin(), stock)
    assert runs(wan) == EVERYTHING


def test_a_saved_model_knows_nothing_of_it(wan: TinyModel, tmp_path: Path) -> None:
    from diffusers import WanTransformer3DModel

    expected = wan()
    postgen.apply_fused_ops(wan.transformer)
    wan.transformer.save_pretrained(tmp_path)
    assert "fused" not in (tmp_path / "config.json").read_text()
    loaded = dataclasses.replace(wan, transformer=WanTransformer3DModel.from_pretrained(tmp_path))
    assert torch.equal(loaded(), expected)


def test_twice_is_refused(wan: TinyModel) -> None:
    with pytest.raises(postgen.UserError, match="there are no fused operations on this WanTransformer3DModel"):
        postgen.remove_fused_ops(wan.transformer)
    postgen.apply_fused_ops(wan.transformer)
    with pytest.raises(postgen.UserError, match="are on this transformer already"):
        postgen.apply_fused_ops(wan.transformer)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"norm_rope": 1}, "norm_rope must be True or False, got 1"),
        ({"attention": "fastest"}, "unknown attention backend 'fastest'. Known: auto, "),
        ({"norm_rope": False, "adaln": False, "attention": None}, "the settings fuse nothing"),
    ],
)
def test_settings_that_are_wrong(settings: dict[str, Any], message: str, wan: TinyModel) -> None:
    with pytest.raises(postgen.UserError, match=message):
        postgen.FusedOpsConfig(**settings)
    handle = postgen.apply_fused_ops(wan.transformer)
    with pytest.raises(postgen.UserError, match=message):
        handle.update(**settings)
    with pytest.raises(postgen.UserError, match=r"unknown settings speed\. Known: norm_rope, adaln, attention"):
        handle.update(speed=2)
    assert runs(wan) == EVERYTHING


def test_unknown_transformers_are_refused() -> None:
    tiny = tiny_model("Mochi")
    with pytest.raises(postgen.UserError, match=r"no fused operations for MochiTransformer3DModel\. Known: CogVideoX"):
        postgen.apply_fused_ops(tiny.transformer)


def test_unknown_processors_and_blocks_are_refused(wan: TinyModel) -> None:
    from diffusers.models.attention_processor import AttnProcessor2_0

    transformer = copy.deepcopy(wan.transformer)
    transformer.blocks[1].attn1.processor = AttnProcessor2_0()
    with pytest.raises(postgen.UserError, match=r"no fused form of AttnProcessor2_0.*norm_rope=False, attention=None"):
        postgen.apply_fused_ops(transformer)
    transformer = copy.deepcopy(wan.transformer)
    block: Any = transformer.blocks[1]
    block.__class__ = type("MyBlock", (type(block),), {})
    with pytest.raises(postgen.UserError, match=r"no fused form of MyBlock\. Known: WanTransformerBlock.*adaln=False"):
        postgen.apply_fused_ops(transformer)
    assert not is_fused(transformer.blocks[0])
    postgen.apply_fused_ops(transformer, postgen.FusedOpsConfig(adaln=False))


def test_code_that_changed_is_refused(wan: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    known: Any = fused_blocks_of(wan.transformer)
    older = FusedBlock(forward=known["WanTransformerBlock"].forward, fingerprints=("0" * 16,))
    monkeypatch.setitem(known, "WanTransformerBlock", older)
    with pytest.raises(postgen.UserError, match=r"is not the one of diffusers 0\.42 .*adaln=False"):
        postgen.apply_fused_ops(wan.transformer)
    assert installed(wan.transformer).plug_ins == {}


def test_a_forward_that_cannot_be_looked_through_is_refused(wan: TinyModel) -> None:
    transformer = copy.deepcopy(wan.transformer)
    block: Any = transformer.blocks[1]
    stock = block.forward
    block.forward = lambda *args, **kwargs: stock(*args, **kwargs)
    with pytest.raises(postgen.UserError, match="the forward of a WanTransformerBlock was replaced"):
        postgen.apply_fused_ops(transformer)
    assert not any(map(is_fused, transformer.blocks))
    assert installed(transformer).plug_ins == {}


def replace_forward(block: Any) -> None:
    stock = block.forward
    block.forward = lambda *args, **kwargs: stock(*args, **kwargs)


def test_all_transformers_of_a_pipeline_or_none(wan: TinyModel) -> None:
    first, second = copy.deepcopy(wan.transformer), copy.deepcopy(wan.transformer)
    replace_forward(second.blocks[1])
    pipe = SimpleNamespace(components={"transformer": first, "transformer_2": second})
    with pytest.raises(postgen.UserError, match="the forward of a WanTransformerBlock was replaced"):
        postgen.apply_fused_ops(pipe)
    assert installed(first).plug_ins == {}
    assert not any(map(is_fused, first.blocks))


def test_what_fails_changes_nothing(wan: TinyModel) -> None:
    twin = dataclasses.replace(wan, transformer=copy.deepcopy(wan.transformer))
    config = postgen.FusedOpsConfig(adaln=False)
    handle = postgen.apply_fused_ops(twin.transformer, config)
    replace_forward(twin.transformer.blocks[0])
    for enabled in (True, False):
        with pytest.raises(postgen.UserError, match="was replaced"):
            handle.update(adaln=True)
        with pytest.raises(postgen.UserError, match="was replaced"), fused_for_call(twin.transformer, True):
            pass
        assert (handle.config, handle.enabled) == (config, enabled)
        assert runs(twin) == ({"qk_norm_rope", "attention"} if enabled else set())
        handle.disable()


def test_a_forward_that_is_replaced_later_is_told_of(wan: TinyModel) -> None:
    twin = dataclasses.replace(wan, transformer=copy.deepcopy(wan.transformer))
    handle = postgen.apply_fused_ops(twin.transformer)
    replace_forward(twin.transformer.blocks[0])
    with pytest.warns(UserWarning, match=r"still call the fused forward: delete block\.forward"):
        handle.disable()
    with pytest.raises(postgen.UserError, match="was replaced"):
        handle.enable()
    assert not is_fused(twin.transformer.blocks[1])
    del twin.transformer.blocks[0].forward
    assert torch.equal(twin(), wan())
    handle.enable()
    assert runs(twin) == EVERYTHING


def test_a_handle_knows_that_they_were_removed(wan: TinyModel) -> None:
    stock = wan()
    stale = postgen.apply_fused_ops(wan.transformer)
    postgen.remove_fused_ops(wan.transformer)
    assert stale.stats() == {}
    for _ in range(2):
        for act in (
            stale.enable,
            stale.disable,
            stale.remove,
            lambda: stale.update(adaln=False),
            lambda: stale.config,
        ):
            with pytest.raises(postgen.UserError, match="were removed: apply them again"):
                act()
        # In the second pass other fused operations are applied, which the removed handle must not affect.
        if not installed(wan.transformer).plug_ins:
            assert torch.equal(wan(), stock)
            handle = postgen.apply_fused_ops(wan.transformer)
    assert runs(wan) == EVERYTHING
    handle.remove()
    assert torch.equal(wan(), stock)


def test_blocks_that_were_wrapped_come_back(wan: TinyModel) -> None:
    twin = dataclasses.replace(wan, transformer=copy.deepcopy(wan.transformer))
    handle = postgen.apply_fused_ops(twin.transformer)
    block = twin.transformer.blocks[0]
    twin.transformer.blocks[0] = checkpoint_wrapper(block)
    assert runs(twin) == EVERYTHING
    handle.disable()
    assert runs(twin) == set()
    assert torch.equal(twin(), wan())
    with pytest.raises(postgen.UserError, match="no fused form of CheckpointWrapper"):
        handle.enable()
    twin.transformer.blocks[0] = block
    handle.enable()
    assert runs(twin) == EVERYTHING


def test_layers_may_be_dropped_meanwhile(wan: TinyModel) -> None:
    twin = dataclasses.replace(wan, transformer=copy.deepcopy(wan.transformer))
    handle = postgen.apply_fused_ops(twin.transformer)
    del twin.transformer.blocks[1]
    fused = twin()
    handle.disable()
    shorter = twin()
    assert torch.allclose(fused, shorter, atol=1e-5)
    handle.enable()
    assert handle.stats() == {"": {"norm_rope": 1, "adaln": 1, "attention": 1}}
    assert torch.equal(twin(), fused)
    handle.remove()
    assert torch.equal(twin(), shorter)


def test_a_class_that_a_block_was_given_since_is_not_taken_away(wan: TinyModel) -> None:
    twin = dataclasses.replace(wan, transformer=copy.deepcopy(wan.transformer))
    handle = postgen.apply_fused_ops(twin.transformer)
    block: Any = twin.transformer.blocks[1]
    before = type(block)
    block.__class__ = type("FSDPWanTransformerBlock", (before,), {})
    with pytest.raises(postgen.UserError, match="was changed to FSDPWanTransformerBlock"):
        handle.remove()
    assert handle.enabled
    assert runs(twin) == EVERYTHING
    block.__class__ = before
    handle.remove()
    assert torch.equal(twin(), wan())
