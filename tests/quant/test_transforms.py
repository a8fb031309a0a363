"""Rotations in the weights, the low-rank branch, and the fold of channel-wise quantisers."""

import copy

import pytest
import torch

from postgen.errors import UserError
from postgen.families import blocks_of
from postgen.quant import LayerSpec, QLinear, format_of, quantize_tensor
from postgen.quant.rotation import rotated
from postgen.quant.transforms.channel_fold import channel_fold, fold_channels_
from postgen.quant.transforms.hadamard import random_signs, rotate_values_
from postgen.quant.transforms.let import initial_scale, let_points
from postgen.quant.transforms.low_rank import low_rank_branch, refined_branch, residual_of
from postgen.quant.transforms.smooth import searched_scale
from tests.families.tiny_models import tiny_model


def weight_of(rows, channels, seed=0):
    return torch.randn(rows, channels, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", ["Wan image-to-video", "HunyuanVideo", "Stable Diffusion 3", "Sana"])
def test_values_are_rotated_in_the_weights(name):
    tiny = tiny_model(name, batch=2)
    expected = tiny()
    model = tiny.transformer
    before = copy.deepcopy(model)
    points = [point for block in blocks_of(model) for point in let_points(model, block, kinds=["value"])]
    for point in points:
        rotate_values_(model, point, signs=random_signs(point.width, 1))
    assert (tiny() - expected).norm() / expected.norm() < 1e-6
    part = points[0].readers[0]
    place = f"{points[0].block}.{part.name}.weight"
    wanted = rotated(before.get_parameter(place)[:, : part.stop], 16, random_signs(part.stop, 1))
    assert torch.allclose(model.get_parameter(place)[:, : part.stop], wanted)


def test_only_values_can_be_rotated_and_only_inside_a_head():
    model = tiny_model("Wan").transformer
    points = {point.name: point for point in let_points(model, "blocks.0")}
    with pytest.raises(UserError, match=r"attn1\.input of blocks\.0 cannot be rotated"):
        rotate_values_(model, points["attn1.input"])
    with pytest.raises(UserError, match=r"size is 32, but a head of attn1\.value of blocks\.0 has 16"):
        rotate_values_(model, points["attn1.value"], 32)


def test_random_signs_depend_on_the_seed_alone():
    assert random_signs(64, 3).equal(random_signs(64, 3))
    assert not random_signs(64, 3).equal(random_signs(64, 4))
    assert random_signs(64).unique().tolist() == [-1, 1]


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_the_branch_is_the_best_of_its_rank(shape):
    weight = weight_of(*shape)
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    for rank in (1, 5, 24):
        up, down = low_rank_branch(weight, rank)
        assert up.shape == (shape[0], rank)
        assert down.shape == (rank, shape[1])
        assert torch.allclose(up @ down, (left[:, :rank] * values[:rank]) @ right[:rank], atol=1e-4)
    assert low_rank_branch(weight, 2, dtype=torch.bfloat16)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_a_second_moment_makes_the_branch_the_best_for_these_inputs(shape):
    weight, inputs = weight_of(*shape), weight_of(400, shape[1], 1) * torch.logspace(-1, 1, shape[1])
    inputs = inputs + 3 * inputs[:, :1]
    moment = inputs.T @ inputs / len(inputs)

    def lost(branch):
        return float((inputs @ residual_of(weight, branch).T).square().sum())

    whole, diagonal, plain = (
        lost(low_rank_branch(weight, 4, moment=each)) for each in (moment, moment.diagonal(), None)
    )
    assert whole < diagonal < plain
    # Eckart and Young: what is lost is the sum of the other singular values of W X^T.
    others = torch.linalg.svdvals(weight @ inputs.T)[4:].square().sum()
    assert whole == pytest.approx(float(others), rel=1e-3)


def test_a_weight_of_low_rank_is_its_branch():
    weight = weight_of(16, 3) @ weight_of(3, 32)
    assert residual_of(weight, low_rank_branch(weight, 6)).abs().max() < 1e-4
    assert residual_of(torch.zeros(4, 8), low_rank_branch(torch.zeros(4, 8), 2)).abs().max() == 0


def test_refinement_reduces_the_error_of_the_layer():
    weight = weight_of(32, 64)
    weight[:, 5] *= 20
    format = format_of("int3:g16")

    def rounded(residual):
        return quantize_tensor(residual, format).numbers()

    def lost(branch):
        residual = residual_of(weight, branch)
        return float((rounded(residual) - residual).norm())

    first = low_rank_branch(weight, 4)
    better = refined_branch(weight, 4, rounded)
    assert lost(better) < lost(first) < float((rounded(weight) - weight).norm())
    spec = LayerSpec(weight=format, rank=4)
    linear = torch.nn.Linear(64, 32)
    linear.weight.data.copy_(weight)
    layer = QLinear.of(linear, quantize_tensor(residual_of(weight, better), format), spec, branch=better)
    x = weight_of(5, 64, 2)
    kept = rounded(residual_of(weight, better)) + better[0] @ better[1]
    assert torch.allclose(layer(x), torch.nn.functional.linear(x, kept, linear.bias), atol=1e-4)


def test_errors_of_the_branch():
    with pytest.raises(UserError, match="rank is 9, but the weight is 8 x 16: use 1 to 8"):
        low_rank_branch(weight_of(8, 16), 9)
    with pytest.raises(UserError, match=r"second moment has shape \(8,\): it must be \(16,\) or \(16, 16\)"):
        low_rank_branch(weight_of(8, 16), 2, moment=torch.ones(8))


def outliers(width):
    x = torch.randn(64, width, generator=torch.Generator().manual_seed(3))
    x[:, 5] *= 30
    return x


@pytest.mark.parametrize("more", [{}, {"rank": 4}, {"rotate": 8}])
def test_the_search_of_a_scale_reduces_the_error_of_the_readers(more):
    model = tiny_model("Wan").transformer
    point = next(each for each in let_points(model, "blocks.0") if each.name == "ffn.input")
    x, layer = outliers(point.width), model.blocks[0].ffn.net[0].proj
    spec = LayerSpec(weight=format_of("int4"), act=format_of("int4:token"), **more)

    def lost(scale):
        weight, branch = layer.weight * scale, None
        if spec.rank:
            branch = low_rank_branch(weight, spec.rank)
            weight = residual_of(weight, branch)
        linear = copy.deepcopy(layer)
        quantized = quantize_tensor(rotated(weight, spec.rotate), spec.weight)
        new = QLinear.of(linear, quantized, spec, branch=branch, input_scale=scale)
        return float((new(x) - layer(x)).square().sum())

    scale, strength = searched_scale(model, point, x, {"ffn.net.0.proj": spec})
    assert lost(scale) < lost(torch.ones_like(scale))
    assert lost(scale) <= lost(initial_scale(model, point, x.abs().amax(0))) * 1.001
    assert 0 < strength <= 1
    assert torch.equal(scale, initial_scale(model, point, x.abs().amax(0), strength))


def test_inputs_without_outliers_need_no_scale_where_they_stay_exact():
    model = tiny_model("Wan").transformer
    point = next(each for each in let_points(model, "blocks.0") if each.name == "attn1.input")
    x = torch.ones(3, point.width)
    spec = LayerSpec(weight=format_of("int8"))
    scale, strength = searched_scale(model, point, x, {"attn1.to_q": spec}, grid=())
    assert torch.equal(scale, torch.ones(point.width))
    assert strength == 0
    with pytest.raises(UserError, match=r"no layer that reads attn1\.input of blocks\.0 is quantised"):
        searched_scale(model, point, x, {"attn1.to_out.0": spec})
    with pytest.raises(UserError, match=r"shape \(3, 4\): they must be \(tokens, 32\)"):
        searched_scale(model, point, x[:, :4], {"attn1.to_q": spec})


def test_a_channel_wise_quantiser_becomes_one_with_a_single_scale():
    generator = torch.Generator().manual_seed(0)
    scale = (torch.rand(12, generator=generator) + 0.1) * 0.3
    zero = torch.randint(0, 15, (12,), generator=generator).float()
    x = torch.randn(100, 12, generator=generator) * 2
    fold = channel_fold(scale, zero)
    after = (x - fold.shift) / fold.scale
    codes = (x / scale + zero).round().clamp(0, 15)
    assert torch.equal((after / fold.layer_scale + fold.layer_zero).round().clamp(0, 15), codes)
    numbers = (codes - fold.layer_zero) * fold.layer_scale
    assert torch.allclose(numbers * fold.scale + fold.shift, (codes - zero) * scale, atol=1e-6)
    assert fold.layer_zero == zero.mean()
    assert fold.layer_scale == scale.mean()


def test_the_fold_of_a_channel_wise_quantiser_leaves_the_model():
    tiny = tiny_model("Wan")
    expected = tiny()
    (point, *_) = let_points(tiny.transformer, "blocks.0")
    scale = torch.rand(point.width, generator=torch.Generator().manual_seed(0)) + 0.2
    fold_channels_(tiny.transformer, point, scale, torch.arange(float(point.width)))
    assert (tiny() - expected).norm() / expected.norm() < 1e-5
    with pytest.raises(UserError, match="all scales must be positive"):
        channel_fold(-scale, scale)
    with pytest.raises(UserError, match="both need one number"):
        channel_fold(scale, scale[:2])
