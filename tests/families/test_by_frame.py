"""Modulation by frame: blocks have the frames in their batch, results have the bits of a stock call, no hook stays."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from postgen import EnhanceAVideoConfig, FusedOpsConfig, apply_enhance_a_video, apply_fused_ops
from postgen.families import denoiser_for
from postgen.families.by_frame import modulated_by_frame
from tests.families.test_frame_levels import FRAMES, MAKERS

FOLDED = (2 * FRAMES, 6)
"""Rows in the batch of a block, and tokens of each row: 2 clips of 4 x 6 latent pixels in patches of 2 x 2."""


def call_of(pipe: Any, level: int = 2) -> dict[str, Any]:
    """Return the arguments of a call with a timestep for each frame (`level` 2) or for each clip (`level` 1)."""
    generator = torch.Generator().manual_seed(0)
    times = torch.rand(2, FRAMES, generator=generator) * 1000
    call: dict[str, Any] = {
        "hidden_states": torch.randn(2, 4, FRAMES, 4, 6, generator=generator),
        "encoder_hidden_states": torch.randn(2, 8, pipe.transformer.config.text_dim, generator=generator),
        "return_dict": False,
    }
    if level == 1:
        return {**call, "timestep": times[:, 0]}
    if type(pipe).__name__ == "SkyReelsV2Pipeline":
        return {**call, "timestep": times, "enable_diffusion_forcing": True}
    return {**call, "timestep": times.repeat_interleave(6, 1)}


def shapes(model: nn.Module, name: str, call: dict[str, Any], frames: int = FRAMES) -> tuple[Tensor, set[Any]]:
    """Return the output of a call by frame, and the (rows, tokens) of the inputs of one module."""
    seen = set()
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.add((*args[0].shape[:2],)))
    with modulated_by_frame(model, frames):
        out = model(**call)[0]
    hook.remove()
    return out, seen


@pytest.mark.parametrize("family", ["Wan", "SkyReels-V2"])
@torch.no_grad()
def test_by_frame_has_the_bits_of_a_call_by_token(family: str) -> None:
    pipe = MAKERS[family]()
    model, call = pipe.transformer, call_of(pipe)
    expected = model(**call)[0]
    hooks = [(len(each._forward_hooks), len(each._forward_pre_hooks)) for each in model.modules()]
    for name, seen in {"blocks.0.ffn": FOLDED, "blocks.0": (2, 24), "blocks.0.attn1": (2, 24)}.items():
        out, found = shapes(model, name, call)
        assert torch.equal(out, expected), name
        assert found == {seen}, name
    one = call_of(pipe, level=1)
    out, found = shapes(model, "blocks.0.ffn", one)
    assert torch.equal(out, model(**one)[0])
    assert found == {(2, 24)}
    with pytest.raises(RuntimeError), modulated_by_frame(model, FRAMES):
        model(**{**call, "encoder_hidden_states": call["encoder_hidden_states"][..., 1:]})
    assert hooks == [(len(each._forward_hooks), len(each._forward_pre_hooks)) for each in model.modules()]


@torch.no_grad()
def test_ltx_by_frame_is_a_call_by_token() -> None:
    """The tokens of LTX are packed, and its blocks and their self-attention are called with keyword arguments.

    The bits are the same on most CPUs. Some CPUs sum a matrix product of fewer rows in another order; the results then
    differ by float32 rounding.
    """
    pipe = MAKERS["LTX"]()
    model, config, source = pipe.transformer, pipe.transformer.config, torch.Generator().manual_seed(0)
    times = torch.rand(2, FRAMES, generator=source) * 1000
    call: dict[str, Any] = {
        "hidden_states": torch.randn(2, FRAMES * 6, config.in_channels, generator=source),
        "encoder_hidden_states": torch.randn(2, 8, config.caption_channels, generator=source),
        "encoder_attention_mask": torch.tensor([[1] * 8, [1] * 5 + [0] * 3]),
        "timestep": times.repeat_interleave(6, 1),
        **{"num_frames": FRAMES, "height": 2, "width": 3, "return_dict": False},
    }
    expected, seen = model(**call)[0], {}

    def note(module: nn.Module, args: Any, words: dict[str, Any]) -> None:
        seen[names[module]] = tuple((args[0] if args else words["hidden_states"]).shape[:2])

    block = model.transformer_blocks[0]
    names = {block: "block", block.attn1: "attn1", block.attn2: "attn2", block.ff: "ff"}
    hooks = [module.register_forward_pre_hook(note, with_kwargs=True) for module in names]
    with modulated_by_frame(model, FRAMES):
        torch.testing.assert_close(model(**call)[0], expected, rtol=1e-5, atol=1e-6)
    assert seen == {"block": (2, 6 * FRAMES), "attn1": (2, 6 * FRAMES), "attn2": (2, 6 * FRAMES), "ff": FOLDED}
    one = {**call, "timestep": times[:, :1]}
    with modulated_by_frame(model, FRAMES):
        found = model(**one)[0]
    assert seen["ff"] == (2, 6 * FRAMES)
    torch.testing.assert_close(found, model(**one)[0], rtol=1e-5, atol=1e-6)
    for hook in hooks:
        hook.remove()
    assert not any(each._forward_hooks or each._forward_pre_hooks for each in model.modules())
    # `predict` of the denoiser modulates by frame too.
    denoiser, widths = denoiser_for(pipe), []
    condition = denoiser.encode_prompt(["a", "b"], guidance=False)
    x = torch.randn(2, config.in_channels, FRAMES, 2, 3, generator=source)
    hook = block.ff.register_forward_pre_hook(lambda _, args: widths.append(tuple(args[0].shape[:2])))
    denoiser.predict(x, times / 1000, condition)
    hook.remove()
    assert widths == [FOLDED]


@torch.no_grad()
def test_by_frame_goes_with_plug_ins() -> None:
    pipe = MAKERS["Wan"]()
    apply_fused_ops(pipe, FusedOpsConfig(attention=None))
    apply_enhance_a_video(pipe, EnhanceAVideoConfig(weight=4.0))
    expected = pipe.transformer(**call_of(pipe))[0]
    out, found = shapes(pipe.transformer, "blocks.0.ffn", call_of(pipe))
    assert torch.equal(out, expected)
    assert found == {FOLDED}


def test_by_frame_leaves_gradients_others_forwards_and_threads_alone() -> None:
    pipe = MAKERS["Wan"]()
    model, call = pipe.transformer, call_of(pipe)
    model.enable_gradient_checkpointing()
    model.train()
    out, found = shapes(model, "blocks.0.ffn", call)
    out.square().mean().backward()  # checkpointing recomputes the blocks without the hooks
    assert found == {(2, 24)}
    model.eval()
    with torch.no_grad():
        expected = model(**call)[0]
        made: list[Tensor] = []

        def elsewhere() -> None:
            with torch.no_grad():
                made.append(model(**call)[0])

        with modulated_by_frame(model, FRAMES):
            worker = threading.Thread(target=elsewhere)
            worker.start()
            worker.join()
        assert torch.equal(made[0], expected)
        block = model.get_submodule("blocks.0")
        block.forward = type(block).forward.__get__(block)
        assert shapes(model, "blocks.0.ffn", call)[1] == {(2, 24)}
