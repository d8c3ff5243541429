"""choices.py: each choice changes what its name says and nothing else, decodings are inference's own."""

import argparse
import importlib
import json
import pathlib

import numpy as np
import pytest

from pwcrf_jax import config as configs
from pwcrf_jax import metrics
from pwcrf_jax.evaluation import evaluate
from pwcrf_jax.model import decode
from pwcrf_jax.prediction import restore

ROOT = pathlib.Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def choices():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        patch.setattr(importlib.import_module("ladder_table"), "BOOTSTRAP", 200)
        yield importlib.import_module("choices")


def options(**more):
    sizes = dict.fromkeys(("steps", "pair_steps", "batch", "unseen", "ensemble_steps", "evals"), 0) | dict.fromkeys(
        ("crop", "pair_balance", "boxes")
    )
    return argparse.Namespace(**(dict(set="animals", source_dir="", data_dir="", init_from="", **sizes) | more))


def flat(config):
    out = {}
    for key, value in config.items():
        out |= {f"{key}.{k}": v for k, v in flat(value).items()} if hasattr(value, "items") else {key: value}
    return out


def test_one_thing_at_a_time(choices):
    args, ladder = options(), choices.ladder
    base = {name: flat(choices.config_of(args, name, 0, "train")) for name in (choices.LADDER, "joint")}
    contextual = flat(ladder.config_of(args, "contextual", 0, "train"))
    contextual["model.refinement_convs.layers"] = ()
    assert base[choices.LADDER] == contextual and base["joint"] == flat(ladder.config_of(args, "joint", 0, "train"))
    boxes = [f"relations.{r}.{axis}" for r in ("surrounding", "above_below") for axis in ("rows", "cols")]
    expected = {
        choices.LADDER: set(),
        "joint": set(),
        "free": {"model.parameterisation"},
        "balance 0": {"loss.pairwise_balance_power"},
        "balance 0.6": {"loss.pairwise_balance_power"},
        "other boxes": set(boxes),
        "all neighbours": {"relations.surrounding.grid", "relations.above_below.grid", "loss.sampled_offsets"},
        "own features": {"model.pairwise_features"},
        "through mean field": {"loss.objective"},
        "twice the steps": {"train.steps"},
        "refinement convolutions": {"model.refinement_convs.layers"},
        "refinement convolutions, four times the steps": {"model.refinement_convs.layers", "train.steps"},
        "joint, relations train features": {"model.pairwise_trains_features"},
        "the same, a tenth as much": {"model.pairwise_trains_features", "loss.pairwise_weight"},
    }
    assert set(expected) == set(choices.NAMES)
    for name, keys in expected.items():
        found = flat(choices.config_of(args, name, 0, "train"))
        before = base["joint" if name in choices.FROM_THE_START else choices.LADDER]
        assert {k for k in found if found[k] != before[k]} == keys and set(found) == set(before)
    assert choices.config_of(args, "twice the steps", 0, "train").train.steps == 2 * contextual["train.steps"]
    near = flat(choices.config_of(args, "other boxes", 0, "train"))
    again = flat(choices.config_of(options(boxes="near"), choices.LADDER, 0, "train"))
    assert {k: near[k] for k in boxes} == {k: again[k] for k in boxes}


def test_a_run_of_other_settings_is_refused(choices, tmp_path, monkeypatch):
    args = options(runs=str(tmp_path), results=tmp_path, seeds=[0], choices=["joint"])
    monkeypatch.setattr(choices.loop, "train_and_evaluate", lambda config, workdir: None)  # as of a finished run
    config, workdir = choices.config_of(args, "joint", 0, "train"), tmp_path / "animals/choices-joint-0"
    config.loss.pairwise_weight = 0.3
    workdir.mkdir(parents=True)
    configs.save(config, workdir / "config.json")
    with pytest.raises(
        SystemExit, match=r"choices-joint-0 has another config\.loss than asked for: name another --runs"
    ):
        choices.run(args)


@pytest.mark.full
def test_a_decoding_that_came_later_is_added(choices, trained, tmp_path, monkeypatch):
    """To the figures that are there, if they are of the same model; nothing else is counted again."""
    args = options(runs=str(tmp_path), results=tmp_path, seeds=[1], choices=["joint"])
    path, workdir = tmp_path / "choices_animals_joint_1.json", tmp_path / "animals/choices-joint-1"
    workdir.mkdir(parents=True)
    config = choices.config_of(args, "joint", 1, "train_aug[:80%]")
    configs.keep_offsets(config)  # as a run does
    configs.save(config, workdir / "config.json")
    monkeypatch.setattr(choices.loop, "train_and_evaluate", lambda config, workdir: None)
    monkeypatch.setattr(choices, "EACH", (choices.Decoding(), choices.Decoding(2.0)))
    names, unary, asked = list(choices.ladder.ANIMALS), np.ones((2, 1, 3, 7), np.int64), []

    def counts_of_images(config, workdir, split, decodings):
        asked.append([str(d) for d in decodings])
        return {row: unary * (1 + len(row)) for row in ("unary", *asked[-1])}, names

    monkeypatch.setattr(choices, "counts_of_images", counts_of_images)
    choices.run(args)
    before = path.read_text()
    choices.run(args)
    assert path.read_text() == before and asked == [["weight 1", "weight 2"]]
    monkeypatch.setattr(choices, "EACH", (*choices.EACH, choices.Decoding(2.0, 10)))
    choices.run(args)
    assert asked[1:] == [["weight 2, num_iterations 10"]]
    first, result = json.loads(before), json.loads(path.read_text())
    assert set(result["counts"]) - set(first["counts"]) == set(asked[1])
    assert all(result["rows"][row] == first["rows"][row] for row in first["rows"])
    unary = unary + 1
    monkeypatch.setattr(choices, "EACH", (*choices.EACH, choices.Decoding(4.0)))
    with pytest.raises(SystemExit, match=r"choices_animals_joint_1\.json holds figures of another model than .*-1:"):
        choices.run(args)
    assert json.loads(path.read_text()) == result


@pytest.mark.full
def test_decodings_are_those_of_inference(choices, trained):
    config = configs.load(trained / "config.json")
    asked = (
        choices.Decoding(50.0, 2, 0.25), choices.Decoding(num_iterations=0, temperature=3.0),
        choices.Decoding(20.0, average_messages=False), choices.Decoding(50.0, 1, temperature=4.0),
    )  # fmt: skip
    assert [str(d) for d in asked] == [
        "weight 50, num_iterations 2, damping 0.25", "num_iterations 0, temperature 3", "weight 20, sums",
        "weight 50, num_iterations 1, temperature 4",
    ]  # fmt: skip
    counts, names = choices.counts_of_images(config, trained, "val", asked)
    score = lambda row: choices.ladder_table.scores(counts[row].sum(0), list(range(len(names))))["miou"]
    unary = evaluate.evaluate(config, str(trained), "latest", "val")["rows"]["unary"]["miou"]
    assert score("unary") == pytest.approx(100 * unary, abs=1e-3) == score("num_iterations 0, temperature 3")
    for decoding in (asked[0], asked[2]):
        config.crf.weights, config.crf.num_iterations = (decoding.weight,), decoding.num_iterations
        config.crf.damping, config.crf.average_messages = decoding.damping, decoding.average_messages
        wanted = evaluate.evaluate(config, str(trained), "latest", "val")["rows"]["all"]["miou"]
        assert score(str(decoding)) == pytest.approx(100 * wanted, abs=1e-3) and wanted != unary
    # Softer beliefs send other messages.
    config.crf.weights, config.crf.num_iterations, config.crf.damping, config.crf.average_messages = (
        (50.0,),
        1,
        0.0,
        True,
    )
    as_they_are = evaluate.evaluate(config, str(trained), "latest", "val")["rows"]["all"]["miou"]
    assert score(str(asked[3])) != pytest.approx(100 * as_they_are, abs=1e-5)


def softmax(x):
    exp = np.exp(x - x.max(-1, keepdims=True))
    return exp / exp.sum(-1, keepdims=True)


@pytest.mark.full
def test_potts_scores_are_means_of_the_neighbours(choices, trained):
    """Mean field written out in NumPy: what a node hears is the mean of its neighbours' marginals."""
    config = configs.load(trained / "config.json")
    counts, _ = choices.counts_of_images(config, trained, "val", [choices.Decoding(3.0, 2, potts=True)])
    model, params, _, dataset = restore.load(config, str(trained), "latest", "val")
    boxes = dict(model.relations)
    batches = choices.eval_batches(dataset, "val", batch_size=1, size=config.data.eval_size)
    changed = 0
    for ours, unaries, batch in zip(counts["weight 3, num_iterations 2, Potts"], counts["unary"], batches, strict=True):
        unary = np.asarray(model.apply({"params": params}, batch["image"]).unary, np.float64)[0]
        height, width, k = unary.shape
        q = softmax(unary)
        for _ in range(2):
            heard = unary.copy()
            for box in boxes.values():
                total, number = np.zeros_like(q), np.zeros((height, width, 1))
                for row, col in box:
                    for i, j in np.ndindex(height, width):
                        if 0 <= i + row < height and 0 <= j + col < width:
                            # Each edge is heard at both of its ends.
                            total[i, j] += q[i + row, j + col]
                            total[i + row, j + col] += q[i, j]
                            number[i, j] += 1
                            number[i + row, j + col] += 1
                heard += 3.0 * total / np.maximum(number, 1)
            q = softmax(heard)
        labels = decode.upsample(np.log(q)[None].astype(np.float32), batch["label"].shape[1:3]).argmax(-1)
        expected = np.asarray(metrics.confusion_matrix(labels, batch["label"], k))
        assert np.abs(ours[0] - choices.ladder.of_classes(expected)).max() <= 4  # pixels that are undecided
        changed += np.abs(ours - unaries).sum()
    assert changed > 100


def test_unseen_images_need_a_unary_of_before(choices, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["choices.py", "--set", "animals", "--unseen", "20", "--choices", "free", "joint"])
    with pytest.raises(SystemExit):
        choices.main()
    assert "--unseen 20: joint train unary and relations on the same images" in capsys.readouterr().err


@pytest.mark.full
def test_what_is_sharpened_is_a_row_of_its_own(choices, config, tmp_path):
    config.train.steps, config.model.refinement_convs.layers = 2, ("conv2", "conv3")
    choices.loop.train_and_evaluate(config, str(tmp_path / "work"))
    found = configs.load(tmp_path / "work/config.json")
    counts, names = choices.counts_of_images(found, tmp_path / "work", "val", [choices.Decoding()])
    assert list(counts) == ["unary", "weight 1", "weight 1, sharpened"]
    rows = evaluate.evaluate(found, str(tmp_path / "work"), "latest", "val")["rows"]
    for row, ours in {"all": "weight 1", "convs": "weight 1, sharpened"}.items():
        miou = choices.ladder_table.scores(counts[ours].sum(0), list(range(len(names))))["miou"]
        assert miou == pytest.approx(100 * rows[row]["miou"], abs=1e-3)


def test_the_summary_compares_with_the_unary_and_the_ladder(choices, tmp_path, capsys):
    rng, truth = np.random.default_rng(0), np.full((20, 1, 4), 100)

    def keep(name, seed, **hits):
        counts = {row: np.stack([rng.binomial(100, p, truth.shape), truth, truth], 2) for row, p in hits.items()}
        rows = {row: choices.ladder_table.scores(x.sum(0), [0, 1, 2, 3]) for row, x in counts.items()}
        result = dict(set="animals", rung=name, seed=seed, class_indices=[0, 1, 2, 3], rows=rows)
        path = tmp_path / f"choices_animals_{choices.slug(name)}_{seed}.json"
        choices.ladder.write(path, result | dict(counts=choices.ladder.pack(counts)))

    keep(choices.LADDER, 0, **{"unary": 0.5, "weight 1": 0.7, "weight 2": 0.6, "damping 0.5": 0.9})
    keep(choices.LADDER, 1, **{"unary": 0.5, "weight 1": 0.7, "weight 2": 0.6})
    keep("free", 1, **{"unary": 0.5, "weight 1": 0.4, "weight 2": 0.8})
    choices.summary(argparse.Namespace(results=tmp_path))
    path = tmp_path / "choices_animals_free_1.json"
    said = path.read_text()
    path.write_text(json.dumps(json.loads(said) | {"unseen": 20}))
    with pytest.raises(SystemExit, match="choices of animals with different unseen: not one ladder"):
        choices.summary(argparse.Namespace(results=tmp_path))
    path.write_text(said)
    *lines, last = capsys.readouterr().out.splitlines()
    out = json.loads(last)["animals"]
    assert out["as in the ladder"]["weight 1"] > out["as in the ladder"]["weight 2"] > 0 > out["free"]["weight 1"]
    gains = [
        [x.split()[0] for x in line.split("weight ")[1][1:].split("]")[:2] if x] for line in lines if "weight" in line
    ]
    assert [g[1][0] for g in gains] == ["+", "-", "-", "+"]  # over the ladder's: at weight 1, and of "free" at its own
    assert "as in the ladder: unary" in lines[2] and lines[2].endswith("(2 seeds)")
    assert sum(line.endswith(" 1") and "damping 0.5" in line for line in lines) == 1
