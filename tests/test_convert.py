"""`postgen convert METHOD MODEL -o OUT`, and the groups of commands."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest

from postgen.commands.convert import CONVERTERS


def test_help_has_commands_in_groups(cli: Any) -> None:
    told = cli("--help").out
    groups = {
        "Make": ("generate", "compare"),
        "Judge": ("score",),
        "Train": ("train",),
        "Convert": ("convert", "export-lora"),
        "Serve": ("serve-reward",),
        "About": ("info",),
    }
    titles = [f"─ {title} ─" for title in groups]
    places = [told.index(title) for title in titles] + [len(told)]
    assert places == sorted(places)
    for start, end, commands in zip(places, places[1:], groups.values(), strict=False):
        assert all(command in told[start:end] for command in commands)


def test_convert_lora_and_its_older_name(cli: Any, tiny_lora: Path, tmp_path: Path) -> None:
    words = ("--format", "comfyui", "--family", "wan")
    for name, command in (("a", ("convert", "lora")), ("b", ("export-lora",))):
        done = cli(*command, tiny_lora, "-o", tmp_path / f"{name}.safetensors", *words)
        assert done.code == 0, done.err
        assert f"{name}.safetensors: 8 layers" in done.out
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


@pytest.mark.parametrize("method", sorted(CONVERTERS))
def test_a_wrong_place_is_found_before_the_model_is_read(
    cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    (tmp_path / "model").write_text("x")
    needed = inspect.signature(CONVERTERS[method]).parameters.values()
    empty = [one for one in needed if one.default is one.empty][2:]
    words = [word for one in empty for word in (f"--{one.name}", "x")]
    same = cli("convert", method, tmp_path / "model", "-o", tmp_path / ".." / tmp_path.name / "model", *words)
    assert (same.code, same.err.count("\n")) == (2, 1)
    assert "is the model to convert" in same.err
    for command, given in ((("convert", method), words), (("export-lora",), ("--format", "x"))):
        done = cli(*command, tmp_path / "absent", "-o", "/proc/x.safetensors", *given)
        assert (done.code, "cannot write /proc/x.safetensors" in done.err) == (2, True), done.err


def test_convert_alone_tells_its_methods(cli: Any) -> None:
    done = cli("convert")
    assert (done.code, done.err) == (0, "")
    assert all(method in done.out for method in CONVERTERS)
    unknown = cli("convert", "sketch", "x")
    assert (unknown.code, unknown.err) == (
        2,
        "postgen: error: No such command 'sketch'. (see postgen convert --help)\n",
    )
