"""Memory of the factored form does not grow with the number of offsets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pwcrf_jax as pw
from pwcrf_jax import mean_field

H, W, K, M = 16, 18, 12, 24
CHUNK = 16 * W  # by default all edges of a map so small would be few chunks
BOX = np.array([(r, c) for r in range(-5, 6) for c in range(-5, 6) if (r, c) != (0, 0)])
FEW = BOX[(np.abs(BOX) == 5).all(-1) | (np.abs(BOX) <= 2).all(-1)][:24]  # as far as BOX reaches
SAMPLE = np.arange(8)


@pytest.fixture(autouse=True)
def quick_compilation():
    """Full optimisation: the numbers are the compiler's."""


def temporaries(objective, box, gradient=True):
    """Bytes of the temporaries of the compiled gradient, or of the objective itself."""
    floats = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    parts = floats(H, W, M), floats(H, W, M), floats(M, K, K), floats(K, K), floats(H, W, K)
    labels = jax.ShapeDtypeStruct((H, W), jnp.int32)
    compute = jax.jit((jax.grad if gradient else lambda f: f)(lambda parts, labels: objective(parts, labels, box)))
    return compute.lower(parts, labels).compile().memory_analysis().temp_size_in_bytes


def factored(parts, labels, box, **settings):
    potential = pw.factored_pairwise(*parts[:4], box, parts[4])
    return pw.pairwise_log_likelihood(potential, labels, chunk_edges=CHUNK, **settings)[0]


def sampled(parts, labels, box):
    return factored(parts, labels, box, sample=SAMPLE)


def table(parts, labels, box):
    potential = pw.to_table(pw.factored_pairwise(*parts[:4], box, parts[4]))
    return pw.pairwise_log_likelihood(potential, labels.ravel())[0]


def messages(parts, labels, box):
    potential = pw.factored_pairwise(*parts[:4], box)
    return pw.compute_messages(potential, jax.nn.softmax(parts[4]), chunk_edges=CHUNK)[0]


def inference(parts, labels, box, algorithm="factored"):
    potential = pw.factored_pairwise(*parts[:4], box)
    settings = mean_field.Settings(num_iterations=2, algorithm=algorithm, chunk_edges=CHUNK)
    return jnp.sum(mean_field.run(parts[4], [potential], settings)[0] ** 2)


def inference_from_a_table(parts, labels, box):
    return inference(parts, labels, box, "table")


def test_boxes():
    assert len(BOX) == 120 and len(FEW) == 24 and np.abs(FEW).max() == 5


@pytest.mark.parametrize("objective", [factored, sampled])
def test_likelihood(objective):
    few, many = (temporaries(objective, box) for box in (FEW, BOX))
    assert many < 1.3 * few
    # The scores of all edges, which the table keeps and the factored form does not.
    assert temporaries(table, BOX) > 10 * many
    assert many < 10 * 4 * H * W * (K * K + M)


def test_messages():
    few, many = (temporaries(messages, box, gradient=False) for box in (FEW, BOX))
    assert many < 1.3 * few
    assert 10 * many < 4 * H * W * len(BOX) * K * K


@pytest.mark.full
def test_mean_field():
    """Neither scores nor hidden units depend on the iteration: a scan over iterations may keep those of all edges."""
    few, many = (temporaries(inference, box) for box in (FEW, BOX))
    assert many < 1.3 * few
    assert temporaries(inference_from_a_table, BOX) > 10 * many
