"""Labels outside 0..K-1: refused alike where they are seen, void alike where they cannot be, for any integers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rows import full_but

import pwcrf_jax as pw
from pwcrf_jax import metrics
from reference import random_problems

H, W, K = 2, 3, 3
X = random_problems.grid_problem(91, H, W, K)
BOX = pw.offsets(pw.SURROUNDING, H, W)


def factored():
    return pw.factored_pairwise(*X.parts, BOX, X.unary_log_probs)


def flat(labels):
    return labels.reshape(-1) if hasattr(labels, "shape") else sum(map(list, labels), [])


FUNCTIONS = {
    "unary": lambda y, **o: pw.unary_log_likelihood(X.unary, y, **o),
    "pairwise": lambda y, **o: pw.pairwise_log_likelihood(factored(), y, **o),
    "pairwise-table": lambda y, **o: pw.pairwise_log_likelihood(pw.to_table(factored()), flat(y), **o),
    "edges": lambda y, void=255: pw.likelihood.pairwise_log_likelihood(factored(), y, void=void),
    "balance": lambda y, **o: pw.balance_weights(y, K, **o),
    "pseudo": lambda y, **o: pw.pseudo_log_likelihood(X.unary, [factored()], y, **o),
    "unrolled": lambda y, **o: pw.unrolled_log_likelihood(X.unary, [factored()], y, **o),
    "exact": lambda y, **o: pw.exact_log_likelihood(X.unary, [factored()], y, **o),
    "confusion": lambda y, **o: pw.confusion_matrix(np.zeros((H, W), int), y, K, **o),
}
every = pytest.mark.parametrize("name", FUNCTIONS)


def labels_with(value, dtype=np.int32):
    labels = X.labels.astype(dtype)
    labels[0, 1] = value
    return labels


def equal(got, expected):
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("value", "dtype"),
    full_but(
        [(-1, np.int8), (K, np.uint8), (254, np.uint8), (-100, np.int16), (2**32 + 1, np.int64)],
        (-1, np.int8),
        (K, np.uint8),
        (2**32 + 1, np.int64),
    ),
)
@every
def test_what_can_be_seen_is_refused_with_value_and_remedy(name, value, dtype):
    labels = labels_with(value, dtype)
    for given in (labels, labels.tolist()):
        with pytest.raises(ValueError, match=rf"labels 0\.\.2 or void \(255\), got {value} \(1 of 6.*void={value}"):
            FUNCTIONS[name](given)
    if labels.dtype.itemsize < 8:
        with pytest.raises(ValueError, match=f"got {value} "):
            FUNCTIONS[name](jnp.asarray(labels))
        # Seen too where only the scores are traced, or where it is a constant of a traced function.
        with pytest.raises(ValueError, match=f"got {value} "):
            jax.jit(lambda: FUNCTIONS[name](labels))()


@every
def test_what_cannot_be_seen_is_void(name):
    expected = FUNCTIONS[name](labels_with(255))
    run = jax.jit(FUNCTIONS[name])
    for value, dtype in [(-1, np.int32), (-1, np.int8), (K, np.int32), (254, np.uint8), (2**31 + 1, np.uint32)]:
        equal(run(labels_with(value, dtype)), expected)
    grad = lambda y: jax.grad(lambda u: pw.unary_log_likelihood(u, y)[0])(X.unary)
    equal(jax.jit(grad)(labels_with(-1)), grad(labels_with(255)))


@pytest.mark.parametrize(
    ("void", "dtype"),
    full_but(
        [(-1, np.int8), (-1, np.int32), (K, np.uint8), (250, np.int16), (np.int64(-7), np.int64)],
        (-1, np.int32),
    ),
)
@every
def test_any_void_outside_the_classes_does(name, void, dtype):
    expected = FUNCTIONS[name](labels_with(255))
    equal(FUNCTIONS[name](labels_with(void, dtype), void=void), expected)
    equal(jax.jit(lambda y: FUNCTIONS[name](y, void=void))(labels_with(void, dtype)), expected)


@pytest.mark.parametrize("void", [0, 1, K - 1, np.int64(2)])
@every
def test_a_void_that_is_a_class_is_refused(name, void):
    labels = X.labels.astype(np.int32)
    with pytest.raises(ValueError, match=f"void={void} is one of the 3 classes"):
        FUNCTIONS[name](labels, void=void)
    with pytest.raises(ValueError, match=f"void={void} is one of the 3 classes"):
        jax.jit(lambda y: FUNCTIONS[name](y, void=void))(labels)


@pytest.mark.parametrize(
    "labels", [np.zeros((H, W)), np.zeros((H, W), bool), [[0.0] * W] * H, [[True] * W] * H], ids=str
)
@every
def test_what_is_no_integer_is_refused(name, labels):
    with pytest.raises(ValueError, match="integer labels, got"):
        FUNCTIONS[name](labels)


@every
def test_lists_and_tuples_are_labels(name):
    labels = labels_with(255)
    for given in (labels.tolist(), tuple(map(tuple, labels.tolist()))):
        equal(FUNCTIONS[name](given), FUNCTIONS[name](labels))
    assert pw.grid_labels(labels.tolist(), 1, 1).tolist() == pw.grid_labels(labels, 1, 1).tolist()
    assert metrics.boundary_band(labels.tolist(), 1).tolist() == metrics.boundary_band(labels, 1).tolist()


@pytest.mark.parametrize("classes", [256, 257, 300, 1000])
def test_with_many_classes_the_usual_void_is_one_of_them(classes):
    scores, labels = np.zeros((2, classes), np.float32), np.array([255, -1])
    calls = [
        lambda **o: pw.unary_log_likelihood(scores, labels, **o)[1],
        lambda **o: pw.confusion_matrix(np.array([255, 0]), labels, classes, **o).sum(),
        lambda **o: pw.balance_weights(labels[None], classes, **o).sum(),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=f"void=255 is one of the {classes} classes.*void=-1"):
            call()
        assert call(void=-1) == 1


@pytest.mark.parametrize("value", [-1, K, 255, 10**6])
def test_a_prediction_that_is_no_class_counts_in_no_row(value):
    labels, predictions = np.array([0, 1, 255]), np.array([0, value, value])
    with pytest.raises(ValueError, match=rf"predictions 0\.\.2, got {value} \(1 of 3"):
        pw.confusion_matrix(predictions, labels, K)
    run = jax.jit(lambda p, y: pw.confusion_matrix(p, y, K))
    assert run(predictions, labels).tolist() == [[1, 0, 0], [0, 0, 0], [0, 0, 0]]
    # Where the label is void a prediction may be anything.
    labels[1] = 255
    assert pw.confusion_matrix(predictions, labels, K).tolist() == [[1, 0, 0], [0, 0, 0], [0, 0, 0]]


def test_edges_look_at_labels_under_the_mask_alone():
    labels, mask = labels_with(77), labels_with(0) >= 0
    with pytest.raises(ValueError, match="got 77"):
        pw.likelihood.pairwise_log_likelihood(factored(), labels, node_mask=mask)
    mask[0, 1] = False
    equal(
        pw.likelihood.pairwise_log_likelihood(factored(), labels, node_mask=mask),
        FUNCTIONS["pairwise"](labels_with(255)),
    )
    equal(
        pw.unrolled_log_likelihood(X.unary, [factored()], labels, node_mask=mask),
        pw.unrolled_log_likelihood(X.unary, [factored()], labels_with(255), node_mask=mask),
    )


def test_labels_of_64_bits_do_not_wrap():
    with jax.enable_x64(True):
        for value, dtype in [(2**32 + 1, np.int64), (2**64 - 1, np.uint64), (2**32, np.uint64), (-(2**33), np.int64)]:
            equal(jax.jit(FUNCTIONS["unary"])(labels_with(value, dtype)), FUNCTIONS["unary"](labels_with(255)))


@pytest.mark.parametrize(
    ("void", "dtype"),
    full_but(
        [(-(2**63), np.int64), (2**32, np.int64), (2**32 + 1, np.uint64), (2**63 - 1, np.uint64)],
        (2**32 + 1, np.uint64),
    ),
)
@every
def test_a_void_of_64_bits_does_not_become_a_class(name, void, dtype):
    """JAX cuts what it is given to 32 bits, of which these leave 0, 1 or -1."""
    equal(FUNCTIONS[name](labels_with(void, dtype), void=void), FUNCTIONS[name](labels_with(255)))
    equal(jax.jit(lambda: FUNCTIONS[name](labels_with(void, dtype), void=void))(), FUNCTIONS[name](labels_with(255)))


def test_labels_under_a_mask_that_is_traced_do_not_become_classes():
    labels, mask = labels_with(2**32, np.int64), np.ones((H, W), bool)
    run = jax.jit(lambda mask: pw.likelihood.pairwise_log_likelihood(factored(), labels, node_mask=mask))
    equal(run(mask), FUNCTIONS["pairwise"](labels_with(255)))


@pytest.mark.parametrize("name", ["unary", "pseudo", "exact", "confusion"])
def test_void_is_void_without_jit(name):
    expected = FUNCTIONS[name](labels_with(255))
    with jax.disable_jit():
        equal(FUNCTIONS[name](labels_with(255)), expected)


@pytest.mark.parametrize("shape", [(W, H), (1,), (2, H + W), (4, H, W, 1), ()])
def test_edges_take_labels_of_their_nodes_alone(shape):
    for potential in (factored(), pw.to_table(factored())):
        with pytest.raises(ValueError, match=r"expected labels of shape \('...', .*one a node, got"):
            pw.likelihood.pairwise_log_likelihood(potential, np.zeros(shape, int))
    with pytest.raises(ValueError, match=r"\('...', 2, 3\), one a node, got \(6,\)"):
        pw.likelihood.pairwise_log_likelihood(factored(), np.zeros(H * W, int))
