"""Figures of ladder.py and its neighbours: usual scores, paired intervals, nothing mixed that is not of one kind."""

import argparse
import importlib
import importlib.util
import itertools
import json
import pathlib
import re
import sys

import numpy as np
import pytest
import small

from pwcrf_jax import config as configs
from pwcrf_jax import metrics
from pwcrf_jax.evaluation import evaluate

ROOT = pathlib.Path(__file__).resolve().parents[3]
CLASSES, IMAGES, K = [0, 2, 3], 30, 4


@pytest.fixture(scope="module")
def scripts():
    """Imports a script of benchmarks/ as one runs it, with its folder first on the path."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        patch.setattr(importlib.import_module("ladder_table"), "BOOTSTRAP", 200)
        yield importlib.import_module


@pytest.fixture(scope="module")
def ladder(scripts):
    return scripts("ladder")


@pytest.fixture(scope="module")
def table(scripts):
    return scripts("ladder_table")


def confusions(rng, right):
    """int64 [images, 3, K, K], of predictions of which a share is right."""
    truth = rng.integers(0, K, (IMAGES, 3, 400))
    predicted = np.where(rng.random(truth.shape) < right, truth, rng.integers(0, K, truth.shape))
    out = np.zeros((IMAGES, 3, K, K), np.int64)
    image, band = (x.ravel() for x in np.indices(truth.shape)[:2])
    np.add.at(out, (image, band, truth.ravel(), predicted.ravel()), 1)
    return out


def counts_of(n):
    return np.stack([np.diagonal(n, axis1=2, axis2=3), n.sum(3), n.sum(2)], axis=2)


def options(ladder, results, **more):
    defaults = dict(
        set="animals", results=results, against=None, picture=None, steps=0, pair_steps=0, batch=0, crop=None
    )
    defaults |= dict(pair_balance=None, boxes=None, unseen=0, ensemble_steps=0, evals=0, seeds=[0, 1, 2])
    defaults |= dict(source_dir="", data_dir="", init_from="", tune_blocks=2, trials=16)
    return argparse.Namespace(**(defaults | more))


def keep(ladder, args, rung, seed, rows, fold=None, **more):
    result = dict(set=args.set, rung=rung, seed=seed, class_indices=CLASSES, **ladder.sizes_of(args), **more)
    result["rows"] = {row: ladder.scores(x.sum(0), CLASSES) for row, x in rows.items()}
    result["counts"] = ladder.pack(rows)
    result |= {} if fold is None else dict(fold=fold, tuned_on=ladder.tuned_on(fold))
    ladder.write(ladder.path_of(args, rung, seed, fold), result)


def test_scores_are_those_of_the_confusion_matrix(table):
    matrix = confusions(np.random.default_rng(0), 0.6)
    counts = table.unpack(json.loads(json.dumps(table.pack({"all": counts_of(matrix)}))))["all"]
    found = table.scores(counts.sum(0), CLASSES)
    for band, name in enumerate(("miou", "boundary_iou_3px", "boundary_iou_5px")):
        expected = metrics.scores(matrix.sum(0)[band], CLASSES)
        assert found[name] == pytest.approx(100 * float(expected.mean_iou), abs=1e-4)
    whole = metrics.scores(matrix.sum(0)[0], CLASSES)
    assert found["mean_accuracy"] == pytest.approx(100 * float(whole.mean_accuracy), abs=1e-4)
    assert found["pixel_accuracy"] == pytest.approx(100 * float(whole.pixel_accuracy), abs=1e-4)


def test_picture(ladder, table, scripts, tmp_path, monkeypatch):
    args, rng, draw = options(ladder, tmp_path), np.random.default_rng(0), scripts("ladder_summary").picture
    curve = {"all": [[3, 30.0], [6, 40.0]]}
    for seed in (0, 1):
        keep(ladder, args, "baseline", seed, {"all": counts_of(confusions(rng, 0.5))}, curve=curve)
    keep(ladder, args, "refined", 0, {"refined": counts_of(confusions(rng, 0.6))})
    figures = table.Figures(table.figures_in(tmp_path, "animals"))
    assert scripts("ladder_summary").curves_of(figures) == {"baseline": [curve["all"]] * 2}
    if importlib.util.find_spec("matplotlib"):
        draw(tmp_path / "ladder.png", "animals", figures)
        assert (tmp_path / "ladder.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit, match=r"needs matplotlib: pip install -e '\.\[bench\]'"):
        draw(tmp_path / "ladder.png", "animals", figures)


def test_intervals_are_of_pairs(table):
    """The same image in both: the interval of a constant difference is narrow, however much images differ."""
    rng = np.random.default_rng(1)
    first = [counts_of(confusions(rng, 0.5)) for _ in range(2)]
    gain, low, high = table.bootstrap(first, first, CLASSES, np.random.default_rng(0))
    assert gain == low == high == 0
    better = [counts_of(confusions(rng, share)) for share in (0.7, 0.9)]
    gain, low, high = table.bootstrap(first, better, CLASSES, np.random.default_rng(0))
    assert 0 < low < gain < high
    expected = np.mean([table.scores(b.sum(0), CLASSES)["miou"] for b in better])
    expected -= np.mean([table.scores(f.sum(0), CLASSES)["miou"] for f in first])
    assert gain == pytest.approx(expected)
    # Over seeds too: wider, as far as the seeds differ.
    same, least, most = table.bootstrap(first, better, CLASSES, np.random.default_rng(0), over_seeds=True)
    assert same == gain and least < low - 2 and most > high + 2
    # Drawn as one would write it down.
    gain = lambda a, b, pick: (
        table.scores(b[pick].sum(0), CLASSES)["miou"] - table.scores(a[pick].sum(0), CLASSES)["miou"]
    )
    for over_seeds, found in ((False, (gain, low, high)), (True, (same, least, most))):
        rng, drawn = np.random.default_rng(0), []
        for _ in range(table.BOOTSTRAP):
            chosen = rng.choice(2, 2) if over_seeds else (0, 1)
            pick = rng.choice(np.arange(IMAGES), IMAGES)
            drawn.append(np.mean([gain(first[i], better[i], pick) for i in chosen]))
        np.testing.assert_allclose(found[1:], np.percentile(drawn, (2.5, 97.5)), rtol=1e-12)
    alone = table.bootstrap(first[:1], better[:1], CLASSES, np.random.default_rng(0))
    again = table.bootstrap(first[:1], better[:1], CLASSES, np.random.default_rng(0), over_seeds=True)
    assert alone[0] == again[0] and abs(alone[1] - again[1]) < 0.5


def test_summary_ends_with_the_figures(ladder, table, tmp_path, capsys):
    args, rng = options(ladder, tmp_path), np.random.default_rng(2)
    rows = lambda *shares: {
        row: counts_of(confusions(rng, share)) for row, share in zip(("unary", "all", "refined"), shares, strict=False)
    }
    for seed in (0, 1):
        keep(ladder, args, "multiscale", seed, rows(0.5, 0.5))
        keep(ladder, args, "contextual", seed, rows(0.5, 0.7, 0.8))
        keep(ladder, args, "refined", seed, rows(0.5, 0.5, 0.6))
    keep(ladder, args, "joint", 1, rows(0.4, 0.6))
    keep(ladder, args, "unrolled", 1, rows(0.5, 0.9))
    keep(ladder, args, "unrolled_tuned", 0, rows(0.5, 0.6))
    ladder.summary(args)
    *lines, last = capsys.readouterr().out.splitlines()
    out = json.loads(last)["animals"]
    assert 0 < out["crf_gain_low"] < out["crf_gain"] and out["seeds"] == 2
    assert 0 < out["crf_gain_refined_low"] < out["crf_gain_refined"]
    assert out["ensemble_gain"] is out["ensemble_gain_low"] is out["ensemble_gain_refined"] is None
    assert out["joint_unary_minus_alone"] < 0 and 60 < out["best_miou"] < 90
    values, _ = table.Figures(table.figures_in(tmp_path, "animals")).values("unrolled", "all")
    assert out["best_miou"] == round(values["miou"][0], 2)  # of one seed; of contextual the mean of two
    assert sum(line.startswith("  unrolled over contextual: +") and line.endswith("1 seeds") for line in lines) == 1
    assert any(line.startswith("  unrolled_tuned over contextual: -") for line in lines)
    assert any(line.split()[0] == "contextual" and "2 seeds" in line for line in lines if line.strip())
    path = tmp_path / "ladder_animals_contextual_1.json"
    other = json.loads(path.read_text())
    ladder.write(path, other | {"tuned": {"crf.num_iterations": 20}})
    with pytest.raises(SystemExit, match="different weights or iterations: not of one pilot"):
        ladder.summary(args)
    ladder.write(path, other | {"tuned": {"refine.smoothness_compat": 2.0}})
    with pytest.raises(SystemExit, match="different dense CRFs of rung contextual: not of one pilot"):
        ladder.summary(args)
    ladder.write(path, other)
    # A ladder of other sizes, which takes as much time.
    args.against, longer = tmp_path, options(ladder, tmp_path / "longer", steps=9)
    keep(ladder, longer, "contextual", 1, rows(0.5, 0.95, 0.95))
    keep(ladder, longer, "unrolled_joint", 1, rows(0.5, 0.2))
    args.results = longer.results
    ladder.summary(args)
    *lines, last = capsys.readouterr().out.splitlines()
    said = [re.match(r"  (.*): ([+-])[\d.]+ \[.*\], 1 seeds$", x).groups() for x in lines if "unrolled over" in x]
    assert said == [("the other ladder's unrolled over contextual", "-")]
    said = [re.match(r"  (.*): ([+-])[\d.]+ \[.*\], 1 seeds$", x).groups() for x in lines if "_joint over" in x]
    assert said == [("unrolled_joint over the other ladder's joint", "-")]
    for said in ("row unary (9 steps)", "row all (9 + 175 steps)"):
        assert sum(x.startswith(f"  contextual, {said} over the other ladder's unary (350): ") for x in lines) == 1
    assert any(re.search(r"row all .* unary \(350\): \+.*; over seeds too \[.*\], 1 seeds$", x) for x in lines)
    assert json.loads(last)["animals"]["seeds"] == 1  # its own figures alone


def test_ladders_of_other_sizes_are_not_mixed(ladder, tmp_path):
    args, rng = options(ladder, tmp_path), np.random.default_rng(3)
    keep(ladder, args, "baseline", 0, {"all": counts_of(confusions(rng, 0.5))})
    path = tmp_path / "ladder_animals_baseline_0.json"
    assert ladder.kept(args, path)["seed"] == 0 and ladder.kept(args, tmp_path / "none") is None
    other = options(ladder, tmp_path, steps=7)
    with pytest.raises(SystemExit, match="holds figures of {'steps': 350}, this ladder has"):
        ladder.kept(other, path)
    # Of a unary it does not matter how long relations train.
    longer = options(ladder, tmp_path, pair_steps=7)
    assert ladder.kept(longer, path)["seed"] == 0
    keep(ladder, args, "contextual", 0, {row: counts_of(confusions(rng, 0.5)) for row in ("unary", "all", "refined")})
    with pytest.raises(SystemExit, match="holds figures of {'pair_steps': 175}, this ladder has"):
        ladder.kept(longer, tmp_path / "ladder_animals_contextual_0.json")
    ladder.summary(args)
    others = dict(pair_balance=0.5, boxes=ladder.BOXES["near"])
    depends = {"contextual": {"pair_balance", "boxes"}, "convs": {"pair_balance", "boxes"}, "pyramid": set()}
    depends |= dict.fromkeys(("joint", "unrolled", "unrolled_joint"), {"boxes"})  # these have the balance of the unary
    for rung, (key, value) in itertools.product(depends, others.items()):
        asked = options(ladder, tmp_path, **{key: 0.5 if key == "pair_balance" else "near"})
        result = dict(rung=rung, **ladder.sizes_of(args)) | {key: value}
        assert ladder.sizes_of(asked) == ladder.sizes_of(args) | {key: value}  # the option by which it is had
        ladder.write(tmp_path / "one.json", result)
        if key not in depends[rung]:
            assert ladder.kept(args, tmp_path / "one.json") == result
            continue
        with pytest.raises(SystemExit, match=f"holds figures of {{'{key}': .*}}, this ladder has"):
            ladder.kept(args, tmp_path / "one.json")
    keep(ladder, other, "baseline", 1, {"all": counts_of(confusions(rng, 0.5))})
    with pytest.raises(SystemExit, match="figures of animals with different steps: not one ladder"):
        ladder.summary(args)


@pytest.mark.parametrize("name", ["camvid", "animals"])
def test_a_relation_is_the_same_in_crop_and_image(ladder, name):
    args = options(ladder, None, set=name, source_dir="", data_dir="", init_from="")
    config = ladder.config_of(args, "contextual", 0, "train")
    assert config.loss.objective == "piecewise_staged" and config.train.steps == ladder.SETS[name].pair_steps
    for relation, box in ladder.BOXES[ladder.SETS[name].boxes].items():
        found = config.relations[relation]
        assert found.unit == "cells" and [list(found.rows), list(found.cols)] == box
    # Of the relations alone: unary and convolutions keep the unary's.
    unary = ladder.config_of(args, "multiscale", 0, "train").loss.balance_power
    of_pairs = config.loss.pairwise_balance_power if config.loss.pairwise_balance_power >= 0 else unary
    assert config.loss.balance_power == unary and of_pairs == ladder.SETS[name].pair_balance
    assert ladder.config_of(args, "baseline", 0, "train").model.relations == ()
    unrolled = ladder.config_of(args, "unrolled", 0, "train")
    assert unrolled.loss.objective == "unrolled_mean_field_staged" and unrolled.loss.unary_share == 0
    assert unrolled.loss.balance_power == unary and unrolled.loss.pairwise_balance_power == -1
    assert unrolled.crf.weights == config.crf.weights == (1.0,)
    joint, through = (ladder.config_of(args, rung, 0, "train").to_dict() for rung in ("joint", "unrolled_joint"))
    assert (joint["loss"].pop("objective"), through["loss"].pop("objective")) == ("piecewise", "unrolled_mean_field")
    assert joint == through
    assert unrolled.model.refinement_convs.layers == () and unrolled.train.steps == ladder.SETS[name].pair_steps


def test_relations_on_images_that_their_unary_has_not_seen(ladder, tmp_path, monkeypatch):
    assert ladder.parts("train", 0) == ("train", "train")
    assert ladder.parts("train", 20) == ("train[:80%]", "train[80%:]")
    assert ladder.parts("train_aug[:80%]", 30) == ("train_aug[:50%]", "train_aug[50%:80%]")
    args = options(ladder, tmp_path, unseen=20, source_dir="", data_dir="", init_from="", runs=str(tmp_path))
    seen = {}

    def train_and_evaluate(config, workdir):
        pathlib.Path(workdir).mkdir(parents=True)
        configs.save(config, pathlib.Path(workdir, "config.json"))
        seen[pathlib.Path(workdir).name] = config.data.train_split

    monkeypatch.setattr(ladder.loop, "train_and_evaluate", train_and_evaluate)
    trains, tunes = ladder.held_out("animals")
    ladder.trained(args, "contextual", 0, trains, "pilot")
    ladder.trained(args, "contextual", 1, "train_aug", "run")
    assert tunes == "train_aug[80%:]"  # which neither of the pilot's has seen
    assert seen == {
        "pilot-multiscale-0": "train_aug[:60%]", "pilot-contextual-0": "train_aug[60%:80%]",
        "run-multiscale-1": "train_aug[:80%]", "run-contextual-1": "train_aug[80%:]",
    }  # fmt: skip
    ladder.write(tmp_path / "one.json", dict(rung="contextual", **ladder.sizes_of(options(ladder, tmp_path))))
    with pytest.raises(SystemExit, match="holds figures of {'unseen': 0}, this ladder has"):
        ladder.kept(args, tmp_path / "one.json")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--set", "camvid", "--unseen", "80"], "--unseen 80: 0 to 79, the pilot holds 20 % out for itself"),
        (["--unseen", "9", "--rungs", "unrolled", "joint"], "--unseen 9: joint train unary and relations on the same"),
        (["--summary", "--against", "nowhere"], "--against nowhere does not exist"),
        ([], "--set is needed, or --summary"),
        (["--set", "camvid", "--source_dir", "nowhere"], "--source_dir 'nowhere' does not exist"),
    ],
)
def test_what_is_missing_is_named(ladder, flags, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ladder.py", *flags])
    with pytest.raises(SystemExit):
        ladder.main()
    assert message in capsys.readouterr().err


def test_a_run_of_other_settings_is_refused(ladder, tmp_path, monkeypatch):
    """A finished run is taken as it is, so it must be the one that the ladder asks for."""
    settings = dict(set="camvid", source_dir="", data_dir="", init_from="", runs=str(tmp_path))
    args, workdir = options(ladder, None, **settings), tmp_path / "camvid/run-multiscale-0"
    monkeypatch.setattr(ladder.loop, "train_and_evaluate", lambda config, workdir: None)  # as of a finished run
    config = ladder.config_of(args, "multiscale", 0, "train")
    workdir.mkdir(parents=True)
    configs.save(config, workdir / "config.json")
    assert ladder.trained(args, "multiscale", 0, "train", "run") == workdir
    for key in ("balance_power", "pairwise_balance_power"):
        before, config.loss[key] = config.loss[key], 0.9
        configs.save(config, workdir / "config.json")
        with pytest.raises(SystemExit, match=rf"trained with config\.loss\.{key} = 0\.9, this ladder has .*--runs"):
            ladder.trained(args, "multiscale", 0, "train", "run")
        config.loss[key] = before


def test_the_pilot_is_tuned_on_images_that_it_was_not_trained_on_once(ladder, tmp_path, monkeypatch):
    args, done, rows = options(ladder, tmp_path, trials=3, rungs=ladder.RUNGS), [], []

    def trained(args, rung, seed, split, name):
        done.append((rung, seed, split, name))
        configs.save(ladder.config_of(args, rung, seed, split), tmp_path / "config.json")
        return tmp_path

    def tune(config, workdir, which, split, mode, trials, row):
        assert (workdir, which, mode) == (str(tmp_path), "latest", "full")
        assert trials == (1 if done[-1][0] == "unrolled" else 3)
        rows.append(row)
        found = {"config": {"crf.weights": (0.5, 1.0)}, "split": split, "step": 175}
        return found | {key: 0.5 for key in ("miou_before", "miou_messages", "miou_after")}

    args.source_dir = args.data_dir = args.init_from = ""
    monkeypatch.setattr(ladder, "trained", trained)
    monkeypatch.setattr(ladder.tuning, "tune", tune)
    chosen = ladder.pilot(args, args.rungs)
    assert done == [(run, 0, "train_aug[:80%]", "pilot") for run in ("multiscale", "contextual", "contextual")]
    assert rows == ["all", "all", "convs"]  # marginals that the rungs' dense CRF refines
    assert chosen == {name: {"crf.weights": (0.5, 1.0)} for name in ("multiscale", "contextual", "convs")}
    kept = json.loads((tmp_path / "ladder_animals_pilot.json").read_text())
    assert kept["contextual"]["split"] == "train_aug[80%:]" and kept["boxes"] == ladder.BOXES["far"]
    assert ladder.pilot(args, args.rungs)["multiscale"] == {"crf.weights": [0.5, 1.0]} and len(done) == 3
    # The one that needs a pilot of its own.
    assert ladder.pilot(args, ["unrolled_tuned"])["unrolled"] == {"crf.weights": (0.5, 1.0)} and done[3:] == [
        ("unrolled", *done[0][1:])
    ]
    assert ladder.pilot(args, ["baseline", "joint", "unrolled"]) == {} and len(done) == 4


def test_rungs_are_decoded_with_what_their_pilot_chose(ladder, tmp_path, monkeypatch):
    args, seen = options(ladder, tmp_path, seeds=[0], rungs=(*ladder.RUNGS[2:], "unrolled", "unrolled_tuned")), {}
    args.source_dir = args.data_dir = args.init_from = ""
    messages = lambda weight, n: {"crf.weights": [weight, weight], "crf.num_iterations": n}
    refine = lambda value: {"refine.smoothness_compat": value}
    chosen = {"multiscale": refine(5.0), "unrolled": refine(9.0) | messages(2.0, 7)}
    chosen |= {"contextual": refine(6.0) | messages(0.5, 20), "convs": refine(8.0) | messages(0.5, 20)}

    def trained(args, rung, seed, split, name):
        configs.save(ladder.config_of(args, rung, seed, split), tmp_path / "config.json")
        (tmp_path / "rung").write_text(rung)
        return tmp_path

    def counts_of_images(config, workdir, refined, split):
        assert split == "val"
        found = config.crf.weights, config.crf.num_iterations, config.refine.smoothness_compat, refined
        seen.setdefault((workdir / "rung").read_text(), []).append(found)
        rows = ("unary", "all", *(["refined"] if refined else []))
        return {row: counts_of(confusions(np.random.default_rng(0), 0.5)) for row in rows}, list("ab"), list("wxyz")

    asked = []
    monkeypatch.setattr(ladder, "pilot", lambda args, rungs, fold: (asked.append(rungs), chosen)[1])
    monkeypatch.setattr(ladder, "trained", trained)
    monkeypatch.setattr(ladder, "counts_of_images", counts_of_images)
    monkeypatch.setattr(ladder.configs, "scored_classes", lambda config, names: CLASSES)
    ladder.run(args)
    config = ladder.config_of(args, "unrolled", 0, "train")
    weights, n, compat = config.crf.weights, config.crf.num_iterations, config.refine.smoothness_compat
    assert n == 3
    assert seen == {
        "multiscale": [(weights, n, 5.0, "all")],  # and the refined rung with it
        "contextual": [((0.5, 0.5), 20, 6.0, "all"), ((0.5, 0.5), 20, 8.0, "convs")],
        "unrolled": [(weights, n, compat, ""), ((2.0, 2.0), 7, compat, "")],
    }
    kept = {path.stem for path in tmp_path.glob("ladder_*.json")}
    assert kept == {f"ladder_animals_{rung}_0" for rung in args.rungs}
    tuned = json.loads((tmp_path / "ladder_animals_unrolled_tuned_0.json").read_text())["tuned"]
    assert tuned == messages(2.0, 7)
    (tmp_path / "ladder_animals_convs_0.json").unlink()
    ladder.run(args)
    assert asked == [list(args.rungs), ["convs"]]  # of what is kept no pilot is trained
    (tmp_path / "ladder_animals_convs_0.json").unlink()
    args.trials = 0
    ladder.run(args)
    assert len(asked) == 2 and json.loads((tmp_path / "ladder_animals_convs_0.json").read_text())["tuned"] is None
    assert seen["contextual"][-1] == (weights, n, compat, "convs")
    # Left for eval.py beside the model that was refined last, the one with convolutions.
    config = ladder.config_of(args, "contextual", 0, "train")
    ladder.configs.check_tuned(config, ladder.configs.apply_tuned(config, tmp_path), tmp_path)
    assert (config.crf.weights, config.crf.num_iterations, config.refine.smoothness_compat) == ((0.5, 0.5), 20, 8.0)


def test_objectives_refuse_runs_on_other_scenes(scripts, tmp_path, monkeypatch):
    objectives = scripts("objectives")
    config = objectives.demo.get_config()
    (tmp_path / "piecewise-4-0").mkdir()
    configs.save(config, tmp_path / "piecewise-4-0/config.json")
    monkeypatch.setattr(objectives.loop, "train_and_evaluate", lambda config, workdir: None)
    args = argparse.Namespace(seeds=[0], steps=4, runs=str(tmp_path), data_dir=str(tmp_path))
    with pytest.raises(SystemExit, match=r"piecewise-4-0 was trained on other scenes: name another folder with --runs"):
        objectives.train(args, {name: 1.0 for name in objectives.OBJECTIVES}, None)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--train", "--seeds", "0"],
            "holds seeds 0, 1, 2 of 600 steps, which this run would not make again: name another",
        ),
        (
            ["--train", "--steps", "4"],
            "holds seeds 0, 1, 2 of 600 steps, which this run would not make again: name another",
        ),
        (["--train", "--full_box"], "--train takes the demo's own grid of neighbours: leave --full_box out"),
        (["--train", "--models", "camvid"], "--models has to name it"),
    ],
)
def test_objectives_keep_what_they_have(scripts, flags, message, tmp_path, monkeypatch, capsys):
    objectives = scripts("objectives")
    runs = {str(seed): {"steps": 600} for seed in range(3)}
    (tmp_path / "objectives_synthetic.json").write_text(json.dumps({"reached": {"steps": {"piecewise": runs}}}))
    monkeypatch.setattr(objectives, "measure", lambda *_: pytest.fail("measured before it was refused"))
    monkeypatch.setattr(sys, "argv", ["objectives.py", "--results", str(tmp_path), *flags])
    with pytest.raises(SystemExit):
        objectives.main()
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_steps_of_every_objective_are_measured(scripts, tmp_path, monkeypatch, capsys):
    """And nothing is written by --quick; a staged step is the mean of its stages, as the config weighs them."""
    objectives = scripts("objectives")
    monkeypatch.setitem(objectives.CONFIGS, "demo", lambda: small.config(tmp_path, **{"loss.unary_share": 0.25}))
    medians = []

    def take_turns(turns, repeats):
        for turn in turns.values():
            turn()
        medians.append({name: 1.0 + i for i, name in enumerate(turns)})
        return medians[-1]

    monkeypatch.setattr(objectives.timing, "medians", take_turns)
    monkeypatch.setattr(sys, "argv", ["objectives.py", "--quick", "--full_box", "--results", str(tmp_path / "results")])
    objectives.main()
    out, (step, crf) = json.loads(capsys.readouterr().out.splitlines()[-1]), medians
    stages = {f"pairwise {name}" for name in (*objectives.STEPS, "piecewise_staged_sampled") if "_staged" in name}
    assert {"unary", "piecewise", "pseudo_likelihood", "unrolled_mean_field", "piecewise_sampled"} | stages == set(step)
    assert set(crf) == {"piecewise", "pseudo_likelihood", "unrolled_mean_field", "piecewise_sampled"}
    staged = lambda name: 0.25 * step["unary"] + 0.75 * step[f"pairwise {name}"]
    assert out["step_ratio"] == {"demo": round(step["unrolled_mean_field"] / step["piecewise"], 2)}
    assert out["step_ratio_staged"] == {"demo": round(step["unrolled_mean_field"] / staged("piecewise_staged"), 2)}
    for kind in ("staged", "staged_sampled"):
        both = staged("unrolled_mean_field_staged") / staged(f"piecewise_{kind}")
        assert out[f"step_ratio_of_{kind}"] == {"demo": round(both, 2)}
    assert out["crf_ratio_sampled"] == {"demo": round(crf["unrolled_mean_field"] / crf["piecewise_sampled"], 2)}
    assert not (tmp_path / "results").exists()


def test_misplaced_pixels_have_their_class_near(scripts):
    diagnose, rng = scripts("diagnose"), np.random.default_rng(4)
    labels = np.where(rng.random((2, 9, 11)) < 0.7, 0, rng.integers(0, 4, (2, 9, 11)))
    labels[rng.random(labels.shape) < 0.1] = 255
    found = rng.integers(0, 4, labels.shape)
    for width in (0, 1, 3):
        expected = np.zeros(labels.shape, bool)
        for n, i, j in np.ndindex(labels.shape):
            near = labels[n, max(0, i - width) : i + width + 1, max(0, j - width) : j + width + 1]
            expected[n, i, j] = labels[n, i, j] not in (255, found[n, i, j]) and found[n, i, j] in near
        np.testing.assert_array_equal(diagnose.misplaced(found, labels, width, 4), expected)
        assert expected.any() == (width > 0)


@pytest.mark.full
def test_diagnosis_agrees_with_evaluation(scripts, trained, tmp_path, monkeypatch, capsys):
    diagnose, config, output = scripts("diagnose"), configs.load(trained / "config.json"), tmp_path / "figures.json"
    flags = ["--workdir", str(trained), "--checkpoint", "latest", "--weights", "1,50", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["diagnose.py", *flags])
    diagnose.main()
    out, kept = json.loads(capsys.readouterr().out.splitlines()[-1]), json.loads(output.read_text())
    miou = {row: values[2] for row, values in kept["miou"].items()}
    assert out["miou"] == {row: round(value, 2) for row, value in miou.items()}
    config.crf.weights = (1.0,)
    rows = evaluate.evaluate(config, str(trained), "latest")["rows"]
    assert miou["unary"] == pytest.approx(100 * rows["unary"]["miou"], abs=1e-3)
    assert miou["all residual x 1"] == pytest.approx(100 * rows["all"]["miou"], abs=1e-3)
    assert set(out["held_out"]) == {"all residual", "surrounding", "above_below"}
    assert all(set(found["chosen"]) <= {1.0, 50.0} for found in out["held_out"].values())
    # Either kind of error mended is better, both are right; finer cells reach more.
    assert 0 < out["misplaced"] < 1 and miou["unary"] < min(miou["misnamed"], miou["misplaced"])
    assert miou["cells of scale 1"] < miou["cells of scale 2"] < 100
    assert set(out["nll"]) == {n + end for n in ("surrounding", "above_below") for end in ("", ", unaries alone")}


def test_rivals_take_turns(scripts):
    timing, order = scripts("timing"), []
    turns = {name: lambda name=name, s=s: (order.append(name), s)[1] for name, s in {"slow": 2.0, "fast": 1.0}.items()}
    found = timing.interleaved(turns, 5, patience=3.0)
    assert order == ["slow", "fast"] * 4 + ["fast"]  # the first round is not kept; the slow one has had enough
    assert found == {"slow": [2.0] * 3, "fast": [1.0] * 4}
    assert timing.medians(turns, 2, warm=0) == {"slow": 2.0, "fast": 1.0}
