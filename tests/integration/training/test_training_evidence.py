"""Noise of the evidence that residual relations train beside: config.loss.evidence_temperature and evidence_dropout."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pwcrf_jax import config as configs
from pwcrf_jax.model import losses
from pwcrf_jax.model.segmenter import Potentials
from pwcrf_jax.potentials import factored_pairwise
from pwcrf_jax.prediction import restore
from pwcrf_jax.runtime import parallel
from pwcrf_jax.training import steps

K, GRID = 4, (5, 6)


def potentials(rng, images):
    """Of one residual relation and one free one."""
    draw = lambda *shape: jnp.asarray(rng.normal(0, 2, shape), jnp.float32)
    unary = draw(images, *GRID, K)
    parts = draw(images, *GRID, 2), draw(images, *GRID, 2), draw(2, K, K), draw(K, K)
    pair = lambda evidence: factored_pairwise(*parts, ((0, 1),), evidence)
    return Potentials(unary, {"a": pair(jax.nn.log_softmax(unary)), "b": pair(None)})


def noisy(given, keys, **settings):
    found = losses.with_evidence_noise(given, keys, losses.Settings(**settings))
    assert found.unary is given.unary and found.pairwise["b"] is given.pairwise["b"]
    same = dataclasses.replace(found.pairwise["a"], unary_log_probs=None)
    assert all(x is y for x, y in zip(*map(jax.tree.leaves, (same, given.pairwise["b"])), strict=True))
    return np.asarray(found.pairwise["a"].unary_log_probs)


def test_the_noise_is_what_the_settings_say():
    rng, images = np.random.default_rng(0), 300
    given, keys = potentials(rng, images), jax.random.split(jax.random.key(1), images)
    evidence = np.asarray(given.pairwise["a"].unary_log_probs)
    spread = lambda e: e[..., 0] - e[..., 1]
    got = noisy(given, keys, evidence_temperature=(1.0, 4.0))
    np.testing.assert_allclose(np.exp(got).sum(-1), 1, rtol=1e-5)
    temperature = np.median(spread(evidence) / spread(got), axis=(1, 2))
    np.testing.assert_allclose(spread(got) * temperature[:, None, None], spread(evidence), atol=1e-3)
    assert 1 <= temperature.min() < 1.1 and 3.7 < temperature.max() <= 4.0001
    # As many below 2 as above: log-uniform.
    assert np.mean(temperature < 2) == pytest.approx(0.5, abs=0.1)
    got = noisy(given, keys, evidence_dropout=0.3)
    uniform = np.ptp(got, axis=-1) == 0
    assert uniform.mean() == pytest.approx(0.3, abs=0.02) and 0 < uniform.mean((1, 2)).std() < 0.2
    np.testing.assert_allclose(got[uniform], -np.log(K), rtol=1e-6)
    np.testing.assert_allclose(got[~uniform], evidence[~uniform], atol=1e-5)
    # An image's noise is its key's, whatever the batch.
    some = given._replace(pairwise=jax.tree.map(lambda x: x[7:9] if x.ndim == 4 else x, given.pairwise))
    both = dict(evidence_temperature=(1.0, 4.0), evidence_dropout=0.3)
    alone = losses.with_evidence_noise(some, keys[7:9], losses.Settings(**both)).pairwise["a"].unary_log_probs
    np.testing.assert_allclose(alone, noisy(given, keys, **both)[7:9], rtol=1e-6)


@pytest.mark.parametrize(
    ("settings", "on"),
    [({}, False), ({"evidence_temperature": (2.0, 2.0)}, True), ({"evidence_dropout": 0.1}, True)],
    ids=str,
)
def test_without_noise_no_key_is_made(settings, on):
    loss = steps._Loss(None, losses.OBJECTIVES["piecewise"], losses.Settings(**settings), None, 0, ("unary",), 1)
    loss = dataclasses.replace(loss, model=dataclasses.make_dataclass("Model", [("dropout", float)])(0.0))
    batch = {"image": np.zeros((2, 4, 4, 3), np.uint8)}
    keyed = jax.eval_shape(jax.vmap(lambda _: loss.with_keys(batch, 0), axis_name=parallel.AXIS), np.zeros(2))
    assert ("evidence_keys" in keyed) == on and set(batch) == {"image"}


@pytest.mark.full
def test_a_step_draws_the_same_on_all_devices_and_parts_and_another_the_next_time(config):
    from test_training_recipe import _one_step, _small, _uneven

    _small(config)
    config.model.relations, config.model.parameterisation = ("surrounding",), "residual"
    batch, params = _uneven(16), restore.init_params(configs.build_model(config), 0)
    plain, _ = _one_step(config, batch, 1, params)
    config.loss.evidence_temperature, config.loss.evidence_dropout = (1.0, 4.0), 0.3
    one, _ = _one_step(config, batch, 1, params)
    config.train.accumulate = 2
    many, _ = _one_step(config, batch, 8, params)
    assert one["nll_unary"] == pytest.approx(plain["nll_unary"], rel=1e-6)
    assert abs(one["nll_surrounding"] - plain["nll_surrounding"]) > 1e-4
    assert many["nll_surrounding"] == pytest.approx(one["nll_surrounding"], rel=1e-6)
    model = configs.build_model(config)
    step = parallel.pmap_train(steps.from_config(config, model, optax.sgd(0.0)), devices=jax.devices()[:1])
    state = steps.TrainState.create(jax.tree.map(jnp.array, params), optax.sgd(0.0))
    state = dataclasses.replace(state, step=jnp.int32(1))
    _, later = step(state, parallel.split(batch, 1))
    assert abs(float(later["nll_surrounding"]) - one["nll_surrounding"]) > 1e-5


@pytest.mark.parametrize("key, value", [("evidence_temperature", (1.0, 4.0)), ("evidence_dropout", 0.3)])
def test_noise_without_evidence_is_refused(config, key, value):
    config.loss[key] = value
    configs.validate(config, num_devices=1)
    config.relations.above_below.parameterisation = "free"
    configs.validate(config, num_devices=1)
    config.model.parameterisation = "free"
    with pytest.raises(configs.ConfigError, match=rf"^config\.loss\.{key} = .* parameterisation 'residual', there is"):
        configs.validate(config, num_devices=1)
    config.model.parameterisation, config.loss.objective = "residual", "unrolled_mean_field"
    with pytest.raises(configs.ConfigError, match=rf"config\.loss\.{key} = .* does nothing with"):
        configs.validate(config, num_devices=1)
