"""docs/paper_index.md lists every cited paper, and the modules, recipes and results that it names exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.docs import PAPERS
from tests.test_layout import ROOT, tracked

PAGE = ROOT / "docs" / "paper_index.md"
NUMBER = r"(?:0[7-9]|1[0-4])(?:0[1-9]|1[0-2])\.\d{4}|(?:1[5-9]|2\d)(?:0[1-9]|1[0-2])\.\d{5}"
CITED = re.compile(rf"(?<![\d.])(?:{NUMBER})(?!\d)")
ROW = re.compile(rf"^\| \[({NUMBER})\]\(https://arxiv\.org/abs/\1\) \| (.+) \|$", re.MULTILINE)
LINK = re.compile(r"\]\(([^)]+)\)")


def table(heading: str) -> dict[str, list[str]]:
    """Return arXiv number -> other cells of the row."""
    section = PAGE.read_text(encoding="utf-8").partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    rows = ROW.findall(section)
    assert len(rows) == section.count("\n| ["), "a row is not of the form that this test reads"
    assert len({number for number, _ in rows}) == len(rows), "a paper has two rows"
    return {number: cells.split(" | ") for number, cells in rows}


USED, OWN = table("In use"), table("The papers of this project")
PLANNED = {number: cells for number, cells in OWN.items() if cells[2] == "planned"}


def cited(path: Path) -> set[str]:
    """Return the arXiv numbers in a file, or in the Python files of a folder."""
    files = sorted(path.rglob("*.py")) if path.is_dir() else [path]
    return {number for file in files for number in CITED.findall(file.read_text(encoding="utf-8"))}


def linked(cell: str) -> list[Path]:
    return [(PAGE.parent / target).resolve() for target in LINK.findall(cell)]


def test_every_paper_that_is_cited_is_there():
    files = [path for pattern in ("*.py", "*.md", "*.yaml") for path in tracked(pattern)]
    places = {number: path for path in files if path not in (PAGE, Path(__file__)) for number in cited(path)}
    assert not [f"{number} in {path}" for number, path in places.items() if number not in USED]
    assert places.keys() == USED.keys()
    assert not PLANNED.keys() & USED.keys()


@pytest.mark.parametrize("number", USED)
def test_a_row_says_where_it_is(number):
    title, modules, config, results = USED[number]
    assert title
    assert config
    assert linked(modules)
    for path in linked(modules):
        assert number in cited(path), f"{path} does not name {number}"
    assert all(path.is_file() for path in (*linked(config), *linked(results)))
    assert linked(results) or results == "not yet"


def test_the_first_table_agrees_with_the_others():
    assert sorted(OWN) == sorted(PAPERS)
    for number, (title, module, state, result) in OWN.items():
        if number in PLANNED:
            assert title
            assert re.fullmatch(r"`\w+`", module)
            assert result == "not yet"
        else:
            assert state == "in use" or state.startswith("in part: ")
            assert title == USED[number][0]
            assert all(path.is_dir() for path in linked(module))
            assert linked(result) or result == "not yet"
            assert {*linked(result)} <= {*linked(USED[number][3])}


def test_a_citation_is_told_from_a_number():
    text = (
        "arXiv:2505.07818, eq. 8; https://arxiv.org/abs/1312.5650v2; 2399.12345; 2505.078; 12505.07818; 3.2505.07818"
    )
    assert CITED.findall(text) == ["2505.07818", "1312.5650"]
