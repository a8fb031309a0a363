"""Functions of the user are found in the current folder by module or file, however the program was started."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from postgen.errors import UserError
from postgen.own_code import names_own_code, own_function
from postgen.rewards import get_reward
from postgen.training.prompts import Prompts

REWARD = """
from dataclasses import dataclass


@dataclass
class Scale:
    by: float = 1.0


def bright(completions, scale=1.0, **columns):
    return [Scale(scale).by * float(clip.mean()) for clip in completions]
"""
CLIP = torch.full((5, 3, 32, 32), 0.25)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, which is not on the import path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place not in ("", str(tmp_path))])
    (tmp_path / "deep").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    "named", ["own_a.bright", "own_a:bright", "own_a.py:bright", "./own_a.py:bright", "{folder}/own_a.py:bright"]
)
def test_a_reward_of_the_current_folder(folder: Path, named: str) -> None:
    (folder / "own_a.py").write_text(REWARD)
    try:
        reward = get_reward(named.format(folder=folder) + "(scale=2.0)")
        assert reward.function(completions=[CLIP]) == [0.5]
    finally:
        sys.modules.pop("own_a", None)


def test_files_of_one_name_are_two_modules(folder: Path) -> None:
    (folder / "own_b.py").write_text("def value(): return 1")
    (folder / "deep" / "own_b.py").write_text("def value(): return 2")
    one, two = own_function("own_b.py:value", "x"), own_function("deep/own_b.py:value", "x")
    assert (one(), two()) == (1, 2)
    assert own_function("./own_b.py:value", "x") is one


def test_installed_modules_come_first(folder: Path) -> None:
    (folder / "json.py").write_text("def dumps(value): return 'mine'")
    assert own_function("json.dumps", "x")("a") == '"a"'
    assert own_function("json.py:dumps", "x")("a") == "mine"


def test_rows_of_a_function(folder: Path) -> None:
    (folder / "own_c.py").write_text(
        "def rows(): return [{'prompt': 'a red ball'}]\nROWS = 3\ndef none(): return None\n"
    )
    try:
        for named in ("own_c:rows", "own_c.py:rows", "./own_c.py:rows"):
            assert Prompts(named, "train_dataset", seed=0, shuffle=False).rows == [{"prompt": "a red ball"}]
        for named, text in (
            ("own_c:ROWS", "own_c:ROWS is a int, not a function that returns rows"),
            ("own_c:none", "own_c:none returned a NoneType, not rows of prompts"),
            ("sys:exit", "sys:exit ended the program instead of returning rows"),
        ):
            with pytest.raises(UserError, match=text):
                Prompts(named, "train_dataset", seed=0, shuffle=False)
    finally:
        sys.modules.pop("own_c", None)


@pytest.mark.parametrize(
    ("named", "text"),
    [
        ("nowhere.f", "cannot be imported: No module named 'nowhere'"),
        ("nowhere.py:f", "cannot be imported: the file nowhere.py does not exist"),
        ("own_d.py:g", "cannot be imported: its module has no g"),
        ("own_d.py", "is a file: add the name of the function, own_d.py:name"),
        ("own_e.py:f", "cannot be imported: ZeroDivisionError: division by zero"),
        ("own_f.py:f", "cannot be imported: SyntaxError"),
        ("own_g.py:f", "cannot be imported: SystemExit: 3"),
    ],
)
def test_what_cannot_be_imported_is_told_in_one_line(folder: Path, named: str, text: str) -> None:
    for name, code in (("d", "f = 1"), ("e", "1 / 0"), ("f", "def"), ("g", "raise SystemExit(3)")):
        (folder / f"own_{name}.py").write_text(code)
    with pytest.raises(UserError, match=text) as told:
        get_reward(named)
    assert "\n" not in str(told.value)


def test_forms() -> None:
    assert all(map(names_own_code, ("a.b", "a.b:c", "x/y.py:f", "../y.py:f")))
    assert not any(map(names_own_code, ("a", "a b.c", "a.b.", "owner/name:train", "a/b.c")))


def test_the_command_finds_it_from_the_current_folder(folder: Path) -> None:
    """The console script does not have the current folder on its import path; `-P` has the same effect."""
    (folder / "own_h.py").write_text(REWARD)
    (folder / "run.py").write_text("from postgen.rewards import get_reward\nprint(get_reward('own_h.bright').name)\n")
    code = f"import sys; sys.path[:0] = {[p for p in sys.path if p]!r}; exec(open('run.py').read())"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "bright" in done.stdout
