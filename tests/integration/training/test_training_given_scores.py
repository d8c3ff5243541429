"""configs/scores.py: relations on scores that were given with the images, from the folder to labels."""

import numpy as np
import pytest
import small
from PIL import Image

from pwcrf_jax import config as configs
from pwcrf_jax.cli import check
from pwcrf_jax.configs import scores
from pwcrf_jax.data import DataError, load_dataset
from pwcrf_jax.evaluation import evaluate, evaluators, tuning
from pwcrf_jax.model import decode
from pwcrf_jax.prediction import export, predict, predictor, restore
from pwcrf_jax.report import collect
from pwcrf_jax.runtime.errors import ConfigError
from pwcrf_jax.training import loop

K, FRAME = 3, (64, 80)
SIZES = [FRAME, (50, 71), (64, 48), (33, 80), (64, 80), (41, 80), (64, 80), (64, 67)]


def changed(config, changes):
    for key, value in changes.items():
        *sections, name = key.split(".")
        part = config
        for section in sections:
            part = part[section]
        part[name] = value
    return config


def tiny(root, **changes):
    keys = {
        "init_from": "",
        "data.source_dir": str(root),
        "data.scores.dir": str(root / "logits"),
        "data.data_dir": str(root / "prepared"),
        "data.num_classes": K,
        "data.crop_size": (48, 64),
        "data.eval_size": FRAME,
        "data.image_folder.val_fraction": 0.5,
        "model.backbone": "tiny",
        "model.tiny.features": (4, 4, 4, 8),
        "model.scales": (1.0,),
        "model.block6": (),
        "model.hidden": 8,
        "optimizer.learning_rate": 0.03,
        "optimizer.warmup_steps": 0,
        "crf.num_iterations": 2,
        "train.steps": 4,
        "train.batch_size": 8,
        "train.eval_every": 0,
        "train.log_every": 1,
        "eval.batch_size": 8,
        "eval.panel": 0,
        "eval.each_relation": False,
    }
    return changed(scores.get_config(), keys | changes)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Eight images, and their scores in two forms: logits [H/4, W/4, K], and as probabilities [K, H/4, W/4]."""
    root, rng = tmp_path_factory.mktemp("scores"), np.random.default_rng(0)
    for name in ("images", "masks", "logits", "probabilities", "photos"):
        (root / name).mkdir()
    (root / "classes.txt").write_text("sky\nroad\ncar\n")
    for i, (height, width) in enumerate([*SIZES, (96, 160)]):
        label = np.zeros((height, width), np.uint8)
        label[height // 2 :] = 1
        label[height // 3 : height // 2 + 9, width // 4 : width // 2] = 2
        image = Image.fromarray((60 * label[..., None] + rng.integers(0, 60, (height, width, 3))).astype(np.uint8))
        if i < len(SIZES):
            image.save(root / f"images/{i}.png")
            Image.fromarray(label).save(root / f"masks/{i}.png")
        else:
            image.save(root / f"photos/{i}.png")
        centres = label[2::4, 2::4][: -(-height // 4), : -(-width // 4)]
        logits = np.float32(2 * np.eye(K)[centres] + rng.normal(0, 1.2, (*centres.shape, K)))
        probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        np.save(root / f"logits/{i}.npy", logits)
        np.savez(root / f"probabilities/{i}.npz", probs=np.moveaxis(probs, -1, 0))
    return root


@pytest.fixture(scope="module")
def workdir(root, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run") / "run"
    with small.programs(tmp_path_factory):
        result = loop.train_and_evaluate(tiny(root), str(workdir))
    assert set(result["rows"]) == {"unary", "all"}
    assert (workdir / "best").exists()
    return workdir


def of_run(workdir, **changes):
    return changed(configs.load_checked(str(workdir)), changes)


def alone(root, name):
    """Labels of the scores of an image whose sides are multiples of 16, upsampled alone."""
    logits = np.load(root / f"logits/{name}.npy")
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return np.argmax(decode.upsample(log_probs, [4 * n for n in logits.shape[:2]]), -1)


@pytest.mark.full
def test_commands_take_a_run_on_given_scores(root, workdir, tmp_path):
    """Evaluation, its report, tuning by likelihood and prediction, of a split and of photographs larger than a tile."""
    config = of_run(workdir)
    model, params, *_ = restore.restore_params(config, str(workdir))
    assert "unary" not in params and params["pairwise_surrounding"]["first_p"]["kernel"].shape == (3 * 8 + K, 8)
    assert any(np.abs(params[f"pairwise_{name}"]["last_kernel"]).max() > 0.01 for name, _ in model.relations)
    report = collect.Report(str(tmp_path / "report.html"), 4, 2)
    result = evaluate.evaluate(config, str(workdir), report=report)
    assert report.write(result) > 10_000
    rows = {row: figures["pixel_accuracy"] for row, figures in result["rows"].items()}
    assert len(set(rows.values())) > 1, "relations must change labels"
    # The same scores in another form.
    other = evaluate.evaluate(of_run(workdir, **{"data.scores.dir": str(root / "probabilities")}), str(workdir))
    for row, accuracy in rows.items():
        assert other["rows"][row]["pixel_accuracy"] == pytest.approx(accuracy, abs=2e-4)

    tuned = tuning.tune(config, str(workdir), "best", "val", "spatial", 1, method="nll")
    assert tuned["nll_after"] <= tuned["nll_before"] and set(tuned["config"]) >= {
        "crf.unary_temperature",
        "crf.weights",
    }
    configs.apply_tuned(config, str(workdir))
    assert config.crf.unary_temperature == tuned["config"]["crf.unary_temperature"]

    # What predict writes is what eval scores.
    scored = evaluate.evaluate(config, str(workdir))["rows"]["all"]["pixel_accuracy"]
    done = predict.predict(config, str(workdir), str(tmp_path / "split"), split="val")
    assert done["num_images"] == 4 and not done["failed"]
    right = count = 0
    for file in (tmp_path / "split/labels").iterdir():
        truth = np.asarray(Image.open(root / "masks" / file.name))
        right, count = right + (np.asarray(Image.open(file)) == truth).sum(), count + truth.size
    assert right / count == pytest.approx(scored, abs=1e-9)
    photos = str(root / "photos")
    done = predict.predict(config, str(workdir), str(tmp_path / "photos"), images=photos)
    assert done["num_images"] == 1 and Image.open(tmp_path / "photos/labels/8.png").size == (160, 96)


@pytest.mark.full
def test_with_weights_of_0_labels_are_those_of_the_scores(root, workdir):
    """Of an image in a frame, of one in tiles, and of views."""
    config = of_run(workdir, **{"crf.weights": (0.0,), "tiles.size": (64, 96)})
    model, params, *_ = restore.restore_params(config, str(workdir))
    files = configs.score_files(config)
    images = [np.asarray(Image.open(root / f"{name}.png")) for name in ("images/0", "photos/8")]
    given = [(name, x, files(name, x.shape[:2])) for name, x in zip("08", images, strict=True)]
    for name, _, marginals in predictor.Predictor(config, model, params)(given):
        np.testing.assert_array_equal(marginals.labels(), alone(root, name))
    views = predictor.Predictor(changed(config, {"tta.flip": True}), model, params)
    ((_, _, marginals),) = views(given[:1])
    assert (marginals.labels() == alone(root, "0")).mean() > 0.999
    # In the table's row of views each image has its own scores.
    (batch,) = evaluate.batches_of(config, load_dataset(**configs.dataset_options(config)), "val")
    seen = evaluators.Seen(0, batch, None, {"all": np.zeros((1, K, K))}, {}, {})
    evaluators.ImageByImage(views, "all", None, scores=files).add(seen)
    shown = [(i, x, files(batch["id"][i], x.shape[:2])) for i, x in seen.images()]
    found = [(x.labels(), batch["label"][i][: x.size[0], : x.size[1]]) for i, _, x in views(shown)]
    assert np.trace(seen.confusion["tta"][0]) == sum((labels == truth).sum() for labels, truth in found)


@pytest.mark.full
def test_what_is_missing_or_of_other_classes_is_refused_before_training(root, tmp_path, capsys, monkeypatch):
    few = tmp_path / "few"
    few.mkdir()
    for i in range(1, len(SIZES)):
        (few / f"{i}.npy").write_bytes((root / f"logits/{i}.npy").read_bytes())
    for changes, told in (
        ({"data.scores.dir": str(few)}, "no scores of image '0'"),
        ({"data.scores.dir": str(root / "images")}, "label image needs|label images"),
        ({"data.scores.dir": ""}, "is empty"),
    ):
        with pytest.raises(DataError, match=told):
            loop.train_and_evaluate(tiny(root, **changes), str(tmp_path / "none"))
    with pytest.raises(ConfigError, match=r"config\.model\.unary"):
        export.export_predictor(tiny(root), str(tmp_path), str(tmp_path / "file"))
    arguments = ["image_folder", f"--source_dir={root}", f"--data_dir={root / 'prepared'}"]
    assert check.main([*arguments, f"--scores={root / 'logits'}"]) == 0
    assert "pixel accuracy of the scores: " in capsys.readouterr().out
    assert check.main([*arguments, f"--scores={few}"]) == 2
    assert "refused: data.scores.dir" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"model.unary": "net"}, r"data\.scores\.dir"),
        ({"model.relations": ()}, r"model\.relations"),
        ({"model.pairwise_trains_features": False}, r"model\.pairwise_trains_features"),
        ({"loss.objective": "piecewise_staged"}, r"loss\.objective"),
        ({"loss.dice_weight": 0.5}, r"loss\.dice_weight"),
        ({"data.augment": "math:sqrt"}, r"data\.augment"),
    ],
)
def test_what_given_scores_do_not_train_is_refused(changes, key, tmp_path):
    with pytest.raises(ConfigError, match=rf"config\.{key} = .*model\.unary"):
        configs.validate(tiny(tmp_path, **changes))
