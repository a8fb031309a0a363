"""The matrix of bad inputs: each prints one clear line and leaves no file, and similar correct inputs are accepted.

It has thousands of rows, most of them generated from the existing options and settings.
"""

import pytest

from tests.bad_inputs.run import TABLES, problems, table


@pytest.mark.parametrize("name", TABLES)
def test_bad_inputs(name):
    found = problems(name)
    assert not found, f"{len(found)} rows:\n" + "\n".join(f"{row}: {told}" for row, told in found[:20])


def test_rows_are_many_and_have_right_neighbours():
    rows = [row for name in TABLES for row in table(name)]
    wrong = sum(row.wrong for row in rows)
    assert wrong >= 300
    assert len(rows) - wrong >= 100
    by_hand = [row for name in TABLES if not name.startswith("numbers") for row in table(name)]
    assert sum(row.wrong for row in by_hand) >= 300
