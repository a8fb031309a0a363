"""LoRA on quantised models: it trains, is saved and loaded, and merges into quantised weights."""

import pytest
import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from postgen.errors import UserError
from postgen.quant import QuantSpec
from postgen.quant.layers import quantized_layers
from postgen.quant.merging import merge_lora_
from postgen.quant.model import quantize_weights
from tests.quant.models import arguments, predicted, same_bits, wan

TARGETS = ["attn1.to_q", "attn2.to_k", "ffn.net.2"]


def adapted(spec=None, *, size=0.3, dtype=torch.float32, folder=None, **words):
    """Return a quantised model with a LoRA whose matrices are not zero."""
    model = wan(dtype, folder)
    quantize_weights(model, spec or QuantSpec(weight="int8:g16"))
    model.add_adapter(LoraConfig(r=3, lora_alpha=6, target_modules=TARGETS, **words))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = (torch.randn(parameter.shape, generator=generator) * size).to(parameter.dtype)
    return model


@pytest.mark.parametrize("spec", [QuantSpec(weight="int4:g16"), QuantSpec(weight="fp8", act="fp8", rotate=16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_trains_on_a_quantised_model(tmp_path, spec, dtype):
    model = adapted(spec, dtype=dtype, folder=tmp_path)
    before = {name: each.clone() for name, each in model.state_dict().items()}
    trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
    assert len(trained) == 2 * 2 * len(TARGETS)
    optimizer = torch.optim.SGD(trained.values(), lr=1.0)
    losses = []
    for _ in range(4):
        loss = model(**arguments(dtype), return_dict=False)[0].float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    after = model.state_dict()
    assert all(torch.equal(after[name], each) for name, each in before.items() if name not in trained)
    assert all(not torch.equal(after[name], each) for name, each in before.items() if name in trained)


def test_a_lora_loads_into_a_quantised_model():
    model, other = adapted(), wan()
    state = get_peft_model_state_dict(model)
    quantize_weights(other, QuantSpec(weight="int8:g16"))
    # Without settings, alpha is the rank, half of what it is in the model.
    scaled = {f"transformer.{name}": each * (2 if "lora_B" in name else 1) for name, each in state.items()}
    other.load_lora_adapter(scaled)
    assert torch.equal(predicted(other), predicted(model))
    other.delete_adapters(["default_0"])
    other.unload_lora()
    exact = wan()
    quantize_weights(exact, QuantSpec(weight="int8:g16"))
    assert same_bits(other, exact)


@pytest.mark.parametrize("requantize", [True, False])
@pytest.mark.parametrize("spec", [{}, {"rotate": 16, "rank": 2}, {"weight": None, "act": "int8"}])
def test_a_lora_merges(tmp_path, spec, requantize):
    model = adapted(QuantSpec(**{"weight": "int8:g16"} | spec))
    expected = predicted(model)
    noise = merge_lora_(model, requantize=requantize)
    assert noise.keys() == {f"blocks.{block}.{name}" for block in (0, 1) for name in TARGETS if name != "attn2.to_k"}
    assert min(noise.values()) > (40 if requantize else 100)
    assert not any("lora" in name or "base_layer" in name for name, _ in model.named_modules())
    assert getattr(model, "peft_config", None) is None
    # The adapter read the exact input; where only the input is quantised, it now reads the rounded one.
    limit = 2e-2 if requantize or "act" in spec else 1e-4
    assert (predicted(model) - expected).norm() / expected.norm() < limit
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, torch_dtype=torch.float32)
    assert same_bits(loaded, model)
    assert torch.equal(predicted(loaded), predicted(model))


def test_a_small_lora_keeps_the_codes_of_a_calibrated_model():
    model = adapted(QuantSpec(weight="int3:g16"), size=0.0)
    before = {name: layer.quantized().values for name, layer in quantized_layers(model).items()}
    layer = model.blocks[0].ffn.net[2].base_layer
    learned = layer.quantized()
    layer.store_(type(learned)(values=learned.values, format=learned.format, shape=learned.shape,
                               scales=type(learned.scales)(scale=learned.scales.scale * 0.9)))  # fmt: skip
    merge_lora_(model)
    after = model.blocks[0].ffn.net[2].quantized()
    assert torch.equal(after.values, before["blocks.0.ffn.net.2"])
    assert torch.equal(after.scales.scale, learned.scales.scale * 0.9)


def with_biases():
    model = adapted(use_dora=False, lora_bias=True)
    for name, value in model.named_parameters():
        if "lora_B" in name and name.endswith("bias"):
            torch.nn.init.normal_(value, std=0.3)
    return model


def test_biases_of_adapters_merge():
    model = with_biases()
    expected = predicted(model)
    merge_lora_(model, requantize=False)
    torch.testing.assert_close(predicted(model), expected)


def test_only_active_adapters_merge():
    model = adapted()
    model.disable_adapters()
    expected = predicted(model)
    assert not merge_lora_(model)
    assert torch.equal(predicted(model), expected)


def test_what_cannot_merge_changes_nothing():
    with pytest.raises(UserError, match=r"has no quantised layers: merge its adapters with fuse_lora\(\)"):
        merge_lora_(wan())
    model = wan()
    quantize_weights(model, QuantSpec(weight="int8"))
    with pytest.raises(UserError, match="has no LoRA adapters: load one first"):
        merge_lora_(model)
    model = with_biases()
    wrapper = next(module for module in model.modules() if hasattr(module, "lora_B"))
    wrapper.base_layer.bias = None
    expected = predicted(model)
    with pytest.raises(UserError, match=r"the adapter of .* cannot be merged: it has a bias, and the layer has none"):
        merge_lora_(model)
    assert torch.equal(predicted(model), expected)
    with pytest.raises(UserError, match="a LoRA cannot be added to them"):
        model.fuse_lora()
