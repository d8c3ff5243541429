"""Pairwise networks as modules and as functions, and what they share with training: parameters, loss, decoding."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import pwcrf_jax as pw
from pwcrf_jax import config, nets
from pwcrf_jax.config import settings
from pwcrf_jax.model import decode, losses
from pwcrf_jax.model.segmenter import Potentials

H, W, D, M, K = 3, 4, 5, 6, 3
RELATIONS = {"surrounding": pw.SURROUNDING, "above_below": pw.ABOVE_BELOW}


def problem():
    rng = np.random.default_rng(0)
    features, unary = (rng.standard_normal((2, H, W, n)).astype(np.float32) for n in (D, K))
    labels = np.where(rng.random((2, 2 * H, 2 * W)) < 0.2, 255, rng.integers(0, K, (2, 2 * H, 2 * W)))
    return jnp.asarray(features), jnp.asarray(unary), labels.astype(np.int32)


@pytest.mark.parametrize("dtype", [jnp.float32, pytest.param(jnp.bfloat16, marks=pytest.mark.full)])
def test_function_linen_and_nnx_are_the_net_of_our_models(dtype):
    features, _, _ = problem()
    net = nets.PairwiseNet(K, M, dtype=dtype)
    params = net.init(jax.random.key(1), features)["params"]
    parts = net.apply({"params": params}, features)
    linen, of_nnx = nets.PairwiseHead(K, M, dtype=dtype), nets.NNXPairwiseHead(D, M, K, dtype=dtype, rngs=nnx.Rngs(0))
    shapes = jax.eval_shape(lambda key: linen.init(key, features, pw.SURROUNDING)["params"], jax.random.key(0))
    own = nnx.to_pure_dict(nnx.state(of_nnx, nnx.Param))
    drawn = jax.eval_shape(lambda key: pw.pairwise_init(key, D, M, K), jax.random.key(0))
    for tree in (shapes, own, drawn):
        assert jax.tree.structure(tree) == jax.tree.structure(params)
        assert jax.tree.map(jnp.shape, tree) == jax.tree.map(jnp.shape, params)
    assert not np.any(own["last_kernel"]) and np.any(own["first_q"]["kernel"])
    nnx.update(of_nnx, params)
    for potential in (
        pw.pairwise_apply(params, features, pw.SURROUNDING, dtype=dtype),
        linen.apply({"params": params}, features, pw.SURROUNDING),
        of_nnx(features, pw.SURROUNDING),
    ):
        assert potential.offsets == tuple(map(tuple, pw.offsets(pw.SURROUNDING, H, W).tolist()))
        for name in ("hidden_p", "hidden_q", "kernel", "bias"):
            got, expected = getattr(potential, name), getattr(parts, name)
            assert got.dtype == expected.dtype
            np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6)


@pytest.mark.full
def test_nnx_trains_by_the_loss():
    features, unary, labels = problem()
    head = nets.NNXPairwiseHead(D, M, K, rngs=nnx.Rngs(0))
    loss = lambda head: pw.piecewise_loss(unary, head(features, pw.SURROUNDING), labels)
    gradients = nnx.to_pure_dict(nnx.grad(loss)(head))
    assert np.abs(gradients["last_kernel"]).max() > 0


@pytest.fixture(scope="module")
def potentials():
    """Those of a model with both relations, once as its heads give them and once as a `Segmenter` does."""
    features, unary, _ = problem()
    plain, residual = {}, {}
    for i, (name, relation) in enumerate(RELATIONS.items()):
        params = pw.pairwise_init(jax.random.key(i), D, M, K, zero_last=False)
        plain[name] = pw.pairwise_apply(params, features, relation)
        log_probs = jax.lax.stop_gradient(jax.nn.log_softmax(unary))
        residual[name] = dataclasses.replace(plain[name], unary_log_probs=log_probs)
    return plain, Potentials(unary, residual)


@pytest.mark.full
def test_the_loss_is_that_of_training(potentials):
    plain, of_model = potentials
    _, unary, labels = problem()
    objective, of_loss = losses.OBJECTIVES["piecewise"], settings.loss_settings(config.defaults())
    terms = objective.terms(of_model, labels, of_loss)
    expected = losses.negative_log_likelihood(terms, 2, objective.weights(terms, of_loss), of_loss.reduction)
    np.testing.assert_allclose(pw.piecewise_loss(unary, plain, labels), expected, rtol=1e-6)


def test_defaults_are_those_of_training():
    of_loss, of_crf = settings.loss_settings(config.defaults()), settings.crf_settings(config.defaults())
    named = inspect.signature(pw.piecewise_loss).parameters
    shared = {field.name for field in dataclasses.fields(of_loss)} & set(named)
    assert shared == {"pairwise_weight", "balance_power", "chunk_edges"}
    assert {name: named[name].default for name in shared} == {name: getattr(of_loss, name) for name in shared}
    assert config.defaults().model.parameterisation == "residual" and of_loss.reduction == "mean"
    assert dataclasses.replace(of_crf, weights=None, unary_temperature=None) == pw.pixels.DEFAULT_SETTINGS
    assert set(of_crf.weights.values()) == {1.0} and of_crf.unary_temperature == 1.0  # which is what None means
    assert inspect.signature(pw.decode).parameters["settings"].default is pw.pixels.DEFAULT_SETTINGS


@pytest.mark.full
def test_decoding_is_that_of_evaluation(potentials):
    plain, of_model = potentials
    of_crf = settings.crf_settings(config.defaults())
    boxes, size = np.array([[0, 0, 2 * H, 2 * W], [0, 0, 4, 5]], np.int32), (2 * H, 2 * W)
    expected = decode.decode(of_model, boxes, size, of_crf)
    got = pw.decode(of_model.unary, plain, size=size, valid_box=boxes)
    np.testing.assert_allclose(got.log_marginals, expected.log_marginals, atol=1e-6)
    np.testing.assert_array_equal(got.labels, decode.frame_labels(expected, size))
