"""Tables of pages, made of results: a table stands between `<!-- table: NAME -->` and `<!-- end -->`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from postgen.errors import UserError
from postgen.files import replacing

Makers = Mapping[str, Callable[[Mapping[str, Any]], Iterable[str]]]
"""What makes the lines of a table of a result, by the name of the table."""
NOTHING = "Not measured yet."
_PLACE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def of_result(result: Mapping[str, Any] | None, makers: Makers) -> dict[str, list[str]]:
    """Return the lines of all tables; None says that nothing was measured."""
    return {name: [NOTHING] if result is None else list(make(result)) for name, make in makers.items()}


def filled(text: str, tables: Mapping[str, Iterable[str]]) -> str:
    """Return a page with its tables written anew.

    Args:
        text: the page.
        tables: lines by the name of the table.

    Raises:
        UserError: the page lacks a table or has another one.
    """
    names = [match[2] for match in _PLACE.finditer(text)]
    if sorted(names) != sorted(tables):
        raise UserError(f"the page has the tables {', '.join(names)}, and should have {', '.join(tables)}, each once")

    def made(match: re.Match[str]) -> str:
        told = "\n".join(tables[match[2]])
        return f"{match[1]}\n{told}\n\n{match[3]}"

    return _PLACE.sub(made, text)


def write(page: Path, tables: Mapping[str, Iterable[str]]) -> None:
    """Write the tables of a page anew; nothing is half-written."""
    text = filled(page.read_text(encoding="utf-8"), tables)
    with replacing(page) as part:
        part.write_text(text, encoding="utf-8")
