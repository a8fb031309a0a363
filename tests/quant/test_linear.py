"""A quantised linear layer computes what its formats say, in every mode, and LoRA on top of it trains."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from postgen.errors import UserError
from postgen.quant import LayerSpec, QLinear, format_of, quantize_tensor
from postgen.quant.products import eight_bits, rounded
from postgen.quant.rotation import rotated, rotated_back
from postgen.quant.rounding import as_format
from postgen.quant.step_bins import StepBins

K, N = 64, 48


def layer(dtype=torch.float32, bias=True):
    torch.manual_seed(0)
    return nn.Linear(K, N, bias=bias, dtype=dtype)


def inputs(dtype=torch.float32):
    return torch.randn(2, 5, K, generator=torch.Generator().manual_seed(1)).to(dtype)


def spec_of(weight, act=None, **more):
    return LayerSpec(weight=weight and format_of(weight), act=act and format_of(act), **more)


def made(weight, act=None, linear=None, **more):
    linear, spec = linear or layer(), spec_of(weight, act, **more)
    return QLinear.of(linear, None if weight is None else quantize_tensor(linear.weight, spec.weight), spec)


@pytest.mark.parametrize(
    "text",
    ["int4:g32", "int3:asym", "int5", "int8", "int8:asym", "fp8", "mxint8", "fp8:block", "mxfp4", "nvfp4", "bp2:g32"],
)
def test_a_layer_with_exact_input_multiplies_with_the_numbers_of_its_codes(text):
    linear = layer() if text != "fp8:block" else nn.Linear(128, N)
    x = torch.randn(3, linear.in_features)
    new = made(text, linear=linear)
    numbers = new.quantized().numbers()
    assert new.mode == "dequant"
    torch.testing.assert_close(new.dequantized(), numbers, rtol=0, atol=1e-7 if "bp" in text else 0)
    assert torch.equal(new(x), nn.functional.linear(x, new.dequantized(), linear.bias))
    if "bp" not in text:  # coefficients of planes are stored as bfloat16
        assert torch.equal(new.quantized().numbers(), quantize_tensor(linear.weight, format_of(text)).numbers())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("act", ["fp8:token", "int8:token", "int4:g32", "int8:asym", "mxfp4", "int6:tensor"])
def test_the_input_is_rounded_in_every_call(act, dtype):
    new, x = made("int4:g32", act, linear=layer(dtype)), inputs(dtype)
    expected = nn.functional.linear(
        quantize_tensor(x, format_of(act)).numbers(dtype), new.quantized().numbers(dtype), new.bias
    )
    assert new.mode == "sim"
    assert torch.equal(new(x), expected)
    assert new(x).dtype == dtype


@pytest.mark.parametrize(("weight", "act", "mode"), [("fp8", "fp8", "fp8"), ("int8", "int8", "int8")])
def test_products_of_8_bit_numbers_equal_the_simulation(weight, act, mode):
    new, x = made(weight, act), inputs()
    simulated = new(x)
    new.mode = mode
    assert new.mode == mode
    torch.testing.assert_close(new(x), simulated, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize(("act", "mode", "worst"), [("fp8", "fp8", 0.04), ("int8", "int8", 0.02)])
def test_a_4_bit_weight_is_expanded_for_products_of_8_bit_numbers(act, mode, worst):
    new, x = made("int4:g32", act), inputs()
    simulated = new(x)
    new.mode = mode
    assert (new(x) - simulated).norm() / simulated.norm() < worst


def test_modes_that_the_formats_do_not_allow_are_refused():
    new = made("int4:g32", "mxfp4")
    with pytest.raises(UserError, match=r"mode is 'fp8', but this layer \(.*act=mxfp4.*\) allows sim, or None"):
        new.mode = "fp8"
    new.mode = "sim"
    new.mode = None
    assert new.mode == "sim"


def test_blocks_that_share_a_scale_are_128_channels_of_a_token():
    x = torch.randn(3, 256)
    assert torch.equal(rounded(x, format_of("fp8:block")), quantize_tensor(x, format_of("fp8:g128")).numbers())


@pytest.mark.parametrize("signs", [False, True])
def test_rotation_is_orthonormal(signs):
    x = inputs(torch.float64)
    flips = torch.randint(2, (K,), generator=torch.Generator().manual_seed(2)) * 2 - 1 if signs else None
    turned = rotated(x, 16, flips)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(rotated_back(turned, 16, flips), x)
    torch.testing.assert_close(turned[..., 0], (x * (1 if flips is None else flips))[..., :16].sum(-1) / 4)


def test_scales_rotation_and_branch_cancel():
    linear, x = layer(), inputs()
    generator = torch.Generator().manual_seed(3)
    scale = torch.rand(K, generator=generator) + 0.5
    signs = torch.randint(2, (K,), generator=generator) * 2 - 1
    branch = torch.randn(N, 3, generator=generator), torch.randn(3, K, generator=generator)
    branch = branch[0] / 10, branch[1] / 10
    weight = rotated(linear.weight.detach() * scale - branch[0] @ branch[1], 16, signs)
    spec = spec_of("int8:g16", rotate=16)
    new = QLinear.of(linear, quantize_tensor(weight, spec.weight), spec, branch=branch, input_scale=scale, signs=signs)
    assert new.spec.rank == 3
    assert (new.effective_weight() - linear.weight).norm() / linear.weight.norm() < 0.02
    torch.testing.assert_close(
        new(x), nn.functional.linear(x, new.effective_weight(), linear.bias), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("rotate", [0, 16])
def test_a_layer_may_quantise_its_input_only(rotate):
    linear, x = layer(), inputs()
    new = made(None, "int8", linear, rotate=rotate)
    assert torch.equal(new.weight, linear.weight)
    expected = nn.functional.linear(
        rotated_back(rounded(rotated(x, rotate), format_of("int8")), rotate), linear.weight, linear.bias
    )
    torch.testing.assert_close(new(x), expected, rtol=1e-5, atol=1e-5)
    x.requires_grad_()
    new(x).sum().backward()
    torch.testing.assert_close(x.grad, linear.weight.sum(0).expand_as(x))


@pytest.mark.parametrize(("weight", "act", "mode"), [("int4:g32", None, None), ("fp8", "fp8", "fp8")])
def test_gradients_ignore_the_rounding_of_the_input(weight, act, mode):
    new = made(weight, act, rotate=16)
    new.mode = mode
    new.bias.requires_grad_()
    x = inputs().requires_grad_()
    out = new(x)
    out.backward(gradient := torch.randn_like(out))
    torch.testing.assert_close(x.grad, gradient @ new.effective_weight())
    torch.testing.assert_close(new.bias.grad, gradient.sum((0, 1)))
    with torch.no_grad():
        assert torch.equal(new(x), out)


def test_training_does_not_keep_expanded_weights():
    new, kept = made("int4:g32"), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape), lambda kept: kept):
        new(inputs().requires_grad_())
    assert (N, K) not in kept


def test_autocast_chooses_the_dtype():
    new, x = made("int4:g32", "int8", rotate=16), inputs()
    with torch.autocast("cpu", torch.bfloat16):
        out = new(x)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, new(x.bfloat16()))


def test_copies_moves_and_state_dicts_keep_every_bit():
    new, x = made("int3:g16:asym", "fp8", rotate=16), inputs()
    expected = new(x)
    other = QLinear(K, N, new.spec)
    other.load_state_dict(new.state_dict())
    for each in (copy.deepcopy(new), new.to("cpu"), other):
        assert torch.equal(each(x), expected)
    state = new.bfloat16().state_dict()
    assert {str(each.dtype) for name, each in state.items() if name.startswith("weight")} == {
        "torch.uint8",
        "torch.int32",
    }


@pytest.mark.parametrize("text", ["bp2:g16", "fp8", "nvfp4", "mxfp8", "int4:g16:asym"])
def test_no_tensor_of_bits_can_be_cast_and_every_library_can_send_it(text):
    new = made(text, "int8")
    assert {each.dtype for name, each in new.state_dict().items() if name != "bias"} <= {torch.uint8, torch.int32}
    assert new.quantized().scales.scale.dtype == torch.float32


def test_zero_points_that_are_no_bytes_survive_a_state_dict():
    new = made("int4:g32:asym")
    found = new.quantized()
    new.store_(as_format(found, replace(found.scales, zero=found.scales.zero + 0.5)))
    other = QLinear(K, N, new.spec)
    assert other.weight_zero.dtype == torch.uint8
    other.load_state_dict(new.state_dict())
    assert torch.equal(other(inputs()), new(inputs()))
    assert not torch.equal(new(inputs()), made("int4:g32:asym")(inputs()))


def test_wrong_parts_are_refused():
    linear = layer()
    with pytest.raises(UserError, match="int4:g128 groups 128 input channels, but the layer has 64"):
        made("int4:g128")
    with pytest.raises(UserError, match=r"rotate is 128, but the layer has 64 channels: .* at most 64"):
        made("int4:g32", rotate=128)
    with pytest.raises(UserError, match="nothing of the layer is quantised"):
        made(None)
    with pytest.raises(UserError, match=r"needs a int4:g32 weight \(48, 64\), got a int4:g64 weight \(48, 64\)"):
        QLinear.of(linear, quantize_tensor(linear.weight, format_of("int4:g64")), spec_of("int4:g32"))
    with pytest.raises(UserError, match=r"needs a int4 weight \(48, 64\), got an exact weight"):
        QLinear.of(linear, None, spec_of("int4"))
    with pytest.raises(UserError, match=r"input_scale has the shape \(48,\), the layer needs \(64,\)"):
        QLinear.of(
            linear, quantize_tensor(linear.weight, format_of("int4")), spec_of("int4"), input_scale=torch.ones(48)
        )
    with pytest.raises(UserError, match="keeps its weight exact"):
        made(None, "int8").quantized()


def test_blocks_that_share_a_scale_equal_the_simulation():
    linear = nn.Linear(256, N)
    new, x = made("fp8:block", "fp8:block", linear), torch.randn(3, 256)
    assert new.mode == "sim"
    simulated = new(x)
    new.mode = "fp8"
    torch.testing.assert_close(new(x), simulated, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.int8])
@pytest.mark.parametrize("text", ["int4:g32", "int3:asym", "int4:tensor:asym", "mxfp6", "nvfp4", "bp3:g16"])
def test_expanded_rows_fit_8_bits(text, kind):
    new = made(text)
    codes, scale = eight_bits(new.packed(), new.spec.weight, K, kind)
    numbers = new.dequantized()
    assert codes.dtype == kind
    assert (codes.float() * scale - numbers).norm() / numbers.norm() < 0.04
    used = codes.float().abs().amax() / (448 if kind == torch.float8_e4m3fn else 127)
    assert 0.4 < used <= 1


@pytest.mark.parametrize("mode", ["sim", "int8"])
def test_the_range_of_the_input_is_clipped_by_the_bin_of_the_noise_level(mode):
    linear, spec = layer(), spec_of("int8", "int8", rotate=16)
    bins, clip = StepBins([500.0]), torch.tensor([0.5, 0.9])
    new = QLinear.of(linear, quantize_tensor(rotated(linear.weight, 16), spec.weight), spec, clip=(bins, clip))
    new.mode = mode
    x = inputs()
    bins.current = torch.tensor([1, 0])
    turned = rotated(x, 16)
    most = turned.abs().amax(-1, keepdim=True) * torch.tensor([0.9, 0.5])[:, None, None]
    clipped = rounded(turned.clamp(-most, most), spec.act)
    expected = nn.functional.linear(clipped, new.dequantized(), linear.bias)
    torch.testing.assert_close(new(x), expected, rtol=1e-5, atol=1e-5)
    new.bins = None
    with pytest.raises(UserError, match="set its `bins`"):
        new(x)
