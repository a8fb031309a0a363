"""Calibration points of a model: latents on its own sampling trajectories, with the text that it receives there.

    calibration = Calibration(pipe, prompts, CalibrationConfig(points=64, bins=8))
    amax = AbsMax()
    calibration.stream(pipe.transformer, [amax])

A point is a prompt, a noise level, a text (the prompt or, with classifier-free guidance, the negative prompt) and the
transformer that runs there (Wan 2.2 has two). Its latents come from the model before quantisation, because they are
drawn once and kept.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from postgen.errors import UserError, shown
from postgen.families import Block, Condition, Denoiser, denoiser_for
from postgen.families.installed import transformers_of
from postgen.families.linear import find_linears
from postgen.quant.calibration_config import CalibrationConfig
from postgen.quant.step_bins import StepBins
from postgen.quant.visits import Bin, Branch, EndPass, Observer, Visit, watching
from postgen.reconstruct import Records, Share, collect
from postgen.reconstruct.teacher import Teacher
from postgen.training.logging import Progress
from postgen.training.modes import evaluating


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One point of a trajectory."""

    prompt: int
    """Number of the prompt, from 0."""
    step: int
    """Step of the trajectory, from 0."""
    timestep: float
    """Timestep that the transformer receives."""
    bin: Bin
    held_out: bool
    """Whether the point only measures errors."""
    latents: Tensor
    """Noisy latents of one sample, float32 on the CPU."""


class Calibration:
    """Points on the sampling trajectories of a model. They are drawn on first use and kept, see `draw`.

    Args:
        pipe: the pipeline of the model.
        prompts: texts, or rows with `prompt` and optionally `negative_prompt` and `image`. The last
            `held_out_prompts` are held out.
        config: settings; None for the defaults.

    Raises:
        UserError: there are too few prompts, the pipeline has no denoiser, or a setting does not fit the model.
    """

    def __init__(
        self, pipe: Any, prompts: Iterable[str | Mapping[str, Any]], config: CalibrationConfig | None = None
    ) -> None:
        self.config = config or CalibrationConfig()
        self.rows = [prompts] if isinstance(prompts, str) else list(prompts)
        least = self.config.held_out_prompts + 1
        if len(self.rows) < least:
            raise UserError(
                f"calibration needs at least {least} prompts, of which held_out_prompts={least - 1} measure errors,"
                f" but got {len(self.rows)}: give texts like those that the model will be used with"
            )
        self.denoiser: Denoiser = denoiser_for(pipe)
        self.settings = self.config.records(pipe, len(self.rows))
        self._teachers = {
            name: Teacher(self.denoiser, [], name, self.settings, self.rows) for name in self.denoiser.transformers
        }
        first = next(iter(self._teachers.values()))
        self._sampler, self._conditions = first.sampler, first.conditions
        self._points: dict[str, tuple[Point, ...]] = {}
        self._bins: dict[str, StepBins] = {}

    @property
    def branches(self) -> tuple[Branch, ...]:
        """The texts of the points: "prompt", and with classifier-free guidance "negative"."""
        return ("prompt", "negative") if self.settings.guidance_scale > 1 else ("prompt",)

    @property
    def experts(self) -> tuple[str, ...]:
        """Names of the transformers that run at some noise level."""
        self.draw()
        return tuple(self._points)

    @torch.no_grad()
    def draw(self, *, progress: bool = False) -> None:
        """Sample the trajectories, if this has not been done. Call it before the model is changed.

        Args:
            progress: whether to show a progress bar.

        Raises:
            UserError: the latents are not finite.
        """
        if self._points:
            return
        with evaluating(self.denoiser.transformers.values()):
            timesteps = {name: each.timesteps() for name, each in self._teachers.items()}
            plans = {name: each.plan() for name, each in self._teachers.items() if timesteps[name]}
            self._bins = {name: StepBins.of([*timesteps[name].values()], self.config.bins) for name in plans}
            found: dict[str, list[Point]] = {name: [] for name in plans}
            first = next(iter(self._teachers.values()))
            bar = Progress(step=0, max_steps=len(first.chunks), shown=progress, name="calibrate")
            for chunk in first.chunks:
                latents = first.trajectory(chunk)
                for name, plan in plans.items():
                    for row, prompt in enumerate(chunk.prompts):
                        for step in (steps[row] for steps in self._teachers[name].steps(plan, chunk)):
                            x, at = latents[step, row].clone(), timesteps[name][step]
                            found[name] += self._twins(name, prompt, step, at, x, held_out=chunk.held_out)
                bar.step()
            bar.close()
        self._points = {name: tuple(points) for name, points in found.items()}

    def _twins(
        self, expert: str, prompt: int, step: int, at: float, latents: Tensor, *, held_out: bool
    ) -> Iterator[Point]:
        level = int(self._bins[expert].index(torch.tensor([at]))[0])
        for branch in self.branches:
            bin = Bin(level=level, branch=branch, expert=expert)
            yield Point(prompt=prompt, step=step, timestep=at, bin=bin, held_out=held_out, latents=latents)

    def points(self, expert: str = "transformer", *, held_out: bool = False) -> tuple[Point, ...]:
        """Return the points of a transformer.

        Args:
            expert: name of the transformer.
            held_out: True for the points of held-out prompts, False for the others.

        Raises:
            UserError: the pipeline has no such transformer, or it runs at no noise level.
        """
        return tuple(point for point in self._of(expert) if point.held_out == held_out)

    def step_bins(self, expert: str = "transformer") -> StepBins:
        """Return the bins of the noise level of a transformer: new ones, which may be attached. Errors as `points`."""
        self._of(expert)
        return StepBins(self._bins[expert].edges)

    def _of(self, expert: str) -> tuple[Point, ...]:
        self.draw()
        if expert not in self._points:
            raise UserError(
                f"there are no calibration points of {shown(expert)}: the transformers that run in"
                f" {self.settings.num_inference_steps} steps are {', '.join(self._points)}"
            )
        return self._points[expert]

    # Runs of a model.

    def condition(self, points: Sequence[Point]) -> Condition:
        """Return the condition of points of one bin; entries of the negative prompt take the names of the prompt's."""
        told = self._conditions([point.prompt for point in points])
        named = {name: value for name, value in told.items() if name.partition("_")[0] != "negative"}
        if points[0].bin.branch == "negative":
            named |= {
                name.replace("negative", "prompt", 1): value for name, value in told.items() if name not in named
            }
        return named

    def predict(self, points: Sequence[Point], model: nn.Module | None = None) -> Tensor:
        """Return the prediction (B, ...) of a transformer at points of one bin, in one pass without guidance.

        Args:
            points: the points.
            model: the transformer, which may be a changed copy; None is the one of the pipeline.
        """
        device = self._sampler.device
        x = torch.stack([point.latents for point in points]).to(device)
        start = torch.tensor([point.step for point in points], device=device)
        with self._standing_in(model, points[0].bin.expert):
            sigma = self._sampler.schedule.received(start)
            return self.denoiser.predict(x, sigma, self.condition(points), 1.0)

    def batches(self, expert: str = "transformer", *, held_out: bool = False) -> list[tuple[Visit, tuple[Point, ...]]]:
        """Return the points of a transformer in batches of one bin and at most `batch_size` points."""
        by_bin: dict[Bin, list[Point]] = {}
        for point in self.points(expert, held_out=held_out):
            by_bin.setdefault(point.bin, []).append(point)
        found, size = [], self.config.batch_size
        for bin, points in sorted(by_bin.items()):
            for low in range(0, len(points), size):
                part = tuple(points[low : low + size])
                prompts = tuple(point.prompt for point in part)
                found.append((Visit(bin=bin, prompts=prompts, weight=1 / len(points)), part))
        return found

    @torch.no_grad()
    def stream(
        self,
        model: nn.Module,
        observers: Observer | Sequence[Observer],
        *,
        layers: Collection[str] | None = None,
        expert: str | None = None,
        held_out: bool = False,
        progress: bool = False,
    ) -> None:
        """Run a model over the points, while observers see its activations. Nothing is kept but what they keep.

        Args:
            model: the transformer of the pipeline, or a changed copy of it.
            observers: one or several observers.
            layers: names of the linear layers of interest; None for those of attention and feed-forward networks.
            expert: name of the transformer in the pipeline; None finds it.
            held_out: whether to run over the points of held-out prompts instead of the others.
            progress: whether to show a progress bar.

        Raises:
            UserError: a layer is unknown, or the pipeline has two transformers and `model` is neither of them.
        """
        expert = expert or self.expert_of(model)
        watched = [observers] if isinstance(observers, Observer) else list(observers)
        linears = linears_of(model, layers)
        batches = self.batches(expert, held_out=held_out)
        bar = Progress(step=0, max_steps=len(batches), shown=progress, name="calibrate")
        running: list[Visit] = []
        with evaluating([model]), watching(linears, inner_model(model), watched, lambda: running[-1]):
            for visit, points in batches:
                running.append(visit)
                with suppress(EndPass):
                    self.predict(points, model)
                bar.step()
        bar.close()

    def expert_of(self, model: nn.Module) -> str:
        """Return the name of a transformer in the pipeline.

        Raises:
            UserError: the pipeline has two transformers and `model` is neither of them.
        """
        known = self.denoiser.transformers
        for name, each in known.items():
            if each is model or inner_model(each) is inner_model(model):
                return name
        if len(known) > 1:
            raise UserError(
                f"the pipeline has {' and '.join(known)}, and this {type(model).__name__} is neither of them: give"
                " expert"
            )
        return next(iter(known))

    @contextmanager
    def _standing_in(self, model: nn.Module | None, expert: str) -> Iterator[None]:
        before = self.denoiser.transformers[expert]
        self.denoiser.transformers[expert] = before if model is None else model
        try:
            yield
        finally:
            self.denoiser.transformers[expert] = before

    # Recordings of blocks.

    def records(
        self,
        modules: Iterable[Block | str] | str,
        expert: str = "transformer",
        *,
        where: Path | str = "cpu",
        share: Share | None = None,
        progress: bool = True,
    ) -> Records:
        """Record the inputs and outputs of modules at the points, as `postgen.reconstruct.collect` does.

        With guidance, a record has two calls of a module: with the prompt, then with the negative prompt.
        """
        return collect(
            self.denoiser,
            modules,
            self.rows,
            self.settings,
            where=where,
            transformer=expert,
            share=share,
            progress=progress,
            drawn={(point.prompt, point.step): point.latents for point in self._of(expert)},
        )

    def bins_of(self, records: Records, expert: str = "transformer", *, held_out: bool) -> list[tuple[Bin, ...]]:
        """Return the bins of the rows of each call in `records.calls([module], held_out=held_out)`, in its order.

        The module must be called once in a forward pass, as blocks and their linear layers are.
        """
        self._of(expert)
        teacher = self._teachers[expert]
        at = {point.step: point.bin.level for point in self._points[expert]}
        found: list[tuple[Bin, ...]] = []
        for chunk in teacher.chunks:
            for steps in teacher.steps(records.plan, chunk) if chunk.held_out == held_out else ():
                for branch in self.branches:
                    found.append(tuple(Bin(level=at[step], branch=branch, expert=expert) for step in steps))
        return found


def inner_model(model: nn.Module) -> nn.Module:
    """Return a transformer without its wrappers (peft, compiled)."""
    return transformers_of(model)[""]


def linears_of(model: nn.Module, layers: Collection[str] | None) -> dict[str, nn.Module]:
    """Return layers of a model by name; None for the linear layers of attention and feed-forward networks.

    Raises:
        UserError: a layer is unknown.
    """
    if layers is None:
        return dict(find_linears(model))
    known = {name.replace(".base_layer", ""): module for name, module in inner_model(model).named_modules()}
    if unknown := [name for name in layers if name not in known]:
        raise UserError(f"{type(inner_model(model)).__name__} has no layer {', '.join(map(shown, unknown))}")
    return {name: known[name] for name in layers}
