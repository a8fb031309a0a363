"""The table of plug-ins: what a row defines, how often its functions are called, and which rows are refused."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import postgen
import postgen.generate
import postgen.plug_ins as table
from postgen.families.handle import PlugInHandle
from postgen.pipelines import WanPipeline
from postgen.plug_ins import PlugIn, known_plug_ins, plug_ins_for_call, register_plug_in, resolve
from postgen.request import GenerateConfig
from tests.families.tiny_models import tiny_model
from tests.tiny_wan import wan_components

SMALL = ("--size", "32x16", "--frames", "5", "--steps", "1", "--format", "frames")
TEXTS = {
    "enhance_a_video": "2.5",
    "fp8_attention": "simulate",
    "fp8_linears": "feed_forward",
    "fused_ops": "norm_rope",
}
"""A valid text for the option of each row."""
CONFIGS = {"fp8_attention": postgen.FP8AttentionConfig(first_exact_steps=0, last_exact_steps=0, simulate=True)}
"""Settings of rows whose default settings need a GPU."""


@pytest.fixture(scope="module")
def tiny_wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny Wan with a width that every plug-in supports."""
    from diffusers import WanPipeline as Stock

    path = tmp_path_factory.mktemp("models") / "wan-32"
    Stock(**wan_components(head_dim=16)).save_pretrained(path)
    return path


@pytest.fixture(params=known_plug_ins(), ids=lambda row: row.name)
def row(request: pytest.FixtureRequest) -> PlugIn:
    return request.param  # type: ignore[no-any-return]


def test_a_row_is_one_plug_in_everywhere(row: PlugIn, cli: Any) -> None:
    transformer = tiny_model("Wan").transformer
    handle = resolve(row.apply)(transformer, CONFIGS.get(row.name))
    assert isinstance(handle, PlugInHandle)
    assert row.name in postgen.summary(transformer).transformers[0].plug_ins
    handle.remove()
    setting = resolve(row.parse)(TEXTS[row.name])
    with resolve(row.for_call)(transformer, setting):
        assert list(postgen.summary(transformer).transformers[0].plug_ins) == [row.name]
    assert not postgen.summary(transformer).transformers[0].plug_ins
    resolve(row.check)(type(transformer).__name__)
    with pytest.raises(postgen.UserError, match="Nobodys"):
        resolve(row.check)("Nobodys")
    for command in ("generate", "compare"):
        assert row.flag in cli(command, "--help").out
    assert row.name in inspect.signature(WanPipeline.__call__).parameters


def test_a_wrong_text_is_found_before_the_weights_are_read(
    row: PlugIn, cli: Any, tiny_wan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgen.generate, "load", lambda job: pytest.fail("the model was loaded"))
    done = cli("generate", "a", "--model", tiny_wan, "-o", tmp_path / "x.mp4", row.flag, "nonsense")
    assert (done.code, done.err.count("\n"), list(tmp_path.iterdir())) == (2, 1, [])
    assert f"{row.flag} must be" in done.err


def counted(monkeypatch: pytest.MonkeyPatch, *places: str) -> Counter[str]:
    """Count the calls of functions without changing them."""
    calls: Counter[str] = Counter()

    def count(place: str, function: Any) -> Any:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[place] += 1
            return function(*args, **kwargs)

        return call

    for place in places:
        monkeypatch.setattr(place.replace(":", "."), count(place, resolve(place)))
    return calls


PREPARED = ("postgen.generate:prepare", "postgen.generate:inspect_model", "postgen.generate:output_paths")
PARSED = tuple(row.parse for row in known_plug_ins())
WORDS = [word for row in known_plug_ins() for word in (row.flag, TEXTS[row.name])]


@pytest.mark.parametrize("count", [1, 2])
def test_generate_parses_and_prepares_once(
    cli: Any, tiny_wan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    calls = counted(monkeypatch, *PREPARED, *PARSED)
    done = cli("generate", "a", "--model", tiny_wan, "-o", tmp_path / "x", "--count", str(count), *SMALL, *WORDS)
    assert done.code == 0, done.err
    assert calls == {**dict.fromkeys((*PREPARED, *PARSED), 1), "postgen.generate:output_paths": count}


def test_files_of_prompts_and_sidecars_are_prepared_once_too(
    cli: Any, tiny_wan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "prompts.txt").write_text("a ball\na cube\n")
    words = ["--model", tiny_wan, *SMALL, *WORDS]
    reads = ("postgen.commands.generate:read_prompts", "postgen.request:read_sidecar")
    calls = counted(monkeypatch, *PREPARED[:2], *PARSED, *reads)
    done = cli("generate", "--prompts", tmp_path / "prompts.txt", "--count", "2", "-o", tmp_path / "x", *words)
    assert done.code == 0, done.err
    assert calls == dict.fromkeys((*PREPARED[:2], *PARSED, reads[0]), 1)
    calls.clear()
    # A sidecar of an earlier version has the texts of plug-ins beside the other settings.
    note = json.loads((tmp_path / "x-003.json").read_text())
    assert "plug_ins" not in note["settings"]
    done = cli("generate", "--from", tmp_path / "x-003.json", "-o", tmp_path / "again")
    assert done.code == 0, done.err
    assert calls == dict.fromkeys((*PREPARED[:2], *PARSED, reads[1]), 1)
    assert json.loads((tmp_path / "again.json").read_text())["settings"] == note["settings"]


def test_compare_parses_and_prepares_each_side_once(
    cli: Any, tiny_wan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = counted(monkeypatch, *PREPARED[:2], *PARSED)
    words = ["--model", tiny_wan, "-o", tmp_path / "x", *SMALL, *WORDS]
    done = cli("compare", "a", "--a", "fused=off", "--b", "enhance=1", *words)
    assert done.code == 0, done.err
    assert calls == dict.fromkeys((*PREPARED[:2], *PARSED), 2)
    settings = [json.loads((tmp_path / f"x-{side}.json").read_text())["settings"] for side in "ab"]
    assert [(each["fused"], each["enhance"]) for each in settings] == [("off", "2.5"), ("norm_rope", "1")]


def test_the_command_line_starts_without_any_method_or_model_library() -> None:
    script = (
        "import sys\nfrom postgen.cli import main\n"
        "try:\n    main([{words}])\nexcept SystemExit as stop:\n    assert not stop.code\n"
        "heavy = ['torch', 'diffusers', 'transformers', 'numpy']\n"
        "heavy += ['postgen.families', 'postgen.enhance', 'postgen.fp8_linear', 'postgen.fused']\n"
        "found = sorted(set(heavy) & set(sys.modules))\nassert not found, found"
    )
    for words in ("'--help'", "'compare', '--help'", "'convert', '--help'"):
        run = subprocess.run([sys.executable, "-c", script.format(words=words)], capture_output=True, text=True)
        assert run.returncode == 0, run.stderr


def test_what_is_off_is_not_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    transformer = tiny_model("Wan").transformer
    monkeypatch.setattr(table, "resolve", lambda place: pytest.fail(f"{place} was imported"))
    with plug_ins_for_call(transformer, {"fused_ops": False, "enhance_a_video": 0}):
        pass


def test_off_for_a_call_is_off_where_it_was_on(row: PlugIn) -> None:
    transformer = tiny_model("Wan").transformer
    handle = resolve(row.apply)(transformer, CONFIGS.get(row.name))
    for zero in (0, 0.0, False, np.float32(0), np.int64(0)):
        with plug_ins_for_call(transformer, {row.name: zero}):
            assert not handle.enabled
    with plug_ins_for_call(transformer, {}):
        assert handle.enabled
    assert handle.enabled


def test_rows_that_are_refused(cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "_rows", list(table._rows))
    first = known_plug_ins()[0]
    for change, message in (
        ({}, "already has the name fused_ops"),
        ({"name": "other"}, "already has the option fused"),
    ):
        with pytest.raises(postgen.UserError, match=message):
            register_plug_in(dataclasses.replace(first, **change))
    for change, message in (({"option": "a b"}, "be a Python identifier"), ({"parse": "x.y"}, "be module:function")):
        with pytest.raises(postgen.UserError, match=message):
            dataclasses.replace(first, **change)
    register_plug_in(dataclasses.replace(first, name="guidance_scale", option="guided"))
    with pytest.raises(postgen.UserError, match="already has an argument guidance_scale"):
        WanPipeline.__call__  # noqa: B018
    register_plug_in(dataclasses.replace(first, name="other", option="steps"))
    assert "the option steps of the plug-in other already exists" in cli("--help").err


def test_settings_that_are_no_options() -> None:
    assert GenerateConfig.of({"prompt": "a", "fused": None}).plug_ins == {}
    # Requests are hashable, so that sets and dicts can contain them.
    assert len({GenerateConfig(prompt="a", plug_ins={"fused": text}) for text in ("auto", "auto", "off")}) == 2
    with pytest.raises(postgen.UserError, match="unknown setting 'fuse'"):
        GenerateConfig.of({"prompt": "a", "fuse": "auto"})
    with pytest.raises(postgen.UserError, match="enhance must be a text, got 2"):
        GenerateConfig(prompt="a", plug_ins={"enhance": 2})  # type: ignore[dict-item]


def test_an_old_sidecar_may_lack_a_plug_in_that_was_off(tmp_path: Path) -> None:
    from postgen.request import read_sidecar

    note = {"settings": {"prompt": "a", "boost": None}, "format": "mp4"}
    (tmp_path / "x.json").write_text(json.dumps(note))
    assert read_sidecar(tmp_path / "x.json") == ({"prompt": "a", "lora": ()}, "mp4")
    note["settings"]["boost"] = "1"  # type: ignore[index]
    (tmp_path / "x.json").write_text(json.dumps(note))
    with pytest.raises(postgen.UserError, match="unknown settings boost"):
        read_sidecar(tmp_path / "x.json")
