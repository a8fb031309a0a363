"""The option `--fused`, and its key in sidecars and `postgen compare`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from postgen.commands.compare import parse_side
from postgen.errors import UserError
from postgen.fused import FusedOpsConfig
from postgen.fused.config import fused_setting
from postgen.video import read_video

SIZE = ("--size", "32x32", "--frames", "5", "--steps", "1", "--format", "frames")


def test_a_fused_video_is_the_stock_one(cli: Any, tiny_wan: Path, tmp_path: Path) -> None:
    stock, fused = tmp_path / "stock", tmp_path / "fused"
    for folder, words in ((stock, ()), (fused, ("--fused", "auto"))):
        outcome = cli("generate", "a ball", "--model", tiny_wan, "-o", folder, *SIZE, *words)
        assert outcome.code == 0, outcome.err
    assert (read_video(stock) - read_video(fused)).abs().max() <= 1 / 255
    assert json.loads(fused.with_suffix(".json").read_text())["settings"]["fused"] == "auto"


def test_unknown_names_and_models(cli: Any, tiny_wan: Path, tmp_path: Path) -> None:
    outcome = cli("generate", "a ball", "--model", tiny_wan, "-o", tmp_path / "a.mp4", "--fused", "norm_rope,flash")
    assert outcome.code == 2
    assert "fused must be auto, off or some of norm_rope, adaln, attention" in outcome.err


def test_names() -> None:
    assert fused_setting(None) is fused_setting("off") is False
    assert fused_setting("auto") == FusedOpsConfig()
    assert fused_setting("attention, adaln") == FusedOpsConfig(norm_rope=False)
    assert parse_side("--b", ["fused=auto"]) == {"fused": "auto"}
    with pytest.raises(UserError, match="got ''"):
        fused_setting("")
