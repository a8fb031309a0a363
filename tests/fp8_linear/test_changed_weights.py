"""Changed weights of FP8 layers: the next call rounds them again, and removal keeps the changed weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import postgen
from postgen.fp8_linear import FP8Linear
from postgen.fp8_linear.samples import NUMBERS, sample_of, samples_of
from postgen.kernels.fp8_rows import naive
from tests.families.tiny_models import tiny_model
from tests.kernels.launches import relative_error

QUIET = postgen.FP8LinearConfig(simulate=True)


def lora(model: Any, seed: int = 3) -> None:
    from peft import LoraConfig

    torch.manual_seed(seed)
    targets = ["to_q", "to_v", "to_out.0", "net.2"]
    model.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False))


def fused_and_unloaded(model: Any) -> None:
    """Fuse a LoRA and unload it, as diffusers recommends for a permanent LoRA; only the weights change."""
    lora(model)
    model.fuse_lora()
    model.unload_lora()


def fused_again_with_another_scale(model: Any) -> None:
    lora(model)
    model.fuse_lora()
    model(**tiny_model("Wan").arguments)
    model.unfuse_lora()
    model.fuse_lora(lora_scale=0.1)


def written_past_the_version(model: Any) -> None:
    for weight in model.parameters():
        weight.data.mul_(1.5)


def assigned(model: Any) -> None:
    model.load_state_dict({name: value * 1.5 for name, value in model.state_dict().items()}, assign=True)


def in_another_dtype(model: Any) -> None:
    model.blocks.to(torch.bfloat16).to(torch.float32)


CHANGES = [
    fused_and_unloaded,
    fused_again_with_another_scale,
    written_past_the_version,
    assigned,
    in_another_dtype,
]


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_changes_are_seen_and_stay(change: Callable[[Any], None], tmp_path: Path) -> None:
    # Load the model from a folder, so that no weight was written to and all version counters are equal.
    wan = tiny_model("Wan")
    wan.transformer.save_pretrained(tmp_path)  # type: ignore[operator]
    wan.transformer = type(wan.transformer).from_pretrained(tmp_path)  # type: ignore[attr-defined]
    handle = postgen.apply_fp8_linears(wan.transformer, QUIET)
    before = wan()
    change(wan.transformer)
    found, state = wan(), wan.transformer.state_dict()
    for layer in wan.transformer.modules():
        if isinstance(layer, FP8Linear):
            codes, scales = naive.quantize_rows(layer.weight)
            assert torch.equal(layer.codes, codes.view(torch.uint8))
            assert torch.equal(layer.scales.view(torch.float32), scales)
    handle.remove()
    after = wan.transformer.state_dict()
    assert after.keys() == state.keys()
    assert all(torch.equal(after[name], state[name]) for name in state)
    assert not torch.equal(found, before)
    assert relative_error(found, wan()) < 0.1


@torch.no_grad()
def test_codes_stay_where_they_are() -> None:
    """Codes keep their memory, which compiled code and CUDA graphs use; unchanged weights are not rounded again."""
    wan = tiny_model("Wan")
    postgen.apply_fp8_linears(wan.transformer, QUIET)
    wan()
    layer: Any = wan.transformer.get_submodule("blocks.0.attn1.to_q")
    memory, version = layer.codes.data_ptr(), layer.codes._version
    wan()
    assert layer.codes._version == version
    written_past_the_version(wan.transformer)
    wan()
    assert (layer.codes.data_ptr(), layer.codes._version) == (memory, version + 1)


def test_put_on_in_inference_mode() -> None:
    """Layers applied in inference mode work outside of it: a LoRA can be fused, and gradients pass."""
    wan = tiny_model("Wan")
    with torch.inference_mode():
        handle = postgen.apply_fp8_linears(wan.transformer, QUIET)
        wan()
    fused_and_unloaded(wan.transformer)
    given = wan.arguments["hidden_states"].clone().requires_grad_()
    out: Any = wan.transformer(**{**wan.arguments, "hidden_states": given}, return_dict=False)[0]
    out.sum().backward()
    assert given.grad is not None
    assert given.grad.isfinite().all()
    handle.remove()
    assert relative_error(out.detach(), wan()) < 0.04


@torch.no_grad()
def test_weights_that_diffusers_stores_in_eight_bits() -> None:
    wan = tiny_model("Wan")
    model: Any = wan.transformer
    postgen.apply_fp8_linears(model, QUIET)
    other = tiny_model("Wan")
    for each in (model, other.transformer):
        each.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert model.get_submodule("blocks.0.attn1.to_q").weight.dtype == torch.float8_e4m3fn
    assert relative_error(wan(), other()) < 0.04


def test_samples() -> None:
    torch.manual_seed(0)
    weights = {
        "a": torch.randn(96, 80),
        "b": torch.randn(96, 80),
        "small": torch.ones(3, 3),
        "half": torch.randn(640, 128, dtype=torch.bfloat16),
        "codes": torch.randn(32, 32).to(torch.float8_e4m3fn),
        "none": torch.empty(8, 8, device="meta"),
        "turned": torch.randn(8, 4).T,
    }
    found = samples_of(weights)
    assert found.keys() == weights.keys() - {"none", "turned"}
    assert {name: sample_of(each) for name, each in weights.items() if name in found} == found
    assert len(found["small"]) == 4 * 9
    assert NUMBERS * 0.9 <= len(found["half"]) / 2 <= NUMBERS * 1.1
    # Any change by a product of two thin matrices is detected.
    changed = weights["half"] + torch.randn(640, 1, dtype=torch.bfloat16) @ torch.randn(1, 128, dtype=torch.bfloat16)
    assert sample_of(changed) != found["half"]
    weights["a"][0, 0] = torch.nan
    assert sample_of(weights["a"]) == sample_of(weights["a"].clone()) != found["a"]
