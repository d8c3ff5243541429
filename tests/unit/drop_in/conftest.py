"""Most of these tests' time is XLA's: compile fast, run slow."""

import pytest


@pytest.fixture(autouse=True)
def quick_compilation(quick_compilation):
    """That of all tests, without asking."""
