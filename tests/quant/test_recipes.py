"""`quantize` puts what each recipe finds into the model, which is saved and loaded, and refuses what cannot work."""

from __future__ import annotations

import copy
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

from postgen.errors import UserError
from postgen.families import blocks_of
from postgen.quant import LayerSpec, Quantized, QuantSpec
from postgen.quant.calibration import Calibration
from postgen.quant.calibration_config import CalibrationConfig
from postgen.quant.layers import quantized_layers
from postgen.quant.model import quantize_weights, rtn
from postgen.quant.recipes import quantize
from postgen.quant.stages import RECIPES, Recipe, Stage
from postgen.reconstruct.block_run import BlockRun
from tests.quant.calibrated import calibration_of, short, two_experts
from tests.reconstruct.toy import PROMPTS, pipeline

W4A4 = QuantSpec(weight="int4:g8", act="int4:token")


class Exact:
    def __init__(self) -> None:
        self.pipe, size = pipeline("Wan")
        config = CalibrationConfig(**size, points=4, bins=2, num_inference_steps=4, guidance_scale=1.0)
        self.calibration = short(Calibration(self.pipe, PROMPTS[:3], config))
        self.calibration.draw()
        self.model = self.pipe.transformer
        self.points = self.calibration.points(held_out=True)

    def quantized(self, spec: QuantSpec, recipe: str | Recipe, **values: Any) -> nn.Module:
        """Return a quantised copy of the model, calibrated on the points of the model."""
        model = copy.deepcopy(self.model)
        self.pipe.transformer = self.calibration.denoiser.transformers["transformer"] = model
        try:
            quantize(model, spec, recipe=recipe, calibration=self.calibration, progress=False, **values)
        finally:
            self.pipe.transformer = self.calibration.denoiser.transformers["transformer"] = self.model
        return model

    @torch.no_grad()
    def error(self, model: nn.Module) -> float:
        """Return the relative error of the prediction at the held-out points."""
        found = [(self.predict(model, [point]), self.predict(None, [point])) for point in self.points]
        return sum(float((a - b).norm() / b.norm()) for a, b in found) / len(found)

    @torch.no_grad()
    def predict(self, model: nn.Module | None, points: Any) -> Tensor:
        return self.calibration.predict(points, model)


@pytest.fixture(scope="module")
def exact() -> Exact:
    return Exact()


TEXT = {r".*attn2\.to_[kv]": {"weight": "int8", "act": None}}
"""Layers of the text, which are exact unless they are named."""
RUNS = [
    ("gptq", QuantSpec(weight="int3:g8", overrides=TEXT), {}),
    ("bpdq", QuantSpec(weight="bp2:g8"), {}),
    ("omniquant", replace(W4A4, rotate=8, rank=2, overrides=TEXT), {"steps": 4}),
    ("sos", W4A4, {"steps": 4}),
    ("block_ap+fdda", QuantSpec(weight="int2:g8:asym"), {"steps": 4}),
]


@pytest.mark.parametrize(("recipe", "spec", "values"), RUNS, ids=[run[0] for run in RUNS])
def test_recipes_with_data(exact: Exact, tmp_path: Path, recipe: str, spec: QuantSpec, values: dict[str, Any]) -> None:
    rough = copy.deepcopy(exact.model)
    quantize(rough, spec)
    model = exact.quantized(spec, recipe, **values)
    layers = quantized_layers(model)
    assert len(layers) == 2 * (10 if spec.overrides else 8)
    assert all(layer.spec == spec.layer(name) for name, layer in layers.items())
    # A few steps on a model with random weights: not worse than rounding to nearest.
    assert exact.error(model) < 1.1 * exact.error(rough)
    model.save_pretrained(tmp_path)
    loaded = WanTransformer3DModel.from_pretrained(tmp_path)
    assert torch.equal(exact.predict(model, exact.points[:1]), exact.predict(loaded, exact.points[:1]))


@pytest.mark.parametrize("recipe", ["rtn", "ls"])
def test_recipes_without_data(exact: Exact, recipe: str) -> None:
    model = copy.deepcopy(exact.model)
    report = quantize(model, QuantSpec(weight="int4:g8"), recipe=recipe)
    assert report.bits == pytest.approx(8.0)  # 4, and 32 for each 8 weights
    assert exact.error(model) < 0.2


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_zero_points_that_are_no_codes_are_loaded(exact: Exact, tmp_path: Path, dtype: torch.dtype | None) -> None:
    model, spec = copy.deepcopy(exact.model), QuantSpec(weight="int2:g8:asym")

    def solve(name: str, linear: nn.Linear, each: LayerSpec) -> Quantized:
        found = rtn(name, linear, each)
        assert found.scales.zero is not None
        return replace(found, scales=replace(found.scales, zero=found.scales.zero + 0.25))

    quantize_weights(model, spec, solve)
    model.save_pretrained(tmp_path)
    loaded = WanTransformer3DModel.from_pretrained(tmp_path, torch_dtype=dtype)
    for (name, value), other in zip(model.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(value, other), name


def test_exact_weights_with_transformed_inputs_change_only_by_the_rounding_of_inputs(exact: Exact) -> None:
    stage = replace(RECIPES["omniquant"].stages[0], steps=1, learning_rate=1e-6, learning_rate_new=1e-6)
    recipe = Recipe(summary="", stages=(stage,))
    model = exact.quantized(QuantSpec(weight=None, act="int8:token", rotate=8), recipe)
    assert exact.error(model) < 0.03


def test_clips_of_inputs_by_noise_level(exact: Exact, tmp_path: Path) -> None:
    stage = Stage(trains=frozenset({"act_clip"}), steps=3, learning_rate=1e-2)
    model = exact.quantized(W4A4, Recipe(summary="", stages=(stage,)))
    clips = [layer.act_clip.view(torch.float32) for layer in quantized_layers(model).values()]
    assert all(clip.shape == (2,) and (clip != 1).all() for clip in clips)
    model.save_pretrained(tmp_path)
    loaded = WanTransformer3DModel.from_pretrained(tmp_path)
    assert torch.equal(exact.predict(model, exact.points[:1]), exact.predict(loaded, exact.points[:1]))


def test_a_finished_run_is_read_again(exact: Exact, tmp_path: Path) -> None:
    first = exact.quantized(W4A4, "omniquant", steps=1, output_dir=tmp_path)
    with pytest.raises(UserError, match="resume=True"):
        exact.quantized(W4A4, "omniquant", steps=1, output_dir=tmp_path)
    again = exact.quantized(W4A4, "omniquant", steps=1, output_dir=tmp_path, resume=True)
    for (name, value), other in zip(first.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(value, other), name


def test_both_experts() -> None:
    pipe, size = two_experts()
    calibration = calibration_of(pipe, size, guidance_scale=3.0, points=4)
    calibration.draw()
    with pytest.raises(UserError, match="transformer and transformer_2: quantise one after the other"):
        quantize(pipe, W4A4, recipe="gptq", calibration=calibration)
    for name in calibration.experts:
        recipe = {"recipe": "omniquant+fdda", "steps": 1} if name == "transformer" else {"recipe": "gptq"}
        report = quantize(getattr(pipe, name), W4A4, calibration=calibration, progress=False, **recipe)
        assert len(report.layers) == 2 * 8
    assert len(quantized_layers(pipe.transformer_2)) == 2 * 8


def test_ctrl_c_keeps_the_model_and_the_run_goes_on(
    exact: Exact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, values = QuantSpec(weight="int4:g8"), {"recipe": "block_ap+fdda", "steps": 3}
    straight = exact.quantized(spec, **values)
    step = BlockRun._one_step

    def interrupted(run: BlockRun) -> None:
        step(run)
        if (run.task.name, run.step) == ("blocks.1", 2):
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(BlockRun, "_one_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        exact.quantized(spec, **values, output_dir=tmp_path)
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "stage-1/blocks/blocks.1").glob("checkpoint-*")] == ["checkpoint-2"]
    resumed = exact.quantized(spec, **values, output_dir=tmp_path, resume=True)
    for (name, value), other in zip(straight.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(value, other), name


@pytest.mark.parametrize(
    ("spec", "values", "said"),
    [
        (W4A4, {"recipe": "gptq"}, "needs calibration, but there is none"),
        (W4A4, {"recipe": "omnquant"}, "Did you mean 'omniquant'"),
        (W4A4, {"recipe": "rtn", "steps": 3}, "steps can only be given for a recipe that needs data"),
        (W4A4, {"recipe": "gptq", "steps": 3, "calibration": True}, "only be given for training"),
        (W4A4, {"recipe": "bpdq", "calibration": True}, "for bit planes such as bp2:g64, not for int4:g8"),
        (QuantSpec(weight="bp2:g8"), {"recipe": "omniquant", "calibration": True}, "use the recipe bpdq"),
        (QuantSpec(weight="nvfp4"), {"recipe": "block_ap", "calibration": True}, "groups 16"),
        (QuantSpec(weight="int4:g8"), {"recipe": "sos", "calibration": True}, "act must be an integer format"),
        (QuantSpec(weight="int4:g7"), {}, "groups 7 input channels"),
        (W4A4, {"recipe": "gptq", "calibration": True, "resume": True}, "resume needs the output_dir"),
        (W4A4, {"recipe": "omniquant", "calibration": True, "steps": 0}, "steps must be at least 1"),
    ],
)
def test_what_cannot_work_is_refused_at_once(exact: Exact, spec: QuantSpec, values: dict[str, Any], said: str) -> None:
    before = copy.deepcopy(exact.model.state_dict())
    if "calibration" in values:
        values = {**values, "calibration": exact.calibration}
    with pytest.raises(UserError, match=said):
        quantize(exact.model, spec, **values)
    assert not quantized_layers(exact.model)
    assert all(torch.equal(value, before[name]) for name, value in exact.model.state_dict().items())
    assert len(blocks_of(exact.model)) == 2


def test_wrong_arguments_are_refused_before_anything_is_computed() -> None:
    exact = Exact()
    other, _ = pipeline("Wan")
    model = exact.model
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"target": other.transformer, "calibration": exact.calibration}, "is of a pipeline without this Wan"),
        ({"calibration": ["a ball", "a cube"]}, r"calibration must be a Calibration\(pipe, prompts\), got"),
        ({"spec": {"weight": "int4:g8"}}, "spec must be a QuantSpec"),
    ]
    for words, said in wrong:
        with pytest.raises(UserError, match=said):
            quantize(**{"target": model, "spec": W4A4, "recipe": "gptq", "calibration": exact.calibration, **words})
    with pytest.raises(UserError, match="prompts must be texts or rows"):
        Calibration(exact.pipe, None)  # type: ignore[arg-type]
    quantize(model, W4A4)
    with pytest.raises(UserError, match="is quantised already: load the exact model"):
        quantize(model, W4A4, recipe="gptq", calibration=exact.calibration)


@pytest.mark.parametrize("spec", ["int4:g8", None, LayerSpec(weight=None)])
def test_a_spec_of_another_class_is_refused(exact: Exact, spec: Any) -> None:
    with pytest.raises(UserError, match=r"spec must be a QuantSpec, such as QuantSpec\(weight='int4:g64'\), got"):
        quantize(exact.model, spec)


@pytest.mark.parametrize("recipe", ["gptq", "fdda"])
def test_every_long_phase_shows_progress(capfd: pytest.CaptureFixture[str], recipe: str) -> None:
    pipe, size = pipeline("Wan")
    quantize(pipe, QuantSpec(weight="int4:g8"), recipe=recipe, calibration=calibration_of(pipe, size))
    shown = capfd.readouterr().err
    assert ("solve blocks: 100%" if recipe == "gptq" else "correct groups of layers: 100%") in shown
