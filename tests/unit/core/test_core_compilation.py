"""How the tests of this folder are compiled: fast by default, as users do with PWCRF_TESTS_OPTIMIZED=1."""

import os

import jax
import small


def test_the_switch_decides_how_programs_are_compiled():
    assert jax.config.read("jax_disable_most_optimizations") is not small.OPTIMIZED
    assert not small.OPTIMIZED or "--xla_cpu" not in os.environ["XLA_FLAGS"]
