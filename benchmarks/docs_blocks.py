"""Finds the code blocks of README.md, CONTRIBUTING.md and docs/ and computes the share that the tests run.

    python -m benchmarks.docs_blocks

This module runs no block. tests/test_docs.py or another test runs every Python and shell block, unless the line above
the block is `<!-- no-run: reason -->`.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LANGUAGES = {"python": "python", "bash": "bash", "sh": "bash"}
"""The word after the fence -> the language of the block. Blocks with other words are not code."""
_FENCE = re.compile(r"^ *```(\w*)")
_TAG = re.compile(r"^ *<!-- no-run: (\S.*) -->$")


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """One code block."""

    page: Path
    """The file of the block."""
    line: int
    """The line of its fence, counted from 1."""
    language: str
    """python or bash."""
    code: str
    """The lines between the fences."""
    no_run: str | None
    """The reason why tests do not run the block; None if they run it."""

    @property
    def place(self) -> str:
        """The page and line as `page:line`, a form that editors can open."""
        return f"{self.page.name}:{self.line}"


def pages(root: Path = ROOT) -> list[Path]:
    """Return the pages whose blocks the tests run."""
    return [root / "README.md", root / "CONTRIBUTING.md", *sorted((root / "docs").rglob("*.md"))]


def blocks_of_page(page: Path) -> list[Block]:
    """Return the Python and shell blocks of a page in their order.

    Raises:
        ValueError: a block has no end, or a `no-run` tag is not directly above a block.
    """
    found: list[Block] = []
    lines = page.read_text(encoding="utf-8").splitlines()
    tags = {number for number, line in enumerate(lines) if _TAG.match(line)}
    used, number = set(), 0
    while number < len(lines):
        fence = _FENCE.match(lines[number])
        if fence is None:
            number += 1
            continue
        end = next((n for n in range(number + 1, len(lines)) if lines[n].strip() == "```"), None)
        if end is None:
            raise ValueError(f"{page.name}:{number + 1}: this code block has no end, add a line with ```")
        tag = _TAG.match(lines[number - 1]) if number else None
        if fence[1] in LANGUAGES:
            used.add(number - 1)
            found.append(
                Block(
                    page=page,
                    line=number + 1,
                    language=LANGUAGES[fence[1]],
                    code="\n".join(lines[number + 1 : end]) + "\n",
                    no_run=tag and tag[1],
                )
            )
        number = end + 1
    if tags - used:
        raise ValueError(f"{page.name}:{min(tags - used) + 1}: a no-run tag must be directly above a code block")
    return found


def all_blocks(root: Path = ROOT) -> list[Block]:
    """Return the blocks of all pages."""
    return [block for page in pages(root) for block in blocks_of_page(page)]


def code_blocks_run(root: Path = ROOT) -> float:
    """Return the share of blocks that the tests run, from 0 to 1."""
    blocks = all_blocks(root)
    return sum(block.no_run is None for block in blocks) / len(blocks)


def main() -> int:
    """Print the blocks that the tests do not run, and the share of those that they run."""
    blocks = all_blocks()
    for block in blocks:
        if block.no_run is not None:
            print(f"{block.place}: {block.no_run}")
    print(f"code_blocks_run {code_blocks_run():.3f}: {sum(b.no_run is None for b in blocks)} of {len(blocks)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
