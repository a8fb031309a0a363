"""Finding and running the code blocks of pages."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.docs_blocks import ROOT, all_blocks, blocks_of_page, code_blocks_run, main, pages
from tests.contributing import blocks
from tests.doc_blocks import Page
from tests.doc_swaps import BEFORE, SWAPS, smaller

TEXT = """# A page

```python
number = 1
```

<!-- no-run: needs a network -->
```bash
make all
```

```yaml
key: value
```

- in a list

  ```sh
  postgen recipes
  ```
"""


def page(folder: Path, text: str) -> Path:
    (folder / "page.md").write_text(text, encoding="utf-8")
    return folder / "page.md"


def test_blocks_of_a_page(tmp_path: Path) -> None:
    found = blocks_of_page(page(tmp_path, TEXT))
    assert [(block.line, block.language, block.no_run) for block in found] == [
        (3, "python", None),
        (8, "bash", "needs a network"),
        (18, "bash", None),
    ]
    assert found[0].code == "number = 1\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("```python\nx = 1\n", "page.md:1: this block has no end"),
        ("<!-- no-run: a reason -->\n\n```bash\nmake\n```\n", "page.md:1: a no-run tag stands directly above"),
        ("<!-- no-run: a reason -->\n```yaml\na: 1\n```\n", "page.md:1: a no-run tag stands directly above"),
    ],
    ids=["no end", "apart", "of a text"],
)
def test_a_page_that_is_wrong(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        blocks_of_page(page(tmp_path, text))


def test_a_tag_without_a_reason_is_none(tmp_path: Path) -> None:
    assert blocks_of_page(page(tmp_path, "<!-- no-run:  -->\n```bash\nmake\n```\n"))[0].no_run is None


def test_the_share_is_that_of_the_blocks(tmp_path: Path) -> None:
    for name in ("README.md", "CONTRIBUTING.md"):
        (tmp_path / name).write_text("# Nothing\n", encoding="utf-8")
    (tmp_path / "docs" / "methods").mkdir(parents=True)
    page(tmp_path / "docs" / "methods", TEXT)
    assert code_blocks_run(tmp_path) == pytest.approx(2 / 3)


def test_at_most_a_fifth_is_not_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert code_blocks_run() >= 0.8
    assert main() == 0
    assert f"code_blocks_run {code_blocks_run():.3f}" in capsys.readouterr().out


def test_the_worked_examples_are_all_python_of_that_page() -> None:
    """Other tests run these blocks: tests/test_worked_*.py."""
    python = [block for block in blocks_of_page(ROOT / "CONTRIBUTING.md") if block.language == "python"]
    worked = [code for heading in ("## A model", "## An inference method", "## A reward") for code in blocks(heading)]
    assert [block.code for block in python if block.code not in worked] == []


def test_the_tables_name_pages_that_run() -> None:
    names = [path.name for path in pages()]
    assert sorted(names) == sorted(set(names)), "two pages of one name: give the tables of tests/doc_swaps.py paths"
    runs = {block.page.name for block in all_blocks() if block.no_run is None}
    assert {*BEFORE, *SWAPS} - runs == set()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("```python\nraise LookupError('wrong')\n```\n", "wrong"),
        ("```bash\npostgen info --everything\n```\n", "page.md:1: postgen info --everything"),
        ("```bash\nmake style\n```\n", "needs a no-run tag"),
        ("```bash\ncurl example.org\n```\n", "no test runs curl"),
    ],
    ids=["python", "command", "make", "unknown"],
)
def test_a_block_that_fails(text: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises((AssertionError, LookupError), match=said):
        Page(page(tmp_path, text)).run()


def test_a_swap_that_fits_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(SWAPS, "page.md", (("FOLDER", "here"),))
    with pytest.raises(AssertionError, match=r"page\.md has no \{'FOLDER'\}"):
        Page(page(tmp_path, "```python\nnumber = 1\n```\n")).run()


def test_a_page_is_one_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = (
        "```python\nn = 1\n```\n\n```bash\npostgen recipes | head -1 > first.txt  # a remark\n```\n\n"
        "```python\nn += 1\n```\n"
    )
    ran = Page(page(tmp_path, text))
    ran.run()
    assert ran.names["n"] == 2
    assert (tmp_path / "first.txt").read_text().strip()


def test_options_that_make_a_command_small() -> None:
    long = smaller(["generate", "a ball", "--long", "40", "-o", "a.mp4"])
    assert long[:6] == ["generate", "a ball", "--long", "2", "-o", "a.mp4"]
    assert smaller(["generate", "--continue", "a.state", "--long", "40"]) == [
        "generate",
        "--continue",
        "a.state",
        "--long",
        "2",
    ]
    assert smaller(["train", "fast-tiny", "--dry-run"]) == ["train", "fast-tiny", "--dry-run"]
    assert smaller(["recipes"]) == ["recipes"]
