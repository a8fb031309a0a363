"""The worked example of a reward: one file, from CONTRIBUTING.md."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import postgen.rewards
from postgen.rewards import RewardRunner
from postgen.video import write_video
from tests.contributing import blocks

NAME = "postgen.rewards.redness.redness"


@pytest.fixture(autouse=True)
def redness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "room").mkdir()
    (tmp_path / "room" / "redness.py").write_text(*blocks("## A reward"), encoding="utf-8")
    monkeypatch.setattr(postgen.rewards, "__path__", [*postgen.rewards.__path__, str(tmp_path / "room")])
    yield
    # The next test imports it again from another folder.
    sys.modules.pop("postgen.rewards.redness", None)
    vars(postgen.rewards).pop("redness", None)


def clip(*colour: float) -> torch.Tensor:
    return torch.tensor(colour)[None, :, None, None].expand(5, 3, 16, 16).clone()


def test_its_numbers() -> None:
    clips = [clip(1.0, 0.0, 0.0), clip(0.5, 0.5, 0.5), clip(0.0, 1.0, 1.0), clip(0.5, 0.25, 0.0)]
    result = RewardRunner([NAME])(prompts=["a ball"] * 4, completions=clips)
    assert result.values[:, 0].tolist() == [1.0, 0.0, -1.0, 0.375]


def test_as_a_score_on_the_command_line(cli: Any, tmp_path: Path) -> None:
    write_video(tmp_path / "red", clip(1.0, 0.0, 0.0), fps=8, format="frames")
    done = cli("score", tmp_path / "red", "--reward", NAME, "--prompt", "a ball", "-o", tmp_path / "scores.csv")
    assert done.code == 0, done.err
    assert (tmp_path / "scores.csv").read_text().splitlines()[1].split(",").count("1.0") == 1
