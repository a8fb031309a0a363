"""Number formats give the reference numbers of published code, and every code survives packing into bits."""

import pytest
import torch

from benchmarks.quant_vectors import DECIBELS, EXPECTED, PACKED, SCALES, ours, packed, wrong
from postgen.errors import UserError
from postgen.quant import FORMATS, QuantSpec, format_of, quantize_tensor
from postgen.quant.rounding import qsnr


@pytest.mark.parametrize("which", [0, 1], ids=["even", "outlier"])
@pytest.mark.parametrize("text", EXPECTED)
def test_reference_vectors(text, which):
    values, noise = EXPECTED[text][which]
    numbers, scales, decibels = ours(text, which)
    assert numbers == values
    assert decibels == pytest.approx(noise, abs=DECIBELS)
    assert scales == SCALES[text][which]


def test_nvfp4_bit_patterns_and_the_whole_check():
    assert [packed(which) for which in (0, 1)] == [*PACKED]
    assert wrong() == []


@pytest.mark.parametrize("name", [name for name, each in FORMATS.items() if not each.planes])
def test_every_number_of_the_grid_is_its_own_rounding_and_survives_its_bits(name):
    grid = FORMATS[name].grid
    patterns = torch.arange(2**grid.bits, dtype=torch.uint8)
    numbers = (
        grid.decode(patterns) if name not in ("fp8", "mxfp8") else patterns[:127].view(torch.float8_e4m3fn).float()
    )
    inside = numbers[numbers.abs() <= grid.largest]
    assert torch.equal(grid.round(inside), inside)
    assert torch.equal(grid.decode(grid.encode(inside)), inside)


def test_e4m3_grid_equals_torch():
    x = torch.randn(10000, generator=torch.Generator().manual_seed(0)) * 60
    expected = x.clamp(-448, 448).to(torch.float8_e4m3fn)
    grid = FORMATS["fp8"].grid
    assert torch.equal(grid.round(x), expected.float())
    assert torch.equal(grid.encode(grid.round(x)), expected.view(torch.uint8))


def test_gaussian_noise_of_the_formats():
    x = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
    expected = {"mxint8": 41.61, "mxfp8": 31.52, "mxint6": 29.42, "mxfp6": 30.96, "mxint4": 16.84, "mxfp4": 18.75,
                "nvint4": 21.28, "nvfp4": 20.44}  # fmt: skip
    for name, noise in expected.items():
        assert qsnr(x, quantize_tensor(x, FORMATS[name]).numbers()) == pytest.approx(noise, abs=0.05), name


def test_asymmetric_numbers_keep_zero_and_both_extremes():
    x = torch.tensor([[-1.0, 0.0, 0.25, 2.0]])
    found = quantize_tensor(x, format_of("int2:asym"))
    assert found.scales.scale.item() == 1
    assert found.scales.zero.item() == 1
    assert found.numbers().tolist() == [[-1, 0, 0, 2]]


@pytest.mark.parametrize("sign", [1, -1])
def test_the_zero_point_is_a_code_for_numbers_of_one_sign(sign):
    x = sign * torch.tensor([[5.0, 5.5, 6.0, 5.25]])
    found = quantize_tensor(x, format_of("int4:asym"))
    assert 0 <= found.scales.zero.item() <= 15
    assert (found.numbers() - x).abs().max() <= 0.2


@pytest.mark.parametrize("text", ["fp8:block", "int4:tensor", "int8", "int4:g16", "bp2:g16", "nvfp4"])
def test_grouping_is_undone(text):
    x = torch.randn(130, 256, generator=torch.Generator().manual_seed(0))
    found = quantize_tensor(x, format_of(text)).numbers()
    assert found.shape == x.shape
    assert qsnr(x, found) > (5 if text == "bp2:g16" else 9)


def test_zeros_stay_zeros():
    for format in FORMATS.values():
        assert quantize_tensor(torch.zeros(2, 64), format).numbers().abs().max() == 0


@pytest.mark.parametrize("text", ["int4:g64", "mxfp4:floor", "fp8:block", "int3:g128:asym", "bp2:g128", "nvint4"])
def test_the_text_of_a_format_names_it(text):
    assert format_of(format_of(text).text) == format_of(text)
    assert format_of(text).text == text


@pytest.mark.parametrize(
    ("text", "said"),
    [("int9", "int9"), ("int4:g0", "'g0'"), ("mxfp4:g16", "floor, rceil"), ("fp8:asym", "'asym'"),
     ("nvfp4:row", "none"), ("bp2:row", "gN"), (4, "unknown")],
)  # fmt: skip
def test_unknown_formats_are_refused(text, said):
    with pytest.raises(UserError, match=said):
        format_of(text)


def test_a_group_that_does_not_divide_is_refused_with_one_that_does():
    with pytest.raises(UserError, match=r"groups 64 input channels, but the layer has 96.*g32"):
        quantize_tensor(torch.randn(2, 96), format_of("int4:g64"))


def test_stored_bits():
    assert format_of("int4:g64").bits(512, 512) == 4.5
    assert format_of("bp2:g64").bits(512, 512) == 2.75
    assert format_of("nvfp4").bits(1, 2**20) == pytest.approx(4.5, abs=1e-4)
    assert format_of("mxfp4").bits(512, 512) == 4.25


def test_the_first_matching_exception_decides():
    spec = QuantSpec(weight="int4:g64", overrides={r".*ffn.*": {"act": "fp8:token"}, r".*\.2": {"weight": "int8"}})
    assert spec.layer("blocks.0.ffn.2").weight.name == "int4"
    assert spec.layer("blocks.0.ffn.2").act.name == "fp8"
    assert spec.layer("blocks.0.attn.2").weight.name == "int8"
    assert spec.layer("blocks.0.attn.2").act is None


@pytest.mark.parametrize(
    ("given", "said"),
    [({"weight": None}, "both None"), ({"act": "bp2"}, "weights only"), ({"rotate": 3}, "power of two"),
     ({"rank": -1}, "rank"), ({"overrides": {"(": {}}}, "regular expression"),
     ({"overrides": {"a": {"weigth": "int4"}}}, "Did you mean 'weight'"), ({"overrides": {"a": 3}}, "mapping")],
)  # fmt: skip
def test_wrong_specs_are_refused(given, said):
    with pytest.raises(UserError, match=said):
        QuantSpec(**given)
