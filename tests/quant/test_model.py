"""Which layers are quantised, what is reported, and what is refused."""

import copy
import math

import pytest
import torch
from torch import nn

import postgen
from postgen.errors import UserError
from postgen.families.linear import find_linears, replaced_linears
from postgen.fp8_linear import apply_fp8_linears
from postgen.lit import convert
from postgen.quant import QLinear, QuantSpec, format_of, linear, quantize_tensor, recipes
from postgen.quant.layers import layers_of, parts_of, quantized_layers
from postgen.quant.model import quantize_weights, rtn
from tests.families.tiny_models import tiny_model
from tests.quant.models import predicted, wan

WAN = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "attn2.to_q", "attn2.to_out.0", "ffn.net.0.proj",
       "ffn.net.2")  # fmt: skip


def test_the_default_layers_of_wan():
    names = [f"blocks.{block}.{name}" for block in (0, 1) for name in WAN]
    assert list(layers_of(wan(), QuantSpec(weight="int4:g16"))) == names


@pytest.mark.parametrize("name", ["CogVideoX 1.5", "HunyuanVideo", "LTX", "Flux", "PixArt", "Wan"])
def test_every_family_can_be_quantised(name):
    tiny = tiny_model(name)
    expected = tiny()
    report = quantize_weights(tiny.transformer, QuantSpec(weight="int8", act="int8:token"))
    assert report.layers.keys() == quantized_layers(tiny.transformer).keys()
    assert (tiny() - expected).norm() / expected.norm() < 0.05
    assert report.bytes_after < report.bytes_before


def test_overrides_change_layers_and_keep_them_exact():
    spec = QuantSpec(
        weight="int4:g16",
        act="fp8",
        overrides={r".*ffn\.net\.2": {"act": "int8", "rotate": 16}, r"blocks\.0\..*": {"weight": None, "act": None}},
    )
    found = layers_of(wan(), spec)
    assert "blocks.0.attn1.to_q" not in found
    assert found["blocks.0.ffn.net.2"].act == format_of("int8")  # the first match decides
    assert found["blocks.1.ffn.net.2"].rotate == 16
    assert found["blocks.1.ffn.net.0.proj"].act == format_of("fp8")


def test_an_exception_for_exact_layers_alone_quantises_them():
    """The keys and values of the text are exact by default; a pattern that also matches others leaves them so."""
    text = [f"blocks.{block}.attn2.to_{name}" for block in (0, 1) for name in "kv"]
    both = {r".*attn2\.to_[kv]": {"weight": "int8", "act": None}, r".*to_[kv]": {"weight": "int4:g16"}}
    found = layers_of(wan(), QuantSpec(weight="int4:g16", act="fp8", overrides=both))
    assert [name for name in found if name in text] == text
    assert {(found[name].weight, found[name].act) for name in text} == {(format_of("int8"), None)}
    others = layers_of(wan(), QuantSpec(weight="int4:g16", overrides={r".*to_[kv]": {"weight": "int8"}}))
    assert not others.keys() & set(text)
    model = wan()
    quantize_weights(model, QuantSpec(weight="int4:g16", overrides={r".*attn2\.to_[kv]": {"weight": "int8"}}))
    assert isinstance(model.blocks[1].attn2.to_v, QLinear)


def test_the_report_counts_bits_bytes_and_noise():
    model, spec = wan(), QuantSpec(weight="int4:g16", act="fp8", rotate=16)
    exact = {name: linear.weight.detach().clone() for name, linear in find_linears(model).items()}
    before = sum(each.nbytes for each in model.state_dict().values())
    report = quantize_weights(model, spec)
    assert report.bytes_before == before
    assert report.bytes_after == sum(each.nbytes for each in model.state_dict().values())
    assert report.bits == pytest.approx(4 + 32 / 16)
    layer = report.layers["blocks.1.ffn.net.2"]
    new = model.get_submodule("blocks.1.ffn.net.2")
    weight = exact["blocks.1.ffn.net.2"].double()
    noise = (weight - new.effective_weight()).square().sum()
    assert layer.qsnr == pytest.approx(-10 * math.log10(noise / weight.square().sum()))
    assert (layer.weight, layer.act, layer.rotate, layer.shape) == ("int4:g16", "fp8", 16, (32, 32))
    assert report.to_dict()["layers"]["blocks.1.ffn.net.2"]["qsnr"] == layer.qsnr
    assert "16 linear layers quantised to 6.00 bits per weight" in str(report)
    assert f"with a relative error of {100 * 10 ** (-report.qsnr / 20):.1f} % (QSNR {report.qsnr:.1f} dB)" in str(
        report
    )


def test_a_branch_lowers_the_noise_and_an_exact_weight_has_none():
    plain = quantize_weights(wan(), QuantSpec(weight="int2:g16"))
    branch = quantize_weights(wan(), QuantSpec(weight="int2:g16", rank=16))
    inputs = quantize_weights(wan(), QuantSpec(weight=None, act="int8"))
    assert branch.qsnr > plain.qsnr + 2
    assert branch.bits == pytest.approx(4 + 32 * 16 * 2 / 32)
    assert inputs.qsnr == math.inf
    assert str(inputs).startswith(
        "the inputs of 16 linear layers are quantised; their weights are exact; the model has"
    )
    assert inputs.to_dict()["layers"]["blocks.0.ffn.net.2"]["qsnr"] is None


def test_progress_is_shown_if_asked_for(capfd):
    quantize_weights(wan(), QuantSpec(weight="int8"))
    assert capfd.readouterr().err == ""
    quantize_weights(wan(), QuantSpec(weight="int8"), progress=True)
    assert "16/16" in capfd.readouterr().err


def test_a_model_given_to_the_rounding_of_tensors_is_refused():
    with pytest.raises(UserError, match=r"rounds a tensor, got .*: postgen\.quant\.quantize quantises a model"):
        quantize_tensor(wan(), format_of("int8"))


def test_solve_gets_the_weight_that_remains():
    model, seen = wan(), {}
    spec = QuantSpec(weight="int4:g16", rotate=16, rank=2)

    def solve(name, linear, each):
        seen[name] = linear.weight
        assert linear.bias is None
        return rtn(name, linear, each)

    quantize_weights(model, spec, solve)
    for name, layer in quantized_layers(model).items():
        assert torch.equal(layer.quantized().numbers(), quantize_tensor(seen[name], format_of("int4:g16")).numbers())


def test_a_copy_of_a_quantised_model_is_its_own():
    model = wan()
    quantize_weights(model, QuantSpec(weight="int4:g16", act="int8"))
    other = copy.deepcopy(model)
    assert torch.equal(predicted(other), predicted(model))
    for layer in quantized_layers(other).values():
        layer.weight.zero_()
    assert not torch.equal(predicted(other), predicted(model))
    assert "16 linear layers are QLinear" in str(postgen.summary(other))
    assert all(each in other.modules() for each in replaced_linears(other)["quant"].modules.values())


def test_a_compiled_layer_computes_the_same():
    model = wan()
    quantize_weights(model, QuantSpec(weight="int4:g16", act="int8", rotate=16))
    layer = model.blocks[0].ffn.net[2]
    x = torch.randn(1, 3, 32)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), layer(x))
    x.requires_grad_()
    layer(x).sum().backward()
    expected, x.grad = x.grad, None
    compiled(x).sum().backward()
    torch.testing.assert_close(x.grad, expected)


@torch.no_grad()
def test_queries_keys_and_values_share_one_rounding(monkeypatch):
    model, seen = wan(), []
    quantize_weights(model, QuantSpec(weight="int8", act="int8", rotate=16))
    expected = predicted(model)
    real = linear.input_rows
    monkeypatch.setattr(linear, "input_rows", lambda x, *words: seen.append(x.shape) or real(x, *words))
    for layer in quantized_layers(model).values():
        layer.mode = "int8"
    torch.testing.assert_close(predicted(model), expected, rtol=1e-4, atol=1e-5)
    assert len(seen) == 2 * (1 + 5)  # of 8 layers in each block


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"weight": "int4:g64"}, r"blocks\.0\.attn1\.to_q cannot be quantised: int4:g64 groups 64 .* has 32: .* g32"),
        ({"weight": "int4:g16", "rotate": 64}, r"to_q cannot be quantised: rotate is 64, .* 32 channels"),
        ({"weight": "int4:g16", "rank": 33}, r"to_q cannot be quantised: rank is 33, but the layer is 32 x 32"),
        ({"weight": "int4:g16", "overrides": {"ffn": {}}}, r"the pattern 'ffn' of overrides matches no layer that is"),
        ({"weight": "int4:g16", "overrides": {"ffn": {}}}, r"must match the whole name: use '\.\*ffn\.\*'\. Layers: "),
        ({"weight": "int4:g16", "overrides": {"proj_out": {}}}, "proj_out, which always stays exact"),
        ({"weight": "int4:g16", "overrides": {".*": {"weight": None}}}, "keep every layer exact"),
    ],
)
def test_specs_that_do_not_fit_change_nothing(spec, message):
    model = wan()
    with pytest.raises(UserError, match=message):
        quantize_weights(model, QuantSpec(**spec))
    assert not quantized_layers(model)
    quantize_weights(model, QuantSpec(weight="int4:g16"))  # the model is as before


def test_quantised_layers_belong_to_nobody_else():
    model = wan()
    quantize_weights(model, QuantSpec(weight="int8"))
    with pytest.raises(UserError, match="quantised already: load the exact model"):
        quantize_weights(model, QuantSpec(weight="int8"))
    with pytest.raises(UserError, match="already replaced by quant"):
        apply_fp8_linears(model)
    with pytest.raises(RuntimeError, match="floating point"):
        model.blocks[0].attn1.fuse_projections()


def test_other_methods_refuse_a_quantised_model_and_their_models_are_refused():
    converted = wan()
    convert(converted)
    with pytest.raises(UserError, match=r"the format of postgen\.lit\.load\(folder\) in its config, which cannot be"):
        quantize_weights(converted, QuantSpec(weight="int8"))
    with pytest.raises(UserError, match="in its config"):  # and not after hours of training
        recipes.quantize(converted, QuantSpec(weight="int8"), recipe="gptq")
    assert not quantized_layers(converted)
    model = wan()
    quantize_weights(model, QuantSpec(weight="int8"))
    with pytest.raises(UserError, match="quantised already"):
        recipes.quantize(model, QuantSpec(weight="int8"), recipe="gptq")
    with pytest.raises(UserError, match=r"is quantised \(blocks.* is a QLinear\), so it cannot be converted"):
        convert(model)


def test_a_model_without_a_layout_is_refused():
    with pytest.raises(UserError, match="Sequential"):
        quantize_weights(nn.Sequential(nn.Linear(32, 32)), QuantSpec(weight="int8"))
    assert "blocks.0.attn2.to_k" not in parts_of(wan())
    assert not isinstance(wan().blocks[0].attn2.to_k, QLinear)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_weights_that_are_not_finite_are_refused(value, name):
    model = wan()
    getattr(model.blocks[1].ffn.net[2], name).data[0] = value
    with pytest.raises(UserError, match=rf"net\.2 cannot be quantised: its {name} has NaN or infinite numbers"):
        quantize_weights(model, QuantSpec(weight="int8"))
    assert not quantized_layers(model)


def test_a_compiled_model_is_quantised():
    model = wan()
    compiled = torch.compile(model, backend="eager")
    predicted(compiled)
    quantize_weights(compiled, QuantSpec(weight="int4:g8"))
    assert len(quantized_layers(model)) == 16
    torch.testing.assert_close(predicted(compiled), predicted(model))
