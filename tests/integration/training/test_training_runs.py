"""Whole runs of the loop: train, resume, evaluate, and what they write."""

import json
import re
import shutil

import jax
import numpy as np
import pytest
from rows import full_but

from pwcrf_jax import config as configs
from pwcrf_jax.evaluation import evaluate
from pwcrf_jax.prediction import restore
from pwcrf_jax.runtime import checkpoint
from pwcrf_jax.runtime.logs import log
from pwcrf_jax.training import initial, loop


def _params(workdir, config, folder="checkpoints"):
    model = configs.build_model(config)
    config = configs.load(workdir / "config.json")  # with the input scaling settled
    with checkpoint.Store(str(workdir / folder), configs.identity(config)) as store:
        trees, meta = store.restore({"params": restore.abstract_params(model)})
    return trees["params"], meta


def _interrupt_after(monkeypatch, num_batches):
    whole = loop.train_batches

    def some(*args, **kwargs):
        for i, batch in enumerate(whole(*args, **kwargs)):
            if i == num_batches:
                raise KeyboardInterrupt
            yield batch

    monkeypatch.setattr(loop, "train_batches", some)


@pytest.mark.parametrize("sampled_offsets", full_but([0, 3], 3))
def test_resumed_run_equals_uninterrupted_run(config, tmp_path, monkeypatch, sampled_offsets):
    config.loss.sampled_offsets = sampled_offsets
    loop.train_and_evaluate(config, str(tmp_path / "whole"))
    with monkeypatch.context() as m:
        # Stopped two steps after the checkpoint of step 3: those two are done again.
        _interrupt_after(m, 5)
        with pytest.raises(KeyboardInterrupt):
            loop.train_and_evaluate(config, str(tmp_path / "stopped"))
    _, meta = _params(tmp_path / "stopped", config)
    assert meta["step"] == 3 and meta["samples_seen"] == 24
    loop.train_and_evaluate(config, str(tmp_path / "stopped"))
    whole, whole_meta = _params(tmp_path / "whole", config)
    resumed, resumed_meta = _params(tmp_path / "stopped", config)
    assert whole_meta["step"] == resumed_meta["step"] == 6
    assert whole_meta["score"] == resumed_meta["score"] is not None
    assert _params(tmp_path / "whole", config, "best")[1] == _params(tmp_path / "stopped", config, "best")[1]
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(resumed), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_run_writes_what_it_says(config, tmp_path, capsys):
    result = loop.train_and_evaluate(config, str(tmp_path))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    train = [line for line in lines if "train/loss" in line]
    assert [line["step"] for line in train] == [2, 4, 6]
    assert {"train/nll_unary", "train/nll_surrounding", "train/nll_above_below", "train/images_per_second"} <= set(
        train[0]
    )
    assert [line["step"] for line in lines if "val/miou_all" in line] == [3, 6]
    assert list((tmp_path / "tensorboard").glob("events*"))
    assert list(result["rows"]) == ["unary", "surrounding", "above_below", "all"]
    assert result["num_images"] == 10  # the filler of the last batch is no image

    # The best of both evaluations is kept, and evaluating it again gives the same figures.
    _, meta = _params(tmp_path, config, "best")
    scores = {line["step"]: line["val/miou_all"] for line in lines if "val/miou_all" in line}
    assert meta["step"] == max(scores, key=lambda s: (scores[s], -s))
    stored = configs.load(tmp_path / "config.json")
    again = evaluate.evaluate(stored, str(tmp_path), "latest")
    evaluate.write(again, str(tmp_path))
    assert again["rows"] == result["rows"]
    written = json.loads((tmp_path / "eval_val.json").read_text())
    assert written["rows"] == json.loads(json.dumps(again["rows"]))
    figures = evaluate.summary(again)
    assert {"miou_unary", "miou_surrounding", "miou_above_below", "miou_all"} <= set(figures)
    assert figures["miou_all"] == pytest.approx(100 * again["rows"]["all"]["miou"], abs=1e-3)
    assert "all relations" in evaluate.table(again)

    # A complete run has nothing left to do, and says how to go on.
    assert loop.train_and_evaluate(config, str(tmp_path)) == {}


def test_config_survives_the_workdir(config, tmp_path):
    configs.save(config, tmp_path / "config.json")
    assert configs.load(tmp_path / "config.json").to_dict() == config.to_dict()


@pytest.mark.full
def test_table_of_one_relation_and_of_none(config, tmp_path):
    config.train.steps = config.train.eval_every = 2
    config.model.relations = ("above_below",)
    config.crf.weights = (1.0,)
    result = loop.train_and_evaluate(config, str(tmp_path / "one"))
    assert result["rows"]["all"] == result["rows"]["above_below"]
    config.model.relations = ()
    result = loop.train_and_evaluate(config, str(tmp_path / "none"))
    assert result["rows"]["all"] == result["rows"]["unary"]


def test_a_user_defined_relation_by_config(config, tmp_path):
    config.relations.left_right = configs.relation(rows=(-1, 1), cols=(-3, -1), unit="cells")
    config.model.relations = ("left_right",)
    config.train.steps = 2
    result = loop.train_and_evaluate(config, str(tmp_path))
    assert list(result["rows"]) == ["unary", "left_right", "all"]


@pytest.mark.full
def test_pretrained_scaling_is_kept_for_evaluation(config, tmp_path, mobilenet_file):
    config.model.backbone = "mobilenet_v2"
    config.model.mobilenet_v2.output = "block_6_project"
    config.init_from = mobilenet_file
    config.model.pairwise_features = "own"
    config.train.steps = 1
    _, params = initial.resolve_init(config, str(tmp_path))
    first, second = (params[name]["backbone"]["Conv1"]["kernel"] for name in ("featmap", "featmap_pairwise"))
    assert np.array_equal(first, second) and np.any(first)
    loop.train_and_evaluate(config, str(tmp_path))
    assert configs.load(tmp_path / "config.json").model.input_scaling == "tf"
    # Evaluation needs the workdir alone, not the weights.
    stored = configs.load(tmp_path / "config.json")
    stored.init_from = "gone.h5"
    evaluate.evaluate(stored, str(tmp_path))


@pytest.mark.full
def test_bfloat16_trains_float32_parameters(config, tmp_path):
    config.model.dtype = "bfloat16"
    config.train.steps = 2
    result = loop.train_and_evaluate(config, str(tmp_path))
    assert np.isfinite(result["nll"]["surrounding"])
    params, _ = _params(tmp_path, config)
    assert all(x.dtype == np.float32 for x in jax.tree.leaves(params))


def test_best_is_saved_again_when_the_run_stopped_between_the_two_saves(config, tmp_path):
    config.train.steps = 3
    loop.train_and_evaluate(config, str(tmp_path))
    shutil.rmtree(tmp_path / "best" / "3")
    assert loop.train_and_evaluate(config, str(tmp_path)) == {}
    best, meta = _params(tmp_path, config, "best")
    latest, _ = _params(tmp_path, config)
    assert meta["step"] == 3
    for a, b in zip(jax.tree.leaves(best), jax.tree.leaves(latest), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.full
def test_scaling_of_a_run_that_never_saved_is_forgotten(config, tmp_path, monkeypatch):
    config.train.checkpoint_every, config.train.eval_every = 100, 0
    with monkeypatch.context() as m:
        _interrupt_after(m, 1)
        with pytest.raises(KeyboardInterrupt):
            config.model.input_scaling = "caffe"
            loop.train_and_evaluate(config, str(tmp_path))
    assert configs.load(tmp_path / "config.json").model.input_scaling == "caffe"
    config.model.input_scaling = "auto"
    config.train.steps = 1
    loop.train_and_evaluate(config, str(tmp_path))
    assert configs.load(tmp_path / "config.json").model.input_scaling == "tf"


def test_the_log_starts_with_a_plan(config, tmp_path, caplog, monkeypatch):
    config.train.steps = 1
    monkeypatch.setattr(log, "propagate", True)
    with caplog.at_level("INFO", logger=log.name):
        loop.train_and_evaluate(config, str(tmp_path))
    assert re.search(r"planned for 1 images of 96 x 128 a device: parameters .*B, activations .*B", caplog.text)
