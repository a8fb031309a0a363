"""Layers of modulation are quantised by their own option, in 8 bits, after whatever a recipe does."""

import pytest
import torch

import postgen
from postgen.errors import UserError
from postgen.families.linear import find_linears
from postgen.quant import Calibration, CalibrationConfig, QLinear, QuantSpec, format_of, quantize, quantize_tensor
from postgen.quant.layers import layers_of, modulation_of, quantized_layers
from postgen.quant.recipes import check_recipe
from postgen.quant.stages import recipe_of
from tests.families.tiny_models import tiny_model
from tests.families.tiny_pipelines import tiny_pipeline
from tests.quant.models import same_bits, wan


def difference(model, changed):
    with torch.no_grad():
        exact, found = (each(**model.arguments, return_dict=False)[0].float() for each in (model.transformer, changed))
    return float((found - exact).norm() / exact.norm())


def quantised(name, **words):
    model, other = tiny_model(name), tiny_model(name).transformer
    quantize(other, QuantSpec(**words))
    return model, other


@pytest.mark.parametrize("name", ["HunyuanVideo", "Mochi", "Stable Diffusion 3", "Flux"])
def test_modulation_in_8_bits_adds_little_error(name):
    _, plain = quantised(name, weight="int4")
    model, both = quantised(name, weight="int4", modulation="int8")
    added = quantized_layers(both).keys() - quantized_layers(plain).keys()
    assert added == {*find_linears(model.transformer, roles=["modulation"])}
    assert all(both.get_submodule(each).spec.weight == format_of("int8") for each in added)
    assert difference(model, both) < 1.1 * difference(model, plain)
    model, alone = quantised(name, weight=None, modulation="int8")
    assert quantized_layers(alone).keys() == added
    assert 0 < difference(model, alone) < 0.002


def test_inputs_of_modulation_stay_exact_and_the_weights_are_rounded_to_nearest():
    model, changed = quantised("HunyuanVideo", weight="int4", act="int8:token", modulation="fp8")
    name = "transformer_blocks.0.norm1.linear"
    layer = changed.get_submodule(name)
    assert layer.spec.act is None
    exact = model.transformer.get_submodule(name).weight
    assert torch.equal(layer.dequantized(), quantize_tensor(exact.detach(), format_of("fp8")).numbers())


def test_exceptions_keep_modulation_exact_but_do_not_change_its_format():
    model = tiny_model("HunyuanVideo").transformer
    first = {r"transformer_blocks\.0\..*": {"weight": None, "act": None}, ".*": {"weight": "int2"}}
    found = modulation_of(model, QuantSpec(weight="int4", modulation="int8", overrides=first))
    names = [
        name for name in find_linears(model, roles=["modulation"]) if not name.startswith("transformer_blocks.0.")
    ]
    assert [*found] == names
    assert {each.weight.text for each in found.values()} == {"int8"}
    assert not modulation_of(model, QuantSpec(weight="int4"))
    # Recipes with integer inputs do not see these layers.
    check_recipe(recipe_of("sos"), layers_of(model, QuantSpec(weight="int4", act="int8", modulation="int8")))


def test_a_saved_model_keeps_them(tmp_path):
    _, changed = quantised("HunyuanVideo", weight="int4", modulation="int8")
    changed.save_pretrained(tmp_path)
    again = type(changed).from_pretrained(tmp_path)
    assert same_bits(again, changed)
    assert again.config.quantization_config.modulation == "int8"
    tiny_model("HunyuanVideo").transformer.save_pretrained(tmp_path / "exact")
    config = postgen.PostgenQuantConfig(weight="int4", modulation="int8")
    assert same_bits(type(changed).from_pretrained(tmp_path / "exact", quantization_config=config), changed)


def test_wrong_choices_are_refused():
    with pytest.raises(UserError, match="blocks of WanTransformer3DModel have no linear layers of modulation: leave"):
        quantize(wan(), QuantSpec(weight="int8", modulation="int8"))
    model = tiny_model("HunyuanVideo").transformer
    with pytest.raises(UserError, match=r"norm1\.linear cannot be quantised: int4:g64 groups 64 input channels"):
        quantize(model, QuantSpec(weight="int8", modulation="int4:g64"))
    with pytest.raises(UserError, match="int9"):
        QuantSpec(modulation="int9")
    with pytest.raises(
        UserError, match=r"matches transformer_blocks.0.norm1.linear, which modulation='int8' quantises"
    ):
        quantize(model, QuantSpec(weight="int8", overrides={r".*norm1\.linear": {"weight": "int8"}}))


def test_folds_change_modulation_before_it_is_rounded():
    pipe, size = tiny_pipeline("HunyuanVideo")
    config = CalibrationConfig(points=2, bins=1, num_inference_steps=2, **size)
    calibration = Calibration(pipe, ["a red ball", "a blue cube", "a cone"], config)
    exact = {name: each.weight.detach().clone() for name, each in modulations(pipe.transformer).items()}
    spec = QuantSpec(weight="int8", act="int8:token", modulation="int8")
    quantize(pipe, spec, recipe="omniquant", calibration=calibration, steps=2, rates=20)
    found = modulations(pipe.transformer)
    assert all(isinstance(each, QLinear) for each in found.values())
    changes = {
        name: float((each.dequantized() - exact[name]).norm() / exact[name].norm()) for name, each in found.items()
    }
    assert max(changes.values()) > 0.02 > min(changes.values())  # rounding alone changes 0.5 %
    assert drawn_latents(pipe, size).isfinite().all()


def modulations(model):
    return find_linears(model, roles=["modulation"])


def drawn_latents(pipe, size):
    return pipe("a ball", **size, num_inference_steps=1, output_type="latent", generator=torch.manual_seed(0)).frames
