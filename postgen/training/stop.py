"""Ways to stop a run between two steps: Ctrl-C, a termination signal, a deadline."""

import os
import signal
import threading
from dataclasses import dataclass, field
from enum import StrEnum
from types import FrameType, TracebackType
from typing import Any


class Reason(StrEnum):
    """Why a run ended."""

    DONE = "done"
    CALLBACK = "callback"
    DEADLINE = "deadline"
    INTERRUPTED = "interrupted"


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """How a run ended."""

    global_step: int
    """Optimiser steps done."""

    reason: Reason
    """Why it ended."""

    metrics: dict[str, float] = field(default_factory=dict)
    """The last logged metrics."""


class Signals:
    """While entered, the first SIGINT or SIGTERM is only noted; the second acts as usual.

    Outside the main thread signals cannot be caught: then nothing is changed.
    """

    def __init__(self) -> None:
        self.received = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        """Take over the two signals."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give them back."""
        self._give_back()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = True
        self._give_back()
        # Written past the streams, which the interrupted code may be in the middle of using.
        os.write(2, b"\nstopping after this step; a second signal stops at once\n")

    def _give_back(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
