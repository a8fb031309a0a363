"""Quantised models survive diffusers' save and load bit by bit, and wrong checkpoints are refused in one line."""

import copy
import json
import sys
from dataclasses import replace
from importlib import import_module

import pytest
import torch
from diffusers import DiffusionPipeline, PipelineQuantizationConfig, WanPipeline
from diffusers.quantizers import auto
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import nn

import postgen
from postgen.compat import quantizers
from postgen.errors import UserError
from postgen.quant import QLinear, QuantSpec, quantize_tensor
from postgen.quant.hf import PostgenQuantConfig, mark_quantized
from postgen.quant.layers import quantized_layers
from postgen.quant.model import quantize_weights, replace_with
from postgen.quant.rounding import as_format
from postgen.quant.step_bins import StepBins
from postgen.quant.transforms.gains import gained_blocks
from postgen.quant.transforms.let import fold_, let_points
from tests.quant.models import arguments, predicted, same_bits, wan
from tests.tiny_wan import wan_components

BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
MIXED = {
    r".*attn1\.to_q": {"weight": "nvfp4", "act": "int8"},
    r".*attn1\.to_k": {"weight": "mxfp6", "act": None},
    r".*attn1\.to_v": {"weight": "bp3:g16", "act": None},
    r".*attn2\.to_q": {"weight": "int3:g16:asym", "rotate": 16, "rank": 2},
    r".*attn2\.to_out\.0": {"weight": None},
    r".*ffn\.net\.0\.proj": {"weight": "fp8:tensor"},
}
SPEC = QuantSpec(weight="int4:g16", act="fp8", overrides=MIXED)


@BOTH
def test_a_quantised_model_is_loaded_bit_by_bit(tmp_path, dtype):
    model = wan(dtype, tmp_path / "exact")
    quantize_weights(model, SPEC)
    model.save_pretrained(tmp_path / "out")
    loaded = type(model).from_pretrained(tmp_path / "out", torch_dtype=dtype)
    assert same_bits(loaded, model)
    assert torch.equal(predicted(loaded), predicted(model))
    loaded.save_pretrained(tmp_path / "again")
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        first, second = ((tmp_path / folder / name).read_bytes() for folder in ("out", "again"))
        assert first.replace(b"exact", b"out") == second or name == "config.json"
    configs = [json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("out", "again")]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]
    assert "16 linear layers are QLinear" in str(postgen.summary(loaded))


def test_a_model_in_several_files_is_loaded_to_a_device(tmp_path):
    model = wan()
    quantize_weights(model, SPEC)
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    loaded = type(model).from_pretrained(tmp_path, device_map={"": "cpu"})
    assert same_bits(loaded, model)
    assert torch.equal(predicted(loaded), predicted(model))


def test_codes_do_not_depend_on_the_dtype_of_the_loaded_model(tmp_path):
    model = wan()
    quantize_weights(model, SPEC)
    model.save_pretrained(tmp_path)
    for dtype in (torch.bfloat16, torch.float16):
        loaded = type(model).from_pretrained(tmp_path, torch_dtype=dtype)
        for name, layer in quantized_layers(loaded).items():
            stock = model.get_submodule(name)
            assert layer.packed().keys() == stock.packed().keys()
            if layer.spec.weight is not None:
                assert all(torch.equal(each, stock.packed()[key]) for key, each in layer.packed().items())
        assert loaded.blocks[0].attn2.to_q.branch_up.dtype == dtype
        assert loaded.blocks[0].norm2.weight.dtype == torch.float32  # as diffusers keeps it in exact models


@BOTH
def test_a_model_is_quantised_while_it_is_loaded(tmp_path, dtype):
    model = wan(dtype, tmp_path / "exact")
    config = PostgenQuantConfig(**SPEC.to_dict())
    loaded = type(model).from_pretrained(tmp_path / "exact", quantization_config=config, torch_dtype=dtype)
    quantize_weights(model, SPEC)
    assert same_bits(loaded, model)
    assert config.layers is None  # the object of the caller serves for further models
    loaded.save_pretrained(tmp_path / "out")
    assert same_bits(type(model).from_pretrained(tmp_path / "out", torch_dtype=dtype), model)


def test_a_pipeline_quantises_its_components(tmp_path):
    WanPipeline(**wan_components(head_dim=16)).save_pretrained(tmp_path / "exact")
    mapping = {"transformer": PostgenQuantConfig(weight="int8", act="int8")}
    pipe = DiffusionPipeline.from_pretrained(
        tmp_path / "exact", quantization_config=PipelineQuantizationConfig(quant_mapping=mapping)
    )
    assert len(quantized_layers(pipe.transformer)) == 16
    pipe.save_pretrained(tmp_path / "out")
    again = DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert same_bits(again.transformer, pipe.transformer)
    words = {"height": 16, "width": 16, "num_frames": 5, "num_inference_steps": 1, "output_type": "latent"}
    first, second = (
        each("a cube", generator=torch.Generator().manual_seed(0), **words).frames for each in (pipe, again)
    )
    assert torch.equal(first, second)


def test_scales_signs_and_clips_of_a_recipe_are_kept(tmp_path):
    model, bins = wan(), StepBins([700.0, 300.0])

    def make(name, linear, spec):
        scale, signs = torch.rand(32) + 0.5, torch.randint(2, (32,)) * 2 - 1
        clip = bins, torch.tensor([0.6, 0.8, 1.0])
        found = quantize_tensor(linear.weight * scale, spec.weight)
        return QLinear.of(linear, found, spec, input_scale=scale, signs=signs, clip=clip)

    torch.manual_seed(0)
    replace_with(model, QuantSpec(weight="int8", act="int8", rotate=16), make)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert same_bits(loaded, model)
    assert loaded.blocks[0].ffn.net[2].bins is loaded.blocks[1].ffn.net[2].bins
    for timestep in (900, 500, 100):
        told = arguments() | {"timestep": torch.tensor([timestep])}
        with torch.no_grad():
            assert torch.equal(loaded(**told, return_dict=False)[0], model(**told, return_dict=False)[0])
    other = copy.deepcopy(loaded)
    other.blocks[0].ffn.net[2].bins.current = torch.tensor([2])
    assert loaded.blocks[0].ffn.net[2].bins.current.tolist() == [2]  # timestep 100
    predicted(other)
    assert other.blocks[0].ffn.net[2].bins.current.tolist() == [1]


def test_zero_points_that_are_no_bytes_are_kept(tmp_path):
    model = wan()
    quantize_weights(model, QuantSpec(weight="int4:g16:asym"))
    layer = model.blocks[0].ffn.net[2]
    found = layer.quantized()
    layer.store_(as_format(found, replace(found.scales, zero=found.scales.zero + 0.5)))
    model.save_pretrained(tmp_path)
    for words in ({}, {"torch_dtype": torch.float32}):
        assert same_bits(type(model).from_pretrained(tmp_path, **words), model)


def test_folds_are_kept(tmp_path):
    model = wan()
    point = next(each for each in let_points(model, "blocks.0") if each.kind == "norm")
    fold_(model, point, torch.rand(point.width) + 0.5)
    quantize_weights(model, QuantSpec(weight="int8"))
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, torch_dtype=torch.float32)
    assert gained_blocks(loaded) == ["blocks.0"]
    assert same_bits(loaded, model)
    assert torch.equal(predicted(loaded), predicted(model))
    with pytest.raises(UserError, match=r"blocks\.0 was folded, .* load the exact model instead"):
        loaded.dequantize()


def test_dtypes_and_devices_of_a_loaded_model(tmp_path):
    model = wan()
    quantize_weights(model, SPEC)
    expected = predicted(model)
    assert torch.equal(predicted(model.to("cpu")), expected)
    with pytest.raises(ValueError, match="Casting a quantized model"):
        model.to(torch.bfloat16)
    assert all(not each.requires_grad for layer in quantized_layers(model).values() for each in layer.parameters())
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`low_cpu_mem_usage` cannot be False"):
        type(model).from_pretrained(tmp_path, low_cpu_mem_usage=False)


def test_without_the_import_diffusers_says_what_is_unknown(saved, monkeypatch):
    kind, folder = saved
    for table in (auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING):
        monkeypatch.delitem(table, "postgen")
    with pytest.raises(ValueError, match="Unknown quantization type, got postgen"):
        kind.from_pretrained(folder)


@pytest.mark.parametrize("first", ["tables", "postgen", "classes"])
def test_the_order_of_imports_does_not_matter(tmp_path, monkeypatch, first):
    tables, classes = f"tables_of_quantisers_{first}", f"classes_of_quantisers_{first}"
    (tmp_path / f"{tables}.py").write_text("AUTO_QUANTIZER_MAPPING, AUTO_QUANTIZATION_CONFIG_MAPPING = {}, {}\n")
    (tmp_path / f"{classes}.py").write_text(
        f"import {tables}\nfrom postgen.compat.quantizers import register_quantizer\n\n\nclass Mine: ...\n\n\n"
        "class Config: ...\n\n\nregister_quantizer('mine', __name__, 'Mine', 'Config')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(quantizers, "_TABLES", tables)
    finders = list(sys.meta_path)
    if first == "tables":
        import_module(tables)
    quantizers.register_quantizer("mine", classes, "Mine", "Config")
    if first == "classes":
        import_module(classes)
    found, made = import_module(tables), sys.modules[classes]
    assert found.AUTO_QUANTIZER_MAPPING["mine"] is made.Mine
    assert found.AUTO_QUANTIZATION_CONFIG_MAPPING["mine"] is made.Config
    assert type(found.__spec__.loader).__name__ == "SourceFileLoader"
    assert sys.meta_path == finders
    monkeypatch.delitem(sys.modules, tables)
    monkeypatch.delitem(sys.modules, classes)


def test_other_names_in_the_library_do_not_break_its_import(tmp_path, monkeypatch):
    (tmp_path / "later_tables.py").write_text("AUTO_QUANTIZER_MAPPING = {}\n")
    (tmp_path / "later_classes.py").write_text("from later_tables import Base\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(quantizers, "_TABLES", "later_tables")
    quantizers.register_quantizer("mine", "later_classes", "Mine", "Config")
    with pytest.warns(UserWarning, match="diffusers cannot load mine checkpoints: cannot import name 'Base'"):
        assert import_module("later_tables").AUTO_QUANTIZER_MAPPING == {}
    monkeypatch.delitem(sys.modules, "later_tables")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    model = wan()
    quantize_weights(model, QuantSpec(weight="int4:g16"))
    model.save_pretrained(folder)
    return type(model), folder


def changed(saved, tmp_path, *, tensors=None, config=None):
    """Copy a saved model with changed tensors or config, and load the copy."""
    kind, folder = saved
    state = load_file(folder / "diffusion_pytorch_model.safetensors")
    said = json.loads((folder / "config.json").read_text())
    if tensors is not None:
        tensors(state)
    if config is not None:
        config(said)
    save_file(state, tmp_path / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(said))
    return kind.from_pretrained(tmp_path)


SCALE = "blocks.1.ffn.net.2.weight_scale"


def group_with(**values):
    return lambda said: said["quantization_config"]["layers"][0].update(values)


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        (lambda state: state.pop(SCALE), None, rf"lacks 1 tensors of quantised layers, the first is {SCALE}"),
        (
            lambda state: state.update({SCALE: state[SCALE][:20]}), None,
            rf"{SCALE} must have the shape \(32, 2\), got \(20, 2\): the checkpoint is of a model of another size",
        ),
        (
            lambda state: state.update({SCALE: state[SCALE].view(torch.float32)}), None,
            rf"{SCALE} must be torch.int32 in a quantised checkpoint, got torch.float32",
        ),
        (None, lambda said: said.update(num_layers=1), "weights for 'blocks.1.attn1.to_q', but Wan.* no such"),
        (None, lambda said: said.update(ffn_dim=64), r"ffn.net.0.proj.\w+ must have the shape \(64,.*\), got"),
        (None, lambda said: said["quantization_config"].pop("layers"), "does not name its quantised layers"),
        (
            None, lambda said: said["quantization_config"]["layers"][0].pop("rotate"),
            "a group of quantised layers in the config must have act, .*written by another version",
        ),
        (
            None, lambda said: said["quantization_config"]["layers"][0].update(weight="int9"),
            "the number format 'int9' is unknown",
        ),
        (
            lambda state: state.update({SCALE.replace("weight", "branch"): state[SCALE].clone()}), None,
            r"has 1 tensors that its config does not tell about, the first is blocks\.1\.ffn\.net\.2\.branch_scale",
        ),
        (None, group_with(names=[]), "tensors that its config does not tell about, the first is blocks.0.attn1.to_k"),
        (None, group_with(bias=False), r"does not tell about, the first is blocks\.0\.attn1\.to_k\.bias"),
        (
            lambda state: state.update({"blocks.0.temb_gain": torch.ones(6, 32, dtype=torch.int32)}), None,
            r"does not tell about, the first is blocks\.0\.temb_gain",
        ),
        (None, lambda said: said["quantization_config"].update(gains=["blocks.0"]), r"lacks 8 tensors.*blocks\.0\."),
        (None, lambda said: said["quantization_config"].update(gains=4), "gains of a Postgen.* must be a list"),
        (None, group_with(rotate="8"), "rotate is '8'"),
        (None, group_with(rank=-2), "rank is -2"),
        (None, group_with(clips="3"), "clips of a group of quantised layers must be a whole number, got '3'"),
        (None, group_with(signs="no"), "signs of a group of quantised layers must be true or false, got 'no'"),
    ],
)  # fmt: skip
def test_broken_checkpoints_are_refused_in_one_line(saved, tmp_path, tensors, config, message):
    with pytest.raises(UserError, match=message) as caught:
        changed(saved, tmp_path, tensors=tensors, config=config)
    assert "\n" not in str(caught.value)


def test_a_truncated_file_is_refused(saved, tmp_path):
    kind, folder = saved
    data = (folder / "diffusion_pytorch_model.safetensors").read_bytes()
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(data[: len(data) // 2])
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(OSError, match="Unable to load weights from checkpoint file"):
        kind.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"weight": "int9"}, "the number format 'int9' is unknown"),
        ({"weigth": "int4"}, "PostgenQuantConfig has no argument 'weigth'. Did you mean 'weight'"),
        ({"weight": None}, "weight and act are both None"),
        ({"rotate": 3}, "rotate is 3"),
        ({"rank": 4, "weight": None, "act": "int8"}, "rank is 4, but all weights are exact"),
        ({"overrides": {".*": {"weight": None, "rank": 4}}}, r"rank in overrides\['\.\*'\] has no use"),
        ({"overrides": [1]}, "overrides must map patterns of layer names to settings"),
        ({"layers": 5}, "layers of a PostgenQuantConfig must be a list"),
        ({"gains": "blocks.0"}, "gains of a PostgenQuantConfig must be a list"),
        ({"step_bins": ["a"]}, "step_bins of a PostgenQuantConfig must be a list"),
        ({"quant_method": "torchao"}, "quant_method of a PostgenQuantConfig must be postgen"),
    ],
)
def test_wrong_configs_are_refused(words, message):
    with pytest.raises(UserError, match=message):
        PostgenQuantConfig(**words)


def test_a_config_of_a_saved_model_is_refused_for_an_exact_one(tmp_path):
    kind = type(wan(folder=tmp_path))
    for words in ({"layers": []}, {"gains": ["blocks.0"]}, {"step_bins": [3.0]}):
        with pytest.raises(UserError, match="describe a saved quantised model, but this checkpoint is exact"):
            kind.from_pretrained(tmp_path, quantization_config=PostgenQuantConfig(weight="int8", **words))


def test_a_model_with_adapters_is_not_saved(tmp_path):
    model = wan()
    quantize_weights(model, QuantSpec(weight="int8"))
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(UserError, match="a LoRA is attached, and a saved quantised model cannot hold it"):
        model.save_pretrained(tmp_path)
    model.unload_lora()
    model.save_pretrained(tmp_path)
    assert same_bits(type(model).from_pretrained(tmp_path), model)


def test_layers_with_different_bins_are_refused():
    model = wan()
    quantize_weights(model, QuantSpec(weight="int8", act="int8"))
    for block in model.blocks:
        block.ffn.net[2].bins = StepBins([500.0])
    with pytest.raises(UserError, match="2 sets of bins"):
        mark_quantized(model)


def test_the_exact_model_returns_by_dequantize():
    model = wan()
    exact = predicted(model)
    quantize_weights(model, QuantSpec(weight="int8", rotate=16))
    quantised = predicted(model)
    model.dequantize()
    assert not quantized_layers(model)
    assert type(model.blocks[0].attn1.to_q) is nn.Linear
    torch.testing.assert_close(predicted(model), quantised, rtol=1e-4, atol=1e-5)
    assert not torch.equal(predicted(model), exact)
    assert model.config.get("quantization_config") is None
    quantize_weights(model, QuantSpec(weight="int8"))
