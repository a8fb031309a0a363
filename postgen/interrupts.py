"""Ctrl-C and termination signals: they raise an exception, wait while a critical block runs, and are never lost.

A command line runs inside `stoppable`. A block that must not be interrupted runs inside `held`. Light to import.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
"""Signals that ask a program to end. The system sends SIGHUP when the terminal closes."""

_AGAIN = 2.0
"""Seconds after which `Interrupted` is raised again if a library has swallowed it."""


class Interrupted(KeyboardInterrupt):
    """Exception for Ctrl-C, SIGTERM or SIGHUP inside `stoppable`; its argument is the number of the signal.

    As a subclass of KeyboardInterrupt it triggers all code that cleans up after Ctrl-C. A plain KeyboardInterrupt does
    not work: after it has left an `exec` (which creates dataclasses), Python ends by the signal and ignores the exit
    code.
    """


@dataclass
class Stop:
    """State of a command that a signal can end."""

    number: int = 0
    """Number of the first signal that arrived; 0: none."""
    ended: bool = False
    """Whether the command is already ending; further signals are then ignored."""

    @property
    def code(self) -> int:
        """The exit code: 130 after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP."""
        return 128 + (self.number or signal.SIGINT)

    def end(self) -> None:
        """Mark the command as ending; further signals are ignored."""
        self.ended = True


_stop: Stop | None = None
_given_up = False
_held = 0
_waiting: list[int] = []
"""Signals that arrived inside `held`."""


@contextmanager
def stoppable() -> Iterator[Stop]:
    """Context manager in which Ctrl-C, SIGTERM and SIGHUP raise `Interrupted`, and none of them is lost.

    Some libraries swallow an exception that is raised during an import or a callback. `Interrupted` is therefore
    raised again every `_AGAIN` seconds until `Stop.end` is called. Python ignores an exception that is raised while it
    deletes an object; in this case the signal is sent again. The context manager leaves a signal alone if the process
    ignores it (nohup, a background process of a shell) or if other code has installed a handler. A nested `stoppable`
    has no effect. Outside the main thread it cannot catch signals.
    """
    global _stop
    if _stop is not None or threading.current_thread() is not threading.main_thread():
        yield _stop or Stop()
        return
    _stop = stop = Stop()
    usual = (signal.SIG_DFL, signal.default_int_handler)
    before: dict[int, Any] = {number: old for number in SIGNALS if (old := signal.getsignal(number)) in usual}
    repeats = hasattr(signal, "SIGALRM") and signal.getsignal(signal.SIGALRM) == signal.SIG_DFL
    unraisable, sys.unraisablehook = sys.unraisablehook, _unraisable
    try:
        if repeats:
            before[signal.SIGALRM] = signal.signal(signal.SIGALRM, _raise_again)
        for number in before.keys() & set(SIGNALS):
            signal.signal(number, _raise)
        yield stop
    finally:
        stop.end()
        if repeats:
            signal.setitimer(signal.ITIMER_REAL, 0)
        sys.unraisablehook = unraisable
        _give_back(before)
        _stop = None


@contextmanager
def held() -> Iterator[None]:
    """Context manager that delays signals that ask the program to end until the block ends. Keep the block short."""
    global _held
    if threading.current_thread() is not threading.main_thread():  # Python handles signals only in the main thread
        yield
        return
    hold = _Hold()
    _held += 1
    try:
        if _stop is None:
            hold.begin()
        yield
    finally:
        _held -= 1
        came = hold.end()
        if not _held:
            came += _waiting
            _waiting.clear()
        for number in dict.fromkeys(came):
            signal.raise_signal(number)


class _Hold:
    """Signal handlers that record signals, for programs that do not run inside `stoppable`."""

    def __init__(self) -> None:
        self.came: list[int] = []
        self.before: dict[int, Any] = {}
        self.over = False

    def begin(self) -> None:
        """Replace the handlers of all signals that would end the program or raise an exception."""
        for number in SIGNALS:
            if (old := signal.getsignal(number)) == signal.SIG_DFL or callable(old):
                self.before[number] = old
                signal.signal(number, self.note)

    def note(self, number: int, frame: FrameType | None) -> None:
        if self.over:  # a signal interrupted the restoring of handlers, so this handler is still installed
            signal.signal(number, self.before[number])
            signal.raise_signal(number)
        else:
            self.came.append(number)

    def end(self) -> list[int]:
        """Restore the earlier handlers, and return the recorded signals."""
        self.over = True
        _give_back(self.before)
        return self.came


def terminate_children() -> None:
    """Terminate the child processes of `multiprocessing`, so that an interrupted call does not wait for them."""
    if "multiprocessing" in sys.modules:
        from multiprocessing import active_children

        for child in active_children():
            child.terminate()


def give_up_threads() -> None:
    """Record that threads are still running and cannot be stopped.

    On exit, Python would free objects that these threads use, and abort. `leave_given_up` avoids this.
    """
    global _given_up
    _given_up = True


def leave_given_up(code: int) -> None:
    """Exit the process at once if `give_up_threads` was called; otherwise do nothing."""
    if _given_up:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def leave_within(seconds: float, code: int) -> None:
    """Exit the process after some seconds if it has not ended by then, because a thread may wait forever."""
    timer = threading.Timer(seconds, os._exit, (code,))
    timer.daemon = True
    timer.start()


def _give_back(before: dict[int, Any]) -> None:
    for number, handler in before.items():
        signal.signal(number, handler)


def _raise(number: int, frame: FrameType | None) -> None:
    stop = _stop
    if stop is None or stop.ended:
        return
    if _held:
        _waiting.append(number)
        return
    stop.number = stop.number or number
    if signal.getsignal(getattr(signal, "SIGALRM", signal.SIGINT)) is _raise_again:
        signal.setitimer(signal.ITIMER_REAL, _AGAIN)
    raise Interrupted(number)


def _raise_again(number: int, frame: FrameType | None) -> None:
    stop = _stop
    if stop is None or stop.ended or not stop.number:
        return
    signal.setitimer(signal.ITIMER_REAL, _AGAIN)
    if not _held:
        raise Interrupted(stop.number)


def _unraisable(lost: sys.UnraisableHookArgs) -> None:
    """Send a signal again if Python would ignore it because it arrived while an object was being deleted."""
    if issubclass(lost.exc_type, KeyboardInterrupt) and hasattr(signal, "pthread_kill"):  # not on Windows
        number = _stop.number if _stop is not None and _stop.number else signal.SIGINT
        # The signal is sent a little later, because the object is still being deleted, and to the main thread, which
        # may be blocked in a system call.
        threading.Timer(0.1, signal.pthread_kill, (threading.main_thread().ident, number)).start()
    else:
        sys.__unraisablehook__(lost)


def _in_a_fork() -> None:
    """Restore the default handlers in a forked child: it ends at once, and the parent process does all cleaning up."""
    if _stop is not None:
        for number in SIGNALS:
            if signal.getsignal(number) is _raise:
                signal.signal(number, signal.SIG_DFL)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_a_fork)
