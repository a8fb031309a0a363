"""FP8 layers on models that compute on another device than when they were applied: offloaded, or moved later."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

import postgen
from postgen.families.installed import computes_on
from postgen.fp8_linear import FP8Linear, state
from postgen.kernels.dispatch import TOLD
from tests.families.tiny_models import TinyModel, tiny_model

GPU = torch.device("cuda", 0)


@pytest.fixture
def wan() -> TinyModel:
    """Return a Wan model with 32 attention channels and 16 inner feed-forward channels."""
    made = tiny_model("Wan")
    model: Any = made.transformer
    torch.manual_seed(0)
    made.transformer = type(model).from_config({**model.config, "ffn_dim": 16}).eval()
    return made


def layers(model: Any) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, FP8Linear)]


def offloaded(model: Any) -> Any:
    """Add the hook of `enable_model_cpu_offload`, which moves the model only when it is called."""
    from accelerate.hooks import CpuOffload, add_hook_to_module

    return add_hook_to_module(model, CpuOffload(GPU), append=True)


def test_where_a_model_computes(wan: TinyModel) -> None:
    model = wan.transformer
    assert computes_on(model) == torch.device("cpu")
    assert computes_on(model, (3, torch.empty(2), torch.empty(2, device="meta"))) == torch.device("cpu")
    offloaded(model)
    assert computes_on(model, (torch.empty(2),)) == GPU


@pytest.fixture
def capable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "why_not_fp8", lambda device: None)
    monkeypatch.setattr(state, "may_be_inline", lambda device: True)


@pytest.mark.usefixtures("capable")
def test_narrow_layers_of_an_offloaded_model(wan: TinyModel) -> None:
    offloaded(wan.transformer)
    with pytest.raises(postgen.UserError, match=r"fewer than 2048 inputs or outputs .* set min_features=0"):
        postgen.apply_fp8_linears(wan.transformer)


@pytest.mark.usefixtures("capable")
def test_narrow_layers_of_a_model_that_came_to_a_gpu(wan: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    config = postgen.FP8LinearConfig(min_features=32)
    handle = postgen.apply_fp8_linears(wan.transformer, config)
    on = wan()
    assert any("ffn" in name for name in layers(wan.transformer))
    monkeypatch.setattr(state, "computes_on", lambda model, inputs=(): GPU)
    there = wan()
    assert not any("ffn" in name for name in layers(wan.transformer))
    assert handle.stats() == {"": {"attention": 8, "cross_attention": 4}}
    assert not torch.equal(there, on)
    # The result equals that of layers applied on that device.
    handle.remove()
    postgen.apply_fp8_linears(wan.transformer, config)
    assert torch.equal(wan(), there)


@pytest.mark.usefixtures("capable")
def test_nothing_is_left_on_the_gpu(wan: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    stock = wan()
    handle = postgen.apply_fp8_linears(wan.transformer)
    monkeypatch.setattr(state, "computes_on", lambda model, inputs=(): GPU)
    for _ in range(2):
        with pytest.raises(postgen.UserError, match="set min_features=0 in FP8LinearConfig"):
            wan()
    handle.update(min_features=0)
    assert not torch.equal(wan(), stock)
    handle.remove()
    assert torch.equal(wan(), stock)


@pytest.mark.usefixtures("capable")
def test_layers_that_offloading_holds_stay_and_compute_what_the_stock_ones_do(
    wan: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = wan.transformer
    config = postgen.FP8LinearConfig(min_features=32)
    monkeypatch.setattr(state, "computes_on", lambda model, inputs=(): GPU)
    handle = postgen.apply_fp8_linears(model, config)
    expected = wan()
    handle.remove()
    monkeypatch.undo()
    monkeypatch.setattr(state, "why_not_fp8", lambda device: None)
    handle = postgen.apply_fp8_linears(model, config)
    before = layers(model)
    model.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
    monkeypatch.setattr(state, "computes_on", lambda model, inputs=(): GPU)
    monkeypatch.setattr(state, "may_be_inline", lambda device: True)
    assert torch.equal(wan(), expected)
    assert layers(model) == before
    assert "feed_forward" not in handle.stats()[""]


def test_a_gpu_that_the_model_is_offloaded_from(wan: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """An offloaded model is on the CPU between calls: there is no warning about the CPU, but an old GPU is refused."""
    monkeypatch.setattr(state, "why_not_fp8", lambda device: "it is old" if device.type == "cuda" else "a CPU")
    monkeypatch.setattr(state, "may_be_inline", lambda device: True)
    handle = postgen.apply_fp8_linears(wan.transformer)
    monkeypatch.setattr(state, "computes_on", lambda model, inputs=(): GPU)
    TOLD.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(postgen.UserError, match=r"slower than exact layers: it is old\. Leave them out"):
            wan()
    handle.remove()
