"""The end of a long benchmark."""

from __future__ import annotations

import signal

import pytest

from benchmarks.command import ended
from postgen.errors import UserError


def test_how_a_command_ends(capsys: pytest.CaptureFixture[str]) -> None:
    """Wrong input, a signal, and an error that a signal caused print one line; a bug keeps its traceback."""

    def wrong() -> int:
        raise UserError("no such thing")

    def stopped() -> int:
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt:
            raise RuntimeError("a library failed") from None
        return 0

    def broken() -> int:
        raise RuntimeError("a defect")

    assert (ended("x", lambda: 3), ended("x", wrong), ended("x", stopped)) == (3, 2, 143)
    assert capsys.readouterr().err == "x: no such thing\nx: stopped; the same command goes on\n"
    with pytest.raises(RuntimeError, match="a defect"):
        ended("x", broken)
