"""Rescue of a run from spikes of its loss: back to the mean of the checkpoints before them, with fresh moments.

A run that had diverged passed the spike after it was resumed from the mean of the three checkpoints before the
collapse (arXiv:2505.12082).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from . import checkpoint
from .averages import alike, average, sound
from .config import TrainingConfig
from .logging import say
from .run_log import RunLog
from .run_state import RunState

_DEVIATIONS = 1.4826
"""Standard deviation of normal values, in medians of the absolute deviations."""


class Spikes:
    """Watches the loss of each step, if `rescue_spike` is set.

    Args:
        args: the configuration.
        accelerator: the processes of the run; the main one prints messages.
    """

    def __init__(self, args: TrainingConfig, accelerator: Accelerator) -> None:
        self._args, self._device, self._main = args, accelerator.device, accelerator.is_main_process
        self._losses: list[Tensor] = []
        self._window: list[float] = []
        self._row = 0
        self.rescues = 0
        self.spiked: list[list[int]] = []
        """First and last step of each span of checkpoints whose weights belong to a spike that was rescued."""

    def add(self, loss: Tensor) -> None:
        """Note the loss of a micro-batch, without waiting for the device."""
        if self._args.rescue_spike:
            self._losses.append(loss.detach().float().reshape(()))

    def state(self) -> dict[str, Any]:
        """Return the state for checkpoints, JSON values."""
        spiked = [list(span) for span in self.spiked]
        return {"window": list(self._window), "row": self._row, "rescues": self.rescues, "spiked": spiked}

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore the return value of `state`; an empty mapping is the state of a new run."""
        self._window = [float(value) for value in state.get("window", ())]
        self._row, self.rescues = int(state.get("row", 0)), int(state.get("rescues", 0))
        self.spiked[:] = [list(span) for span in state.get("spiked", ())]

    def rescue(self, step: int, parts: RunState, log: RunLog, models: Mapping[str, nn.Module]) -> dict[str, float]:
        """Act after a step: rescue the run if the last losses were spikes, or the weights are not finite.

        Every process must call this.

        Args:
            step: optimiser steps done.
            parts: the state of the run, which a rescue changes.
            log: the log; a rescue removes what it collected since the last line.
            models: the prepared models.

        Returns:
            Metrics for the log; empty without a rescue.
        """
        if not self._args.rescue_spike:
            return {}
        # A gradient that is not finite breaks the weights of a step whose loss is finite.
        due, broken = self._is_due(), not math.isfinite(parts.checksum())
        if not (due or broken):
            return {}
        first, self._row = step - self._row + 1, 0
        what = f"the loss has spiked since step {first}" if due else f"the weights of step {step} are not finite"
        # The loss of the first spike is that of the weights of the step before it, so they are the last choice.
        for before in (first - 1, first):
            if folders := self._sound(before, parts.named):
                break
        if not folders or self.rescues >= self._args.rescue_limit:
            reason = f"rescue_limit is {self.rescues}" if folders else "there is no earlier checkpoint"
            self._say(f"postgen: warning: {what}; {reason}, so the run goes on")
            return {}
        self.rescues += 1
        self.spiked.append([before, step - 1])
        found = average(folders, [1 / len(folders)] * len(folders), parts.named)
        parts.rewind(checkpoint.read(folders[-1]), alike(found, self._device).tensors, step, models)
        log.forget()
        names = ", ".join(folder.name for folder in folders)
        self._say(f"step {step}: {what}: the run goes on from the mean of {names} with new moments of the optimiser")
        return {"rescue/first_spike": first, "rescue/count": self.rescues}

    def _sound(self, before: int, trained: Collection[str]) -> list[Path]:
        args = self._args
        return sound(args.folder, args.rescue_last, before, trained=trained, spiked=self.spiked, main=self._main)

    def _is_due(self) -> bool:
        """Take in the mean loss of the step, over processes and micro-batches; return whether to rescue the run."""
        value = float(torch.stack(self._losses).mean())
        self._losses.clear()
        every = gather_object([value])
        value = sum(every) / len(every)
        if not self._is_spike(value):
            self._row = 0
            self._window = [*self._window, value][-self._args.rescue_window :]
            return False
        self._row += 1
        return self._row >= self._args.rescue_patience or not math.isfinite(value)

    def _is_spike(self, value: float) -> bool:
        if not math.isfinite(value):
            return True
        if len(self._window) < self._args.rescue_window:
            return False
        middle = statistics.median(self._window)
        spread = _DEVIATIONS * statistics.median(abs(each - middle) for each in self._window)
        return value - middle > self._args.rescue_spike * spread

    def _say(self, text: str) -> None:
        if self._main:
            say(text)
