"""Enhance-A-Video together with what users put on the same model, on four families."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import postgen
from postgen.enhance.state import NAME
from postgen.families.installed import installed
from tests.families.tiny_models import TinyModel, tiny_model

FAMILIES = ("CogVideoX 1.0", "HunyuanVideo", "LTX", "Wan")
CONFIG = postgen.EnhanceAVideoConfig(relative_weight=0.4)

pytestmark = pytest.mark.filterwarnings("error:Enhance-A-Video")


class Pair:
    """A tiny model without and with Enhance-A-Video, and what both predict."""

    def __init__(self, name: str) -> None:
        self.plain = tiny_model(name, batch=2, layers=3)
        self.enhanced = copy.deepcopy(self.plain)
        postgen.apply_enhance_a_video(self.enhanced.transformer, CONFIG)
        self.off, self.on = self.plain(), self.enhanced()

    def either_order(self, add: Callable[[TinyModel], Any]) -> list[TinyModel]:
        """Two enhanced models: one where `add` came before Enhance-A-Video, one where it came after."""
        before, after = copy.deepcopy(self.plain), copy.deepcopy(self.enhanced)
        add(before)
        postgen.apply_enhance_a_video(before.transformer, CONFIG)
        add(after)
        return [before, after]


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest) -> Pair:
    found = Pair(request.param)
    assert (found.on - found.off).abs().max() > 1e-3
    return found


def steps(tiny: TinyModel, count: int) -> list[tuple[Tensor, int]]:
    """(prediction, number of layers that were really computed) of the same step, again and again, as caches see it."""
    enhancement: Any = installed(tiny.transformer).plug_ins[NAME]
    results = []
    for _ in range(count):
        for layer in enhancement.layers.values():
            layer.gain = None
        with tiny.transformer.cache_context("cond"):
            results.append((tiny(), len(enhancement.gains())))
    return results


def first_block_cache(tiny: TinyModel) -> None:
    from diffusers import FirstBlockCacheConfig

    tiny.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.5))


def attention_broadcast(tiny: TinyModel) -> None:
    from diffusers import PyramidAttentionBroadcastConfig

    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=3,
        spatial_attention_timestep_skip_range=(0, 1000),
        current_timestep_callback=lambda: 500,
        spatial_attention_block_identifiers=("blocks",),
    )
    tiny.transformer.enable_cache(config)


def taylorseer(tiny: TinyModel) -> None:
    from diffusers import TaylorSeerCacheConfig

    config = TaylorSeerCacheConfig(
        cache_interval=4,
        disable_cache_before_step=2,
        taylor_factors_dtype=torch.float32,
        cache_identifiers=[r"(single_)?(transformer_)?blocks\.\d+\.attn1?"],
    )
    tiny.transformer.enable_cache(config)


def faster_cache(tiny: TinyModel) -> None:
    from diffusers import FasterCacheConfig

    # It keeps nothing of its own until a step outside the range has been computed.
    begun: list[int] = []
    tiny.transformer.register_forward_hook(lambda *_: begun.append(1))
    config = FasterCacheConfig(
        spatial_attention_block_skip_range=3,
        spatial_attention_timestep_skip_range=(0, 900),
        current_timestep_callback=lambda: 500 if begun else 1000,
        attention_weight_callback=lambda _: 0.5,
        is_guidance_distilled=True,
    )
    tiny.transformer.enable_cache(config)


def mag_cache(tiny: TinyModel) -> None:
    from diffusers import MagCacheConfig

    # Each step is taken to be as large as the one before, so none but the first is computed.
    tiny.transformer.enable_cache(
        MagCacheConfig(retention_ratio=0.0, num_inference_steps=4, mag_ratios=torch.ones(4), threshold=0.5)
    )


@pytest.mark.parametrize("cache", [first_block_cache, attention_broadcast, taylorseer, faster_cache, mag_cache])
def test_caches_keep_the_gain(pair: Pair, cache: Callable[[TinyModel], None]) -> None:
    for tiny in pair.either_order(cache):
        results = steps(tiny, 4)
        # The step does not change, so what a cache gives back must be what was computed, gain included.
        for result, _ in results:
            assert torch.allclose(result, pair.on, atol=1e-5)
        computed = [layers for _, layers in results]
        assert computed[0] == max(computed) > min(computed)


def to_group_offload(level: str) -> Callable[[TinyModel], None]:
    def add(tiny: TinyModel) -> None:
        tiny.transformer.enable_group_offload(
            onload_device=torch.device("cpu"),
            offload_device=torch.device("cpu"),
            offload_type=f"{level}_level",
            num_blocks_per_group=1 if level == "block" else None,
        )

    return add


def accelerate_hook(tiny: TinyModel) -> None:
    from accelerate.hooks import CpuOffload, add_hook_to_module

    add_hook_to_module(tiny.transformer, CpuOffload(execution_device="cpu"))


def sequential_offload(tiny: TinyModel) -> None:
    from accelerate import cpu_offload

    cpu_offload(tiny.transformer, execution_device=torch.device("cpu"))


@pytest.mark.parametrize(
    "add", [sequential_offload, to_group_offload("block"), to_group_offload("leaf"), accelerate_hook]
)
def test_offloading_changes_nothing(pair: Pair, add: Callable[[TinyModel], None]) -> None:
    for tiny in pair.either_order(add):
        assert torch.equal(tiny(), pair.on)


def test_an_offload_hook_may_come_off_again(pair: Pair) -> None:
    from accelerate.hooks import remove_hook_from_module

    shorter = tiny_model(pair.plain.name, frames=3, layers=3)
    for tiny in pair.either_order(accelerate_hook):
        tiny()
        remove_hook_from_module(tiny.transformer, recurse=True)
        assert torch.equal(tiny(), pair.on)
        # The geometry is still read: another clip length is another grid.
        changed = tiny(**shorter.arguments)
        postgen.remove_enhance_a_video(tiny.transformer)
        assert (tiny(**shorter.arguments) - changed).abs().max() > 1e-3
        assert torch.equal(tiny(), pair.off)


def test_projections_fused_before(pair: Pair) -> None:
    fused = copy.deepcopy(pair.plain)
    fused.transformer.fuse_qkv_projections()
    postgen.apply_enhance_a_video(fused.transformer, CONFIG)
    assert torch.allclose(fused(), pair.on, atol=1e-5)
    postgen.remove_enhance_a_video(fused.transformer)
    assert torch.allclose(fused(), pair.off, atol=1e-5)


def test_projections_fused_after(pair: Pair) -> None:
    tiny = copy.deepcopy(pair.enhanced)
    if not pair.plain.name.startswith("CogVideoX"):
        tiny.transformer.fuse_qkv_projections()
        assert torch.allclose(tiny(), pair.on, atol=1e-5)
        return
    # Fusing puts new processors on CogVideoX: it cannot act there, and says so, once.
    tiny.transformer.fuse_qkv_projections()
    with pytest.warns(UserWarning, match="processors of 3 of 3 layers were replaced"):
        assert torch.allclose(tiny(), pair.off, atol=1e-5)
    tiny()
    assert "other code replaced the processor" in str(postgen.summary(tiny.transformer))
    postgen.remove_enhance_a_video(tiny.transformer)
    postgen.apply_enhance_a_video(tiny.transformer, CONFIG)
    assert torch.allclose(tiny(), pair.on, atol=1e-5)
    # Unfusing puts the processors of before back, and with them nothing of ours that was removed.
    postgen.remove_enhance_a_video(tiny.transformer)
    tiny.transformer.unfuse_qkv_projections()
    assert torch.allclose(tiny(), pair.off, atol=1e-5)
    postgen.apply_enhance_a_video(tiny.transformer, CONFIG)
    assert torch.allclose(tiny(), pair.on, atol=1e-5)


def test_layerwise_casting(pair: Pair) -> None:
    def add(tiny: TinyModel) -> None:
        tiny.transformer.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)

    first, second = pair.either_order(add)
    assert torch.equal(first(), second())
    assert torch.allclose(first(), pair.on, atol=0.1)
    cast = copy.deepcopy(pair.plain)
    add(cast)
    assert (cast() - first()).abs().max() > 1e-3


def test_lora(pair: Pair) -> None:
    from peft import LoraConfig

    def add(tiny: TinyModel) -> None:
        torch.manual_seed(5)
        tiny.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))

    first, second = pair.either_order(add)
    adapted = first()
    assert torch.equal(adapted, second())
    assert not torch.allclose(adapted, pair.on, atol=1e-3)
    first.transformer.fuse_lora()
    assert torch.allclose(first(), adapted, atol=1e-4)
    first.transformer.unfuse_lora()
    first.transformer.unload_lora()
    assert torch.allclose(first(), pair.on, atol=1e-4)
    second.transformer.disable_adapters()
    assert torch.equal(second(), pair.on)


def test_an_attention_backend_may_be_chosen(pair: Pair) -> None:
    def add(tiny: TinyModel) -> None:
        tiny.transformer.set_attention_backend("_native_math")

    try:
        for tiny in pair.either_order(add):
            assert torch.allclose(tiny(), pair.on, atol=1e-5)
    finally:
        pair.plain.transformer.set_attention_backend("native")
        pair.plain.transformer.reset_attention_backend()


def test_a_batch_is_its_rows(pair: Pair) -> None:
    """Guidance may come in one batch or in separate calls: a clip's gain does not see what it is batched with."""
    arguments = pair.enhanced.arguments
    for row in range(2):
        alone = {
            name: value[row : row + 1] if isinstance(value, Tensor) and len(value) == 2 else value
            for name, value in arguments.items()
        }
        assert alone["hidden_states"].shape[0] == 1
        assert torch.allclose(pair.enhanced(**alone), pair.on[row : row + 1], atol=1e-5)
