"""How far a pipeline has come, read off its scheduler."""

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
"""What bfloat16 may move a timestep, as a part of the largest."""


class PipelineProgress:
    """Fraction of the denoising steps that are done when the transformer is called.

    The step is that of the pipeline whose `__call__` is running in this thread, so what another pipeline with the same
    transformer does, or did, is of no account. Without one, the pipeline given here is taken, for loops written by
    hand; it is not kept alive. A scheduler is asked for each time, so one that is exchanged later counts.
    """

    def __init__(self, pipe: Any | None, *, who: str = "Enhance-A-Video") -> None:
        """Take the pipeline of loops written by hand, if there is one, and who asks, for errors."""
        self._pipe, self._who = None if pipe is None else weakref.ref(pipe), who

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, arguments: Mapping[str, Any], model: nn.Module | None = None) -> float:
        """Return `step` as a number in [0, 1)."""
        done: tuple[int, int] = self.step(arguments, model)
        return done[0] / done[1]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def step(self, arguments: Mapping[str, Any], model: nn.Module | None = None) -> tuple[int, int]:
        """Return how many steps are done, and how many there are.

        Args:
            arguments: forward arguments of the transformer; `timestep` is looked up in the schedule where the
                scheduler does not count its steps (DDIM), has not begun to (the first step of a call, which need not
                be that of the schedule), or is one of several (diffusion forcing has one a frame).
            model: the transformer that is called; None takes the innermost pipeline whatever it has.

        Raises:
            UserError: no pipeline is running, and the one given is gone or at the end of its schedule.
        """
        pipe = _running(model)
        if pipe is not None:
            return _step(pipe.scheduler, arguments)
        pipe = self._pipe() if self._pipe is not None else None
        if pipe is None:
            raise UserError(
                f"{self._who} needs the pipeline, which is gone, to know the step: apply it to the new one"
            )
        if (getattr(pipe.scheduler, "step_index", None) or 0) >= len(pipe.scheduler.timesteps):
            raise UserError(
                f"{self._who} needs the denoising step, but no pipeline is running and the {type(pipe).__name__}"
                " that it was applied to has finished: call a pipeline, or give progress=, a function"
            )
        return _step(pipe.scheduler, arguments)

    def __deepcopy__(self, memo: dict[int, Any]) -> PipelineProgress:
        return self

    def __getstate__(self) -> str:
        return self._who

    def __setstate__(self, state: str) -> None:
        self._pipe, self._who = None, state


def _running(model: nn.Module | None) -> Any | None:
    """Return the innermost pipeline with this transformer whose call is under way in this thread; None: there is none.

    A pipeline of diffusers says nowhere that it runs. Its frame does, and is gone however the call ends.
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
    except UserError:  # it has none
        return False


def _step(scheduler: Any, arguments: Mapping[str, Any]) -> tuple[int, int]:
    steps = scheduler.timesteps
    counted = getattr(scheduler, "step_index", None)
    if counted is not None:
        return int(counted), len(steps)
    # Timesteps may come per sample, frame or token; clean reference tokens have 0.
    now = arguments["timestep"].max().to(steps)
    distance, index = (steps - now).abs().min(0)
    # A count that has not begun, in a model with a time of its own (Cosmos), is at the first step.
    unlike = hasattr(scheduler, "step_index") and distance > _CLOSE * steps.abs().max()
    return 0 if unlike else int(index), len(steps)
