"""Calls `transformers.TrainerCallback`s with the state and control objects they know."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState

from .config import TrainingConfig

KEPT = 1000
"""Lines of training, and as many of evaluations, that `state.log_history` holds."""


class Callbacks:
    """Callbacks of a run with their shared `state` and `control`.

    Events: on_train_begin, on_step_begin, on_step_end, on_log, on_evaluate, on_save, on_train_end. The flags that
    callbacks set in `control` (should_training_stop, should_save, should_evaluate, should_log) are honoured after each
    step. `args` is our configuration, which carries the names of `TrainingArguments`.

    `state.log_history` holds the newest `KEPT` lines of training and as many of evaluations, in their order, so that
    a long run needs no more memory than a short one. `metrics.jsonl` holds all of them.
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
        """Tell `state` which step it is; the whole run counts as one epoch."""
        self.state.global_step = step
        self.state.epoch = step / self.args.max_steps

    def remember(self, step: int, values: Mapping[str, float]) -> None:
        """Add a line to `state.log_history`; the oldest of its kind goes where there are too many."""
        history, kind = self.state.log_history, _evaluates(values)
        if self._lines.total() != len(history):  # a callback has cut it, or taken another
            self._lines = Counter(map(_evaluates, history))
        history.append({"step": step, **values})
        self._lines[kind] += 1
        if self._lines[kind] > KEPT:
            del history[next(place for place, line in enumerate(history) if _evaluates(line) == kind)]
            self._lines[kind] -= 1

    def call(self, event: str, **extra: Any) -> None:
        """Call `event` on every callback; one that returns a control object replaces the shared one."""
        for callback in self.callbacks:
            self.control = getattr(callback, event)(self.args, self.state, self.control, **extra) or self.control

    def take(self, flag: str) -> bool:
        """Return a flag of `control` and lower it."""
        raised = bool(getattr(self.control, flag))
        setattr(self.control, flag, False)
        return raised


def _evaluates(values: Mapping[str, float]) -> bool:
    return any(name.startswith("eval_") for name in values)
