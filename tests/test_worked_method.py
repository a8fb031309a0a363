"""The worked example of an inference method: a folder and one row, from CONTRIBUTING.md."""

from __future__ import annotations

import copy
import importlib
import inspect
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

import postgen
import postgen.plug_ins as table
from postgen.pipelines import WanPipeline
from postgen.plug_ins import PlugIn, register_plug_in
from postgen.video import read_video
from tests.contributing import blocks
from tests.tiny_wan import wan_components

SMALL = ("--size", "32x16", "--frames", "5", "--steps", "2", "--guidance", "1", "--format", "frames")


@pytest.fixture
def boost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Module of the example, with its row in the table."""
    code, row = blocks("## An inference method")
    folder = tmp_path / "room" / "boost"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text(code, encoding="utf-8")
    monkeypatch.setattr(postgen, "__path__", [*postgen.__path__, str(folder.parent)])
    monkeypatch.setattr(table, "_rows", list(table._rows))
    register_plug_in(eval(row, {"PlugIn": PlugIn}))
    yield importlib.import_module("postgen.boost")
    del sys.modules["postgen.boost"], postgen.boost  # type: ignore[attr-defined]


def test_option_key_and_sidecar(boost: Any, cli: Any, tiny_wan: Path, tmp_path: Path) -> None:
    def frames(name: str) -> torch.Tensor:
        return read_video(tmp_path / name)

    assert "--boost" in cli("generate", "--help").out
    words = ["--model", tiny_wan, *SMALL]
    sides = cli("compare", "a ball", "--a", "boost=0", "--b", "boost=1", "-o", tmp_path / "c", *words)
    assert sides.code == 0, sides.err
    assert cli("generate", "a ball", "-o", tmp_path / "stock", *words).code == 0
    assert cli("generate", "a ball", "-o", tmp_path / "on", "--boost", "1", *words).code == 0
    assert torch.equal(frames("c-a"), frames("stock"))
    assert torch.equal(frames("c-b"), frames("on"))
    assert not torch.equal(frames("on"), frames("stock"))
    settings = [json.loads((tmp_path / f"{name}.json").read_text())["settings"] for name in ("stock", "on")]
    assert [each["boost"] for each in settings] == [None, "1"]
    assert cli("generate", "--from", tmp_path / "on.json", "-o", tmp_path / "again").code == 0
    assert torch.equal(frames("again"), frames("on"))
    with pytest.MonkeyPatch.context() as without:
        without.setattr(table, "_rows", table._rows[:-1])
        missing = cli("generate", "--from", tmp_path / "on.json", "-o", tmp_path / "x")
        assert (missing.code, missing.err.count("\n"), (tmp_path / "x").exists()) == (2, 1, False)
        assert "was made with a plug-in 'boost' of postgen.boost, which this command does not have" in missing.err
        note = json.loads((tmp_path / "on.json").read_text())
        note["settings"]["boost"] = None  # as the message says
        (tmp_path / "off.json").write_text(json.dumps(note))
        assert cli("generate", "--from", tmp_path / "off.json", "-o", tmp_path / "plain").code == 0
        assert torch.equal(frames("plain"), frames("stock"))
    wrong = cli("generate", "a ball", "-o", tmp_path / "x", "--boost", "much", *words)
    assert (wrong.code, wrong.err) == (2, "postgen: error: boost must be a number, got 'much'\n")


def test_the_argument_of_a_drop_in_pipeline(boost: Any) -> None:
    """Doubling the output of attention equals doubling the weights of its last layer, bit by bit."""
    parameter = inspect.signature(WanPipeline.__call__).parameters["boosted_attention"]
    assert (parameter.kind, parameter.default) == (parameter.KEYWORD_ONLY, None)
    assert "a weight, True or a `BoostConfig` switches it on" in WanPipeline.__call__.__doc__
    components = wan_components()
    pipe, plain = WanPipeline(**components), diffusers.WanPipeline(**components)
    doubled = diffusers.WanPipeline(**{**components, "transformer": copy.deepcopy(pipe.transformer)})
    for block in doubled.transformer.blocks:
        for weights in block.attn1.to_out[0].parameters():
            weights.data *= 2

    def video(one: Any, **settings: Any) -> torch.Tensor:
        one.set_progress_bar_config(disable=True)
        size = {"height": 16, "width": 32, "num_frames": 5, "num_inference_steps": 2}
        generator = torch.Generator().manual_seed(0)
        frames: torch.Tensor = one("a ball", **size, **settings, generator=generator, output_type="pt").frames
        return frames

    stock = video(plain)
    for setting in (1, 1.0, True, boost.BoostConfig()):
        assert torch.equal(video(pipe, boosted_attention=setting), video(doubled))
    for setting in (None, 0, False):
        assert torch.equal(video(pipe, boosted_attention=setting), stock)
    handle = boost.apply_boost(pipe, boost.BoostConfig(weight=1))
    assert torch.equal(video(pipe), video(doubled))
    assert str(postgen.summary(pipe)).splitlines()[1:] == [
        "  boosted_attention: on, weight 1 in 2 layers",
        "  attention processors: diffusers < boosted_attention",
    ]
    assert torch.equal(video(pipe, boosted_attention=0), stock)
    handle.remove()
    assert torch.equal(video(pipe), stock)
    for call in (handle.enable, handle.disable, handle.remove, handle.update, lambda: handle.enabled):
        with pytest.raises(postgen.UserError, match="the boost was removed"):
            call()


def test_without_its_row_nothing_of_it_is_left(cli: Any) -> None:
    assert "--boost" not in cli("generate", "--help").out
    assert "boosted_attention" not in inspect.signature(WanPipeline.__call__).parameters
