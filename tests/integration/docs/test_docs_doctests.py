"""The examples in docstrings run and give what they say."""

import doctest
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pwcrf_jax as pw

# Functions that must show an example, by module; others may.
SHOWN = {
    "costs": ["algorithm"],
    "dense_crf": ["refine"],
    "heads": ["pairwise_apply", "pairwise_init"],
    "mean_field": ["run"],
    "metrics": ["confusion_matrix", "scores"],
    "objectives": ["exact_log_likelihood"],
    "messages": ["compute_messages"],
    "likelihood": ["pairwise_log_likelihood"],
    "piecewise": ["balance_weights", "grid_labels", "piecewise_loss", "unary_log_likelihood"],
    "pixels": ["decode"],
    "potentials": ["factored_pairwise"],
    "model.plan": ["plan"],
    "relations": ["edge_list", "offsets"],
}
NAMES = {"jax": jax, "jnp": jnp, "np": np, "pw": pw}  # as docs/api/index.md says


def run(test):
    """What fails in an example, as text."""
    told = []
    doctest.DocTestRunner(verbose=False).run(test, out=told.append)
    return "".join(told)


@pytest.mark.parametrize("module", SHOWN)
def test_examples_in_docstrings(module):
    loaded = importlib.import_module(f"pwcrf_jax.{module}")
    tests = [
        t for t in doctest.DocTestFinder(exclude_empty=True).find(loaded, extraglobs={}, globs=NAMES) if t.examples
    ]
    shown = {test.name.removeprefix(f"pwcrf_jax.{module}.") for test in tests}
    assert not set(SHOWN[module]) - shown
    with jax.default_device(jax.devices("cpu")[0]):
        assert not "".join(map(run, tests))


def test_a_wrong_example_is_found():
    (test,) = doctest.DocTestFinder().find(wrong, "wrong", module=False, globs={})
    assert "Expected:\n    3" in run(test)


def wrong():
    """
    >>> 1 + 1
    3
    """
