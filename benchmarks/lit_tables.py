"""Print the tables of docs/lit.md about time and memory: `python -m benchmarks.lit_tables`.

They are made from the results of `benchmarks.lit_speed` and `benchmarks.lit_parts`; nothing is measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.gates import read_result
from benchmarks.lit_models import LARGE, SMALL, Model

Row = dict[str, Any]
CLIP = "720p 81f"


def digits(number: float) -> str:
    """Return a number with three significant digits, or as a whole number from 100 on.

    >>> digits(11145.8), digits(26.16), digits(0.34)
    ('11,146', '26.2', '0.340')
    """
    return f"{number:,.0f}" if number >= 100 else f"{number:.{1 if number >= 10 else 2 if number >= 1 else 3}f}"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield the lines of a table."""
    yield f"| {' | '.join(heads)} |"
    yield "|" + "---|" * len(heads)
    for row in rows:
        yield f"| {' | '.join(row)} |"


def named(kind: str) -> str:
    """Return a layer type, with its options, in the notation of the docs pages."""
    name, _, options = kind.partition(" ")
    name = name if name == "softmax" else f"`{name}`"
    return f"{name}, {options}" if options else name


def share(dense: float | None) -> str:
    """Return a share of pairs as text; empty for None, which stands for types without a window."""
    return "" if dense is None else f"{dense:.3f}"


def planned(row: Row) -> str:
    """Return the plan of a step in the notation of the docs pages."""
    if row["plan"] == "softmax":
        return "softmax"
    if row["plan"].startswith("half "):
        return f"half {named(row['kind'])}"
    return f"{named(row['kind'])}{row['plan'].removeprefix(row['kind'])}"


def layers(rows: Sequence[Row]) -> Iterator[str]:
    """Yield the table of self-attention and blocks of both models."""
    models = (LARGE, SMALL)
    there = [row for row in rows if row["part"] == "layer" and row["clip"] == CLIP and "layer_ms" in row]
    of = {(row["model"], row["kind"]): row for row in there}
    kinds = [kind for model, kind in of if model == LARGE.name and (SMALL.name, kind) in of]
    heads = [
        "",
        *(f"{model.name}: {what}" for model in models for what in ("self-attention", "block", "GiB")),
        "pairs",
    ]

    def cells(kind: str) -> Iterator[str]:
        yield named(kind)
        for model in models:
            row = of[model.name, kind]
            for what in ("layer", "block"):
                faster = "" if kind == "softmax" else f" ({digits(row[f'{what}_speed_up'])})"
                yield digits(row[f"{what}_ms"]) + faster
            yield f"{row['peak_gib']:.1f}"
        yield "1" if kind == "softmax" else share(of[LARGE.name, kind]["density"])

    yield from table(heads, [[*cells(kind)] for kind in kinds])


def steps(rows: Sequence[Row], model: Model) -> Iterator[str]:
    """Yield the table of a model's steps."""
    heads = [model.name, "blocks", "pairs", "ms", "times as fast", "at most", "GiB"]
    of = [row for row in rows if (row["part"], row.get("model"), row.get("clip")) == ("step", model.name, CLIP)]

    def cells(row: Row) -> list[str]:
        stock = row["plan"] == "softmax"
        where = planned(row)
        of_all = f"{row.get('converted_blocks', 0)} of {model.layers}"
        gain, limit = ("1", "") if stock else (f"{row['speed_up']:.2f}", f"{row['ceiling']:.2f}")
        pairs = "1" if stock else share(row["plan_density"])
        return [where, of_all, pairs, digits(row["ms"]), gain, limit, f"{row['peak_gib']:.1f}"]

    yield from table(heads, [cells(row) for row in of])


def lengths(rows: Sequence[Row], model: Model) -> Iterator[str]:
    """Yield the table of speed-ups of steps for each number of tokens."""
    of = [row for row in rows if row["part"] == "step" and row["model"] == model.name]
    clips = sorted({(row["tokens"], row["clip"]) for row in of})
    stock = {row["clip"]: row for row in of if row["plan"] == "softmax"}
    found = {(planned(row), row["clip"]): row for row in of if row["plan"] != "softmax"}
    heads = [model.name, *(f"{clip}, {tokens:,} tokens" for tokens, clip in clips)]
    made: list[list[str]] = [["softmax, ms", *(digits(stock[clip]["ms"]) for _, clip in clips)]]
    made.append(["share of softmax", *(f"{stock[clip]['attention_share']:.2f}" for _, clip in clips)])
    for plan in dict.fromkeys(name for name, _ in found):
        cells = [found.get((plan, clip)) for _, clip in clips]
        if all(cells):
            made.append([plan, *(f"{row['speed_up']:.2f} of {row['ceiling']:.2f}" for row in cells if row)])
    yield from table(heads, made)


def crossings(found: Sequence[Row]) -> Iterator[str]:
    """Yield the table of the numbers of tokens from which a layer is faster than softmax."""
    models, kinds = (dict.fromkeys(row[name] for row in found) for name in ("model", "kind"))
    of = {(row["model"], row["kind"]): row for row in found}

    def cell(row: Row | None) -> str:
        return "" if row is None else f"{'at most ' if row['at_most'] else ''}{row['tokens']:,}"

    yield from table(
        ["", *models], [[named(kind), *(cell(of.get((model, kind))) for model in models)] for kind in kinds]
    )


def parts(rows: Sequence[Row]) -> Iterator[str]:
    """Yield the table of parts with and without kernels."""
    heads = ["", "plain torch", "kernels", "times as fast", "differ by"]
    compared = [row for row in rows if "plain_ms" in row]

    def cells(row: Row) -> list[str]:
        old, new = row["plain_ms"], row["kernels_ms"]
        layer = row["part"].removeprefix("layer, ")
        name = row["part"] if layer == row["part"] else f"self-attention, {named(layer)}"
        return [name, digits(old), digits(new), digits(old / new), f"{row['difference']:.1e}"]

    yield from table(heads, [cells(row) for row in compared])


def tables() -> Iterator[str]:
    """Yield the lines of all tables, with empty lines between them."""
    result = read_result("lit_speed")
    rows = result["rows"]
    whole = (layers(rows), steps(rows, LARGE), steps(rows, SMALL))
    along = (lengths(rows, LARGE), lengths(rows, SMALL), crossings(result["crossings"]))
    for each in (*whole, *along, parts(read_result("lit_parts")["rows"])):
        yield from each
        yield ""


def main() -> None:
    """Print all tables."""
    print("\n".join(tables()))


if __name__ == "__main__":
    main()
