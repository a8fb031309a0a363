"""What happens between two steps: ways to stop a run (Ctrl-C, a signal, a deadline), and what is due."""

import os
import signal
import threading
from dataclasses import dataclass, field
from enum import StrEnum
from types import FrameType, TracebackType
from typing import Any

from postgen.interrupts import SIGNALS


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

    signal: int = 0
    """Number of the signal that this process received; 0 for none."""


def due(step: int, every: int) -> bool:
    """Return whether something is due after a step that is done every `every` steps; 0 is never."""
    return bool(every) and step % every == 0


class Signals:
    """Context that only records the first SIGINT, SIGTERM or SIGHUP; a second signal has its usual effect.

    Outside the main thread signals cannot be caught, and the context does nothing. A SIGHUP that the process ignores
    (nohup) stays ignored.
    """

    def __init__(self) -> None:
        self.number = 0
        self._before: dict[int, Any] = {}

    @property
    def received(self) -> bool:
        """Whether a signal was received."""
        return bool(self.number)

    def __enter__(self) -> "Signals":
        """Install the signal handlers."""
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if number in (signal.SIGINT, signal.SIGTERM) or signal.getsignal(number) != signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Restore the previous signal handlers."""
        self._give_back()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = self.number or number
        self._give_back()
        # Written to the file descriptor, because the interrupted code may be in the middle of using sys.stderr.
        os.write(2, b"\nstopping after this step; a second signal stops at once\n")

    def _give_back(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
