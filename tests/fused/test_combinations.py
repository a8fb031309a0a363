"""Fused operations combined with other changes of the same model, in four families."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

import postgen
from tests.enhance.test_combinations import attention_broadcast, faster_cache, first_block_cache, mag_cache
from tests.families.tiny_models import TinyModel, tiny_model
from tests.fused.counted import count_operations

ENHANCED = postgen.EnhanceAVideoConfig(relative_weight=0.4)

pytestmark = pytest.mark.filterwarnings("error:Enhance-A-Video")


class Pair:
    """A tiny model without and with fused operations, and its prediction."""

    def __init__(self, name: str) -> None:
        self.plain = tiny_model(name, batch=2, layers=3)
        self.fused = copy.deepcopy(self.plain)
        postgen.apply_fused_ops(self.fused.transformer)
        self.prediction = self.plain()

    def either_order(self, add: Callable[[TinyModel], Any]) -> list[TinyModel]:
        """Return a stock model with `add`, and two fused models with `add` before and after the fused operations."""
        stock, before, after = copy.deepcopy(self.plain), copy.deepcopy(self.plain), copy.deepcopy(self.fused)
        add(stock)
        add(before)
        postgen.apply_fused_ops(before.transformer)
        add(after)
        return [stock, before, after]


@pytest.fixture(scope="module", params=["CogVideoX 1.5", "HunyuanVideo", "LTX", "Wan"])
def pair(request: pytest.FixtureRequest) -> Pair:
    return Pair(request.param)


def counted(tiny: TinyModel) -> tuple[torch.Tensor, Counter[str]]:
    with count_operations() as run:
        return tiny(), run.counts


def assert_same_when_removed(models: list[TinyModel], expected: torch.Tensor) -> None:
    for tiny in models:
        postgen.remove_fused_ops(tiny.transformer)
        found, run = counted(tiny)
        assert torch.equal(found, expected)
        assert not run["gate_residual"]


def test_enhance_a_video_measures_the_same(pair: Pair) -> None:
    stock, *fused = pair.either_order(lambda tiny: postgen.apply_enhance_a_video(tiny.transformer, ENHANCED))
    expected, stock_gains = stock(), gains(stock)
    assert (expected - pair.prediction).abs().max() > 1e-3
    for tiny in fused:
        found, run = counted(tiny)
        assert torch.allclose(found, expected, atol=1e-5)
        assert run["temporal_self_share"] == run["attention"] == len(stock_gains)
        for layer, gain in gains(tiny).items():
            assert gain == pytest.approx(stock_gains[layer], abs=1e-5)
        text = str(postgen.summary(tiny.transformer))
        assert "diffusers < fused_ops (computes) < enhance_a_video" in text
    assert_same_when_removed(fused, expected)


def gains(tiny: TinyModel) -> dict[str, tuple[float, ...]]:
    from postgen.enhance import handle_of

    handle = handle_of(tiny.transformer)
    assert handle is not None
    return handle.stats()


@pytest.mark.parametrize("cache", [first_block_cache, attention_broadcast, faster_cache, mag_cache])
def test_caches(pair: Pair, cache: Callable[[TinyModel], None]) -> None:
    _, *fused = pair.either_order(cache)
    for tiny in fused:
        runs = []
        for _ in range(3):
            with tiny.transformer.cache_context("cond"):
                found, run = counted(tiny)
            # All calls have the same step, so the cached output must equal the computed one.
            assert torch.allclose(found, pair.prediction, atol=1e-5)
            runs.append(run)
        assert runs[0]["attention"] > runs[-1]["attention"]
        assert runs[0]["gate_residual"] >= pair.plain.attention_layers
        tiny.transformer.disable_cache()
        found, run = counted(tiny)
        assert torch.allclose(found, pair.prediction, atol=1e-5)
        assert run == runs[0]
    assert_same_when_removed(fused, pair.prediction)


def block_offload(tiny: TinyModel, kind: str = "block_level", blocks: int | None = 1) -> None:
    cpu = torch.device("cpu")
    tiny.transformer.enable_group_offload(cpu, cpu, offload_type=kind, num_blocks_per_group=blocks)


def leaf_offload(tiny: TinyModel) -> None:
    block_offload(tiny, "leaf_level", None)


def accelerate_hooks(tiny: TinyModel) -> None:
    from accelerate.hooks import CpuOffload, add_hook_to_module

    for block in (tiny.transformer, *tiny.transformer.modules()):
        if type(block).__name__.endswith("Block"):
            add_hook_to_module(block, CpuOffload(execution_device="cpu"))


def sequential_offload(tiny: TinyModel) -> None:
    """Offload each module separately: outside its own call, its weights are on the meta device."""
    from accelerate import cpu_offload

    cpu_offload(tiny.transformer, execution_device=torch.device("cpu"))


@pytest.mark.parametrize("add", [block_offload, leaf_offload, accelerate_hooks, sequential_offload])
def test_offloading(pair: Pair, add: Callable[[TinyModel], None]) -> None:
    _, *fused = pair.either_order(add)
    for tiny in fused:
        found, run = counted(tiny)
        assert torch.allclose(found, pair.prediction, atol=1e-5)
        assert run["attention"] == pair.plain.attention_layers
    # If hooks move the weights of norms, these norms are called; otherwise everything is fused.
    moved = add in (leaf_offload, sequential_offload) and pair.plain.name.startswith(("CogVideoX", "Wan"))
    assert bool(run["gate_residual"]) != moved
    assert_same_when_removed(fused, pair.prediction)


def test_hooks_may_come_off_first_or_last(pair: Pair) -> None:
    from accelerate.hooks import remove_hook_from_module

    _, before, after = pair.either_order(accelerate_hooks)
    remove_hook_from_module(before.transformer, recurse=True)
    _, run = counted(before)
    assert run == counted(pair.fused)[1]
    assert_same_when_removed([before, after], pair.prediction)
    remove_hook_from_module(after.transformer, recurse=True)
    found, run = counted(after)
    assert torch.equal(found, pair.prediction)
    assert not run


def test_hooks_on_a_norm_are_called(pair: Pair) -> None:
    tiny = copy.deepcopy(pair.fused)
    seen: list[str] = []
    for name, module in tiny.transformer.named_modules():
        if name.endswith(("norm_q", "norm1", "norm.norm")):
            module.register_forward_hook(lambda *_, name=name: seen.append(name))
    assert torch.allclose(tiny(), pair.prediction, atol=1e-5)
    assert len(seen) == len(set(seen)) >= pair.plain.attention_layers


def test_lora(pair: Pair) -> None:
    from peft import LoraConfig

    def add(tiny: TinyModel) -> None:
        torch.manual_seed(5)
        tiny.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))

    stock, *fused = pair.either_order(add)
    adapted = stock()
    assert not torch.allclose(adapted, pair.prediction, atol=1e-3)
    keys = list(stock.transformer.state_dict())
    for tiny in fused:
        assert torch.allclose(tiny(), adapted, atol=1e-5)
        assert list(tiny.transformer.state_dict()) == keys
    assert_same_when_removed(fused, adapted)


def test_layerwise_casting(pair: Pair) -> None:
    def add(tiny: TinyModel) -> None:
        tiny.transformer.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)

    stock, *fused = pair.either_order(add)
    for tiny in fused:
        assert torch.allclose(tiny(), stock(), atol=1e-5)


def test_an_attention_backend_of_diffusers_wins(pair: Pair) -> None:
    tiny = copy.deepcopy(pair.fused)
    try:
        tiny.transformer.set_attention_backend("_native_math")
        found, run = counted(tiny)
    finally:
        tiny.transformer.set_attention_backend("native")
        tiny.transformer.reset_attention_backend()
    assert torch.allclose(found, pair.prediction, atol=1e-5)
    # CogVideoX's attention processor has no backends.
    assert bool(run["attention"]) == pair.plain.name.startswith("CogVideoX")


def test_gradient_checkpointing(pair: Pair) -> None:
    losses = []
    for tiny in (copy.deepcopy(pair.plain), copy.deepcopy(pair.fused)):
        tiny.transformer.train().enable_gradient_checkpointing()
        tiny.transformer(**tiny.arguments, return_dict=False)[0].square().mean().backward()
        gradients = [p.grad.norm() for p in tiny.transformer.parameters() if p.grad is not None]
        losses.append(torch.stack(gradients).norm())
    assert torch.allclose(*losses, rtol=1e-4)


def test_the_meta_device(pair: Pair) -> None:
    """Models on the meta device compute shapes, which tools use to estimate memory."""

    def meta(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(meta, value))
        return value.to("meta") if isinstance(value, torch.Tensor) else value

    tiny = copy.deepcopy(pair.fused)
    arguments = {name: meta(value) for name, value in tiny.arguments.items()}
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients):
            out = tiny.transformer.to("meta")(**arguments, return_dict=False)[0]
        assert out.is_meta
        assert out.shape == pair.prediction.shape
