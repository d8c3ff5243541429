"""Figures of which there is no valid pixel or edge: None and "-", never 0 or NaN, and never the best."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

import pwcrf_jax as pw
from pwcrf_jax import config as configs
from pwcrf_jax.evaluation import evaluate, tuning
from pwcrf_jax.evaluation import steps as eval_steps
from pwcrf_jax.model import losses, segmenter
from pwcrf_jax.model.counts import confusions
from pwcrf_jax.prediction import restore
from pwcrf_jax.report import collect
from pwcrf_jax.runtime import checkpoint
from pwcrf_jax.training import checks, initial, loop

NAMES = ("sky", "water", "boat")
VOID = 255


def labels(*rows):
    return np.array(rows, np.uint8)


def striped(height=8, width=9):
    return np.broadcast_to(np.arange(width) // 3, (height, width)).astype(np.uint8)


class Split:
    """A data set of one image, and its report."""

    name, class_names, palette = "some", NAMES, ((0, 0, 0),) * 3

    def __init__(self, label, splits=("val",)):
        self.label = label
        counts = np.bincount(label[label < len(NAMES)], minlength=len(NAMES)).tolist()
        self.about = {"splits": {name: {"images": 1, "pixels": counts} for name in splits}}

    def source(self, split):
        return [None]

    def label_report(self):
        return self.about


@jax.jit
def confusion_of(label, predicted):
    return confusions(jnp.full_like(label, predicted), label, jnp.ones(label.shape, bool), len(NAMES))


def evaluated(monkeypatch, label, classes=(), predicted=1, factors=(), split="val"):
    """`evaluate_params` of one image whose pixels are all predicted alike, with these (sum, count) of factors."""
    config = small.config("unused", **{"eval.classes": classes, "data.num_classes": len(NAMES)})
    box = np.array([[0, 0, *label.shape]], np.int32)
    batch = dict(image=np.zeros((1, *label.shape, 3), np.uint8), label=label[None], valid_box=box)
    monkeypatch.setattr(evaluate, "batches_of", lambda *_: [batch])
    monkeypatch.setattr(evaluate, "inputs_of", lambda batch: batch)
    counts = confusion_of(label, predicted)
    rows = dict.fromkeys([*configs.table_rows(config), configs.final_row(config)], counts)
    terms = {"unary": (0.0, 0), "surrounding": (0.0, 0), **dict(factors)}
    sums = eval_steps.Sums(rows, terms, {})
    return evaluate.evaluate_params(lambda *_: (sums, None), None, Split(label), split, config)


def strict_json(value):
    return json.loads(json.dumps(value, allow_nan=False))


NOTHING = {
    "all-void": (np.full((8, 9), VOID, np.uint8), (), 1),
    "one-void-pixel": (labels([VOID]), (), 0),
    "absent-classes": (striped() // 2, ("boat",), 0),
    "absent-classes-predicted": (striped() // 2, ("boat",), 2),
    "two-absent-classes": (np.zeros((8, 9), np.uint8), ("water", "boat"), 1),
    "only-void-beside-others": (np.where(striped() == 2, VOID, 0).astype(np.uint8), ("boat", "water"), 2),
}


@pytest.mark.parametrize("name", NOTHING)
def test_no_pixel_of_a_scored_class_gives_no_mean_iou(name, monkeypatch, caplog):
    label, classes, predicted = NOTHING[name]
    with caplog.at_level("WARNING", logger="pwcrf_jax"):
        result = strict_json(evaluated(monkeypatch, label, classes, predicted))
    for figures in result["rows"].values():
        assert figures["miou"] is figures["mean_accuracy"] is figures["fw_iou"] is None
        assert set(figures["boundary_iou"].values()) == {None}
        assert (figures["pixel_accuracy"] is None) == (label == VOID).all()
    line = evaluate.table(result).splitlines()[1]
    assert line.split()[1:3] == ["-", "-"] and "nan" not in evaluate.table(result)
    flat = strict_json(evaluate.summary(result))
    assert flat["miou_unary"] is flat["miou_all"] is flat["boundary_iou_3px_all"] is flat["nll_unary"] is None
    (said,) = [r.getMessage() for r in caplog.records]
    assert said.startswith("split 'val' has no pixel ") and "\n" not in said


@pytest.mark.parametrize(
    "label",
    [labels([1]), np.ones((1, 7), np.uint8), np.ones((6, 1), np.uint8), np.ones((8, 9), np.uint8)],
    ids=lambda x: str(x.shape),
)
def test_a_band_without_pixels_has_no_figure(label, monkeypatch, caplog):
    result = strict_json(evaluated(monkeypatch, label))
    for figures in result["rows"].values():
        assert figures["miou"] == 1.0 and set(figures["boundary_iou"].values()) == {None}
    assert "has no pixel" not in caplog.text


@pytest.mark.parametrize(
    "factors",
    [
        {"unary": (-3.0, 2)},
        {"unary": (-3.0, 2), "surrounding": (0.0, 0.0)},
        {"unary": (-1e-3, 0.25)},  # counts are weighted: they may be small
        {"unary": (np.float32(-2), np.int32(4)), "refinement_convs": (0.0, 0)},
    ],
)
def test_factors_that_do_not_occur_have_no_likelihood(factors, monkeypatch):
    result = strict_json(evaluated(monkeypatch, striped(), factors=factors))
    total, count = factors.pop("unary")
    assert result["nll"]["unary"] == pytest.approx(-float(total) / float(count))
    assert {result["nll"][name] for name in {"surrounding", *factors}} == {None}
    flat = evaluate.summary(result)
    assert flat["nll_surrounding"] is None and flat["nll_unary"] == pytest.approx(result["nll"]["unary"], abs=1e-4)


@pytest.mark.parametrize(
    ("split", "classes"),
    [("val", ()), ("val[:50%]", ()), ("val+more[2:]", ()), ("val", ("sky", "boat"))],
)
def test_known_splits_without_a_scored_pixel_are_refused(split, classes):
    config = small.config("unused", **{"eval.classes": classes})
    nothing = np.where(striped() == 1, 1 if classes else VOID, VOID).astype(np.uint8)
    with pytest.raises(
        configs.ConfigError, match=r"^split '.*' has no pixel .*name another split or check its labels$"
    ):
        evaluate.check_scored(config, Split(nothing, ("val", "more")), split)
    evaluate.check_scored(config, Split(striped(), ("val", "more")), split)
    unlabelled = Split(nothing, ("val", "more"))
    del unlabelled.about["splits"]["val"]["pixels"]
    evaluate.check_scored(config, unlabelled, split)


@pytest.mark.parametrize("name", NOTHING)
def test_nothing_is_chosen_by_no_mean_iou(name):
    label, classes, predicted = NOTHING[name]
    config = small.config("unused", **{"eval.classes": classes})
    counts = confusion_of(label, predicted)[0]
    with pytest.raises(configs.ConfigError, match="split 'val' has no pixel"):
        tuning.mean_iou(counts, config, Split(label), "val")


def test_training_with_such_a_validation_split_is_refused_before_compute(config, tmp_path, monkeypatch):
    dataset = checks.load_dataset(**configs.dataset_options(config))
    about = dataset.label_report()
    about["splits"]["val"]["pixels"] = [0] * len(dataset.class_names)
    monkeypatch.setattr(type(dataset), "label_report", lambda self: about)
    monkeypatch.setattr(initial, "resolve_init", None)
    with pytest.raises(configs.ConfigError, match="split 'val' has no pixel that is not void"):
        loop.train_and_evaluate(config, str(tmp_path / "run"))
    assert not list((tmp_path / "run").glob("**/best/*"))


@pytest.mark.parametrize("figures", [(None,) * 4, (None, 0.25, None, 0.5), (None, 0.5, 0.25, None), (0.25, None) * 2])
def test_the_best_is_never_one_without_a_figure(figures, config, tmp_path, monkeypatch, caplog):
    config.train.steps, config.train.eval_every, config.train.checkpoint_every = 4, 1, 1
    config.eval.panel, config.model.input_scaling, left = 0, "tf", list(figures)

    def step(state, batch):
        metrics = dict(loss=1.0, grad_norm=1.0, skipped=False, finite=True)
        return state.replace(step=state.step + 1), jax.tree.map(np.asarray, metrics)

    def evaluation(eval_fn, params, dataset, split, config, evaluators):
        row = dict.fromkeys(("pixel_accuracy", "mean_accuracy", "fw_iou")) | {"boundary_iou": {}, "iou": {}}
        rows = {configs.final_row(config): row | {"miou": left.pop(0)}}
        return dict(split=split, num_images=1, classes=[], rows=rows, nll={"unary": None}, change={})

    monkeypatch.setattr(loop.parallel, "pmap_train", lambda _: step)
    monkeypatch.setattr(evaluate, "make_eval_fn", lambda *_: None)
    monkeypatch.setattr(evaluate, "evaluate_params", evaluation)
    monkeypatch.setattr(evaluate, "table", str)
    with caplog.at_level("INFO", logger="pwcrf_jax"):
        loop.train_and_evaluate(config, str(tmp_path))
    assert not left and loop.train_and_evaluate(config, str(tmp_path)) == {}  # all four evaluations are done
    known = [x for x in figures if x is not None]
    best = checkpoint.Store(str(tmp_path / "best"), configs.identity(config), score=restore.BEST)
    if known:
        assert best.meta()[restore.BEST] == max(known) and best.latest == 1 + figures.index(max(known))
        assert f"mean IoU {100 * max(known):.1f}" in caplog.text
    else:
        assert best.latest is None and "no best checkpoint" in caplog.text
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        values = json.loads(line, parse_constant=lambda name: pytest.fail(name))
        assert "val/miou_all" not in values or values["val/miou_all"] == 100 * figures[values["step"] - 1]


@pytest.mark.parametrize("counts", [[0, 0], [0, 4], [3, 0], [1, 1]], ids=str)
def test_calibration_is_of_pixels_that_there_are(counts):
    number = np.array(counts, np.float64)
    got = strict_json(collect._calibration((number, 0.75 * number, 0.5 * number)))
    assert got["accuracy"] == [0.5 if n else None for n in counts]
    expected = (0.25, 0.75) if any(counts) else (None, None)
    assert (got["ece"], got["mean_confidence"]) == expected


@pytest.mark.parametrize("place", [(2, 2), (2, 6), (6, 2), (6, 6)], ids=str)
def test_one_labelled_pixel_is_no_edge(place, monkeypatch):
    label = np.full((8, 8), VOID, np.uint8)
    label[place] = 2
    unary, a, b = np.random.default_rng(0).normal(size=(3, 1, 2, 2, 3)).astype(np.float32)
    edges = pw.factored_pairwise(a, b, np.ones((3, 3, 3), np.float32), np.zeros((3, 3)), [(0, 1), (1, 0), (1, 1)])
    terms = losses.piecewise_terms(segmenter.Potentials(unary, {"surrounding": edges}, None), label[None])
    result = evaluated(monkeypatch, label, factors=jax.device_get(terms))
    expected = -jax.nn.log_softmax(unary)[0, place[0] // 4, place[1] // 4, 2]
    assert result["nll"]["surrounding"] is None and result["nll"]["unary"] == pytest.approx(float(expected), rel=1e-5)
    assert result["rows"]["all"]["miou"] == 0.0  # it is there, and predicted wrong
