"""LoRA of peft and diffusers on quantised models: what would take codes for numbers is refused, the rest works."""

import copy
import pickle

import pytest
import torch
from peft import LoHaConfig, LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict

from postgen.errors import UserError
from postgen.quant import QLinear, QuantSpec, merge_lora_, quantize_weights
from tests.families.tiny_pipelines import tiny_pipeline
from tests.quant.models import predicted, wan

TARGETS = ["to_q", "to_v"]
REFUSED = r"quantised, so a LoRA cannot be added to them: call postgen.quant.merge_lora_\(model\)"


def quantised(weight="int8", **more):
    model = wan()
    quantize_weights(model, QuantSpec(weight=weight, **more))
    return model


def with_lora(model, targets=TARGETS, **more):
    torch.manual_seed(0)
    model.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False, **more))
    return model


@pytest.mark.parametrize("safe", [False, True])  # peft casts the LoRA to the dtype of the codes in a safe merge
@pytest.mark.parametrize("weight", ["int8", "fp8", "int4:g16"])
def test_a_lora_is_not_fused_into_codes(weight, safe):
    model = with_lora(quantised(weight), ["to_q", "to_k"])  # attn2.to_k is exact
    before = predicted(model)
    with pytest.raises(UserError, match=f"WanTransformer3DModel are {REFUSED}"):
        model.fuse_lora(lora_scale=0.5, safe_fusing=safe)
    assert torch.equal(predicted(model), before)
    model.unfuse_lora()
    with pytest.raises(UserError, match=REFUSED):
        model.blocks[0].attn1.to_q.merge(safe_merge=safe)
    assert min(merge_lora_(model).values()) > (30 if weight != "int4:g16" else 5)


def test_a_lora_of_exact_layers_is_fused():
    model = with_lora(quantised(), ["attn2.to_k"])
    before = predicted(model)
    model.fuse_lora()
    assert model.blocks[0].attn2.to_k.merged
    torch.testing.assert_close(predicted(model), before)
    model.unfuse_lora()
    torch.testing.assert_close(predicted(model), before)


def test_a_layer_with_an_exact_weight_is_fused():
    model = with_lora(quantised(None, act="int8:token"))
    model.fuse_lora()
    assert model.blocks[0].attn1.to_q.merged


@pytest.mark.parametrize("kind", [LoraConfig, LoHaConfig])
def test_peft_does_not_merge_into_codes(kind):
    wrapped = get_peft_model(quantised(), kind(r=2, target_modules=["to_q"]))
    with pytest.raises(UserError, match="the weights of this layer are quantised"):
        wrapped.merge_and_unload(safe_merge=True)


def test_peft_wrappers_are_merged_by_postgen():
    wrapped = get_peft_model(quantised(), LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    before = predicted(wrapped.get_base_model())
    assert min(merge_lora_(wrapped).values()) > 30
    torch.testing.assert_close(predicted(wrapped.get_base_model()), before, atol=0.02, rtol=0.02)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"use_dora": True}, "DoRA needs the weights of a layer"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' needs the weights of a layer"),
        ({"init_lora_weights": "orthogonal"}, "use True or 'gaussian' or 'eva'"),
    ],
)
def test_adapters_that_read_the_weight_are_refused(words, message):
    with pytest.raises(UserError, match=message):
        quantised().add_adapter(LoraConfig(r=2, target_modules=["to_q"], **words))


def test_a_dora_file_is_refused():
    exact = wan()
    exact.add_adapter(LoraConfig(r=2, target_modules=["to_q"], use_dora=True))
    state = get_peft_model_state_dict(exact)
    model = quantised()
    with pytest.raises(UserError, match="DoRA needs the weights of a layer"):
        model.load_lora_adapter(state, prefix=None)
    with_lora(model)


def test_adapters_are_saved_loaded_exchanged_and_deleted(tmp_path):
    model = with_lora(quantised("int4:g16"))
    model.save_lora_adapter(tmp_path)
    assert model.is_quantized
    place = {"prefix": None, "adapter_name": "a", "weight_name": "pytorch_lora_weights.safetensors"}
    other = quantised("int4:g16")
    plain = predicted(other)
    other.enable_lora_hotswap(target_rank=4)
    other.load_lora_adapter(tmp_path, **place)
    torch.testing.assert_close(predicted(other), predicted(model))
    other.load_lora_adapter(tmp_path, hotswap=True, **place)
    torch.testing.assert_close(predicted(other), predicted(model))
    other.set_adapters(["a"], [0.5])
    half = predicted(other)
    assert not torch.allclose(half, predicted(model))
    merged = copy.deepcopy(other)
    merge_lora_(merged, requantize=False)
    torch.testing.assert_close(predicted(merged), half)
    other.delete_adapters("a")
    torch.testing.assert_close(predicted(other), plain)


def test_copies_and_pickles_refuse_too():
    model = with_lora(quantised())
    for each in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(predicted(each), predicted(model))
        with pytest.raises(UserError, match=REFUSED):
            each.fuse_lora()


def test_projections_are_not_joined(tmp_path):
    with pytest.raises(UserError, match=r"cannot be joined: leave fuse_qkv_projections\(\) out"):
        quantised().fuse_qkv_projections()
    quantised().save_pretrained(tmp_path)
    model = type(wan()).from_pretrained(tmp_path)
    with pytest.raises(UserError, match="cannot be joined"):
        model.fuse_qkv_projections()
    model.dequantize()
    model.fuse_qkv_projections()
    assert predicted(model).isfinite().all()
    with_lora(model, ["to_out.0"]).fuse_lora()


@pytest.mark.parametrize("name", ["FLUX", "HunyuanVideo"])
def test_pipelines_load_loras_into_packed_layers(name):
    pipe, _ = tiny_pipeline(name)
    quantize_weights(pipe.transformer, QuantSpec(weight="int4"))
    donor = with_lora(copy.deepcopy(pipe.transformer), ["attn.to_q"])
    state = {f"transformer.{key}": value for key, value in get_peft_model_state_dict(donor).items()}
    for _ in range(2):
        pipe.load_lora_weights(dict(state), adapter_name="a")
        layer = pipe.transformer.transformer_blocks[0].attn.to_q
        assert isinstance(layer.base_layer, QLinear)
        assert torch.equal(layer.lora_A["a"].weight, donor.transformer_blocks[0].attn.to_q.lora_A["default"].weight)
        with pytest.raises(UserError, match=REFUSED):
            pipe.fuse_lora(components=["transformer"])
        pipe.unload_lora_weights()
        assert isinstance(pipe.transformer.transformer_blocks[0].attn.to_q, QLinear)
