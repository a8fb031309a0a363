"""How far a pipeline has come, read off its scheduler."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

from postgen.errors import UserError

_CLOSE = 0.005
"""What bfloat16 may move a timestep, as a part of the largest."""


class PipelineProgress:
    """Fraction of the denoising steps that are done when the transformer is called.

    The pipeline is asked each time, so a scheduler that is exchanged later counts, and it is not kept alive.
    """

    def __init__(self, pipe: Any) -> None:
        self._pipe = weakref.ref(pipe)

    def __call__(self, arguments: Mapping[str, Any]) -> float:
        """Return a number in [0, 1).

        Args:
            arguments: forward arguments of the transformer; `timestep` is looked up in the schedule where the
                scheduler does not count its steps (DDIM), has not begun to (the first step of a call, which need not
                be that of the schedule), or is one of several (diffusion forcing has one a frame).

        Raises:
            UserError: the pipeline is gone.
        """
        pipe = self._pipe() if self._pipe is not None else None
        if pipe is None:
            raise UserError("start and stop need the pipeline, which is gone: apply Enhance-A-Video to the new one")
        scheduler = pipe.scheduler
        steps = scheduler.timesteps
        counted = getattr(scheduler, "step_index", None)
        if counted is not None:
            return float(counted / len(steps))
        # Timesteps may come per sample, frame or token; clean reference tokens have 0.
        now = arguments["timestep"].max().to(steps)
        distance, index = (steps - now).abs().min(0)
        # A count that has not begun, in a model with a time of its own (Cosmos), is at the first step.
        unlike = hasattr(scheduler, "step_index") and distance > _CLOSE * steps.abs().max()
        return 0.0 if unlike else int(index) / len(steps)

    def __deepcopy__(self, memo: dict[int, Any]) -> PipelineProgress:
        return self

    def __getstate__(self) -> None:
        return None

    def __setstate__(self, state: None) -> None:
        self._pipe = None  # type: ignore[assignment]
