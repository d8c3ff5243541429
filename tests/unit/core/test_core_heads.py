"""Pairwise networks, the loss and decoding for networks of others, against their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pwcrf_jax as pw

H, W, D, M, K = 2, 3, 4, 5, 3
BOX = pw.offsets(pw.SURROUNDING, H, W)


def problem(seed=0):
    """Features, unary scores and labels of two images, and params of a network whose last layer is not zero."""
    rng = np.random.default_rng(seed)
    features, unary = (rng.standard_normal((2, H, W, n)).astype(np.float32) for n in (D, K))
    labels = np.where(rng.random((2, H, W)) < 0.2, 255, rng.integers(0, K, (2, H, W)))
    params = pw.pairwise_init(jax.random.key(seed), D, M, K, zero_last=False)
    biases = rng.standard_normal(M).astype(np.float32), rng.standard_normal((K, K)).astype(np.float32)
    first_p = params["first_p"] | {"bias": biases[0]}
    return features, unary, labels, params | {"first_p": first_p, "last_bias": biases[1]}


def test_scores_are_those_of_two_layers_on_both_ends():
    features, _, _, params = problem()
    potential = pw.pairwise_apply(params, features, BOX)
    edges = pw.edge_list(pw.SURROUNDING, H, W)
    nodes = features.reshape(2, H * W, D)
    both = np.concatenate([nodes[:, edges.p], nodes[:, edges.q]], axis=-1)
    first = np.concatenate([params["first_p"]["kernel"], params["first_q"]["kernel"]])
    hidden = np.maximum(both @ first + np.asarray(params["first_p"]["bias"]), 0)
    expected = np.einsum("bem,mkl->bekl", hidden, params["last_kernel"]) + params["last_bias"]
    np.testing.assert_allclose(pw.to_table(potential).scores, expected, rtol=1e-5, atol=1e-5)
    assert pw.pairwise_apply(params, features, pw.SURROUNDING).offsets == potential.offsets


def test_params_begin_as_a_layer_over_both_ends_and_without_interaction():
    params = pw.pairwise_init(jax.random.key(0), 400, 50, K)
    drawn = np.concatenate([params["first_p"]["kernel"], params["first_q"]["kernel"]])
    assert abs(drawn.std() * np.sqrt(2 * 400) - 1) < 0.02  # that of a layer over 2D inputs
    assert not np.array_equal(params["first_p"]["kernel"], params["first_q"]["kernel"])
    assert not any(np.any(params[name]) for name in ("last_kernel", "last_bias"))


def test_the_loss_is_the_mean_of_nodes_and_of_edges():
    features, unary, labels, params = problem()
    around = pw.pairwise_apply(params, features, BOX)
    log_p = np.asarray(jax.nn.log_softmax(unary)).reshape(2, H * W, K)
    scores = np.asarray(pw.to_table(around).scores)
    p, q = pw.edge_list(pw.SURROUNDING, H, W)
    flat = labels.reshape(2, H * W)
    of_nodes = [log_p[b, i, flat[b, i]] for b in range(2) for i in range(H * W) if flat[b, i] < K]
    of_edges = []
    for b, e in np.ndindex(2, len(p)):
        at_p, at_q = flat[b, p[e]], flat[b, q[e]]
        if at_p < K and at_q < K:
            s = scores[b, e] + log_p[b, p[e], :, None] + log_p[b, q[e], None, :]
            of_edges.append(s[at_p, at_q] - np.log(np.exp(s).sum()))
    expected = -np.mean(of_nodes) - 0.5 * np.mean(of_edges)
    assert np.isclose(pw.piecewise_loss(unary, around, labels, pairwise_weight=0.5), expected, rtol=1e-5)
    # The image's labels are read at the centres of the cells.
    of_image = np.full((2, 3 * H, 3 * W), 255)
    of_image[:, 1::3, 1::3] = labels
    assert np.isclose(pw.piecewise_loss(unary, {"around": around}, of_image, pairwise_weight=0.5), expected, rtol=1e-5)


def test_the_unary_learns_nothing_from_pairs():
    features, unary, labels, params = problem()
    around = pw.pairwise_apply(params, features, BOX)
    alone, beside = (jax.grad(pw.piecewise_loss)(unary, p, labels) for p in ([], [around]))
    np.testing.assert_array_equal(alone, beside)


@pytest.mark.full
def test_balance_and_graphs():
    features, unary, labels, params = problem()
    around = pw.pairwise_apply(params, features, BOX)
    table = pw.to_table(around)
    of_nodes = lambda x: x.reshape(2, H * W, *x.shape[3:])
    for options in ({}, {"residual": False}, {"balance_power": 1.0}):
        on_grid = pw.piecewise_loss(unary, around, labels, **options)
        of_graph = pw.piecewise_loss(of_nodes(unary), table, of_nodes(labels), **options)
        assert np.isclose(on_grid, of_graph, rtol=1e-5)
    weights = pw.balance_weights(labels, K)
    total, count = pw.unary_log_likelihood(unary, labels, node_weights=weights)
    assert np.isclose(pw.piecewise_loss(unary, [], labels, balance_power=1.0), -total / count, rtol=1e-5)


def test_pixels_read_the_marginals_of_cells():
    features, unary, _, params = problem()
    around = pw.pairwise_apply(params, features, BOX)
    decoded = pw.decode(unary, [around], size=(3 * H, 3 * W))
    expected, info = pw.mean_field.run(unary, [around], num_iterations=3, average_messages=True)
    np.testing.assert_array_equal(decoded.log_marginals, expected)
    np.testing.assert_array_equal(decoded.change, info.change)
    assert decoded.labels.dtype == jnp.int32 and decoded.log_probs.shape == (2, 3 * H, 3 * W, K)
    np.testing.assert_array_equal(decoded.labels[:, 1::3, 1::3], expected.argmax(-1))  # centres of cells
    resized = jax.image.resize(expected, (2, 3 * H, 3 * W, K), "linear")
    np.testing.assert_allclose(decoded.log_probs, jax.nn.log_softmax(resized), atol=1e-5)


@pytest.mark.full
def test_padding_changes_nothing():
    features, unary, _, params = problem()
    boxes = np.array([[0, 0, 6, 6], [3, 0, 6, 9]])
    outside = ~np.asarray(pw.pixels.grid_mask(boxes, (H, W), (6, 9)))
    assert outside.sum() == 5
    decoded = []
    for filling in (0.0, np.nan):
        x, z = (np.where(outside[..., None], np.float32(filling), a) for a in (features, unary))
        decoded.append(pw.decode(z, pw.pairwise_apply(params, x, BOX), size=(6, 9), valid_box=boxes))
    for one, (top, left, bottom, right) in enumerate(boxes):
        inside = np.s_[one, top:bottom, left:right]
        np.testing.assert_array_equal(decoded[0].log_probs[inside], decoded[1].log_probs[inside])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, z, y, p: pw.pairwise_init(jax.random.key(0), x, M, K), r"features: expected an integer.*\(2, 2, 3"),
        (lambda x, z, y, p: pw.pairwise_init(jax.random.key(0), D, 0, K), "hidden must be at least 1, got 0"),
        (lambda x, z, y, p: pw.pairwise_apply({"params": p}, x, BOX), "of one relation: first_p .*; got params"),
        (
            lambda x, z, y, p: pw.pairwise_apply(p, z, BOX),
            r"features \[..., H, W, D\] with D = 4 of params, got \(2, 2",
        ),
        (lambda x, z, y, p: pw.pairwise_apply(p, x, "around"), "expected integer offsets"),
        (lambda x, z, y, p: pw.piecewise_loss(z, [], y.swapaxes(1, 2)), r"labels of shape \(2, 2, 3\), one a node"),
        (lambda x, z, y, p: pw.piecewise_loss(z, [], y - 3), "or void"),
        (lambda x, z, y, p: pw.decode(z[0, 0], []), r"a grid \[..., h, w, K\], got \(3, 3\)"),
        (lambda x, z, y, p: pw.decode(z, [], size=(6,)), r"size \(height, width\) in pixels, got \(6,\)"),
        (lambda x, z, y, p: pw.decode(z, [], valid_box=np.zeros((1, 4))), r"valid_box \(2, 4\), one an image"),
        (lambda x, z, y, p: pw.decode(z, [], averaged=True), "'averaged' is no field of mean_field.Settings"),
        (
            lambda x, z, y, p: pw.decode(z, pw.PairwiseTable(np.zeros((1, K, K)), [0], [1])),
            "tables of edges to pwcrf_jax.mean_field.run",
        ),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call(*problem())
