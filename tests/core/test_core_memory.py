"""Training memory of the factored form does not grow with the number of offsets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pwcrf_jax import mean_field, pairwise, piecewise

H, W, K, M = 16, 18, 12, 24
BOX = np.array([(r, c) for r in range(-5, 6) for c in range(-5, 6) if (r, c) != (0, 0)])
FEW = BOX[(np.abs(BOX) == 5).all(-1) | (np.abs(BOX) <= 2).all(-1)][:24]  # as far as BOX reaches


@pytest.fixture(autouse=True)
def quick_compilation():
    """Full optimisation: the numbers are the compiler's."""


def temporaries(objective, box):
    """Bytes of the compiled gradient's temporaries."""
    floats = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    parts = floats(H, W, M), floats(H, W, M), floats(M, K, K), floats(K, K), floats(H, W, K)
    labels = jax.ShapeDtypeStruct((H, W), jnp.int32)
    compute = jax.jit(jax.grad(lambda parts, labels: objective(parts, labels, box)))
    return compute.lower(parts, labels).compile().memory_analysis().temp_size_in_bytes


def factored(parts, labels, box):
    potential = pairwise.factored_pairwise(*parts[:4], box, parts[4])
    return piecewise.pairwise_log_likelihood(potential, labels)[0]


def table(parts, labels, box):
    potential = pairwise.to_table(pairwise.factored_pairwise(*parts[:4], box, parts[4]))
    return piecewise.pairwise_log_likelihood(potential, labels.ravel())[0]


def test_likelihood():
    assert len(BOX) == 120 and len(FEW) == 24 and np.abs(FEW).max() == 5
    few, many = (temporaries(factored, box) for box in (FEW, BOX))
    assert many < 1.3 * few
    # The scores of all edges, which the table keeps and the factored form does not.
    assert temporaries(table, BOX) > 10 * many
    assert many < 10 * 4 * H * W * (K * K + M)


def test_mean_field():
    """Scores do not depend on the iteration, so a scan over iterations may keep those of all offsets."""

    def objective(parts, labels, box):
        potential = pairwise.factored_pairwise(*parts[:4], box)
        return jnp.sum(mean_field.run(parts[4], [potential], 2)[0] ** 2)

    few, many = (temporaries(objective, box) for box in (FEW, BOX))
    assert many < 1.3 * few
