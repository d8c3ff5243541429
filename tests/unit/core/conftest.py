"""Most of these tests' time is XLA's: compile fast, run slow. `test_core_memory` measures, so it opts out."""

import pytest


@pytest.fixture(autouse=True)
def quick_compilation(quick_compilation):
    """That of all tests, without asking."""
