"""The benchmark of calls in threads finds no errors, and it counts errors if there are some."""

from __future__ import annotations

import pytest

from benchmarks import faults_threads
from postgen.families.attached import AttachedPlugIn
from postgen.plug_ins import known_plug_ins


def test_no_call_is_wrong() -> None:
    assert faults_threads.wrong_by_plug_in(calls=8) == {row.name: 0 for row in known_plug_ins()}


def test_settings_that_cross_calls_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulate that every thread reads the settings that were entered last."""
    last = property(lambda self: ([self._usual, *self._calls])[-1])
    monkeypatch.setattr(AttachedPlugIn, "now", last)
    found = faults_threads.wrong_by_plug_in(calls=8)
    assert all(count > 0 for count in found.values())
