"""Progress of a running pipeline through its denoising steps, as its scheduler shows it."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from postgen.errors import UserError
from postgen.families.installed import transformers_of

_CLOSE = 0.005
"""Largest rounding error of a timestep in bfloat16, relative to the largest timestep."""


class PipelineProgress:
    """Fraction of the denoising steps that are complete when the transformer is called.

    The step is that of the pipeline whose `__call__` runs in this thread, so other pipelines with the same transformer
    do not matter. If no pipeline runs, as in a sampling loop written by hand, the step is that of the pipeline given
    here, of which this object holds a weak reference. Every call reads `pipe.scheduler` again, so the scheduler may be
    exchanged.
    """

    def __init__(self, pipe: Any | None, *, who: str = "Enhance-A-Video") -> None:
        """Create the object.

        Args:
            pipe: pipeline for sampling loops written by hand, or None.
            who: name of the method that needs the step, for error messages.
        """
        self._pipe, self._who = None if pipe is None else weakref.ref(pipe), who

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, arguments: Mapping[str, Any], model: nn.Module | None = None) -> float:
        """Return the fraction of complete steps, in [0, 1). Arguments and errors are those of `step`."""
        done: tuple[int, int] = self.step(arguments, model)
        return done[0] / done[1]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def step(self, arguments: Mapping[str, Any], model: nn.Module | None = None) -> tuple[int, int]:
        """Return the number of complete steps and the number of all steps.

        Args:
            arguments: forward arguments of the transformer. Its `timestep` is looked up in the schedule if the
                scheduler has no step count. That is so if the scheduler never counts (DDIM), at the first step of a
                call (which need not be the first of the schedule), and with one scheduler per frame (diffusion
                forcing).
            model: the transformer that is called; None uses the innermost running pipeline with any transformer.

        Raises:
            UserError: no pipeline runs, and the given one no longer exists or is at the end of its schedule.
        """
        pipe = _running(model)
        if pipe is not None:
            return _step(pipe.scheduler, arguments)
        pipe = self._pipe() if self._pipe is not None else None
        if pipe is None:
            raise UserError(
                f"{self._who} needs the denoising step, but its pipeline no longer exists: apply it to the new one"
            )
        if (getattr(pipe.scheduler, "step_index", None) or 0) >= len(pipe.scheduler.timesteps):
            raise UserError(
                f"{self._who} needs the denoising step, but no pipeline is running and the {type(pipe).__name__}"
                " that it was applied to has finished: call a pipeline, or give a function as progress="
            )
        return _step(pipe.scheduler, arguments)

    def __deepcopy__(self, memo: dict[int, Any]) -> PipelineProgress:
        return self

    def __getstate__(self) -> str:
        return self._who

    def __setstate__(self, state: str) -> None:
        self._pipe, self._who = None, state


def _running(model: nn.Module | None) -> Any | None:
    """Return the innermost pipeline with this transformer whose call runs in this thread; None if there is none.

    A diffusers pipeline has no attribute that shows that it runs. The stack frame of its call shows this, and
    disappears however the call ends.
    """
    frame = inspect.currentframe()
    while frame is not None:
        names = frame.f_code.co_varnames
        if frame.f_code.co_name == "__call__" and names and names[0] == "self":
            found = frame.f_locals.get("self")
            if hasattr(found, "scheduler") and hasattr(found, "components") and (model is None or _has(found, model)):
                return found
        frame = frame.f_back
    return None


def _has(pipe: Any, model: nn.Module) -> bool:
    try:
        return any(each is model for each in transformers_of(pipe).values())
    except UserError:  # the pipeline has no transformer
        return False


def _step(scheduler: Any, arguments: Mapping[str, Any]) -> tuple[int, int]:
    steps = scheduler.timesteps
    counted = getattr(scheduler, "step_index", None)
    if counted is not None:
        return int(counted), len(steps)
    # Timesteps may be per sample, frame or token; clean reference tokens have timestep 0.
    now = arguments["timestep"].max().to(steps)
    distance, index = (steps - now).abs().min(0)
    # Some models (Cosmos) have another time scale than their scheduler. Before its step count starts, the step is 0.
    unlike = hasattr(scheduler, "step_index") and distance > _CLOSE * steps.abs().max()
    return 0 if unlike else int(index), len(steps)
