"""A relation's offsets are those of the training crop on every path, at any size."""

import functools
import importlib
import json
import pathlib
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from rows import full_but

import pwcrf_jax as pw
from pwcrf_jax import config as configs
from pwcrf_jax.evaluation import evaluate, tuning
from pwcrf_jax.model import segmenter
from pwcrf_jax.nets import grid_size
from pwcrf_jax.prediction import export, restore
from pwcrf_jax.prediction import predictor as inference
from pwcrf_jax.relations import ABOVE_BELOW, SURROUNDING
from pwcrf_jax.report import collect
from pwcrf_jax.report import parts as report_parts
from pwcrf_jax.runtime import checkpoint, parallel
from pwcrf_jax.runtime.logs import log
from pwcrf_jax.training import initial, loop, steps
from pwcrf_jax.training.optimizer import make_optimizer
from reference import crf_oracle

ROOT = pathlib.Path(__file__).parents[3]
NAMES = sorted(path.stem for path in (ROOT / "configs").glob("[!_]*.py"))
SHIPPED = [(name, ()) for name in NAMES] + [("camvid_mobilenet_v2", ("both",)), ("camvid_mobilenet_v2", ("free",))]
UINT8, INT32 = np.uint8, np.int32


def spec(dtype, *shape):
    return jax.ShapeDtypeStruct(shape, dtype)


def shipped(name, variant=()):
    """A shipped config with nets so small that tracing them takes no time; grids and relations are its own."""
    config = configs.filled(importlib.import_module(f"configs.{name}").get_config(*variant))
    config.model.backbone, config.model.tiny.features = "tiny", (2, 2, 2, 2)
    config.model.block6, config.model.pyramid_windows, config.model.hidden = (), (), 2
    config.model.refinement_convs.layers = ()  # those of another backbone
    config.train.batch_size = jax.device_count()
    return config


def of_crop(config):
    """{relation: pairs} of the boxes on the grid of the training crop, by the oracle."""
    grid = grid_size(config.data.crop_size, config.model.scales)
    out = {}
    for name in config.model.relations:
        box = config.relations[name]
        axes = [
            crf_oracle.box_axis(*bounds, box.unit, min(grid), size, box.grid or None)
            for bounds, size in zip((box.rows, box.cols), grid, strict=True)
        ]
        out[name] = {(r, c) for r in axes[0] for c in axes[1]} - {(0, 0)}
    return out


@pytest.fixture
def seen(monkeypatch):
    """Offsets of every potential that is made, in order, as a list of sets of pairs."""
    made, build = [], pw.factored_pairwise

    def record(*args, **options):
        potential = build(*args, **options)
        made.append(frozenset(potential.offsets))
        return potential

    for module in (segmenter, inference, report_parts):
        monkeypatch.setattr(module, "factored_pairwise", record)
    return made


def trains(config, model, params):
    tx = make_optimizer(config.optimizer, config.model, config.train.steps)
    state = jax.eval_shape(lambda p: steps.TrainState(jnp.int32(0), p, tx.init(p)), params)
    size = config.data.crop_size
    batch = {"image": spec(UINT8, 1, 1, *size, 3), "label": spec(UINT8, 1, 1, *size), "valid_box": spec(INT32, 1, 1, 4)}
    step = steps.from_config(config, model, tx)
    jax.eval_shape(parallel.pmap_train(step, devices=jax.devices()[:1]), state, batch)
    loop.estimate_cost(config, model, tx)


def evaluation_batch(config):
    size = config.data.eval_size
    return {"image": spec(UINT8, 1, 1, *size, 3), "label": spec(UINT8, 1, 1, *size), "valid_box": spec(INT32, 1, 1, 4)}


def evaluates(config, model, params):
    fn = evaluate.make_eval_fn(config, model, devices=jax.devices()[:1])
    jax.eval_shape(fn, params, evaluation_batch(config))


def reports(config, model, params):
    page = collect.Report.__new__(collect.Report)
    page._wanted = 1
    options = page.start(config, model, params, types.SimpleNamespace(num_classes=config.data.num_classes))
    fn = evaluate.make_eval_fn(config, model, devices=jax.devices()[:1], **options)
    _, per_image = jax.eval_shape(fn, params, evaluation_batch(config))
    unary, parts, mask = jax.tree.map(lambda x: spec(x.dtype, *x.shape[2:]), per_image.figures["nodes"])
    layers = {
        name: (params[f"pairwise_{name}"]["last_kernel"], params[f"pairwise_{name}"]["last_bias"]) for name in parts
    }
    jax.eval_shape(page._last_update, unary, parts, mask, layers)


def predicts(config, model, params):
    """An image of the frame, a small one, and one of several tiles, each of them scaled too."""
    predictor = inference.Predictor(config, model, params)
    names, hidden = configs.crf_relations(config), config.model.hidden
    frame = config.data.eval_size
    for size in (frame, (7, 9), tuple(2 * n + 1 for n in frame)):
        for scale in (1.0, 0.5, 1.5):
            layout = predictor._layout(tuple(max(1, round(n * scale)) for n in size))
            maps = lambda n, grid=layout.grid: spec(np.float32, *grid, n)
            parts = {name: (maps(hidden), maps(hidden)) for name in names}
            decode = functools.partial(predictor._decode, canvas=layout.canvas)
            unary, box = maps(config.data.num_classes), spec(INT32, 1, 4)
            jax.eval_shape(decode, unary, parts, None, None, predictor._last_layers, box)
    jax.eval_shape(lambda p, x: model.apply({"params": p}, x), params, spec(UINT8, 1, *frame, 3))


def exports(config, model, params):
    for size in (config.data.eval_size, (33, 47)):
        predict = lambda p, image, valid, size=size: export.make_predictor(config, model, p, size)(image, valid)
        jax.eval_shape(predict, params, spec(UINT8, 1, *size, 3), spec(INT32, 1, 2))


def tunes(config, model, params):
    """The first stage; the second one has the evaluation step's marginals."""
    names = configs.crf_relations(config)

    def mapped(step, **_):
        fn = parallel.pmap_eval(step, devices=jax.devices()[:1])
        return lambda params, batch: np.ones(jax.eval_shape(fn, params, batch).shape, np.int64)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "batches_of", lambda *_: [evaluation_batch(config)])
        patch.setattr(evaluate, "inputs_of", lambda x: x)
        patch.setattr(tuning, "parallel", types.SimpleNamespace(pmap_eval=mapped, AXIS=parallel.AXIS))
        patch.setattr(configs, "scored_classes", lambda *_: None)
        data = types.SimpleNamespace(class_names=())
        tuning._score_messages(config, model, params, data, "val", [(1.0,) * len(names) + (2,)], "")


PATHS = (trains, evaluates, reports, predicts, exports, tunes)


KEPT = [("camvid_mobilenet_v2", ("both",))]


@pytest.mark.parametrize(("name", "variant"), full_but(SHIPPED, *KEPT), ids=lambda x: str(x))
def test_every_path_of_a_shipped_config_has_the_offsets_of_the_crop(name, variant, seen, tmp_path):
    config = shipped(name, variant)
    wanted = of_crop(config)
    assert wanted and all(wanted.values())
    configs.keep_offsets(config)
    configs.save(config, tmp_path / "config.json")
    config = configs.load(tmp_path / "config.json")
    model = configs.build_model(config)
    params = restore.abstract_params(model)
    for path in PATHS:
        seen.clear()
        path(config, model, params)
        used = wanted if path in (trains, evaluates, reports) else {n: wanted[n] for n in configs.crf_relations(config)}
        assert {frozenset(pairs) for pairs in used.values()} <= set(seen), path.__name__
        assert set(seen) <= {frozenset(pairs) for pairs in wanted.values()}, path.__name__


OBJECTIVES = ["piecewise_staged", "pseudo_likelihood", "unrolled_mean_field", "unrolled_mean_field_staged"]


@pytest.mark.parametrize("objective", full_but(OBJECTIVES, "unrolled_mean_field"))
def test_every_objective_has_the_offsets_of_the_run(objective, seen):
    """Where training goes on with smaller crops: those of the crops that it began with."""
    config = shipped("voc_mobilenet_v2")
    wanted = {frozenset(pairs) for pairs in of_crop(config).values()}
    configs.keep_offsets(config)
    config.loss.objective, config.data.crop_size = objective, (160, 240)
    model = configs.build_model(config)
    trains(config, model, restore.abstract_params(model))
    assert set(seen) == wanted


SIZES = {
    "a larger frame": {"data.eval_size": (400, 640)},
    "a frame smaller than the box": {"data.eval_size": (48, 64)},
    "larger crops": {"data.crop_size": (480, 640)},
    "crops of one cell": {"data.crop_size": (16, 16)},
    "both": {"data.crop_size": (33, 500), "data.eval_size": (201, 303)},
}


@pytest.mark.parametrize("changes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("grid", [0, 5])
def test_a_run_keeps_its_offsets_whatever_the_sizes(grid, changes, tmp_path):
    config = small.config(tmp_path, **{"data.crop_size": (192, 256)})
    for box in config.relations.values():
        box.grid = grid
    wanted = of_crop(config)
    configs.keep_offsets(config)
    identity, model = configs.identity(config), configs.build_model(config)
    config.update_from_flattened_dict(changes)
    configs.validate(config, batches=())
    found = {name: set(map(tuple, box.tolist())) for name, box in configs.relations(config).items()}
    assert found == wanted and configs.identity(config) == identity and configs.build_model(config) == model


BOXES = {
    "cells": ({"rows": (-3, 1), "cols": (0, 2), "unit": "cells"}, (64, 96)),
    "cells beyond the crop": ({"rows": (-90, 90), "cols": (-2, 2), "unit": "cells"}, (64, 96)),
    "a grid beyond the crop": ({"rows": (-90, 90), "cols": (-7, 7), "unit": "cells", "grid": 7}, (64, 96)),
    "one row": ({"rows": (0, 0), "cols": (-0.5, 0.0)}, (160, 96)),
    "a grid of fractions": ({"rows": (-0.4, 0.0), "cols": (-0.2, 0.2), "grid": 3}, (320, 500)),
}


@pytest.mark.parametrize(("box", "crop"), BOXES.values(), ids=BOXES)
def test_what_is_kept_of_a_box_is_what_the_crop_has(box, crop, tmp_path):
    """Offsets that leave the crop from every node are never trained: no larger map may use them."""
    config = small.config(tmp_path, **{"data.crop_size": crop, "model.relations": ("own",)})
    config.relations.own = configs.relation(**box)
    wanted = of_crop(config)["own"]
    assert wanted
    configs.keep_offsets(config)
    configs.save(config, tmp_path / "config.json")
    config = configs.load(tmp_path / "config.json")
    config.data.eval_size = config.data.crop_size = (1600, 2000)
    assert set(map(tuple, configs.relations(config)["own"].tolist())) == wanted
    kept = config.relations.own
    assert len(kept.row_offsets) * len(kept.col_offsets) - len(wanted) in (0, 1), "without (0, 0)"


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"row_offsets": (-1, 0)}, r"surrounding.row_offsets = \(-1, 0\) must be \(\), or col_offsets be set too"),
        ({"col_offsets": (2,)}, r"surrounding.col_offsets = \(2,\) must be \(\), or row_offsets be set too"),
        ({"row_offsets": (0,), "col_offsets": (0,)}, "relations.surrounding: its box holds no edge"),
        ({"row_offsets": (0.5,), "col_offsets": (1,)}, "row_offsets = .*must be a tuple, each an integer"),
        ({"row_offsets": tuple(range(-900, 900)), "col_offsets": tuple(range(-900, 900))}, "more than 1000000 offsets"),
        ({"row_offsets": (-40,), "col_offsets": (1,)}, r"no edge on the 12 x 16 grid of config.data.eval_size"),
    ],
)
def test_offsets_that_cannot_be_are_refused(changes, match, tmp_path):
    config = small.config(tmp_path)
    with config.ignore_type():
        config.relations.surrounding.update(changes)
    with pytest.raises(configs.ConfigError, match=match):
        configs.validate(config, batches=())


@pytest.mark.parametrize(
    "relations",
    [
        (ABOVE_BELOW,),
        (SURROUNDING, ABOVE_BELOW),
        {"above": ABOVE_BELOW},
        {"above": [-1, 0]},
        {"above": [(-1.0, 0.0)]},
        [("above", [(1, 2, 3)])],
        ("above", "left"),
    ],
)
def test_a_model_takes_offsets_and_no_boxes(relations):
    with pytest.raises(ValueError, match=r"expected relations \{name: int offsets .*pwcrf_jax\.offsets"):
        segmenter.Segmenter(3, {"backbone": "tiny"}, relations)


def test_nothing_else_makes_offsets_of_the_map_that_comes_in():
    """`configs.relations` alone in the package: the way in which the fault came to be."""
    users = [
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "pwcrf_jax").rglob("*.py")
        if "relations import" in (text := path.read_text()) and "offsets(" in text.replace("_offsets(", "")
    ]
    assert users == ["pwcrf_jax/config/offsets.py"]
    assert (ROOT / users[0]).read_text().count("offsets(box, *grid)") == 1


@pytest.mark.parametrize("crop", [(64, 96), (96, 64), (160, 160), (48, 240)])
def test_a_new_run_keeps_none_that_leave_its_crops(crop, tmp_path):
    """Of offsets that are given, too, as from the config of a run with larger crops."""
    config = small.config(tmp_path, **{"data.crop_size": crop, "data.eval_size": (640, 640)})
    given = tuple(range(-20, 21))
    for box in config.relations.values():
        box.row_offsets = box.col_offsets = given
    configs.keep_offsets(config)
    for box in config.relations.values():
        reach = tuple(tuple(x for x in given if abs(x) < n // 16) for n in crop)
        assert (box.row_offsets, box.col_offsets) == reach
    config.relations.surrounding.row_offsets = (15, 20)
    with pytest.raises(
        configs.ConfigError, match="relations.surrounding: its box holds no edge .* config.data.crop_size"
    ):
        configs.keep_offsets(config)


# --- runs --------------------------------------------------------------------------------------------


@pytest.fixture
def told(monkeypatch, caplog):
    monkeypatch.setattr(log, "propagate", True)
    caplog.set_level("INFO", logger=log.name)
    return caplog


def stored(workdir):
    return json.loads((workdir / "config.json").read_text())["relations"]


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.full
def test_training_that_goes_on_with_other_crops_keeps_its_offsets(config, trained, tmp_path):
    workdir = tmp_path / "work"
    shutil.copytree(trained, workdir)
    before = stored(workdir)
    assert before["surrounding"]["row_offsets"] == [-1, 0, 1] == before["surrounding"]["col_offsets"]
    assert before["above_below"]["row_offsets"] == [-2, -1], "of the 6 x 8 cells of the crop"
    config.train.steps, config.data.crop_size = 2, (64, 96)  # whose box has one row
    loop.train_and_evaluate(config, str(workdir))
    assert stored(workdir) == before
    config.relations.surrounding.rows = (-0.4, 0.4)
    with pytest.raises(checkpoint.CheckpointError, match="relations.surrounding.rows"):
        loop.train_and_evaluate(config, str(workdir))


def test_evaluation_of_a_run_with_other_sizes(trained):
    config = configs.load(trained / "config.json")
    expected = evaluate.evaluate(config, str(trained))
    config.data.crop_size = (320, 480)
    assert evaluate.evaluate(config, str(trained))["nll"] == expected["nll"]
    config.relations.above_below.row_offsets = (-3, -2, -1)
    with pytest.raises(checkpoint.CheckpointError, match="relations.above_below.row_offsets"):
        evaluate.evaluate(config, str(trained))


@pytest.mark.parametrize(
    ("changes", "new"),
    [
        ({}, {}),
        ({"data.crop_size": (192, 256)}, {"surrounding": "16 of its 24", "above_below": "14 of its 20"}),
        ({"data.crop_size": (48, 64)}, {}),
        ({"relations.surrounding.cols": (-0.4, 0.4)}, {"surrounding": "6 of its 14"}),
        ({"data.crop_size": (192, 256), "model.hidden": 4}, {}),
        ({"data.crop_size": (192, 256), "model.relations": ("above_below",)}, {"above_below": "14 of its 20"}),
    ],
)
def test_a_start_from_relations_of_other_distances_is_told(changes, new, config, trained, tmp_path, told):
    """Of nets that are taken: those of another width begin anew. Fewer distances than there are none that is new."""
    config.init_from = str(trained)
    config.update_from_flattened_dict(changes)
    initial.resolve_init(config, str(tmp_path / "new"))
    lines = [x for x in told.messages if "trained at other distances" in x]
    assert len(lines) == len(new)
    for line, (name, number) in zip(lines, new.items(), strict=True):
        assert f"pairwise_{name} " in line and number in line
