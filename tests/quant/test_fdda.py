"""Statistics of activations and their uses: the penalty, the correction without training, the choice of prompts."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from postgen.errors import UserError
from postgen.families import blocks_of
from postgen.families.linear import replace_linears
from postgen.families.recording import replay
from postgen.quant import QLinear, format_of, quantize_tensor
from postgen.quant.calibration import Calibration
from postgen.quant.fdda import Correction, StatPenalty, choose_prompts, correct_, correction, fold_
from postgen.quant.spec import LayerSpec, QuantSpec
from postgen.quant.statistics import NormStats, OutputStats, PromptStats, moments
from postgen.quant.visits import Bin, Visit
from tests.quant.calibrated import calibrated
from tests.quant.test_calibration import Inputs


def layer_of(weight: str, *, bias: bool = True, rank: int = 0) -> QLinear:
    torch.manual_seed(0)
    linear = nn.Linear(32, 8, bias=bias)
    branch = (torch.randn(8, rank), torch.randn(rank, 32)) if rank else None
    spec = LayerSpec(weight=format_of(weight), rank=rank)
    return QLinear.of(linear, quantize_tensor(linear.weight.detach(), format_of(weight)), spec, branch=branch)


@torch.no_grad()
def quantised(model: nn.Module, weight: str) -> Any:
    """Return a copy of a model whose linear layers are rounded to nearest."""
    copied, spec = copy.deepcopy(model), QuantSpec(weight=weight).layer("")

    def make(name: str, linear: nn.Linear) -> QLinear:
        return QLinear.of(linear, quantize_tensor(linear.weight, format_of(weight)), spec)

    replace_linears(copied, make, owner="test", originals="dropped")
    return copied


def test_statistics() -> None:
    pipe, calibration = calibrated("Wan")
    stats, outputs, inputs = NormStats(), OutputStats(), Inputs()
    calibration.stream(pipe.transformer, [stats, outputs, inputs])
    names = set(stats.names)
    assert {"blocks.0", "blocks.1", "blocks.0.norm1", "blocks.0.norm2", "blocks.1.norm3"} <= names
    assert {"blocks.1.attn1.norm_q", "blocks.0.attn2.norm_k"} <= names
    assert "blocks.0.attn1" not in names
    layer, linear = "blocks.1.ffn.net.2", pipe.transformer.blocks[1].ffn.net[2]
    with torch.no_grad():
        rows = [(bin, linear(row)) for bin, row in inputs.seen[layer]]
    for bin in outputs.bins(layer):
        means, variances = moments(torch.stack([row for each, row in rows if each == bin]), 4)
        centre = outputs.centre(layer, bin)
        assert centre.points == 4
        torch.testing.assert_close(centre.mean, means.mean(0))
        torch.testing.assert_close(centre.var, variances.mean(0))
        torch.testing.assert_close(centre.mean_spread, means.std(0, correction=0), rtol=1e-3, atol=1e-5)
    # All bins have equally many points, so the pooled statistics are those of all tokens.
    var, mean = torch.var_mean(torch.cat([row for _, row in rows]), dim=0, correction=0)
    for found, expected in zip(outputs.pooled(layer), (mean, var), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    with pytest.raises(UserError, match=r"blocks\.0 was not observed in Bin\(level=7"):
        stats.centre("blocks.0", Bin(level=7))


def test_statistics_of_joined_axes() -> None:
    """Some models join batch and frames in the first axis."""
    x = torch.randn(6, 5, 3)
    mean, var = moments(x, 2)
    torch.testing.assert_close(mean, x.reshape(2, 15, 3).mean(1))
    torch.testing.assert_close(var, x.reshape(2, 15, 3).var(1, correction=0))
    with pytest.raises(UserError, match="an activation with 6 rows does not fit a forward pass of 4 samples"):
        moments(x, 4)


@pytest.mark.parametrize("weight", ["int4:g16", "int3:row:asym", "bp2:g16", "fp8"])
@torch.no_grad()
def test_a_folded_correction_is_exact(weight: str) -> None:
    layer, x = layer_of(weight, rank=2), torch.randn(10, 32)
    gain, shift = torch.linspace(0.5, 2, 8), torch.linspace(-1, 1, 8)
    before = layer(x)
    fold_(layer, Correction(gain=gain, shift=shift))
    # Coefficients of bit planes are bfloat16.
    close = 2e-2 if weight.startswith("bp") else 1e-5
    torch.testing.assert_close(layer(x), before * gain + shift, rtol=close, atol=close)


@torch.no_grad()
def test_what_cannot_be_folded() -> None:
    found = Correction(gain=torch.full((8,), 1.5), shift=torch.ones(8))
    with pytest.raises(UserError, match="a mxfp4 weight has no scales per row: correct the mean only"):
        fold_(layer_of("mxfp4"), found)
    with pytest.raises(UserError, match="a layer without a bias cannot be corrected"):
        fold_(layer_of("int4", bias=False), found)
    layer, x = layer_of("mxfp4"), torch.randn(3, 32)
    before = layer(x)
    fold_(layer, Correction(gain=torch.ones(8), shift=torch.ones(8)))
    torch.testing.assert_close(layer(x), before + 1)


def test_correction_of_statistics() -> None:
    exact = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4.0, 100.0, 0.0])
    now = torch.tensor([0.0, 1.0, 1.0]), torch.tensor([1.0, 1.0, 1.0])
    found = correction(exact, now)
    assert found.gain.tolist() == [2.0, 2.0, 1.0]  # at most 2; a constant channel keeps its gain
    assert found.shift.tolist() == [1.0, 0.0, 2.0]
    assert correction(exact, now, gain=False).gain.tolist() == [1.0, 1.0, 1.0]


@torch.no_grad()
def error(calibration: Calibration, model: nn.Module) -> float:
    noise = signal = 0.0
    for _, points in calibration.batches(held_out=True):
        exact = calibration.predict(points)
        noise += float((calibration.predict(points, model) - exact).square().sum())
        signal += float(exact.square().sum())
    return noise / signal


def test_correcting_a_model() -> None:
    """The outputs of each layer get mean and variance of the exact ones, and the error on held-out prompts falls."""
    pipe, calibration = calibrated("Wan")
    exact, model = OutputStats(), quantised(pipe.transformer, "int2:row:asym")
    calibration.stream(pipe.transformer, exact)
    before = error(calibration, model)
    told = correct_(model, calibration, exact)
    assert len(told) == len(exact.names)
    assert max(told.values()) > 0.01
    assert error(calibration, model) < 0.8 * before
    after = OutputStats()
    calibration.stream(model, after)
    for name in ("blocks.0.attn1.to_q", "blocks.1.ffn.net.2"):
        for found, expected in zip(after.pooled(name), exact.pooled(name), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    with pytest.raises(UserError, match="has no quantised layers with a bias: quantise it first"):
        correct_(pipe.transformer, calibration, exact)


def test_the_penalty_on_statistics() -> None:
    pipe, calibration = calibrated("Wan")
    stats, blocks = NormStats(), blocks_of(pipe.transformer)
    calibration.stream(pipe.transformer, stats)
    records = calibration.records([blocks[1]], progress=False)
    call, bins = records.calls([blocks[1].name], held_out=False)[0][0], calibration.bins_of(records, held_out=False)[0]
    plain = StatPenalty(stats, blocks, distorted=0)
    values: dict[str, Tensor] = {}
    student = copy.deepcopy(blocks[1].module)
    for name, model in (("exact", blocks[1].module), ("student", student)):
        if name == "student":
            with torch.no_grad():
                student.attn1.to_q.bias.add_(3.0)
        args, kwargs = call.inputs()
        with plain.watching(blocks[1].name, model, bins) as penalty:
            model(*args, **kwargs)
        values[name] = penalty.total
    assert 0 < values["exact"].item() < 0.1 * values["student"].item()
    values["student"].backward()
    assert student.attn1.to_q.bias.grad.abs().sum() > 0
    with plain.watching(blocks[0].name, blocks[0].module, bins) as penalty:
        replay(blocks[0], calibration.records([blocks[0]], progress=False).calls(["blocks.0"], held_out=False)[0][0])
    assert penalty.total.item() == 0  # the first half of the blocks has no penalty
    one, two = (StatPenalty(stats, blocks, centre=0, seed=seed) for seed in (1, 1))
    drawn = []
    for each in (one, one, two):
        with each.watching(blocks[1].name, student, bins) as penalty:
            student(*call.inputs()[0], **call.inputs()[1])
        drawn.append(penalty.total.item())
    assert drawn[0] == drawn[2] != drawn[1]


def test_the_penalty_is_the_formula() -> None:
    """A block of one norm, whose input and output have known statistics."""
    from postgen.families import Block

    block = Block(
        name="b", module=nn.LayerNorm(4), hidden="input", text=None, hidden_out=None, text_out=None, follows=False
    )
    stats, x = NormStats(), torch.randn(1, 6, 4)
    bin = Bin(level=0)
    for name, tensor in (("b.", x), ("b", torch.zeros(1, 6, 4))):
        stats.see(name, tensor, Visit(bin=bin, prompts=(0,), weight=1))
    penalty = StatPenalty(stats, [block], centre=2.0, distorted=0)
    moved = x * 1.5 + 0.25
    with penalty.watching("b", block.module, [bin]) as found:
        block.module(moved)
    mean, var = x.mean((0, 1)), x.var((0, 1), correction=0)
    size = var.mean()
    first = (mean * 0.5 + 0.25).square().mean() / size + (var * 1.25).square().mean() / size.square()
    torch.testing.assert_close(found.terms[0], 2 * first)


def test_the_choice_of_prompts() -> None:
    """Prompts of two kinds, and one that lies in the middle: the middle one first, then one of each kind."""
    stats, bin, generator = PromptStats(), Bin(level=0), torch.Generator().manual_seed(0)
    for prompt, middle in enumerate([-1.0, -1.1, -0.9, 1.0, 1.05, 0.95, 0.0]):
        x = middle + 0.01 * torch.randn(1, 50, 3, generator=generator)
        stats.see("blocks.0", x, Visit(bin=bin, prompts=(prompt,), weight=1))
    assert choose_prompts(stats, 1) == [6]
    first, *pair = choose_prompts(stats, 3)
    assert first == 6
    assert {number // 3 for number in pair} == {0, 1}
    with pytest.raises(UserError, match="count"):
        choose_prompts(stats, 8)
    # A prompt that alone covers a bin comes early.
    stats.see("blocks.0", torch.zeros(1, 50, 3), Visit(bin=Bin(level=1), prompts=(2,), weight=1))
    assert 2 in choose_prompts(stats, 2)


def test_prompts_of_a_model() -> None:
    pipe, calibration = calibrated("Wan")
    stats = PromptStats(blocks=9)
    calibration.stream(pipe.transformer, stats)
    assert stats.names == ("blocks.0", "blocks.1")
    assert stats.prompts() == (0, 1, 2, 3)
    assert len(set(choose_prompts(stats, 3))) == 3
