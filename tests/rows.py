"""Which rows of a parametrised test `make test` runs; the others are for `make test-full`."""

import pytest


def full_but(rows, *kept):
    """The rows as parameters, each marked `full` unless it is one of `kept`."""
    rows = list(rows)
    assert all(row in rows for row in kept), "a kept row must be one of the rows"
    return [row if row in kept else full_row(row) for row in rows]


def full_row(row, **options):
    """One row of `make test-full`; a tuple is the values of several arguments."""
    values = row if type(row) is tuple else (row,)
    return pytest.param(*values, marks=pytest.mark.full, **options)
