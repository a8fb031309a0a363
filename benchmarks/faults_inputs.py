"""Bad inputs: how many there are, how many end in a traceback, how many are taken without a word.

    python -m benchmarks.faults_inputs

Runs the tables of `tests/bad_inputs` in this process, with no model loaded but where only its weights can tell, and
prints the rows that fail. About 40 seconds on one core.
"""

from __future__ import annotations

import functools
import sys
import time
from collections import Counter
from typing import Any

from tests.bad_inputs.run import TABLES, problems, table


@functools.cache
def measured() -> tuple[dict[str, Any], ...]:
    """Return a row a table: its inputs, of them those made by machine, and what failed by kind.

    Kinds: `traceback` (also no answer in time), `silent` (a wrong input taken, or a right one taken as something
    else), `left` (files came or went), `unclear` (not one clear line), `right_refused`.
    """
    found = []
    for name in TABLES:
        began = time.perf_counter()
        failed = problems(name)
        kinds = Counter("traceback" if told.startswith("blocked") else told.partition(":")[0] for _, told in failed)
        rows = table(name)
        found.append(
            {
                "table": name,
                "wrong": sum(row.wrong for row in rows),
                "right": sum(not row.wrong for row in rows),
                "made_from_the_options": name.startswith("numbers"),
                **{kind: kinds[kind] for kind in ("traceback", "silent", "left", "unclear")},
                "right_refused": kinds["right"],
                "seconds": round(time.perf_counter() - began, 1),
                "failed": [f"{row}: {told}" for row, told in failed],
            }
        )
    return tuple(found)


def total(kind: str) -> int:
    """Return the sum of a column of `measured`."""
    return sum(row[kind] for row in measured())


def main() -> int:
    """Print the rows that fail, and what each table holds."""
    for row in measured():
        print(*row["failed"], sep="\n", end="\n" if row["failed"] else "")
        print({key: value for key, value in row.items() if key != "failed"})
    return int(any(row["failed"] for row in measured()))


if __name__ == "__main__":
    sys.exit(main())
