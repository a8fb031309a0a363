"""Quantise a transformer by a recipe: one call for calibration, transformations, training or solving, and the layers.

calibration = Calibration(pipe, prompts)
report = quantize(pipe.transformer, QuantSpec(weight="int4:g64", act="int4:token"), recipe="omniquant",
                  calibration=calibration, output_dir="run")
pipe.transformer.save_pretrained("out")   # later: import postgen; WanTransformer3DModel.from_pretrained("out")
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from postgen.errors import UserError, check_number, shown
from postgen.families import Block, blocks_of
from postgen.families.installed import inner_model, transformers_of
from postgen.quant.calibration import Calibration
from postgen.quant.engine import Bins, BlocksResult, BlockwiseRun
from postgen.quant.fdda import StatPenalty, correct_
from postgen.quant.formats import Format
from postgen.quant.grids import IntGrid
from postgen.quant.layers import layers_of, modulation_of
from postgen.quant.linear import QLinear
from postgen.quant.model import check_exact, quantize_weights, replace_with
from postgen.quant.report import QuantReport
from postgen.quant.rounding import Quantized
from postgen.quant.solvers import check_solver, solve
from postgen.quant.spec import LayerSpec, QuantSpec
from postgen.quant.stages import Recipe, Stage, recipe_of
from postgen.quant.statistics import NormStats, OutputStats
from postgen.quant.step_bins import StepBins
from postgen.quant.student import StudentPlan, points_of
from postgen.quant.transforms.let import fold_all_
from postgen.reconstruct import ReconstructConfig


def quantize(
    target: Any,
    spec: QuantSpec,
    *,
    recipe: str | Recipe = "rtn",
    calibration: Calibration | None = None,
    output_dir: Path | str | None = None,
    resume: bool = False,
    steps: int | None = None,
    rates: float = 1.0,
    seed: int = 42,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    where: Path | str = "cpu",
    progress: bool = True,
) -> QuantReport:
    """Quantise the linear layers of a transformer, in place.

    `save_pretrained` of the model then writes packed weights, and `from_pretrained` reads them after `import postgen`.
    The model stays exact until all blocks are done, so a run that ends early changes nothing.

    Args:
        target: a transformer, or a pipeline with one. Of two transformers, quantise one after the other.
        spec: formats of weights and inputs.
        recipe: a name in `RECIPES`, NAME+fdda, or a recipe.
        calibration: points on the trajectories of the pipeline, for recipes that need data.
        output_dir: folder of the run, for `resume`; None keeps nothing. Only for recipes that need data.
        resume: continue the run in `output_dir`. On the CPU it ends with the weights of an uninterrupted run.
        steps: training steps of each block instead of those of the recipe.
        rates: factor of the learning rates of the recipe, which are those of the papers, for large models. Models with
            a few million weights and few steps need 10 to 50.
        seed: seed of the order of the points.
        device: device of the training; "auto" is that of the model. Only one block at a time is there.
        where: "cpu" to keep the recorded inputs and outputs of the blocks in memory, or a folder.
        progress: whether to show progress bars.

    Returns:
        What was quantised, with the noise of each weight and the bytes before and after.

    Raises:
        UserError: the spec does not fit the model or the recipe, the recipe needs calibration and there is none,
            an argument has no use, `output_dir` holds another run, or see `reconstruct`. Nothing is changed.
    """
    if not isinstance(spec, QuantSpec):
        raise UserError(f"spec must be a QuantSpec, such as QuantSpec(weight='int4:g64'), got {shown(spec)}")
    model, chosen = the_transformer(target), recipe if isinstance(recipe, Recipe) else recipe_of(recipe)
    check_exact(model)
    layers = layers_of(model, spec)
    modulation_of(model, spec)  # these layers are rounded at the end, and a wrong format is told now
    check_recipe(chosen, layers, named=recipe if isinstance(recipe, str) else "")
    if calibration is not None:
        _check_calibration(calibration, model)
    if steps is not None:
        check_number("steps", steps, 1, whole=True)
    check_number("rates", rates, 1e-6)
    pace = {"steps": steps, "rates": None if rates == 1 else rates}
    given = {"calibration": calibration, "output_dir": output_dir, "resume": resume or None, **pace}
    _check_use(recipe, chosen, [name for name, value in given.items() if value is not None])
    if calibration is None:
        return _without_data(model, spec, chosen, progress=progress)
    job = _Job(model=model, spec=spec, layers=layers, recipe=chosen, calibration=calibration, progress=progress)
    with ExitStack() as stack:
        folder = Path(output_dir or stack.enter_context(tempfile.TemporaryDirectory()))
        values = {"resume": resume, "seed": seed, "device": _device(device, model), "disable_tqdm": not progress}
        return job.run(folder, where, {"steps": steps, "rates": rates}, values)


def _check_use(named: str | Recipe, recipe: Recipe, given: Sequence[str]) -> None:
    """Check that the given arguments have a use for a recipe, and that calibration is given if it is needed."""
    trained = [name for name in ("steps", "rates") if name in given]
    if not recipe.calibrated and given:
        raise UserError(f"{', '.join(given)} can only be given for a recipe that needs data, not for {shown(named)}")
    if recipe.calibrated and "calibration" not in given:
        raise UserError(
            f"the recipe {shown(named)} needs calibration, but there is none: give calibration=Calibration(pipe,"
            " prompts), or use rtn or ls"
        )
    if trained and not any(stage.trains for stage in recipe.stages):
        raise UserError(
            f"{' and '.join(trained)} can only be given for training, and the recipe {shown(named)} has none"
        )
    if "resume" in given and "output_dir" not in given:
        raise UserError("resume needs the output_dir of the run")


def _check_calibration(calibration: Any, model: nn.Module) -> None:
    """Check that the recorded blocks are those that are quantised."""
    if not isinstance(calibration, Calibration):
        raise UserError(f"calibration must be a Calibration(pipe, prompts), got {shown(calibration)}")
    known = calibration.denoiser.transformers.values()
    if not any(inner_model(each) is inner_model(model) for each in known):
        raise UserError(
            f"the calibration is of a pipeline without this {type(inner_model(model)).__name__}: make"
            " Calibration(pipe, prompts) with the pipeline that contains it"
        )


def the_transformer(target: Any) -> nn.Module:
    """Return the only transformer of a pipeline, or the transformer inside wrappers.

    Raises:
        UserError: the pipeline has several transformers or none.
    """
    found = transformers_of(target)
    if len(found) != 1:
        raise UserError(f"this pipeline has {' and '.join(found)}: quantise one after the other, with its own call")
    return next(iter(found.values()))


def check_recipe(recipe: Recipe, layers: Mapping[str, LayerSpec], *, named: str = "") -> None:
    """Check that a recipe can find weights in the formats of some layers, before anything is computed.

    Args:
        recipe: the recipe.
        layers: the layers by name.
        named: name of the recipe, for messages.

    Raises:
        UserError: a format has no ranges to train, a solver does not know it, or the recipe needs quantised inputs.
    """
    for name, spec in layers.items():
        try:
            if not recipe.stages and spec.weight is not None:
                check_solver(recipe.solver, spec.weight, recipe.options, hessian=False)
            for stage in recipe.stages:
                _check_stage(stage, spec, recipe)
        except UserError as error:
            raise UserError(f"{name} does not fit the recipe {named}: {error}".replace(" :", ":")) from None


def _check_stage(stage: Stage, spec: LayerSpec, recipe: Recipe) -> None:
    format = spec.weight
    if stage.solver and format is not None:
        check_solver(stage.solver, format, recipe.options, hessian=True)
    if stage.by_channel and (spec.act is None or not isinstance(spec.act.grid, IntGrid)):
        said = "None" if spec.act is None else spec.act.text
        raise UserError(
            f"it quantises inputs with a zero point for each channel, so act must be an integer format such as"
            f" int8:token, not {said}: set act, or use the recipe omniquant"
        )
    if stage.ranges != "minmax" and format is not None and not stage.exact_weights:
        _check_ranges(stage, format)


def _check_ranges(stage: Stage, format: Format) -> None:
    if format.planes:
        raise UserError(f"{format.text} has no range to train: use the recipe bpdq")
    if stage.ranges == "lsq" and format.scale != "float32":
        raise UserError(
            f"the scales of {format.text} are not float32 numbers, so they cannot be trained: use the recipe omniquant"
        )


def _without_data(model: nn.Module, spec: QuantSpec, recipe: Recipe, *, progress: bool) -> QuantReport:
    def found(name: str, linear: nn.Linear, each: LayerSpec) -> Quantized:
        assert each.weight is not None
        return solve(linear.weight.detach(), each.weight, recipe.solver, **recipe.options)

    return quantize_weights(model, spec, found, progress=progress)


def _device(device: str, model: nn.Module) -> str:
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"device is {shown(device)}. Allowed: auto, cpu, cuda")
    return str(next(model.parameters()).device.type) if device == "auto" else device


@dataclass(frozen=True, kw_only=True)
class _Job:
    """A run of a recipe with calibration."""

    model: nn.Module
    spec: QuantSpec
    layers: Mapping[str, LayerSpec]
    recipe: Recipe
    calibration: Calibration
    progress: bool

    def run(self, folder: Path, where: Path | str, pace: Mapping[str, Any], values: Mapping[str, Any]) -> QuantReport:
        """Quantise the model: statistics and records of the exact model, the stages, and then the new layers."""
        expert = self.calibration.expert_of(self.model)
        blocks = blocks_of(self.model)
        for stage in self.recipe.stages:
            for block in blocks:  # a class without folds is refused before hours of training
                points_of(block.module, self._plan(stage).of(block.name), stage)
        self.calibration.draw(progress=self.progress)
        result = self._stages(blocks, expert, folder, where, pace, values) if self.recipe.stages else None
        if result is not None:
            fold_all_(self.model, result.folds)
        exact = OutputStats()
        if self.recipe.statistics:  # folds change outputs of layers
            self.calibration.stream(self.model, exact, layers=list(self.layers), expert=expert, progress=self.progress)
        if result is not None:
            report = self._put_in(result, self._bins(expert))
        else:
            report = _without_data(self.model, self.spec, self.recipe, progress=self.progress)
        if self.recipe.statistics:
            correct_(self.model, self.calibration, exact, expert=expert, progress=self.progress)
        return report

    def _stages(
        self,
        blocks: Sequence[Block],
        expert: str,
        folder: Path,
        where: Path | str,
        pace: Mapping[str, Any],
        values: Mapping[str, Any],
    ) -> BlocksResult:
        penalty = self._penalty(blocks, expert)
        records = self.calibration.records(blocks, expert, where=where, progress=self.progress)
        bins: Bins = {
            held_out: self.calibration.bins_of(records, expert, held_out=held_out) for held_out in (False, True)
        }
        former: BlockwiseRun | None = None
        for number, stage in enumerate(self.recipe.stages, 1):
            config = self._config(stage, folder / f"stage-{number}", {**pace, **values})
            plan = self._plan(stage, self._bins(expert))
            former = BlockwiseRun(
                blocks,
                plan,
                records,
                config,
                bins=bins,
                penalty=penalty,
                former=former,
                settings={"spec": self.spec.to_dict()},
                options=self.recipe.options,
            )
            result = former.run()
        return result

    def _plan(self, stage: Stage, bins: StepBins | None = None) -> StudentPlan:
        dtype = next(self.model.parameters()).dtype
        return StudentPlan(layers=self.layers, stage=stage, bins=bins, dtype=dtype)

    def _bins(self, expert: str) -> StepBins | None:
        clipped = any("act_clip" in stage.trains for stage in self.recipe.stages)
        return self.calibration.step_bins(expert) if clipped else None

    def _penalty(self, blocks: Sequence[Block], expert: str) -> StatPenalty | None:
        if not self.recipe.statistics or not any(stage.trains for stage in self.recipe.stages):
            return None
        stats = NormStats()
        self.calibration.stream(self.model, stats, expert=expert, progress=self.progress)
        found = StatPenalty(stats, blocks)
        # Checkpoints contain the state of torch's own generator.
        found.generator = torch.default_generator
        return found

    def _config(self, stage: Stage, folder: Path, values: Mapping[str, Any]) -> ReconstructConfig:
        half = next(self.model.parameters()).dtype in (torch.float16, torch.bfloat16)
        others = {name: value for name, value in values.items() if name not in ("steps", "rates")}
        return ReconstructConfig(
            output_dir=str(folder),
            max_steps=values["steps"] or stage.steps,
            gradient_accumulation_steps=stage.batch,
            learning_rate=stage.learning_rate * values["rates"],
            learning_rate_new=stage.learning_rate_new * values["rates"],
            lr_scheduler_type=stage.schedule,
            loss=stage.loss,
            bf16=half and values["device"] == "cuda",
            **others,
        )

    @torch.no_grad()
    def _put_in(self, result: BlocksResult, bins: StepBins | None) -> QuantReport:
        """Replace the layers of the folded model."""

        def make(name: str, linear: nn.Linear, each: LayerSpec) -> QLinear:
            found, place = result.layers[name], linear.weight.device
            if found.bias is not None:
                linear.bias.copy_(found.bias)
            if found.weight is not None:
                linear.weight.copy_(found.weight)
            packed = None if found.packed is None else {key: value.to(place) for key, value in found.packed.items()}
            quantized = replace(found, packed=packed).quantized(each, (linear.out_features, linear.in_features))
            branch = None if found.branch is None else (found.branch[0].to(place), found.branch[1].to(place))
            clip = None if found.clips is None or bins is None else (bins, found.clips)
            return QLinear.of(linear, quantized, each, branch=branch, clip=clip)

        return replace_with(self.model, self.spec, make)
