"""Packed weights hold the described bits and unpack to the same weight."""

from dataclasses import replace

import pytest
import torch

from postgen.errors import UserError
from postgen.quant import FORMATS, format_of, quantize_tensor
from postgen.quant.packing import from_bits, layout, pack, to_bits, unpack
from postgen.quant.rounding import as_format

TEXTS = [*FORMATS, "int4:g32", "int3:g16:asym", "int2:tensor:asym", "int8:asym", "fp8:block", "fp8:g64", "mxfp4:floor"]


def weight(rows=130, channels=256):
    return torch.randn(rows, channels, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("text", TEXTS)
def test_a_weight_survives_packing(text):
    format = format_of(text)
    found = quantize_tensor(weight(), format)
    if format.planes:  # coefficients are stored as bfloat16
        found = quantize_tensor(weight(), format, replace(found.scales, scale=found.scales.scale.bfloat16().float()))
    packed = pack(found)
    again = unpack(packed, format, found.shape)
    assert torch.equal(again.values, found.values)
    assert torch.equal(again.numbers(), found.numbers())
    assert {name: (tuple(each.shape), each.dtype) for name, each in packed.items()} == layout(format, found.shape)
    assert all(each.is_contiguous() for each in packed.values())


@pytest.mark.parametrize("text", TEXTS)
def test_stored_bits_are_those_of_the_format(text):
    format, shape = format_of(text), (256, 512)
    packed = pack(quantize_tensor(weight(*shape), format))
    stored = 8 * sum(each.numel() * each.element_size() for each in packed.values())
    assert stored / (shape[0] * shape[1]) == pytest.approx(format.bits(*shape), rel=1e-12)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("length", [1, 7, 24, 37])
def test_bit_streams(bits, length):
    codes = torch.randint(2**bits, (3, length), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    stream = to_bits(codes, bits)
    numbers = [sum(code << (bits * place) for place, code in enumerate(row)) for row in codes.tolist()]
    assert stream.shape == (3, -(-length * bits // 8))
    assert [int.from_bytes(bytes(row), "little") for row in stream.tolist()] == numbers
    assert torch.equal(from_bits(stream, bits, length), codes)


def test_even_channels_of_int4_are_in_the_low_nibble():
    packed = pack(quantize_tensor(torch.tensor([[1.0, -7.0, 7.0, 0.0]]), format_of("int4")))["weight"]
    assert packed.tolist() == [[0x91, 0x07]]  # -7 is 1001 in two's complement


def test_planes_belong_to_their_coefficients():
    format = format_of("bp2:g8")
    found = quantize_tensor(torch.tensor([[0.0, 1, 2, 3, 3, 2, 1, 0]]), format)  # evenly spaced: c = 0, 1, 2
    packed = pack(found)
    assert packed["weight_scale"].tolist() == [[[0, 1, 2]]]
    assert packed["weight"].tolist() == [[[0b01011010]], [[0b00111100]]]


@pytest.mark.parametrize("moved", [0.25, -40.0, 300.0])
def test_zero_points_that_are_no_bytes_are_kept(moved):
    found = quantize_tensor(weight(), format_of("int4:g32:asym"))
    found = as_format(found, replace(found.scales, zero=found.scales.zero + moved))
    packed = pack(found)
    assert packed["weight_zero"].dtype == torch.int32
    assert torch.equal(unpack(packed, found.format, found.shape).numbers(), found.numbers())


def test_packs_of_another_shape_or_format_are_refused():
    found = quantize_tensor(weight(), format_of("int4:g64"))
    packed = pack(found)
    with pytest.raises(UserError, match="no tensor weight_scale"):
        unpack({"weight": packed["weight"]}, found.format, found.shape)
    with pytest.raises(UserError, match=r"weight of .* the shape \(130, 128\), got \(100, 128\): .*truncated"):
        unpack(packed | {"weight": packed["weight"][:100]}, found.format, found.shape)
    with pytest.raises(UserError, match=r"weight_scale of .* must be torch.int32, got torch.bfloat16"):
        unpack(packed | {"weight_scale": packed["weight_scale"].bfloat16()}, found.format, found.shape)
    with pytest.raises(UserError, match="only a matrix"):
        pack(quantize_tensor(torch.randn(2, 3, 64), format_of("int4")))
