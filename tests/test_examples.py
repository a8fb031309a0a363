"""Every example runs in its own folder, and writes the files that its docstring names.

All examples run in the process of the tests, so that torch and diffusers are imported once.
"""

from __future__ import annotations

import ast
import json
import re
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.py"))
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))


def promised(script: Path) -> list[str]:
    """Return the files and folders that the docstring of an example names as its output."""
    said = ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or ""
    return re.findall(r"`(out/[^`]+)`", said)


def is_there(path: Path) -> bool:
    """Return whether a file has content, or a folder has a file with content."""
    files = [path] if path.is_file() else path.rglob("*")
    return any(file.is_file() and file.stat().st_size for file in files)


def run(script: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Run an example in the current folder, and return the named files that it did not write."""
    monkeypatch.setattr(sys, "argv", [str(script)])
    runpy.run_path(str(script), run_name="__main__")
    return [name for name in promised(script) if not is_there(Path(name))]


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=[script.stem for script in SCRIPTS])
def test_it_runs(script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert promised(script), "its docstring names no output, as `out/name`"
    assert run(script, monkeypatch) == []


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=[notebook.stem for notebook in NOTEBOOKS])
def test_a_notebook_runs(notebook: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The code cells of the notebook, one after the other, without a Jupyter kernel, which takes long to start."""
    monkeypatch.chdir(tmp_path)
    cells = [cell for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    code = ["".join(cell["source"]) for cell in cells]
    names = {"__name__": "__main__"}
    for number, text in enumerate(code):
        exec(compile(text, f"{notebook.name}, code cell {number}", "exec"), names)
    written = re.findall(r'"([\w-]+\.(?:mp4|png))"', "\n".join(code))
    assert len(written) >= 3
    assert [name for name in written if not is_there(Path(name))] == []


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=[notebook.stem for notebook in NOTEBOOKS])
def test_a_notebook_is_committed_without_outputs(notebook: Path) -> None:
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    assert [cell["id"] for cell in cells if cell.get("outputs") or cell.get("execution_count")] == []


def test_all_are_short_and_say_how_to_run_them() -> None:
    for script in SCRIPTS:
        text = script.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 60, script
        assert f"python examples/{script.name}" in (ast.get_docstring(ast.parse(text)) or ""), script


def test_the_table_names_all() -> None:
    table = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert [path.name for path in (*SCRIPTS, *NOTEBOOKS) if f"]({path.name})" not in table] == []


@pytest.mark.parametrize(
    ("body", "missing"),
    [
        ("Path('out').mkdir()\nPath('out/a.txt').write_text('a')", []),
        ("pass", ["out/a.txt"]),
        ("Path('out').mkdir()\nPath('out/a.txt').touch()", ["out/a.txt"]),
    ],
    ids=["written", "nothing", "empty"],
)
def test_a_missing_output_is_noticed(
    body: str, missing: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    script = tmp_path / "example.py"
    script.write_text(f'"""Writes `out/a.txt`."""\nfrom pathlib import Path\n{body}\n', encoding="utf-8")
    assert run(script, monkeypatch) == missing
