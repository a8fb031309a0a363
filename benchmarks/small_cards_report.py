"""Write the tables of `docs/small_cards.md` from the result of `benchmarks.small_cards`. It measures nothing."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import docs_tables
from benchmarks.command import without_options
from benchmarks.gates import RESULTS, gate_lines, read_result
from benchmarks.lit_tables import digits, table

PAGE = RESULTS.parent.parent / "docs" / "small_cards.md"
RESULT = "small_cards"


def rows(result: Mapping[str, Any]) -> Iterator[str]:
    """Yield the table of settings: GiB of a step estimated and measured, peak of the whole run, seconds of a step."""
    heads = ["Setting", "step, estimated GiB", "step, measured GiB", "whole run, GiB", "seconds per step"]
    yield from table(heads, [_row(row) for row in result["rows"]])
    lacking = [f"`{name}` ({reason})" for name, reason in result["skipped"].items()]
    if lacking:
        yield from ("", f"Not measured: {', '.join(lacking)}.")


def _row(row: Mapping[str, Any]) -> list[str]:
    if "problem" in row:
        return [row["name"], "", row["problem"], "", ""]
    memory = [_number(row[key]) for key in ("estimated_gb", "measured_gb", "whole_run_gb")]
    return [row["name"], *memory, digits(row["seconds_per_step"])]


def cards(result: Mapping[str, Any]) -> Iterator[str]:
    """Yield the table of cards: the first settings that are estimated to fit, and a run with a limit of the memory."""
    heads = ["Card", "settings", "trained", "step, measured GiB", "seconds per step"]
    made = [
        [
            *(f"{card['card_gb']} GB", card["settings"] or "none fits", "yes" if card["trained"] else "no"),
            *(_number(card.get(key)) for key in ("measured_gb", "seconds_per_step")),
        ]
        for card in result["cards"]
    ]
    yield from table(heads, made) if made else [docs_tables.NOTHING]


def _number(value: float | None) -> str:
    return "" if value is None else digits(value)


MAKERS: docs_tables.Makers = {"cards_rows": rows, "cards_sizes": cards, "cards_gates": gate_lines}


def write_page(page: Path = PAGE, result: str = RESULT) -> None:
    """Write the tables of the page; without a result they say that nothing is measured."""
    try:
        found = read_result(result)
    except FileNotFoundError:
        found = None
    docs_tables.write(page, docs_tables.of_result(found, MAKERS))


def main(argv: Sequence[str] | None = None) -> int:
    """Write the tables of the page."""
    without_options("benchmarks.small_cards_report", __doc__, argv)
    write_page()
    return 0


if __name__ == "__main__":
    sys.exit(main())
