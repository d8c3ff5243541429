"""config.model.refinement_convs: an independent forward pass, who trains them, every road from train to prediction."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small
from rows import full_row

from pwcrf_jax import config as configs
from pwcrf_jax import mean_field, nets, piecewise
from pwcrf_jax.evaluation import evaluate, tuning
from pwcrf_jax.model import decode, losses
from pwcrf_jax.prediction import predictor, restore
from pwcrf_jax.runtime import parallel
from pwcrf_jax.training import loop, steps

LAYERS = ("conv1", "conv3")


@pytest.fixture
def fine(config):
    config.model.refinement_convs.layers, config.model.refinement_convs.width = LAYERS, 4
    return config


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """Workdir of a short run whose convolutions have moved; and its config."""
    config = small.config(tmp_path_factory.getbasetemp() / "prepared", **{"train.log_every": 2})
    workdir = tmp_path_factory.mktemp("fine") / "work"
    config.model.refinement_convs.layers, config.model.refinement_convs.width = LAYERS, 4
    config.optimizer.learning_rate = 0.02
    loop.train_and_evaluate(config, str(workdir))
    return workdir, configs.load(workdir / "config.json")


def conv3x3(x, kernel, bias):
    padded = np.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)])
    height, width = x.shape[1:3]
    taps = [padded[:, i : i + height, j : j + width] @ kernel[i, j] for i in range(3) for j in range(3)]
    return np.sum(taps, axis=0) + bias


def test_against_numpy():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(2, 2, 3, 5)).astype(np.float32)
    middle = [rng.random((2, 4, 6, 7), np.float32), rng.random((2, 2, 3, 3), np.float32)]
    net = nets.RefinementConvs(5, width=4)
    params = net.init(jax.random.key(0), scores, middle)["params"]
    assert not np.any(net.apply({"params": params}, scores, middle))  # untrained: no correction
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), params)
    got = net.apply({"params": params}, scores, middle)

    fine = lambda x: np.asarray(jax.image.resize(x, (2, 4, 6, x.shape[3]), "bilinear"))
    probs = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    x = 0
    for name, one in (("from_scores", probs), ("from_0", middle[0]), ("from_1", middle[1])):
        x = x + fine(one @ params[name]["kernel"][0, 0] + params[name]["bias"])
    x = np.maximum(x, 0)
    for name in ("conv1", "conv2"):
        x = np.maximum(conv3x3(x, params[name]["kernel"], params[name]["bias"]), 0)
    want = x @ params["last"]["kernel"] + params["last"]["bias"]
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    half = jax.jit(nets.RefinementConvs(5, width=4, dtype=jnp.bfloat16).apply)({"params": params}, scores, middle)
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, want, atol=0.05 * np.abs(want).max())


@pytest.mark.parametrize(
    ("backbone", "names", "strides"),
    [
        ("tiny", ("conv1", "conv2"), (2, 4)),
        full_row(("mobilenet_v2", ("block_1_expand", "block_3_expand", "block_6_expand"), (2, 4, 8))),
        full_row(("vgg16", ("block1_conv2", "block3_conv3"), (1, 4))),
    ],
)
def test_skip_layers_of_the_largest_scale(backbone, names, strides):
    """In the order asked for, whatever the order of the scales; the features are those without them."""
    settings = dict(backbone=backbone, scales=(0.5, 1.0), block6=((1, 4),), pyramid_windows=())
    plain, net = nets.FeatMapNet(**settings), nets.FeatMapNet(**settings, skip_layers=names)
    images = np.random.default_rng(0).normal(size=(1, 64, 96, 3)).astype(np.float32)
    params = jax.jit(plain.init)(jax.random.key(0), images)
    features, middle = jax.jit(net.apply)(params, images)
    np.testing.assert_allclose(features, jax.jit(plain.apply)(params, images), rtol=1e-5, atol=1e-5)
    assert [x.shape[1:3] for x in middle] == [(64 // s, 96 // s) for s in strides]
    assert all(np.min(x) == 0 and np.max(x) > 0 for x in middle)  # after the activation


@pytest.mark.parametrize(
    ("backbone", "options", "name"),
    [
        ("tiny", {}, "conv9"),
        ("vgg16", {}, "block6_conv1"),
        ("mobilenet_v2", {}, "block_13_expand"),  # the output itself
        ("mobilenet_v2", {"output": "block_6_depthwise"}, "block_7_expand"),
        ("mobilenet_v2", {}, "block_3_project"),
    ],
)
def test_unknown_layers_are_refused(backbone, options, name):
    with pytest.raises(ValueError, match=rf"{backbone}: no layer '{name}' before the output; known"):
        nets.FeatMapNet(backbone, options, skip_layers=(name,))


def test_refused_with_objectives_that_do_not_train_them(fine):
    fine.loss.objective = "pseudo_likelihood"
    with pytest.raises(configs.ConfigError, match="refinement_convs.*not trained by.*pseudo_likelihood"):
        configs.validate(fine, num_devices=1)
    fine.loss.objective, fine.model.refinement_convs.layers = "piecewise", ("conv7",)
    with pytest.raises(configs.ConfigError, match=r"config\.model\.refinement_convs\.layers: no layer 'conv7'"):
        configs.validate(fine, num_devices=1)


def test_their_loss_moves_nothing_else(fine):
    """The term is the log-likelihood of refined unary marginals at fine cells; its gradient stays in the convs."""
    model = configs.build_model(fine)
    params = restore.init_params(model, 0)
    rng = np.random.default_rng(0)
    params["refinement_convs"] = jax.tree.map(
        lambda x: rng.normal(0, 0.5, x.shape).astype(np.float32), params["refinement_convs"]
    )
    image = rng.integers(0, 256, (2, 64, 96, 3), np.uint8)
    labels = rng.integers(0, 6, (2, 64, 96), np.uint8)

    def term(params):
        potentials = model.apply({"params": params}, image)
        total, count = losses.piecewise_terms(potentials, labels)["refinement_convs"]
        return total, (count, potentials)

    (total, (count, potentials)), grads = jax.jit(jax.value_and_grad(term, has_aux=True, allow_int=True))(params)
    moved = {name for name, tree in grads.items() if any(np.any(x) for x in jax.tree.leaves(tree))}
    assert moved == {"refinement_convs"}
    assert potentials.refinement_logits.shape == (2, 32, 48, 6)
    upsampled = jax.image.resize(jax.nn.log_softmax(potentials.unary), (2, 32, 48, 6), "bilinear")
    scores = upsampled + potentials.refinement_logits
    log_p = np.asarray(jax.nn.log_softmax(scores))
    truth = np.asarray(piecewise.grid_labels(jnp.asarray(labels), 32, 48))
    np.testing.assert_allclose(total, np.take_along_axis(log_p, truth[..., None], -1).sum(), rtol=1e-5)
    assert count == truth.size


@pytest.mark.full
def test_relations_have_a_class_balance_of_their_own(fine):
    """In training and in what evaluation says of the likelihood; unary and convolutions keep theirs."""
    rng = np.random.default_rng(5)
    labels = rng.choice(6, (2, 64, 96), p=[0.5, 0.3, 0.1, 0.05, 0.03, 0.02]).astype(np.uint8)
    batch = {"image": rng.integers(0, 256, (2, 64, 96, 3), np.uint8), "label": labels}
    batch["valid_box"] = np.array([[0, 0, 64, 96]] * 2, np.int32)
    fine.crf.num_iterations = 1
    model = configs.build_model(fine)
    params = restore.init_params(model, 0)
    params = jax.tree.map(lambda x: x + rng.normal(0, 0.3, x.shape).astype(x.dtype), params)
    tx = optax.sgd(0.0)

    def terms(balance, of_pairs):
        fine.loss.balance_power, fine.loss.pairwise_balance_power = balance, of_pairs
        configs.validate(fine, num_devices=1)
        step = parallel.pmap_train(steps.from_config(fine, model, tx), devices=jax.devices()[:1])
        copy = jax.tree.map(jnp.copy, params)
        _, seen = step(steps.TrainState(jnp.int32(0), copy, tx.init(copy)), parallel.split(batch, 1))
        fn = evaluate.make_eval_fn(fine, model, devices=jax.devices()[:1])
        sums = fn(params, parallel.split(batch, 1))[0].terms
        found = {k: -float(total) / float(count) for k, (total, count) in sums.items()}
        assert {k: float(seen[f"nll_{k}"]) for k in found} == pytest.approx(found, rel=1e-4)
        return found

    same, higher, apart = terms(0.5, -1.0), terms(1.0, -1.0), terms(0.5, 1.0)
    relations = set(fine.model.relations)
    assert set(same) == relations | {"unary", "refinement_convs"}
    for name in same:
        assert apart[name] == pytest.approx((higher if name in relations else same)[name], rel=1e-5)
        assert same[name] != pytest.approx(higher[name], rel=1e-3)
    fine.loss.pairwise_balance_power = -0.5
    with pytest.raises(configs.ConfigError, match=r"pairwise_balance_power = -0\.5.* at least 0, or -1"):
        configs.validate(fine, num_devices=1)
    fine.model.refinement_convs.layers = ()
    fine.loss.objective, fine.loss.pairwise_balance_power = "unrolled_mean_field", 0.3
    with pytest.raises(configs.ConfigError, match=r"pairwise_balance_power = 0\.3 does nothing with .*; set it to -1"):
        configs.validate(fine, num_devices=1)


@pytest.mark.full
def test_staged_they_train_with_the_relations(fine, trained, tmp_path):
    """On a run without them: its unary stands still; a model without relations may train them alone."""
    source = restore.restore_params(configs.load(trained / "config.json"), str(trained))[1]
    fine.init_from, fine.loss.objective, fine.loss.unary_share = str(trained), "piecewise_staged", 0.0
    fine.model.relations = ()
    fine.train.steps, fine.train.eval_every, fine.optimizer.weight_decay = 2, 0, 0.1
    loop.train_and_evaluate(fine, str(tmp_path / "work"))
    params = restore.restore_params(configs.load(tmp_path / "work" / "config.json"), str(tmp_path / "work"))[1]
    for name in ("featmap", "unary"):
        jax.tree.map(np.testing.assert_array_equal, source[name], params[name])
    assert np.any(params["refinement_convs"]["last"]["kernel"])


@pytest.mark.full
def test_evaluation_has_a_row_and_the_best_is_by_it(ran):
    workdir, config = ran
    result = evaluate.evaluate(config, str(workdir), "latest")
    assert list(result["rows"])[-2:] == ["all", "convs"]
    assert result["rows"]["convs"] != result["rows"]["all"]
    assert "+ skip layers" in evaluate.table(result)
    refined = evaluate.evaluate(config, str(workdir), "latest", refine="full")
    assert refined["rows"]["convs"] == result["rows"]["convs"]


@pytest.mark.full
def test_predictions_are_those_of_evaluation(ran):
    """One tile: log-probabilities of the pixels against the model applied by hand."""
    workdir, config = ran
    model, params, _ = restore.restore_params(config, str(workdir), "latest")
    height, width = config.data.eval_size
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    potentials = model.apply({"params": params}, image[None])
    log_marginals, _ = mean_field.run(potentials.unary, potentials.pairwise, configs.crf_settings(config))
    sharp = decode.apply_refinement(log_marginals, potentials.refinement_logits)
    want = jax.nn.log_softmax(decode.upsample(sharp, (height, width)))[0]
    ((_, _, marginals),) = predictor.Predictor(config, model, params)([("x", image)])
    np.testing.assert_allclose(marginals.log_probs(), want, atol=2e-4)
    assert np.abs(np.asarray(sharp - decode.upsample(log_marginals, sharp.shape[1:3]))).max() > 1e-3


@pytest.mark.full
def test_tiles_say_what_one_tile_says(ran):
    """Cells of the tiny backbone see nothing of their neighbours; the two convolutions do, so seams do not count."""
    workdir, config = ran
    config = config.copy_and_resolve_references()
    config.model.scales = (1.0,)
    model = configs.build_model(config)
    params = restore.init_params(model, 1)
    rng = np.random.default_rng(1)
    params["refinement_convs"]["last"]["kernel"] = rng.normal(0, 1, (4, 6)).astype(np.float32)
    params = jax.tree.map(jnp.asarray, params)
    image = rng.integers(0, 256, (256, 384, 3), np.uint8)
    config.data.eval_size, config.crf.num_iterations = (96, 128), 0
    read = {}
    for size in ((256, 384), (128, 192)):
        config.tiles.size = size
        ((_, _, marginals),) = predictor.Predictor(config, model, params)([("x", image)])
        read[size] = marginals.log_probs()
    near = np.abs(read[256, 384] - read[128, 192]).max(-1)
    assert np.median(near) < 1e-4
    assert near.max() > 0  # there were several tiles


@pytest.mark.full
def test_tuning_goes_through(ran, tmp_path):
    import shutil

    workdir, config = ran
    shutil.copytree(workdir, tmp_path / "work")
    found = tuning.tune(config, str(tmp_path / "work"), "latest", "val[:4]", "spatial", 2)
    assert 0 <= found["miou_after"] <= 1
    written = (tmp_path / "work/tuned.json").read_text()
    plain = tuning.tune(config, str(tmp_path / "work"), "latest", "val[:4]", "spatial", 2, row="all")
    assert plain["miou_messages"] == found["miou_messages"]  # the same messages, other marginals
    assert (tmp_path / "work/tuned.json").read_text() == written  # of what eval.py refines
    marginals = [np.load(path) for path in sorted((tmp_path / "work/tuning").glob("*/marginals-*/000000.npy"))]
    assert len(marginals) == 2 and marginals[0].shape != marginals[1].shape
