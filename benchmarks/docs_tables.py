"""Tables of pages that are generated from results, between `<!-- table: NAME -->` and `<!-- end -->`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from postgen.errors import UserError
from postgen.files import replacing

Makers = Mapping[str, Callable[[Mapping[str, Any]], Iterable[str]]]
"""Name of a table -> the function that returns the lines of the table for a result."""
NOTHING = "Not measured yet."
_PLACE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def of_result(result: Mapping[str, Any] | None, makers: Makers) -> dict[str, list[str]]:
    """Return the lines of all tables; without a result (None) each table is the line `NOTHING`."""
    return {name: [NOTHING] if result is None else list(make(result)) for name, make in makers.items()}


def lacking(names: Sequence[str]) -> Iterator[str]:
    """Yield the lines that name what a table lacks, because it has not been measured yet; none if nothing is lacking.

    >>> [*lacking(["lit.1", "lit.2"])], [*lacking([])]
    (['', 'Not measured yet: `lit.1`, `lit.2`.'], [])
    """
    if names:
        yield from ("", f"{NOTHING[:-1]}: {', '.join(f'`{name}`' for name in names)}.")


def filled(text: str, tables: Mapping[str, Iterable[str]]) -> str:
    """Return the text of a page with its tables replaced.

    Args:
        text: the text of the page.
        tables: name of a table -> its lines.

    Raises:
        UserError: the page does not have exactly these tables.
    """
    names = [match[2] for match in _PLACE.finditer(text)]
    if sorted(names) != sorted(tables):
        raise UserError(f"the page has the tables {', '.join(names)}, but must have {', '.join(tables)}, each once")

    def made(match: re.Match[str]) -> str:
        told = "\n".join(tables[match[2]])
        return f"{match[1]}\n{told}\n\n{match[3]}"

    return _PLACE.sub(made, text)


def write(page: Path, tables: Mapping[str, Iterable[str]]) -> None:
    """Replace the tables of a page in its file; the file is never incomplete."""
    text = filled(page.read_text(encoding="utf-8"), tables)
    with replacing(page) as part:
        part.write_text(text, encoding="utf-8")
