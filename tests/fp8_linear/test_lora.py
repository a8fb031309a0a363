"""LoRA on FP8 linear layers: in either order, in full precision, fused, trained, removed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import postgen
from postgen.fp8_linear import FP8Linear
from tests.families.tiny_models import TinyModel, tiny_model
from tests.kernels.launches import relative_error

QUIET = postgen.FP8LinearConfig(simulate=True)
TARGETS = ["to_q", "to_v", "to_out.0", "net.2"]


@pytest.fixture
def wan() -> TinyModel:
    return tiny_model("Wan")


def lora(model: Any, seed: int = 3) -> None:
    from peft import LoraConfig

    torch.manual_seed(seed)
    model.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, init_lora_weights=False))


def outputs(tiny: TinyModel, name: str) -> tuple[Tensor, Tensor]:
    """Return the input and the output of a layer in one call."""
    seen: list[tuple[Tensor, Tensor]] = []
    hook = tiny.transformer.get_submodule(name).register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
    tiny()
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("name", ["blocks.0.attn1.to_q", "blocks.1.ffn.net.2"])
def test_lora_is_added_in_full_precision(name: str, wan: TinyModel) -> None:
    model: Any = wan.transformer
    lora(model)
    postgen.apply_fp8_linears(model, QUIET)
    layer = model.get_submodule(name)
    assert isinstance(layer.base_layer, FP8Linear)
    x, out = outputs(wan, name)
    with torch.no_grad():
        branch = layer.lora_B["default"](layer.lora_A["default"](x)) * 2
        assert torch.equal(out, layer.base_layer(x) + branch)
        torch.testing.assert_close(out - layer.base_layer(x), branch, rtol=1e-4, atol=1e-5)


def test_before_and_after_are_the_same(wan: TinyModel) -> None:
    plain = wan()
    lora(wan.transformer)
    stock = wan()
    handle = postgen.apply_fp8_linears(wan.transformer, QUIET)
    first = wan()
    other = tiny_model("Wan")
    second = postgen.apply_fp8_linears(other.transformer, QUIET)
    lora(other.transformer)
    assert torch.equal(other(), first)
    assert 0 < relative_error(first, stock) < 0.05 < relative_error(stock, plain)
    for tiny, each in ((wan, handle), (other, second)):
        each.remove()
        assert torch.equal(tiny(), stock)
        tiny.transformer.delete_adapters("default")  # type: ignore[operator]
        assert torch.equal(tiny(), plain)


def test_fused_into_the_weights(wan: TinyModel) -> None:
    """Weights are rounded again after `fuse_lora`, and again after `unfuse_lora`."""
    model: Any = wan.transformer
    handle = postgen.apply_fp8_linears(model, QUIET)
    plain = wan()
    lora(model)
    beside = wan()
    model.fuse_lora()
    fused = wan()
    assert relative_error(fused, beside) < 0.05 < relative_error(beside, plain)
    assert not torch.equal(fused, plain)
    # FP8 and exact layers share the weight, so FP8 can be disabled while the LoRA is fused.
    handle.disable()
    exact = wan()
    assert relative_error(fused, exact) < 0.05
    with pytest.raises(postgen.UserError, match="LoRA is merged into its weight: unmerge or unload it first"):
        handle.enable()
    model.unfuse_lora()
    handle.enable()
    assert relative_error(wan(), beside) < 1e-2
    model.unload_lora()
    assert relative_error(wan(), plain) < 1e-2
    handle.remove()


def test_trained_on_top(wan: TinyModel) -> None:
    model: Any = wan.transformer.requires_grad_(False)
    postgen.apply_fp8_linears(model, QUIET)
    lora(model)
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 2 * 14
    optimizer = torch.optim.SGD(trained, lr=1e-3)
    codes = {n: m.codes.clone() for n, m in model.named_modules() if isinstance(m, FP8Linear)}
    losses = []
    for _ in range(3):
        loss = (model(**wan.arguments, return_dict=False)[0] - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)
        optimizer.step()
        losses.append(loss.item())
    assert sum(p.grad.abs().sum().item() > 0 for p in trained) == len(trained)  # type: ignore[union-attr]
    assert losses[-1] < losses[0]
    assert all(torch.equal(model.get_submodule(name).codes, before) for name, before in codes.items())
