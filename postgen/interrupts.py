"""Ctrl-C and termination signals: raised where the work is, held back while files change places, never lost.

A command line stands inside `stoppable`, what must not be torn apart inside `held`. Light to import.
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
"""Signals that ask a program to end; SIGHUP comes when its terminal closes."""

_AGAIN = 2.0
"""Seconds after which a signal that nobody heeded is raised once more."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, SIGTERM or SIGHUP inside `stoppable`; its argument is the number of the signal.

    Whatever cleans up after Ctrl-C cleans up after all of them. No plain KeyboardInterrupt: once that has come out of
    an `exec`, with which dataclasses are made, Python ends by the signal, whatever its exit code.
    """


@dataclass
class Stop:
    """The signal that a command was asked to end with."""

    number: int = 0
    """The first that came; 0 while there is none."""
    ended: bool = False
    """Whether the command is ending because of it: signals change nothing any more."""

    @property
    def code(self) -> int:
        """The exit code: 130 after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP."""
        return 128 + (self.number or signal.SIGINT)

    def end(self) -> None:
        """Begin to end: raise no signal from here on."""
        self.ended = True


_stop: Stop | None = None
_given_up = False
_held = 0
_waiting: list[int] = []
"""Signals that came inside `held`."""


@contextmanager
def stoppable() -> Iterator[Stop]:
    """Inside, Ctrl-C, SIGTERM and SIGHUP raise `Interrupted`, and none of them is lost.

    Libraries swallow what is raised in the middle of an import or of a callback: after `_AGAIN` seconds it is raised
    once more, until `Stop.end` is called. Python ignores what is raised while an object is deleted: it is sent again.
    A signal that the process ignores (nohup, a shell in the background), or that has a handler of somebody else, is
    left alone. Inside another `stoppable` this one changes nothing. Outside the main thread no signal can be caught.
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
    """Inside, signals that ask to end wait: they arrive when the block ends. Keep the block short."""
    global _held
    if threading.current_thread() is not threading.main_thread():  # signals arrive in the main thread alone
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
    """Handlers that note signals, for programs that are not inside `stoppable`."""

    def __init__(self) -> None:
        self.came: list[int] = []
        self.before: dict[int, Any] = {}
        self.over = False

    def begin(self) -> None:
        """Take over what would end the program, or raise."""
        for number in SIGNALS:
            if (old := signal.getsignal(number)) == signal.SIG_DFL or callable(old):
                self.before[number] = old
                signal.signal(number, self.note)

    def note(self, number: int, frame: FrameType | None) -> None:
        if self.over:  # a signal came while handlers were given back: this one was left behind
            signal.signal(number, self.before[number])
            signal.raise_signal(number)
        else:
            self.came.append(number)

    def end(self) -> list[int]:
        """Give back; return what came."""
        self.over = True
        _give_back(self.before)
        return self.came


def terminate_children() -> None:
    """End the processes that `multiprocessing` and process pools have started: an interrupted call waits for none."""
    if "multiprocessing" in sys.modules:
        from multiprocessing import active_children

        for child in active_children():
            child.terminate()


def give_up_threads() -> None:
    """Say that threads work on which nothing ends: Python would take away what they use, and abort as it ends."""
    global _given_up
    _given_up = True


def leave_given_up(code: int) -> None:
    """End the process at once with an exit code if threads were given up; otherwise nothing happens."""
    if _given_up:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def leave_within(seconds: float, code: int) -> None:
    """End the process with an exit code where it has not ended by itself: threads may wait for work that is lost."""
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
    """Send a signal again where Python would ignore it: it came while an object was being deleted."""
    if issubclass(lost.exc_type, KeyboardInterrupt) and hasattr(signal, "pthread_kill"):  # not on Windows
        number = _stop.number if _stop is not None and _stop.number else signal.SIGINT
        # Not at once: the object is still being deleted. To the main thread, which may be waiting for something.
        threading.Timer(0.1, signal.pthread_kill, (threading.main_thread().ident, number)).start()
    else:
        sys.__unraisablehook__(lost)


def _in_a_fork() -> None:
    """Let a forked process end at once, as one without handlers does: what there is to clean up is its parent's."""
    if _stop is not None:
        for number in SIGNALS:
            if signal.getsignal(number) is _raise:
                signal.signal(number, signal.SIG_DFL)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_a_fork)
