"""Count the tested bad inputs, those that end in a traceback, and those that are accepted silently.

    python -m benchmarks.faults_inputs

The benchmark runs the tables of `tests/bad_inputs` in this process and prints the rows that fail. It loads a model
only for inputs that cannot be checked without its weights. It takes about 40 seconds on one core.
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
    """Return one row per table: the number of inputs, whether they are generated from the options, and the failures.

    Kinds of failures: `traceback` (or no answer in time), `silent` (a wrong input is accepted, or a right one has a
    wrong effect), `left` (files appear or disappear), `unclear` (the message is not one clear line), `right_refused`.
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
    """Return the sum of the column `kind` of `measured`."""
    return sum(row[kind] for row in measured())


def main() -> int:
    """Print the rows that fail, and the numbers of each table; return 1 if a row fails."""
    for row in measured():
        print(*row["failed"], sep="\n", end="\n" if row["failed"] else "")
        print({key: value for key, value in row.items() if key != "failed"})
    return int(any(row["failed"] for row in measured()))


if __name__ == "__main__":
    sys.exit(main())
