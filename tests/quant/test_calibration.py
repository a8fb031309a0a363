"""Calibration: points on the model's own trajectories, the runs over them, bins, two experts, refusals."""

from __future__ import annotations

import copy
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanPipeline
from torch import Tensor, nn

from postgen.assets import embedded_model
from postgen.errors import UserError
from postgen.families import blocks_of
from postgen.families.linear import find_linears
from postgen.quant.calibration import Calibration
from postgen.quant.calibration_config import CalibrationConfig
from postgen.quant.step_bins import StepBins
from postgen.quant.visits import Bin, Observer, Tap, Visit, input_taps
from tests.quant.calibrated import STEPS, calibrated, calibration_of, short, two_experts
from tests.reconstruct.toy import PROMPTS, pipeline


class Inputs(Observer):
    """Keeps all inputs of the linear layers."""

    def __init__(self) -> None:
        self.seen: defaultdict[str, list[tuple[Bin, Tensor]]] = defaultdict(list)
        self.visits: list[Visit] = []

    def taps(self, linears: Mapping[str, nn.Module], model: nn.Module) -> Sequence[Tap]:
        return input_taps(linears)

    def see(self, name: str, x: Tensor, visit: Visit) -> None:
        self.seen[name] += [(visit.bin, row.clone()) for row in x]
        self.visits += [visit] * (name == next(iter(self.seen)))


def sums(rows: Sequence[tuple[Bin, Tensor]]) -> dict[Bin, list[float]]:
    """Return one number per row, by bin, sorted."""
    found: defaultdict[Bin, list[float]] = defaultdict(list)
    for bin, row in rows:
        found[bin].append(round(float(row.double().square().sum()), 3))
    return {bin: sorted(each) for bin, each in found.items()}


@pytest.mark.parametrize("name", ["Wan", "CogVideoX", "HunyuanVideo", "LTX"])
def test_a_run_sees_what_the_sampler_passes_to_the_model(name: str) -> None:
    """The inputs of a layer are those of the recorded forward passes with guidance, in the same bins."""
    pipe, calibration = calibrated(name)
    model = pipe.transformer
    layers = {find: [*find_linears(model)][place] for place, find in ((0, "first"), (-1, "last"))}
    records = calibration.records([*layers.values()], progress=False)
    for held_out in (False, True):
        inputs = Inputs()
        calibration.stream(model, inputs, held_out=held_out)
        assert set(inputs.seen) == set(find_linears(model))
        for layer in layers.values():
            calls = records.calls([layer], held_out=held_out)
            bins = calibration.bins_of(records, held_out=held_out)
            rows = [
                (bin, row)
                for (call,), each in zip(calls, bins, strict=True)
                for bin, row in zip(each, call.inputs()[0][0], strict=True)
            ]
            expected, found = sums(rows), sums(inputs.seen[layer])
            assert expected.keys() == found.keys()
            for bin, values in expected.items():
                assert found[bin] == pytest.approx(values, rel=1e-4)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_points_and_weights() -> None:
    pipe, calibration = calibrated("Wan")
    points = calibration.points()
    assert calibration.branches == ("prompt", "negative")
    assert len(points) == 8 * 2
    assert len(calibration.points(held_out=True)) == 2 * 2
    assert Counter(point.step for point in points) == dict.fromkeys(range(STEPS), 4)
    bins = calibration.step_bins()
    assert bins.count == 2
    assert {point.step: point.bin.level for point in points} == {0: 0, 1: 0, 2: 1, 3: 1}
    assert all(int(bins.index(torch.tensor([point.timestep]))) == point.bin.level for point in points)
    inputs = Inputs()
    calibration.stream(pipe.transformer, [inputs])
    weights: defaultdict[Bin, float] = defaultdict(float)
    for visit in inputs.visits:
        weights[visit.bin] += visit.weight * len(visit.prompts)
    assert len(weights) == 4
    assert all(each == pytest.approx(1) for each in weights.values())


def test_few_points_are_spread_over_the_levels() -> None:
    """With fewer points than noise levels, the first and the last level are among them."""
    pipe, size = pipeline("Wan")
    calibration = calibration_of(pipe, size, points=4, num_inference_steps=9)
    assert sorted({point.step for point in calibration.points()}) == [0, 3, 5, 8]


@torch.no_grad()
def test_points_stay_those_of_the_exact_model() -> None:
    pipe, size = pipeline("Wan")
    calibration = calibration_of(pipe, size)
    before = [point.latents for point in calibration.points()]
    copied, batches = copy.deepcopy(pipe.transformer), calibration.batches()
    pipe.transformer.proj_out.weight.mul_(2)
    exact = [calibration.predict(points, copied) for _, points in batches]
    changed = [calibration.predict(points) for _, points in batches]
    assert all(torch.equal(one, point.latents) for one, point in zip(before, calibration.points(), strict=True))
    assert not any(torch.equal(one, other) for one, other in zip(exact, changed, strict=True))
    assert calibration.denoiser.transformers["transformer"] is pipe.transformer
    inputs, others = Inputs(), Inputs()
    calibration.stream(copied, inputs, layers=["blocks.0.attn1.to_q"])
    calibration.stream(pipe.transformer, others, layers=["blocks.0.attn1.to_q"])
    assert sums(inputs.seen["blocks.0.attn1.to_q"]) == sums(others.seen["blocks.0.attn1.to_q"])


def test_each_expert_has_its_own_points_and_bins() -> None:
    pipe, size = two_experts()
    calibration = calibration_of(pipe, size, guidance_scale=1.0)
    assert calibration.experts == ("transformer", "transformer_2")
    steps = {name: {point.step for point in calibration.points(name)} for name in calibration.experts}
    assert steps == {"transformer": {0, 1}, "transformer_2": {2, 3}}
    for expert in calibration.experts:
        inputs, bins = Inputs(), calibration.step_bins(expert)
        calibration.stream(getattr(pipe, expert), inputs)
        assert isinstance(bins, StepBins)
        assert bins.count == 2
        rows = inputs.seen["blocks.0.ffn.net.0.proj"]
        assert {bin for bin, _ in rows} == {Bin(level=level, expert=expert) for level in (0, 1)}
        records = calibration.records("blocks.1", expert, progress=False)
        assert len(records.calls(["blocks.1"], held_out=False)) == len(
            calibration.bins_of(records, expert, held_out=False)
        )
    copied = copy.deepcopy(pipe.transformer_2)
    with pytest.raises(UserError, match=r"has transformer and transformer_2, and this .* is neither of them"):
        calibration.stream(copied, Inputs())
    inputs = Inputs()
    calibration.stream(copied, inputs, expert="transformer_2")
    assert {bin.expert for bin, _ in inputs.seen["blocks.0.attn1.to_q"]} == {"transformer_2"}


def test_records_reuse_the_drawn_latents(tmp_path: Path) -> None:
    """Records of calibration equal those of `collect`, which samples the trajectories itself."""
    from postgen.reconstruct import collect

    pipe, calibration = calibrated("Wan")
    block = blocks_of(pipe.transformer)[1]
    reused = calibration.records([block], where=tmp_path / "reused", progress=False)
    fresh = collect(calibration.denoiser, [block], PROMPTS, calibration.settings, progress=False)
    assert reused.identity == fresh.identity
    pairs = [each.calls([block.name], held_out=False) for each in (reused, fresh)]
    for (one,), (other,) in zip(*pairs, strict=True):
        assert torch.equal(one.output(), other.output())


def test_defaults_of_the_model() -> None:
    pipe, size = pipeline("Wan")
    settings = CalibrationConfig().records(pipe, 9)
    assert settings.size == {"num_frames": 17, "height": 480, "width": 832}  # 81 frames by default
    assert (settings.num_inference_steps, settings.guidance_scale) == (50, 5.0)
    assert settings.levels_per_prompt == 8
    # In these pipelines the distilled guidance, an input of the network, is called guidance_scale.
    pipe, size = pipeline("HunyuanVideo")
    assert CalibrationConfig(**size).records(pipe, 9).guidance_scale == 1.0
    assert CalibrationConfig(**size, guidance_scale=4.0).records(pipe, 2).guidance_scale == 4.0


def test_the_embedded_model() -> None:
    pipe: Any = WanPipeline.from_pretrained(embedded_model())
    assert CalibrationConfig().records(pipe, 9).size == {"num_frames": 17, "height": 128, "width": 128}
    size = {"num_frames": 5, "height": 32, "width": 32}
    config = CalibrationConfig(**size, num_inference_steps=2, points=2, bins=2)
    calibration = short(Calibration(pipe, PROMPTS[:2], config))
    assert calibration.settings.guidance_scale == 3.0
    inputs, layer = Inputs(), "blocks.0.ffn.net.2"
    calibration.stream(pipe.transformer, inputs, layers=[layer])
    assert list(inputs.seen) == [layer]
    assert {bin for bin, _ in inputs.seen[layer]} == {
        Bin(level=level, branch=branch) for level in (0, 1) for branch in calibration.branches
    }


def test_what_cannot_be_calibrated() -> None:
    pipe, calibration = calibrated("Wan")
    with pytest.raises(UserError, match=r"calibration needs at least 2 prompts, of which held_out_prompts=1 .* got 0"):
        Calibration(pipe, [])
    with pytest.raises(UserError, match="needs at least 2 prompts"):
        Calibration(pipe, "a ball")
    with pytest.raises(UserError, match=r"points is 0, it must be at least 1"):
        CalibrationConfig(points=0)
    with pytest.raises(UserError, match=r"has no layer 'blocks\.7\.attn1\.to_q'"):
        calibration.stream(pipe.transformer, Inputs(), layers=["blocks.7.attn1.to_q"])
    with pytest.raises(UserError, match="no calibration points of 'unet': the transformers that run in 4 steps"):
        calibration.points("unet")
