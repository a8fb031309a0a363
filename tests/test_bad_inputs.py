"""The matrix of bad inputs: each is one clear line and leaves nothing behind, and its right neighbours are taken.

It has some thousand rows, most of them made from the options and settings that there are.
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
