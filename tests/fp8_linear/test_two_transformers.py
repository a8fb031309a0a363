"""FP8 layers on both transformers of Wan 2.2: if one transformer refuses a change, none is changed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import postgen
from postgen.families.installed import installed
from postgen.fp8_linear import FP8Linear, fp8_linears_for_call
from tests.tiny_wan import wan_components

QUIET = postgen.FP8LinearConfig(simulate=True)


@pytest.fixture
def pipe() -> Any:
    from diffusers import WanPipeline

    parts = wan_components(head_dim=16)
    made: Any = WanPipeline(**parts, transformer_2=copy.deepcopy(parts["transformer"]), boundary_ratio=0.6)
    made.set_progress_bar_config(disable=True)
    return made


def lines(pipe: Any) -> list[str]:
    return [line for line in str(postgen.summary(pipe)).splitlines() if "fp8_linears" in line]


def layers(pipe: Any) -> list[int]:
    both = pipe.transformer, pipe.transformer_2
    return [sum(isinstance(each, FP8Linear) for each in model.modules()) for model in both]


def fuse_lora(model: Any) -> None:
    from peft import LoraConfig

    model.add_adapter(LoraConfig(r=4, target_modules=["to_q"], init_lora_weights=False))
    model.fuse_lora()


def offload(model: Any) -> None:
    model.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")


def make(pipe: Any) -> torch.Tensor:
    size = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 4, "output_type": "latent"}
    found: torch.Tensor = pipe("a ball", **size, generator=torch.Generator().manual_seed(0)).frames
    return found


def test_both_compute_and_are_as_before(pipe: Any) -> None:
    stock = make(pipe)
    handle = postgen.apply_fp8_linears(pipe, QUIET)
    assert layers(pipe) == [16, 16]
    assert not torch.equal(make(pipe), stock)
    handle.remove()
    assert torch.equal(make(pipe), stock)


def test_what_cannot_be_put_on_one_is_put_on_none(pipe: Any) -> None:
    handle = postgen.apply_fp8_linears(pipe, QUIET)
    handle.disable()
    fuse_lora(pipe.transformer_2)
    before = lines(pipe)
    for change in (
        handle.enable,
        lambda: fp8_linears_for_call(pipe, True).__enter__(),
    ):
        with pytest.raises(postgen.UserError, match="LoRA is merged into its weight"):
            change()
        assert (lines(pipe), layers(pipe)) == (before, [0, 0])
    pipe.transformer_2.unfuse_lora()
    handle.enable()
    assert layers(pipe) == [16, 16]
    # This also holds for newly selected layers.
    handle.update(attention=False)
    pipe.transformer_2.fuse_lora()
    before = lines(pipe)
    with pytest.raises(postgen.UserError, match="LoRA is merged into its weight"):
        handle.update(attention=True, feed_forward=False)
    assert (lines(pipe), layers(pipe)) == (before, [8, 8])


def test_what_cannot_be_taken_off_one_stays_on_both(pipe: Any) -> None:
    handle = postgen.apply_fp8_linears(pipe, QUIET)
    on = make(pipe)
    offload(pipe.transformer_2)
    before = lines(pipe)
    for change in (handle.disable, handle.remove, lambda: handle.update(first_exact_blocks=1)):
        with pytest.raises(postgen.UserError, match=r"group_offloading is on blocks.*switch offloading off before"):
            change()
        assert (lines(pipe), layers(pipe)) == (before, [16, 16])
        assert torch.equal(make(pipe), on)
    assert handle.still_on.keys() == {"transformer", "transformer_2"}
    assert "fp8_linears" in installed(pipe.transformer).plug_ins
