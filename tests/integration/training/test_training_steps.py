"""Steps over devices: eight equal one, both lower for other platforms, both parameterisations mean what they say."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import export
from rows import full_but

from pwcrf_jax import config as configs
from pwcrf_jax import likelihood, mean_field, piecewise, validity_mask
from pwcrf_jax.configs import camvid_mobilenet_v2, demo, kitti_vgg16, paper, siftflow_vgg16, voc_vgg16
from pwcrf_jax.evaluation import evaluate
from pwcrf_jax.evaluation import steps as eval_steps
from pwcrf_jax.model import losses
from pwcrf_jax.nets import grid_size
from pwcrf_jax.prediction import restore
from pwcrf_jax.runtime import parallel
from pwcrf_jax.training import steps
from pwcrf_jax.training.optimizer import make_optimizer


def _batch(rng, size, height=64, width=80, num_classes=6):
    label = rng.integers(0, num_classes, (size, height, width)).astype(np.uint8)
    # Another share of void in every image: a mean of per-device means would be wrong.
    for i in range(size):
        label[i, : height * i // size] = 255
    return {"image": rng.integers(0, 256, (size, height, width, 3)).astype(np.uint8), "label": label}


def _state(model, tx, seed=0):
    params = restore.init_params(model, seed)
    return steps.TrainState(jnp.int32(0), params, tx.init(params))


def _assert_trees_close(a, b, rtol):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol * max(1e-3, float(np.abs(y).max())))


@pytest.mark.parametrize("reduction", full_but(["mean", "sum"], "mean"))
def test_eight_devices_equal_one(config, reduction):
    # Plain SGD: Adam would hide a gradient that is wrong by a constant factor.
    config.loss.reduction = reduction
    config.loss.balance_power = 0.5
    config.model.parameterisation = "free"
    model, tx = configs.build_model(config), optax.sgd(1e-3 if reduction == "sum" else 0.1)
    batch, out = _batch(np.random.default_rng(0), 8), {}
    for n in (1, 8):
        step = parallel.pmap_train(steps.from_config(config, model, tx), devices=jax.devices()[:n])
        state, losses = _state(model, tx), []
        for _ in range(3):
            state, metrics = step(state, parallel.split(batch, n))
            losses.append(float(metrics["loss"]))
        out[n] = state.params, losses
    assert out[1][1][0] != out[1][1][2], "the parameters did not move"
    np.testing.assert_allclose(out[8][1], out[1][1], rtol=1e-5)
    _assert_trees_close(out[8][0], out[1][0], 1e-4)


def test_loss_is_the_mean_over_all_valid_factors(config):
    # Against one plain evaluation of the whole batch, without devices.
    model, tx = configs.build_model(config), optax.sgd(0.0)
    batch = _batch(np.random.default_rng(1), 8)
    step = parallel.pmap_train(steps.from_config(config, model, tx))
    state = _state(model, tx)
    potentials = model.apply({"params": state.params}, batch["image"])
    terms = losses.piecewise_terms(potentials, jnp.asarray(batch["label"]))
    expected = sum(-float(total) / float(count) for total, count in terms.values())
    _, metrics = step(state, parallel.split(batch))
    np.testing.assert_allclose(float(metrics["loss"]), expected, rtol=1e-5)


def test_eval_over_eight_devices_equals_one(config):
    # Scores as first initialised send next to nothing: what an iteration changes would be rounding, of any ratio.
    model, rng = configs.build_model(config), np.random.default_rng(2)
    params = jax.tree.map(lambda p: p + 0.1 * rng.normal(size=p.shape), restore.init_params(model, 0))
    batch = _batch(rng, 8)
    batch["valid_box"] = np.array([[0, 0, 64, 80]] * 7 + [[0, 0, 0, 0]], np.int32)
    batch["label"][7] = 255
    step = eval_steps.make_eval_step(model, configs.table_rows(config), configs.crf_settings(config))
    on = lambda n: parallel.pmap_eval(step, jax.devices()[:n], per_image=True)(params, parallel.split(batch, n))[0]
    one, eight = on(1), on(8)
    for row in configs.table_rows(config):
        np.testing.assert_array_equal(one.confusion[row], eight.confusion[row])
        assert int(np.sum(one.confusion[row][0])) == int(np.sum(batch["label"] != 255))
        if row != "unary":
            assert one.change[row][0] > 1e-3
        np.testing.assert_allclose(one.change[row], eight.change[row], rtol=1e-4, atol=1e-6)


def test_rows_of_each_relation_can_be_left_out(config):
    model, rng = configs.build_model(config), np.random.default_rng(3)
    params, every = restore.init_params(model, 0), configs.table_rows(config)
    config.eval.each_relation = False
    assert list(configs.table_rows(config)) == ["unary", "all"] and len(every) == 4
    potentials = model.apply({"params": params}, _batch(rng, 1)["image"])
    box, settings = np.int32([[0, 0, 64, 80]]), configs.crf_settings(config)
    decoded = lambda rows: eval_steps.decode_rows(potentials, rows, settings, box, (64, 80))
    few, four = decoded(configs.table_rows(config)), decoded(every)
    for row, found in few.items():
        np.testing.assert_array_equal(found.log_marginals, four[row].log_marginals)


@pytest.mark.parametrize("name", full_but(["demo", "camvid_mobilenet_v2", "voc_vgg16"], "demo"))
def test_steps_lower_for_accelerators(name):
    config = {"demo": demo, "camvid_mobilenet_v2": camvid_mobilenet_v2, "voc_vgg16": voc_vgg16}[name].get_config()
    model = configs.build_model(config)
    tx = make_optimizer(config.optimizer, config.model, config.train.steps)
    params = restore.abstract_params(model)
    state = jax.eval_shape(lambda p: steps.TrainState(jnp.int32(0), p, tx.init(p)), params)
    height, width = config.data.crop_size
    batch = {
        "image": jax.ShapeDtypeStruct((1, 2, height, width, 3), jnp.uint8),
        "label": jax.ShapeDtypeStruct((1, 2, height, width), jnp.uint8),
    }
    one = jax.devices()[:1]
    train = parallel.pmap_train(steps.from_config(config, model, tx), devices=one)
    platforms = ("tpu", "cuda")
    assert export.export(jax.jit(train), platforms=platforms)(state, batch).platforms == platforms
    evaluation = evaluate.make_eval_fn(config, model, devices=one)
    batch["valid_box"] = jax.ShapeDtypeStruct((1, 2, 4), jnp.int32)
    assert export.export(jax.jit(evaluation), platforms=platforms)(params, batch).platforms == platforms


def test_residual_starts_as_two_unaries_and_sends_nothing(config):
    config.model.parameterisation = "residual"
    model = configs.build_model(config)
    batch = _batch(np.random.default_rng(3), 2)
    potentials = model.apply({"params": restore.init_params(model, 0)}, batch["image"])
    labels = piecewise.grid_labels(jnp.asarray(batch["label"]), *potentials.unary.shape[1:3])
    log_probs = jax.nn.log_softmax(potentials.unary)
    for name, potential in potentials.pairwise.items():
        # At the start P_V(y_p, y_q) = P_U(y_p) P_U(y_q): compare on one offset's edges, by hand.
        total, count = likelihood.pairwise_log_likelihood(potential, labels)
        by_hand = 0.0
        picked = jnp.take_along_axis(log_probs, jnp.where(labels == 255, 0, labels)[..., None], -1)[..., 0]
        valid, edges = np.asarray(labels != 255), 0
        h, w = labels.shape[1:]
        for dr, dc in potential.offsets:
            for r in range(h):
                for c in range(w):
                    if 0 <= r + dr < h and 0 <= c + dc < w:
                        both = valid[:, r, c] & valid[:, r + dr, c + dc]
                        by_hand += float(np.sum(both * np.asarray(picked[:, r, c] + picked[:, r + dr, c + dc])))
                        edges += int(both.sum())
        np.testing.assert_allclose(float(total), by_hand, rtol=1e-4, err_msg=name)
        assert int(count) == edges
    log_marginals, info = mean_field.run(potentials.unary, list(potentials.pairwise.values()))
    np.testing.assert_allclose(log_marginals, mean_field.init(potentials.unary), atol=1e-6)
    assert float(jnp.max(info.change)) < 1e-6


@pytest.mark.parametrize("trains", [True, False])
def test_pairwise_terms_train_the_features_only_if_asked(config, trains):
    config.model.pairwise_trains_features = trains
    config.model.parameterisation = "free"
    model = configs.build_model(config)
    batch = _batch(np.random.default_rng(4), 2)

    def pair_terms(params):
        terms = losses.piecewise_terms(model.apply({"params": params}, batch["image"]), jnp.asarray(batch["label"]))
        return sum(total for name, (total, _) in terms.items() if name != "unary")

    grads = jax.grad(pair_terms)(restore.init_params(model, 0))
    size = {k: float(optax.tree.norm(v)) for k, v in grads.items()}
    assert (size["featmap"] > 0) == trains
    assert size["unary"] == 0
    assert size["pairwise_surrounding"] > 0 and size["pairwise_above_below"] > 0
    config.model.pairwise_features = "own"
    model = configs.build_model(config)
    grads = jax.grad(pair_terms)(restore.init_params(model, 0))
    size = {k: float(optax.tree.norm(v)) for k, v in grads.items()}
    assert size["featmap"] == 0 and size["featmap_pairwise"] > 0


@pytest.mark.parametrize("features", ["shared", "own"])
def test_frozen_layers_stay_and_the_backbone_learns_slower(features):
    config = camvid_mobilenet_v2.get_config()
    config.model.pairwise_features = features
    config.optimizer.name, config.optimizer.warmup_steps, config.optimizer.clip_norm = "sgd", 0, 0.0
    tx = make_optimizer(config.optimizer, config.model, 10)
    params = restore.abstract_params(configs.build_model(config))
    ones = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), params)
    updates, _ = tx.update(ones, tx.init(ones), ones)
    backbone = updates["featmap" if features == "shared" else "featmap_pairwise"]["backbone"]
    rate = config.optimizer.learning_rate
    assert float(jnp.abs(backbone["block_5_project"]["kernel"]).max()) == 0
    assert float(jnp.abs(backbone["Conv1"]["kernel"]).max()) == 0
    np.testing.assert_allclose(backbone["block_6_expand"]["bias"], -rate * config.optimizer.backbone_factor, rtol=1e-5)
    np.testing.assert_allclose(updates["unary"]["last"]["bias"], -rate, rtol=1e-5)


def test_weight_decay_acts_on_kernels_alone(config):
    config.optimizer.weight_decay, config.optimizer.warmup_steps = 1.0, 0
    tx = make_optimizer(config.optimizer, config.model, 10)
    params = jax.tree.map(lambda x: jnp.ones(x.shape), restore.abstract_params(configs.build_model(config)))
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    for path, update in jax.tree_util.tree_flatten_with_path(updates)[0]:
        decayed = float(jnp.abs(update).max()) > 0
        assert decayed == ("bias" not in path[-1].key), path


def test_padding_of_an_image_changes_no_figure(config):
    # The tiny backbone sees one cell, and the valid sizes are whole cells: what follows is exact.
    model = configs.build_model(config)
    params = restore.init_params(model, 0)
    noise = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), params)
    step = eval_steps.make_eval_step(model, configs.table_rows(config), configs.crf_settings(config))
    fn = parallel.pmap_eval(step, jax.devices()[:1], per_image=True)
    batch = _batch(np.random.default_rng(5), 1)
    batch["valid_box"] = np.array([[0, 0, 48, 64]], np.int32)
    batch["label"][:, 48:], batch["label"][:, :, 64:] = 255, 255
    other = {k: v.copy() for k, v in batch.items()}
    other["image"][:, 48:], other["image"][:, :, 64:] = 255, 0
    cropped = {"image": batch["image"][:, :48, :64], "label": batch["label"][:, :48, :64]}
    cropped["valid_box"] = batch["valid_box"]
    a, b, c = (fn(noise, parallel.split(x, 1))[0] for x in (batch, other, cropped))
    assert np.count_nonzero(np.sum(a.confusion["all"][0], axis=0)) > 1, "a constant prediction would hide everything"
    for row in a.confusion:
        np.testing.assert_array_equal(a.confusion[row], b.confusion[row])
    for name, (total, count) in a.terms.items():
        np.testing.assert_allclose([total, count], b.terms[name], rtol=1e-5)
    # Nor is the frame's size seen, where the boxes do not follow from it: unary alone.
    np.testing.assert_array_equal(a.confusion["unary"], c.confusion["unary"])


@pytest.mark.full
def test_sampled_offsets_follow_from_seed_and_step_alone(config):
    config.model.parameterisation = "free"
    config.loss.sampled_offsets = 2
    model, tx = configs.build_model(config), optax.sgd(0.0)
    batch = _batch(np.random.default_rng(4), 8)

    def losses(seed, devices, first_step=0):
        config.seed = seed
        step = steps.from_config(config, model, tx)
        step = parallel.pmap_train(step, devices=jax.devices()[:devices])
        state, out = _state(model, tx).replace(step=jnp.int32(first_step)), []
        for _ in range(3):
            state, metrics = step(state, parallel.split(batch, devices))
            out.append(float(metrics["loss"]))
        return out

    one = losses(0, 1)
    assert len(set(one)) == 3, "the parameters stand still, so other losses are other offsets"
    np.testing.assert_allclose(losses(0, 8), one, rtol=1e-5)
    np.testing.assert_allclose(losses(0, 1, first_step=2)[0], one[2], rtol=1e-6)
    assert losses(1, 1)[0] != one[0]
    config.loss.sampled_offsets = 0
    everything = losses(0, 1)
    assert len(set(everything)) == 1
    config.loss.sampled_offsets = 1000  # more than there are
    np.testing.assert_allclose(losses(0, 1), everything, rtol=1e-6)


@pytest.mark.full
def test_chunks_and_algorithms_change_no_figure(config):
    """Of training and of evaluation; each setting lowers to a program of its own, so none is ignored."""
    config.model.parameterisation = "free"
    batch = _batch(np.random.default_rng(5), 2)
    batch["valid_box"] = np.array([[0, 0, 64, 80], [0, 0, 50, 80]], np.int32)
    one, programs, got = jax.devices()[:1], set(), []
    for config.loss.chunk_edges, config.crf.algorithm in ((0, "table"), (0, "factored"), (7, "factored")):
        model, tx = configs.build_model(config), optax.sgd(0.0)
        train = parallel.pmap_train(steps.from_config(config, model, tx), devices=one)
        evaluation = evaluate.make_eval_fn(config, model, devices=one)
        state, all_of_it = _state(model, tx), parallel.split(batch, 1)
        shared = {k: all_of_it[k] for k in ("image", "label")}
        programs.add(evaluation.lower(state.params, all_of_it).as_text() + train.lower(state, shared).as_text())
        sums, _ = evaluation(state.params, all_of_it)
        got.append((sums.change, sums.terms, train(state, shared)[1]["loss"]))
    assert len(programs) == 3
    for other in got[1:]:
        _assert_trees_close(other, got[0], 1e-4)


@pytest.mark.parametrize(
    ("config", "factors"),
    [(voc_vgg16, 35.7), (camvid_mobilenet_v2, 36.8), (siftflow_vgg16, 36.3), (kitti_vgg16, 38.2)],
)
def test_sums_are_the_papers_and_means_weigh_a_relation_as_the_unary(config, factors):
    """The number of pair factors to each unary one, which configs/paper.py names, is what sums weigh relations with."""
    config = config.get_config()
    grid = grid_size(config.data.crop_size, config.model.scales)
    counts = {"unary": grid[0] * grid[1]}
    counts |= {name: validity_mask(box, *grid).sum() for name, box in configs.relations(config).items()}
    terms = {
        name: (jnp.float32(-2.0 * n), jnp.float32(n)) for name, n in counts.items()
    }  # of one image, each factor -2
    weights = dict.fromkeys(terms, 1.0)
    assert losses.negative_log_likelihood(terms, 1, weights, "mean") == pytest.approx(2.0 * len(terms))
    total = losses.negative_log_likelihood(terms, 1, weights, "sum")
    assert total == pytest.approx(2.0 * sum(counts.values()))
    alone = losses.negative_log_likelihood(terms, 1, {"unary": 1.0}, "sum")
    assert total / alone - 1 == pytest.approx(factors, abs=0.05)
    assert config.loss.reduction == "mean"


def test_what_the_paper_configs_say_of_their_loss():
    assert "35.7 to each unary factor" in paper.__doc__.replace("\n", " ") and "reduction=sum" in paper.__doc__


@pytest.mark.parametrize("devices", [1, 8])
def test_a_step_is_compiled_once(devices, caplog):
    def step(state, batch):
        total = jax.lax.psum(jnp.sum(batch["x"]) * state["w"], parallel.AXIS)
        return {"w": state["w"] + total}, total

    chosen = jax.devices()[:devices]
    step = parallel.pmap_train(step, devices=chosen)
    state = parallel.replicated({"w": jnp.ones(3)}, chosen)
    batch = {"x": np.ones((devices, 2), np.float32)}
    with jax.log_compiles():
        state, _ = step(state, batch)
        assert "Compiling" in caplog.text  # that it is counted at all
        caplog.clear()
        step(state, batch)
    assert "Compiling" not in caplog.text
