"""Programs without options: `--help` explains them, and neither it nor a wrong word writes anything."""

from __future__ import annotations

import importlib

import pytest

from benchmarks import docs_tables

NAMES = ("quant_report", "worldweaver_tables", "lit_video_report", "lowp_report", "small_cards_report")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("word", "code"), [("--help", 0), ("all", 2)])
def test_nothing_is_written(name: str, word: str, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(docs_tables, "write", pytest.fail)
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"benchmarks.{name}").main([word])
    assert ended.value.code == code
