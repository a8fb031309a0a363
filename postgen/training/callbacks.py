"""Runs `transformers.TrainerCallback`s with a `TrainerState` and a `TrainerControl`."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState

from .config import TrainingConfig

KEPT = 1000
"""Maximum number of training lines, and of evaluation lines, in `state.log_history`."""


class Callbacks:
    """The callbacks of a run with their shared `state` and `control`.

    Events: on_train_begin, on_step_begin, on_step_end, on_log, on_evaluate, on_save, on_train_end. After each step the
    trainer honours the flags that callbacks set in `control`: should_training_stop, should_save, should_evaluate,
    should_log. Callbacks receive our configuration as `args`; its fields have the names of `TrainingArguments`.

    `state.log_history` holds the newest `KEPT` training lines and the newest `KEPT` evaluation lines, in order, so the
    memory of a run does not grow with its length. `metrics.jsonl` holds all lines.

    Args:
        callbacks: callback objects or classes.
        args: the configuration.
        is_main: whether this is the main process.
    """

    def __init__(self, callbacks: Iterable[TrainerCallback], args: TrainingConfig, *, is_main: bool) -> None:
        self.callbacks = [callback() if isinstance(callback, type) else callback for callback in callbacks]
        self.args = args
        self._lines: Counter[bool] = Counter()
        self.control = TrainerControl()
        self.state = TrainerState(
            max_steps=args.max_steps,
            logging_steps=args.logging_steps,
            eval_steps=args.eval_steps,
            save_steps=args.save_steps,
            train_batch_size=args.per_device_train_batch_size,
            num_train_epochs=1,
            is_local_process_zero=is_main,
            is_world_process_zero=is_main,
        )

    def at(self, step: int) -> None:
        """Set the step and the epoch of `state`; the whole run is one epoch."""
        self.state.global_step = step
        self.state.epoch = step / self.args.max_steps

    def remember(self, step: int, values: Mapping[str, float]) -> None:
        """Append a line to `state.log_history`; above `KEPT` lines of its kind, remove the oldest of this kind."""
        history, kind = self.state.log_history, _evaluates(values)
        if self._lines.total() != len(history):  # a callback has changed or replaced the list
            self._lines = Counter(map(_evaluates, history))
        history.append({"step": step, **values})
        self._lines[kind] += 1
        if self._lines[kind] > KEPT:
            del history[next(place for place, line in enumerate(history) if _evaluates(line) == kind)]
            self._lines[kind] -= 1

    def call(self, event: str, **extra: Any) -> None:
        """Call `event` on every callback. A control object that a callback returns replaces the shared one."""
        for callback in self.callbacks:
            self.control = getattr(callback, event)(self.args, self.state, self.control, **extra) or self.control

    def take(self, flag: str) -> bool:
        """Return the value of a flag of `control`, and reset the flag to False."""
        raised = bool(getattr(self.control, flag))
        setattr(self.control, flag, False)
        return raised


def _evaluates(values: Mapping[str, float]) -> bool:
    return any(name.startswith("eval_") for name in values)
