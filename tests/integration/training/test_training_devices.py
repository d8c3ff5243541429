"""One, two, four and eight devices are the same run, though void is spread over them as unevenly as can be."""

import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small
from rows import full_but

from pwcrf_jax import config as configs
from pwcrf_jax.data import load_dataset
from pwcrf_jax.evaluation import evaluate
from pwcrf_jax.model import losses
from pwcrf_jax.prediction import restore
from pwcrf_jax.runtime import checkpoint, parallel, preemption
from pwcrf_jax.training import loop, steps

STEPS = 50
# Of the samples of a batch: which share of their rows is void. One device has no label at all if there are eight.
VOID_SHARES = (0.0, 0.98, 0.5, 0.9, 0.0, 0.3, 0.95, 1.0)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    # Plain SGD at a modest rate keeps what rounding changes as small as it is. Adam divides tiny gradients by their own
    # size, and hides a gradient that is wrong by a factor.
    changes = {
        "optimizer.name": "sgd",
        "optimizer.learning_rate": 0.02,
        "optimizer.warmup_steps": 5,
        "optimizer.clip_norm": 0.0,
        "model.relations": ("surrounding",),
        "relations.surrounding.grid": 3,
        "train.steps": 2 * STEPS,  # stopped half way, so that nothing is evaluated
        "train.eval_every": 0,
        "train.checkpoint_every": STEPS // 2,
    }
    return small.config(tmp_path_factory.getbasetemp() / "prepared", **changes)


def _spread_void(batch):
    for label, share in zip(batch["label"], VOID_SHARES, strict=True):
        label[: round(share * len(label))] = 255
    return batch


class _Batches:
    """Training batches whose void `_spread_void` spreads."""

    def __init__(self, batches):
        self._batches, self.close = batches, batches.close

    def __next__(self):
        return _spread_void(next(self._batches))


def _on(monkeypatch, n):
    """Training and evaluation see the first n devices."""
    for name in ("pmap_train", "pmap_eval"):
        whole = getattr(parallel, name)
        monkeypatch.setattr(parallel, name, lambda fn, *_, f=whole, **kw: f(fn, devices=jax.devices()[:n], **kw))
    replicated = parallel.replicated
    monkeypatch.setattr(parallel, "replicated", lambda state: replicated(state, jax.devices()[:n]))
    split = parallel.split
    monkeypatch.setattr(parallel, "split", lambda batch, *_: split(batch, n))
    ahead = parallel.ahead
    monkeypatch.setattr(parallel, "ahead", lambda batches: ahead(batches, jax.devices()[:n]))


def _train(config, workdir, n, steps_to_go):
    """Trains on n devices; {step: loss} of all the run, [parameters that were saved], [parameters it went on from]."""
    read, save, from_trees = loop.train_batches, checkpoint.Store.save, steps.TrainState.from_trees
    requests = iter([False] * (steps_to_go - 1) + [True])
    copied, saved, restored = lambda params: jax.tree.map(np.array, params), [], []

    def saving(store, step, trees, meta):
        saved.append(copied(trees["params"]))
        save(store, step, trees, meta)

    def restoring(trees):
        restored.append(copied(trees["params"]))
        return from_trees(trees)

    with pytest.MonkeyPatch.context() as m:
        _on(m, n)
        m.setattr(loop, "train_batches", lambda *args, **kw: _Batches(read(*args, **kw)))
        m.setattr(checkpoint.Store, "save", saving)
        m.setattr(steps.TrainState, "from_trees", restoring)
        m.setattr(preemption, "requested", lambda: next(requests))
        with pytest.raises(preemption.Preempted):
            loop.train_and_evaluate(config, str(workdir))
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["train/loss"] for line in lines}, saved, restored


@pytest.fixture(scope="module")
def runs(config, tmp_path_factory):
    """(devices) -> (workdir, {step: loss}, [parameters of the checkpoints]), trained when it is first asked for."""

    @functools.cache
    def run(n):
        folder = tmp_path_factory.mktemp("devices") / "work"
        return folder, *_train(config, folder, n, STEPS)[:2]

    return run


def _assert_same(losses, expected):
    assert losses.keys() == expected.keys() == set(range(1, STEPS + 1))
    np.testing.assert_allclose(list(losses.values()), [expected[step] for step in losses], rtol=1e-5)


@pytest.mark.parametrize("n", full_but([2, 4, 8], 8))
@pytest.mark.full
def test_losses_of_fifty_steps(runs, n):
    expected = runs(1)[1]
    assert expected[STEPS] < 0.98 * expected[1], "the parameters hardly moved"
    _assert_same(runs(n)[1], expected)


@pytest.mark.parametrize("n", full_but([1, 4], 1))
@pytest.mark.full
def test_a_checkpoint_of_eight_devices_goes_on_with_fewer(config, runs, tmp_path, n):
    folder, expected, saved = runs(8)
    work = shutil.copytree(folder, tmp_path / "work")
    shutil.rmtree(work / "checkpoints" / str(STEPS))
    losses, _, (restored,) = _train(config, work, n, STEPS - STEPS // 2)
    jax.tree.map(np.testing.assert_array_equal, restored, saved[0])
    _assert_same(losses, expected)


def _model_and_params(config):
    """With parameters that leave nothing at zero."""
    model = configs.build_model(config)
    noise = lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape)
    return model, jax.tree.map(noise, restore.init_params(model, 0))


@pytest.mark.full
def test_raw_gradients_against_a_single_device_without_pmap(config):
    model, params = _model_and_params(config)
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (8, 96, 128, 3)).astype(np.uint8)
    batch = _spread_void({"image": image, "label": rng.integers(0, 6, (8, 96, 128)).astype(np.uint8)})

    def loss(params):
        potentials = model.apply({"params": params}, batch["image"])
        terms = losses.piecewise_terms(potentials, jnp.asarray(batch["label"]))
        return -sum(total / count for total, count in terms.values())

    value, gradient = jax.jit(jax.value_and_grad(loss))(params)
    # The update rule keeps the gradient it is given in its state, and changes nothing.
    zeros = lambda tree: jax.tree.map(jnp.zeros_like, tree)
    keep = optax.GradientTransformation(zeros, lambda grads, state, params: (zeros(grads), grads))
    step = parallel.pmap_train(steps.from_config(config, model, keep))
    state, metrics = step(steps.TrainState(jnp.int32(0), params, zeros(params)), parallel.split(batch))
    np.testing.assert_allclose(float(metrics["loss"]), float(value), rtol=1e-5)
    for got, wanted in zip(jax.tree.leaves(state.opt_state), jax.tree.leaves(gradient), strict=True):
        assert np.abs(wanted).max() > 0
        assert np.abs(got - wanted).max() <= 1e-5 * np.abs(wanted).max()


def test_a_padded_last_batch_over_devices_counts_as_images_one_by_one(config, monkeypatch):
    """Integer confusion matrices of a split of 10 images: in batches of 8 over 8 devices, and singly on one device."""
    model, params = _model_and_params(config)
    dataset, found = load_dataset(**configs.dataset_options(config)), []
    assert len(dataset.source("val")) % 8
    for n in (1, 8):
        config.eval.batch_size, confusion = n, {}
        with monkeypatch.context() as m:
            _on(m, n)
            eval_fn = evaluate.make_eval_fn(config, model)

            def counting(params, batch, eval_fn=eval_fn, confusion=confusion):
                out = eval_fn(params, batch)
                for row, counts in out[0].confusion.items():
                    assert counts.dtype == jnp.int32
                    confusion[row] = confusion.get(row, 0) + np.asarray(counts, np.int64)
                return out

            result = evaluate.evaluate_params(counting, params, dataset, "val", config)
        found.append((confusion, result["rows"], result["num_images"]))
    (one, *rest), (eight, *others) = found
    assert rest == others and one.keys() == eight.keys() == set(configs.table_rows(config))
    pixels = sum(int((dataset.source("val")[i]["label"] != 255).sum()) for i in range(10))
    for row, counts in one.items():
        np.testing.assert_array_equal(eight[row], counts)
        assert counts[0].sum() == pixels and np.count_nonzero(counts[0].sum(axis=0)) > 1
