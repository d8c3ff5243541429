"""pwcrf tune --method nll: what is sought is found, and used by all that decodes."""

import json
import shutil

import jax
import numpy as np
import pytest
import small
from rows import full_but

from pwcrf_jax import config as configs
from pwcrf_jax.evaluation import calibration, evaluate, tuning
from pwcrf_jax.prediction import restore
from reference import crf_oracle, random_problems

K, GRID, SIZE = 3, (2, 3), (32, 48)


def tiny(tmp_path, **changes):
    """A config of 3 classes on a grid of 2 x 3 cells with one relation of its neighbours, free or not."""
    config = small.config(tmp_path, **{"data.num_classes": K, "model.relations": ("surrounding",)} | changes)
    config.data.eval_size, config.crf.weights, config.model.scales = SIZE, (1.0,), (1.0,)
    config.relations.surrounding.update(rows=(-1, 1), cols=(-1, 1), unit="cells", grid=0)
    return config


def kept(config, unary, labels, parts=()):
    """`calibration.Batch` of images on the devices; unary [N, h, w, K] and so on."""
    devices = jax.local_device_count()
    split = lambda x: np.asarray(x).reshape(devices, -1, *np.shape(x)[1:])
    box = np.tile(np.int32([0, 0, *SIZE]), (len(unary), 1))
    names = configs.crf_relations(config)
    return dict(
        unary=split(np.float32(unary)),
        labels=split(np.uint8(labels)),
        valid_box=split(box),
        parts={name: tuple(map(split, parts)) for name in names},
    )


def calibrated(config, batches, monkeypatch, params=None, method="nll"):
    monkeypatch.setattr(calibration, "_outputs", lambda *_: (batches, 0.0))
    return calibration.calibrate(config, configs.build_model(config), params or {}, None, "val", method)


def drawn(rng, log_probs):
    """Labels of these log-probabilities [..., K]."""
    return (log_probs + rng.gumbel(size=log_probs.shape)).argmax(-1)


def test_a_known_temperature_is_found(tmp_path, monkeypatch):
    """Of scores that are three times too large for the labels drawn from them; void counts for nothing."""
    config, rng = tiny(tmp_path, **{"model.relations": ()}), np.random.default_rng(0)
    batches = []
    for _ in range(9):  # two are looked at first
        scores = rng.normal(0, 1.5, (160, *GRID, K))
        labels = drawn(rng, scores)
        labels[:, 0, 0] = 255
        batches.append(kept(config, 3 * scores, labels))
    found = calibrated(config, batches, monkeypatch)
    assert found.config["crf.unary_temperature"] == pytest.approx(3, rel=0.05)
    assert set(found.config) == {"crf.unary_temperature"}
    assert found.nll_after < found.nll_before - 0.1


def problem(config, rng, images=16):
    """(batch, params of the relation, the oracle's edges of each image, labels [images, h w])."""
    box = dict(configs.build_model(config).relations)["surrounding"]
    assert len(box) == 8
    x = random_problems.grid_problem(int(rng.integers(99)), *GRID, K, 4, (images,))
    edges = [crf_oracle.grid_edges(a, b, x.kernel, x.bias, box) for a, b in zip(x.hidden_p, x.hidden_q, strict=True)]
    labels = np.array(
        [
            drawn(rng, crf_oracle.mean_field(u.reshape(-1, K) / 2, [e], 3, weights=[0.5], normalize=True)[0])
            for u, e in zip(x.unary, edges, strict=True)
        ]
    )
    labels[rng.random(labels.shape) < 0.1] = 255
    params = {"pairwise_surrounding": {"last_kernel": x.kernel, "last_bias": x.bias}}
    return kept(config, x.unary, labels.reshape(-1, *GRID), (x.hidden_p, x.hidden_q)), params, (x.unary, edges, labels)


def of_oracle(asked, temperature, weight, pairs):
    """Mean NLL of the labels, by loops in float64."""
    values = []
    for unary, edges, labels in zip(*asked, strict=True):
        scaled = [edge._replace(scores=pairs * edge.scores) for edge in edges]
        nodes = np.float64(unary).reshape(-1, K) / temperature
        log_q = crf_oracle.mean_field(nodes, [scaled], 3, weights=[weight], normalize=True)[0]
        values += [-row[label] for row, label in zip(log_q, labels, strict=True) if label != 255]
    return np.mean(values)


@pytest.mark.parametrize("method", full_but(calibration.METHODS, "nll_labels"))
def test_what_is_found_is_a_minimum_of_the_oracles_likelihood(tmp_path, monkeypatch, method):
    config = tiny(tmp_path)
    batch, params, asked = problem(config, np.random.default_rng(1))
    found = calibrated(config, [batch], monkeypatch, params, method)
    temperature, (weight,) = found.config["crf.unary_temperature"], found.config["crf.weights"]
    of_labels = found.config.get("crf.label_weights", np.ones((1, 2, K)))
    assert ("crf.label_weights" in found.config) == (method == "nll_labels")

    def penalised(x):
        a, b = np.exp(x[2:]).reshape(2, K)
        nll = of_oracle(asked, np.exp(x[0]), x[1], np.outer(a, b))
        return nll + (calibration.RIDGE * np.sum(x[2:] ** 2) if method == "nll_labels" else 0)

    x = np.concatenate([[np.log(temperature), weight], np.log(of_labels).ravel()])
    ridge = penalised(x) - of_oracle(asked, temperature, weight, np.outer(*of_labels[0]))
    assert found.nll_after == pytest.approx(penalised(x) - ridge, abs=1e-4)
    assert found.nll_before == pytest.approx(of_oracle(asked, 1, 1, np.ones((K, K))), abs=1e-4)
    assert found.nll_before > found.nll_after + 0.05
    slope = crf_oracle.numerical_gradient(penalised, x, 1e-5)
    assert np.abs(slope[: len(slope) if method == "nll_labels" else 2]).max() < 1e-2
    # The config that it makes is decoded as it was found.
    configs.apply_values(config, found.config)
    configs.validate(config, num_devices=1)
    weights = configs.crf_settings(config).weights["surrounding"]
    np.testing.assert_allclose(weights * np.ones((K, K)), weight * np.outer(*of_labels[0]), rtol=1e-5)


def test_what_does_not_fit_or_has_nothing_to_seek_is_refused_before_the_nets_run(tmp_path, monkeypatch):
    class Split:
        source = staticmethod(lambda split: range(1000))

    config = tiny(tmp_path)
    model = configs.build_model(config)
    monkeypatch.setattr(evaluate, "batches_of", lambda *_: pytest.fail("images were read"))
    cells = 1000 * GRID[0] * GRID[1]
    monkeypatch.setattr(calibration, "CACHE_BYTES", cells * (4 * K + 2 * 2 * config.model.hidden))
    assert calibration._kept_dtype(config, model, 1000, "val") == np.float16
    monkeypatch.setattr(calibration, "CACHE_BYTES", cells * (4 * K + 2 * 2 * config.model.hidden) // 2)
    with pytest.raises(configs.ConfigError, match=r"^--split=val: .* 1000 images .*name fewer, such as val\[:500\]$"):
        calibration.calibrate(config, model, {}, Split, "val", "nll")
    config.crf.num_iterations = 0
    with pytest.raises(configs.ConfigError, match="--method=nll_labels weighs messages"):
        calibration.calibrate(config, model, {}, Split, "val", "nll_labels")


@pytest.mark.full
@pytest.mark.parametrize("method", calibration.METHODS)
def test_a_run_is_calibrated_and_evaluated_with_it(trained, tmp_path, monkeypatch, method):
    workdir = str(shutil.copytree(trained, tmp_path / "work"))
    config = configs.load(trained / "config.json")
    config.refine.num_iterations = 1
    result = tuning.tune(config, workdir, "best", "val[:8]", "spatial", 1, method=method)
    assert result["nll_after"] <= result["nll_before"] and result["method"] == method
    assert result["config"]["crf.unary_temperature"] != 1
    with monkeypatch.context() as m:  # it is not done again
        m.setattr(calibration, "calibrate", lambda *_: pytest.fail("calibrated again"))
        assert tuning.tune(config, workdir, "best", "val[:8]", "spatial", 1, method=method) == json.loads(
            json.dumps(result)
        )
    tuned = configs.apply_tuned(config, workdir)
    configs.validate(config, num_devices=1)
    configs.check_tuned(config, tuned, workdir)
    assert config.crf.unary_temperature == result["config"]["crf.unary_temperature"]
    assert evaluate.evaluate(config, workdir, split="val[:8]")["rows"]["all"]["miou"] == pytest.approx(
        result["miou_messages"]
    )
    # The unary's own NLL is that of evaluation.
    model, params, _, dataset = restore.load(config, workdir, "best", "val[:8]")
    _, unary = calibration._outputs(config, model, params, dataset, "val[:8]")
    assert unary == pytest.approx(evaluate.evaluate(config, workdir, split="val[:8]")["nll"]["unary"], rel=1e-5)
    config.crf.unary_temperature *= 2
    with pytest.raises(configs.ConfigError, match=r"config\.crf\.unary_temperature = .* tune again"):
        configs.check_tuned(config, tuned, workdir)
