"""Fake quantisation has the values of the real one bit by bit, and gradients that train ranges and weights."""

import pytest
import torch
from torch import nn

from postgen.errors import UserError
from postgen.families.folds import Fold
from postgen.quant import FORMATS, LayerSpec, QLinear, format_of, quantize_tensor
from postgen.quant.fake import FakeQuantLinear, Let
from postgen.quant.gradients import clamped, fake_quantize, through
from postgen.quant.rounding import Scales, grouped, scales_of
from postgen.quant.step_bins import StepBins
from postgen.quant.sulq import Sulq
from postgen.quant.transforms.points import FoldPoint, Part

TEXTS = [
    *(name for name in FORMATS if not name.startswith("bp")),
    "int4:g16",
    "int3:g32:asym",
    "int8:tensor",
    "fp8:block",
]


def layer(seed=0, n=128, k=128, bias=True):
    torch.manual_seed(seed)
    return nn.Linear(k, n, bias=bias)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("clip", [1.0, 0.9])
def test_fake_numbers_equal_the_real_ones(text, clip):
    x = torch.randn(130, 128, generator=torch.Generator().manual_seed(0)).mul(7).bfloat16()
    format = format_of(text)
    real = quantize_tensor(x, format, scales_of(grouped(x, format), format, clip=clip)).numbers(x.dtype)
    assert torch.equal(fake_quantize(x, format, clip=clip), real)


def test_gradients_of_rounding():
    x = torch.tensor([[-9.0, -2.3, 0.4, 7.0]], requires_grad=True)
    format = format_of("int4")
    scales = scales_of(grouped(torch.full((1, 4), 7.0), format), format)  # the step is 1
    fake_quantize(x, format, scales).sum().backward()
    assert x.grad.tolist() == [[0, 1, 1, 1]]  # none beyond the range
    x = torch.tensor([3.0], requires_grad=True)
    clamped(x, 0, 1).backward()
    assert x.grad.item() == 1
    assert through(x, torch.tensor([0.1])).item() == torch.tensor(0.1).item()


@pytest.mark.parametrize("text", ["int4:g16", "int2:g16:asym", "mxfp4", "nvfp4", "fp8"])
def test_learned_clips_get_gradients_and_begin_near_the_range(text):
    fake = FakeQuantLinear(layer(), LayerSpec(weight=format_of(text)), ranges="lwc")
    expected = scales_of(
        grouped(fake.weight, fake.spec.weight), fake.spec.weight, clip=torch.sigmoid(torch.tensor(4.0))
    )
    assert torch.equal(fake.quantized().scales.step, expected.step)
    assert torch.sigmoid(torch.tensor(4.0)).item() == pytest.approx(0.98201, abs=1e-5)
    fake(torch.randn(2, 128)).square().mean().backward()
    for name in ("clip_high", "clip_low"):
        if getattr(fake, name) is not None:
            assert getattr(fake, name).grad.abs().sum() > 0, name
    assert torch.equal(fake.numbers(fake.folded()[0]), fake.quantized().numbers())


@pytest.mark.parametrize("text", ["int4:g16", "int2:g16:asym", "fp8", "int8:tensor"])
def test_learned_scales_begin_as_rounding_to_nearest(text):
    linear = layer()
    fake = FakeQuantLinear(linear, LayerSpec(weight=format_of(text)), ranges="lsq")
    expected = quantize_tensor(linear.weight, format_of(text))
    assert torch.equal(fake.numbers(fake.folded()[0]), expected.numbers())
    assert torch.equal(fake.quantized().values, expected.values)
    with torch.no_grad():
        fake.scale.mul_(0.9)  # zero points matter where numbers are clipped
    fake(torch.randn(2, 128)).square().mean().backward()
    assert fake.scale.grad.abs().sum() > 0
    assert fake.weight.grad.abs().sum() > 0
    assert fake.zero is None or fake.zero.grad.abs().sum() > 0
    assert torch.equal(fake.numbers(fake.folded()[0]), fake.quantized().numbers())


@pytest.mark.parametrize("half", [False, True])
def test_the_layer_computes_what_the_quantised_layer_does(half):
    """Rotated inputs and the branch too, and under autocast."""
    linear, x = layer(), torch.randn(3, 128)
    spec = LayerSpec(weight=format_of("int4:g32"), act=format_of("int4:token"), rotate=32, rank=4)
    branch = (torch.randn(128, 4) / 4, torch.randn(4, 128) / 4)
    fake = FakeQuantLinear(linear, spec, branch=branch)
    real = QLinear.of(linear, fake.quantized(), spec, branch=branch)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=half):
        a, b = fake(x), real(x)
    assert a.dtype == b.dtype == (torch.bfloat16 if half else torch.float32)
    assert torch.equal(a, b)


def folds(linear, *, shift=True):
    """Return transformations of the tensors that a layer "a" reads (its first 96 channels) and writes (32 rows)."""

    def let(width, readers, writers):
        fold = Fold(name="x", kind="norm", writers=())
        point = FoldPoint(block="", fold=fold, width=width, readers=readers, writers=writers, shiftable=shift)
        return Let(point, torch.rand(width) + 0.5, torch.randn(width) if shift else None)

    return [let(96, (Part(name="a", start=0, stop=96),), ()), let(32, (), (Part(name="a", start=64, stop=96),))]


def test_transformations_change_nothing_but_the_rounding():
    linear, x = layer(), torch.randn(3, 5, 128)
    lets, branch = folds(linear), (torch.randn(128, 4) / 4, torch.randn(4, 128) / 4)
    exact = FakeQuantLinear(linear, LayerSpec(weight=None, rotate=32), name="a", lets=lets, branch=branch)
    assert torch.allclose(exact(x), linear(x), atol=2e-5)
    rough = FakeQuantLinear(linear, LayerSpec(weight=format_of("int4")), name="a", lets=lets)
    folded = linear.weight.clone()
    folded[:, :96] *= lets[0].let_scale
    folded[64:96] /= lets[1].let_scale[:, None]
    assert torch.equal(rough.quantized().numbers(), quantize_tensor(folded, format_of("int4")).numbers())
    rough(x).square().mean().backward()
    assert all(each.grad.abs().sum() > 0 for each in lets[0].parameters())
    before = rough(x)
    rough.fix_()
    assert torch.equal(rough(x), before)


def test_the_branch_after_the_transformations():
    linear, x = layer(), torch.randn(3, 128)
    lets, branch = folds(linear), (torch.randn(128, 4) / 4, torch.randn(4, 128) / 4)
    fake = FakeQuantLinear(linear, LayerSpec(weight=None), name="a", lets=lets, branch=branch)
    (up, down), bias = fake.folded_branch()
    seen = fake.transformed(x)
    out = seen @ fake.folded()[0].T + seen @ down.T @ up.T + bias
    assert torch.allclose(fake._undone(out), linear(x), atol=2e-5)


def test_a_small_scale_is_bounded_and_can_grow():
    let = folds(layer())[0]
    with torch.no_grad():
        let.let_scale[0] = -1
    scale, _ = let.values
    assert scale[0].item() == pytest.approx(0.01)
    scale.sum().backward()
    assert (let.let_scale.grad == 1).all()


def test_inputs_are_clipped_by_the_bin_of_their_row():
    bins = StepBins([500.0])
    fake = FakeQuantLinear(layer(), LayerSpec(weight=None, act=format_of("int4:token")), bins=bins)
    with torch.no_grad():
        fake.act_clip.copy_(torch.tensor([0.5, 1.0]))
    x = torch.randn(2, 7, 128)
    bins.current = torch.tensor([1, 0])
    seen = fake.read(x)
    largest = x.abs().amax(-1)
    assert torch.allclose(seen.abs().amax(-1), largest * torch.tensor([[1.0], [0.5]]))
    seen.square().sum().backward()
    assert (fake.act_clip.grad != 0).all()


def test_inputs_by_channel():
    fake = FakeQuantLinear(layer(k=2), LayerSpec(weight=None, act=format_of("int2:token")))
    fake.by_channel_(Scales(scale=torch.tensor([1.0, 2.0]), zero=torch.tensor([1.0, 0.0])))
    assert fake.read(torch.tensor([[-5.0, 1.1], [0.6, 9.0]])).tolist() == [[-1, 2], [1, 6]]


def test_a_fixed_weight_is_kept():
    fake = FakeQuantLinear(layer(), LayerSpec(weight=format_of("bp2:g32")))
    x, before = torch.randn(2, 128), fake.quantized()
    fake.fix_()
    expected = fake(x)
    with torch.no_grad():
        fake.weight.add_(1)
    assert torch.equal(fake(x), expected)
    assert fake.quantized() is before or torch.equal(fake.quantized().numbers(), before.numbers())


def test_ranges_that_cannot_be_trained_are_refused():
    with pytest.raises(UserError, match="recipe bpdq"):
        FakeQuantLinear(layer(), LayerSpec(weight=format_of("bp2")), ranges="lwc")
    with pytest.raises(UserError, match="recipe omniquant"):
        FakeQuantLinear(layer(), LayerSpec(weight=format_of("mxfp4")), ranges="lsq")
    with pytest.raises(UserError, match="groups 48"):
        FakeQuantLinear(layer(), LayerSpec(weight=format_of("int4:g48")))


def test_sulq_vector():
    x = torch.tensor([0, 1e-4, 1e-3, 0.01, 0.05, 0.1, 0.3, 0.54])
    found = Sulq.of(x, 3, 0.01)
    assert found.codes(x).tolist() == [0, 0, 0, 1, 3, 4, 6, 7]
    expected = [-0.0021875, -0.0021875, -0.0021875, 0.005625, 0.0525, 0.115, 0.24, 0.49]
    assert found(x).tolist() == pytest.approx(expected, abs=1e-6)


def test_sulq_chooses_the_shift_with_the_least_error():
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)).mul(2).softmax(-1)
    best = Sulq.search(x, 4)
    errors = [float((Sulq.of(x, 4, eta)(x) - x).square().mean()) for eta in (0.001, best.eta, 1.0)]
    assert errors[1] == min(errors)
    with pytest.raises(UserError, match="eta"):
        Sulq.of(x, 3, 0.0)
    with pytest.raises(UserError, match="bits"):
        Sulq.of(x, 9, 0.1)
