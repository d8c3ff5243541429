"""Prediction into files: tiles without seams, augmentation, names, formats of servers, and what is refused."""

import functools
import json
import os
import pathlib
import shutil

import commands
import jax.numpy as jnp
import numpy as np
import pytest
import small
from layouts import voc
from PIL import Image
from rows import full_row

from pwcrf_jax import config as configs
from pwcrf_jax.configs import voc_vgg16
from pwcrf_jax.data import DataError, load_dataset
from pwcrf_jax.data.sets.synthetic import generate_scene
from pwcrf_jax.evaluation import evaluate
from pwcrf_jax.model import decode
from pwcrf_jax.prediction import image_files, predict, refinement, restore, tiling
from pwcrf_jax.prediction import predictor as inference
from pwcrf_jax.runtime import checkpoint

ROOT = pathlib.Path(__file__).parents[3]


@pytest.fixture(scope="session")
def wide(tmp_path_factory):
    """Workdir of a short run of a network whose cells see far beyond themselves, on crops of 96 x 128."""
    from pwcrf_jax.configs import demo

    config = demo.get_config()
    config.data.data_dir = str(tmp_path_factory.mktemp("wide") / "prepared")
    config.data.synthetic = dict(num_train=24, num_val=8, image_size=(192, 256), seed=0)
    config.data.crop_size = (96, 128)
    config.model.tiny.features = (8, 8, 16, 16)
    config.model.scales, config.model.block6, config.model.pyramid_windows = (1.0, 0.5), ((3, 16),), (5,)
    config.model.hidden = 16
    config.optimizer.learning_rate = 1e-2
    config.train.batch_size = config.eval.batch_size = 8
    config.train.steps = config.train.eval_every = config.train.checkpoint_every = 60
    return small.workdir(tmp_path_factory, "wide", config)


def predictor_of(workdir, **changes):
    return _predictor(workdir, tuple(sorted(changes.items())))


@functools.cache
def _predictor(workdir, changes):
    config = configs.load(workdir / "config.json")
    config.update_from_flattened_dict(dict(changes))
    model, params, _ = restore.restore_params(config, str(workdir))
    return inference.Predictor(config, model, params)


def log_probs_of(workdir, image, **changes):
    ((_, _, marginals),) = predictor_of(workdir, **changes)([("", image)])
    return marginals.log_probs()


def scene(height, width, index=0):
    """The top left of a synthetic scene."""
    size = tuple(max(least, -(-n // 16) * 16) for n, least in ((height, 128), (width, 192)))
    return generate_scene(0, index, "val", size)[0][:height, :width]


# --- tiles -------------------------------------------------------------------------------------------


def test_cells_of_tiles_are_cells_of_the_image():
    assert tiling.alignment((1.0,), 16) == 16
    assert tiling.alignment((1.2, 0.8, 0.4), 16) == tiling.alignment((1.6, 0.8, 0.4), 16) == 40
    assert tiling.alignment((1.0,), 8) == 8 and tiling.alignment((1.2, 0.8, 0.4), 8) == 20
    for scales, frame in (((1.2, 0.8, 0.4), (400, 520)), ((1.0, 0.5), (96, 128)), ((1.6, 0.8, 0.4), (360, 480))):
        for size in ((frame[0] + 1, 7), (1234, 2345), (frame[0], 4 * frame[1])):
            layout = tiling.layout(size, frame, tuple(2 * n for n in frame), 0.5, scales, stride=16)
            assert all(whole >= n for whole, n in zip(layout.canvas, size, strict=True))
            seen, weight = np.zeros(layout.grid, int), np.zeros(layout.grid)
            for corner in layout.corners:
                assert all(at % tiling.alignment(scales, 16) == 0 for at in corner)
                where = layout.cells(corner)
                seen[where] += 1
                weight[where] += layout.weights(corner)
                for at, place, cells, pixels in zip(corner, where, layout.grid, layout.canvas, strict=True):
                    assert place.start * pixels == at * cells and place.stop <= cells
            assert seen.min() > 0 and weight.min() > 0
            for starts, side in zip(layout.starts, layout.tile, strict=True):
                assert all(b - a <= side / 2 for a, b in zip(starts, starts[1:], strict=False))
    one = lambda size, tile: tiling.layout(size, (360, 480), tile, 0.5, (1.6, 0.8, 0.4), stride=16)
    assert one((300, 480), (1080, 1440)).canvas == one((300, 480), (1080, 1440)).tile == (360, 480)
    assert one((361, 900), (1080, 1440)).canvas == one((361, 900), (1080, 1440)).tile == (480, 960), (
        "no more than it needs"
    )
    assert one((1081, 100), (1080, 1440)).tile == (1080, 480)


def test_weights_fall_towards_other_tiles_alone():
    layout = tiling.layout((96, 512), (96, 128), (96, 128), 0.5, (1.0,), stride=16)
    left, middle, right = (layout.weights((0, at))[0] for at in (0, 128, 384))
    assert left[-1] == right[0] == middle[0] == middle[-1] < 1e-3 < 0.7 < left[0] == right[-1]
    assert np.all(np.diff(left) < 0) and np.all(np.diff(right) > 0) and np.argmax(middle) in (3, 4)


@pytest.mark.parametrize("mirrored", [False, True])
def test_reading_at_pixels_is_the_upsampling(mirrored):
    rng = np.random.default_rng(0)
    layout = tiling.layout((75, 91), (96, 128), (96, 128), 0.5, (1.0,), stride=16)
    cells = rng.normal(size=(*layout.grid, 5)).astype(np.float32)
    mask = np.asarray(decode.grid_mask(np.array([(0, 0, *layout.size)]), layout.grid, layout.canvas)[0])
    assert not mask.all()
    whole = decode.upsample(jnp.asarray(cells)[None], layout.canvas, mask[None])[0][:75, :91]
    rows, cols = tiling.taps(np.arange(75), 75, layout, 0), tiling.taps(np.arange(91), 91, layout, 1, mirrored)
    got = decode.read(cells, mask, rows, cols)
    np.testing.assert_allclose(got, whole[:, ::-1] if mirrored else whole, atol=1e-5)


@pytest.mark.full
def test_tiles_leave_no_seams(wide):
    """An image of four times the training size in each direction; frames of the training size."""
    image, frame = scene(384, 512), {"data.eval_size": (96, 128)}
    whole = log_probs_of(wide, image, **frame, **{"tiles.size": (384, 512)})
    assert len(np.unique(whole.argmax(-1))) > 3, "few classes would hide everything"
    agree = lambda **changes: np.mean(log_probs_of(wide, image, **frame, **changes).argmax(-1) == whole.argmax(-1))
    assert agree() >= 0.99
    assert agree(**{"tiles.size": (96, 128), "tiles.overlap": 0.0}) < 0.95, "seams would show here"


def test_what_every_tile_sees_whole_is_exact(trained):
    image, small = scene(250, 333), {"data.eval_size": (96, 128)}  # cells see themselves alone
    whole = log_probs_of(trained, image, **small, **{"tiles.size": (256, 336)})
    tiled = log_probs_of(trained, image, **small, **{"tiles.size": (96, 128)})
    np.testing.assert_allclose(tiled, whole, atol=1e-4)


def test_boxes_do_not_grow_with_the_image(trained):
    """On the 6 x 8 cells of a training crop one box reaches 1 cell and one 2 rows; on 16 x 21 it would be 3 and 6."""
    image, small = scene(256, 336), {"data.eval_size": (96, 128), "crf.num_iterations": 1, "crf.weights": (1000.0,)}
    other = image.copy()
    other[128:144, 160:176] = 255 - other[128:144, 160:176]  # cell (8, 10)
    change = np.abs(log_probs_of(trained, other, **small) - log_probs_of(trained, image, **small)).max(-1)
    rows, cols = (np.unique(x // 16) for x in np.nonzero(change[8::16, 8::16].repeat(16, 0).repeat(16, 1) > 1e-4))
    assert rows.tolist() == [6, 7, 8, 9, 10] and cols.tolist() == [9, 10, 11]


def test_tiles_that_cannot_be_moved_are_refused(trained):
    with pytest.raises(configs.ConfigError, match=r"config\.tiles.*32 pixels.*every 16 pixels.*at least 64"):
        predictor_of(trained, **{"tiles.size": (32, 32), "tiles.overlap": 0.75})
    config = configs.load(trained / "config.json")
    for key, value in (("tiles.size", (3,)), ("tiles.overlap", 1.0), ("tta.scales", ()), ("tta.flip", "yes")):
        broken = config.copy_and_resolve_references()
        with broken.ignore_type():
            broken.update_from_flattened_dict({key: value})
        with pytest.raises(configs.ConfigError, match=f"config.{key}"):
            configs.validate(broken)


def test_any_size_and_order(trained):
    sizes = [(1, 1), (40, 300), (192, 256), (5, 9), (193, 256), (300, 20)]
    images = [(i, scene(*size, index=i)) for i, size in enumerate(sizes)]
    together = predictor_of(trained)
    for (key, image), (got_key, got_image, marginals) in zip(images, together(iter(images)), strict=True):
        assert got_key == key and got_image is image
        labels = marginals.labels()
        assert labels.shape == image.shape[:2] and labels.dtype == np.uint8
        probs = np.exp(marginals.log_probs())
        np.testing.assert_allclose(probs.sum(-1), 1, atol=1e-5)
        np.testing.assert_array_equal(probs.argmax(-1), labels)


# --- against evaluation ------------------------------------------------------------------------------


def figures(dataset, split, labels_of):
    counts, source = 0, dataset.source(split)
    for i in range(len(source)):
        truth, labels = source[i]["label"], labels_of(source[i])
        valid = truth != 255
        counts = counts + np.bincount(truth[valid] * 6 + labels[valid], minlength=36).reshape(6, 6)
    iou = np.diag(counts) / (counts.sum(0) + counts.sum(1) - np.diag(counts))
    return dict(zip(dataset.class_names, iou, strict=True))


@pytest.mark.full
def test_files_of_a_split_are_what_evaluation_scores(wide, tmp_path):
    config = configs.load(wide / "config.json")
    result = predict.predict(config, str(wide), str(tmp_path / "out"), split="val", overlay=False)
    assert result["num_images"] == 8 and result["format"] == "palette" and not result["failed"]
    scored = evaluate.evaluate(config, str(wide))["rows"]["all"]["iou"]
    dataset = load_dataset(**configs.dataset_options(config))
    read = lambda record: np.asarray(Image.open(tmp_path / "out" / "labels" / f"{record['id']}.png"))
    assert figures(dataset, "val", read) == pytest.approx(scored, abs=1e-4)


@pytest.mark.full
def test_augmented_evaluation_is_one_more_row(wide):
    config = configs.load(wide / "config.json")
    assert list(evaluate.evaluate(config, str(wide))["rows"])[-1] == "all"
    config.tta.flip, config.tta.scales = True, (1.0, 1.25)
    config.refine.num_iterations = 0
    result = evaluate.evaluate(config, str(wide), refine="full")
    assert list(result["rows"])[-3:] == ["all", "tta", "refined"]
    # Without iterations, what is refined is what is augmented.
    assert result["rows"]["refined"] == result["rows"]["tta"] != result["rows"]["all"]
    assert "+ augmentation" in evaluate.table(result) and evaluate.summary(result)["miou_tta"] > 0
    augmented = predictor_of(wide, **{"tta.flip": True, "tta.scales": (1.0, 1.25)})
    labels = lambda record: next(augmented([("", record["image"])]))[2].labels()
    dataset = load_dataset(**configs.dataset_options(config))
    assert figures(dataset, "val", labels) == pytest.approx(result["rows"]["tta"]["iou"], abs=1e-4)


# --- augmentation ------------------------------------------------------------------------------------


@pytest.mark.full
def test_augmentation_is_the_mean_over_views(wide):
    """Of an image that fills no frame, so that padding would be mirrored were it part of the view."""
    image = scene(101, 187)
    plain = np.exp(log_probs_of(wide, image))
    mirrored = np.exp(log_probs_of(wide, image[:, ::-1]))[:, ::-1]
    flip = np.exp(log_probs_of(wide, image, **{"tta.flip": True}))
    np.testing.assert_allclose(flip, (plain + mirrored) / 2, atol=1e-5)
    assert np.abs(plain - mirrored).max() > 0.05
    views = [np.exp(log_probs_of(wide, image, **{"tta.scales": (s,)})) for s in (0.75, 1.0, 1.5)]
    np.testing.assert_array_equal(views[1], plain)
    assert np.abs(views[0] - plain).max() > 0.05 and views[0].shape == plain.shape
    both = np.exp(log_probs_of(wide, image, **{"tta.scales": (0.75, 1.0, 1.5)}))
    np.testing.assert_allclose(both, np.mean(views, axis=0), atol=1e-5)


def test_scales_read_where_things_are(trained):
    """Halves of another colour: their border stays where it is at any scale."""
    image = np.zeros((96, 128, 3), np.uint8)
    image[:, 64:] = 255  # between two cells, at all of these
    for scale in (0.5, 1.0, 2.0):
        probs = np.exp(log_probs_of(trained, image, **{"tta.scales": (scale,), "crf.num_iterations": 0}))
        change = np.abs(np.diff(probs[48], axis=0)).sum(-1)
        assert abs(np.average(np.arange(127), weights=change) - 63) <= 1, scale


@pytest.mark.full
def test_mirrored_images_have_mirrored_predictions(wide):
    image, both = scene(200, 300), {"tta.flip": True, "tta.scales": (0.75, 1.0)}
    got, mirrored = log_probs_of(wide, image, **both), log_probs_of(wide, image[:, ::-1], **both)
    np.testing.assert_allclose(np.exp(mirrored[:, ::-1]), np.exp(got), atol=1e-3)
    assert np.mean(mirrored[:, ::-1].argmax(-1) == got.argmax(-1)) > 0.999


@pytest.mark.full
def test_one_image_is_refined_as_in_evaluation(wide):
    """Against `refine_batch`, by what both make of the same pixels."""
    config = configs.load(wide / "config.json")
    image = scene(100, 130)
    log_probs = log_probs_of(wide, image)
    refined, change = refinement.refine_image(log_probs, image, configs.refine_settings(config, "full"))
    assert refined.shape == log_probs.shape and change.shape == (10,) and change[0] > 0
    np.testing.assert_allclose(np.exp(refined).sum(-1), 1, atol=1e-4)
    cells = np.asarray(log_probs[None])  # a grid of one cell a pixel
    truth = np.random.default_rng(0).integers(0, 6, (1, 100, 130)).astype(np.uint8)
    batch = dict(image=image[None], label=truth, valid_box=np.array([[0, 0, 100, 130]], np.int32))
    counts, _ = refinement.refine_batch(cells, batch, configs.refine_settings(config, "full"))
    got = np.bincount(truth.ravel() * 6 + refined.argmax(-1).ravel(), minlength=36).reshape(6, 6)
    assert np.abs(counts[0] - got).sum() <= 4


# --- files in ----------------------------------------------------------------------------------------


def save(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


def test_files_folders_and_patterns(tmp_path):
    root = tmp_path / "in"
    for name in ("a.jpg", "b.PNG", "deep/er/a.png", "deep/x.y.jpeg", ".hidden.png", "out/labels/a.png"):
        save(root / name, scene(8, 8))
    (root / "notes.txt").write_text("no image")
    names = lambda images: set(image_files.find_images(str(images), str(root / "out")).images)
    assert names(root) == {"a", "b", "deep/er/a", "deep/x.y"}
    assert names(root / "a.jpg") == {"a"}
    assert names(root / "*.jpg") == {"a"}
    assert names(root / "**" / "*.png") == {"deep/er/a"}
    assert names(root / "*" / "er" / "*") == {"deep/er/a"}
    shutil.copy(root / "a.jpg", root / "a[1].jpg")
    assert names(root / "a[1].jpg") == {"a[1]"}, "the file of that name, not the pattern"


def test_images_that_cannot_be_told_apart_are_refused(tmp_path):
    for name in ("in/a.jpg", "in/a.png", "other/x/1.png", "other/y/1.png"):
        save(tmp_path / name, scene(8, 8))
    with pytest.raises(DataError, match=r"a\.jpg and .*a\.png.*rename"):
        image_files.find_images(str(tmp_path / "in"), str(tmp_path / "out"))
    target = predict.Targets("out", "palette")
    assert target("x/1") != target("y/1") and target("x/1") == os.path.join("out", "labels", "x", "1.png")
    target = predict.Targets("out", "ade20k")
    target("x/1")
    with pytest.raises(DataError, match="'x/1' and 'y/1' would both be written to out/results/1.png"):
        target("y/1")


@pytest.mark.parametrize("images", ["nowhere", "empty", "empty/*.jpg", "in"])
def test_no_images(trained, tmp_path, monkeypatch, images):
    (tmp_path / "empty").mkdir()
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("")
    monkeypatch.setattr(restore, "restore_params", lambda *_: pytest.fail("went on"))
    config = configs.load(trained / "config.json")
    with pytest.raises(DataError, match="--images=.*no .*files.* there"):
        predict.predict(config, str(trained), str(tmp_path / "out"), images=str(tmp_path / images))
    assert not (tmp_path / "out").exists()


def test_photographs_are_read_upright(tmp_path):
    image = scene(40, 60)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(image).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(predict.read_image(tmp_path / "a.png"), np.rot90(image, -1))
    Image.fromarray(image[..., 0]).save(tmp_path / "grey.png")
    assert predict.read_image(tmp_path / "grey.png").shape == (40, 60, 3)
    with pytest.raises(DataError, match="gone.png"):
        predict.read_image(tmp_path / "gone.png")


def test_output_that_holds_something(trained, tmp_path, monkeypatch):
    save(tmp_path / "in.png", scene(32, 48))
    config = configs.load(trained / "config.json")
    go = lambda output, **options: predict.predict(
        config, str(trained), str(tmp_path / output), images=str(tmp_path / "in.png"), **options
    )
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="--output=.*file: cannot be written"):
        go("file")
    (tmp_path / "out").mkdir()
    go("out", overlay=False)
    (tmp_path / "out" / "labels" / "in.png").write_bytes(b"old")
    with pytest.raises(DataError, match="not empty.*--overwrite"):
        go("out")
    assert (tmp_path / "out" / "labels" / "in.png").read_bytes() == b"old"
    go("out", overwrite=True)
    assert Image.open(tmp_path / "out" / "labels" / "in.png").mode == "P"


# --- files out ---------------------------------------------------------------------------------------


class Fixed:
    """Stands for a predictor: every image has the labels 0, 1, 2, ... in turn."""

    def __init__(self, config, model, params):
        self._num_classes = config.data.num_classes

    def __call__(self, images):
        for key, image in images:
            self._size = image.shape[:2]
            yield key, image, self

    def labels(self):
        return (np.arange(np.prod(self._size)) % self._num_classes).reshape(self._size).astype(np.uint8)


@pytest.fixture
def fixed(trained, tmp_path, monkeypatch):
    """run(format_name, num_classes) -> the label files it wrote, {path: PIL image}; images a/one.jpg, a/two.v2.png."""
    monkeypatch.setattr(inference, "Predictor", Fixed)
    monkeypatch.setattr(restore, "restore_params", lambda *_: (None, None, 7))
    save(tmp_path / "in" / "a" / "one.jpg", scene(70, 90))
    save(tmp_path / "in" / "a" / "two.v2.png", scene(30, 41))

    def run(format_name, num_classes):
        config = configs.load(trained / "config.json")
        config.data.num_classes = num_classes
        work, out = tmp_path / "work", tmp_path / "out"
        work.mkdir()
        colours = [(i, 255 - i, 7) for i in range(num_classes)]
        configs.save_classes([f"thing {i}" for i in range(num_classes)], colours, str(work))
        predict.predict(config, str(work), str(out), images=str(tmp_path / "in"), format_name=format_name)
        assert not list(out.rglob("*.partial"))
        files = {str(p.relative_to(out)): p for p in out.rglob("*.*") if "overlays" not in str(p)}
        assert json.loads(files.pop("classes.json").read_text())[1] == {"name": "thing 1", "colour": [1, 254, 7]}
        return {name: Image.open(path) for name, path in files.items()}

    return run


def labels(size, num_classes):
    return (np.arange(size[0] * size[1]) % num_classes).reshape(size)


def test_palette_and_overlay(fixed, tmp_path):
    images = fixed("auto", 6)
    assert set(images) == {"labels/a/one.png", "labels/a/two.v2.png"}
    one = images["labels/a/one.png"]
    np.testing.assert_array_equal(one, labels((70, 90), 6))
    colours = np.stack([np.arange(6), 255 - np.arange(6), np.full(6, 7)], axis=-1)[labels((70, 90), 6)]
    np.testing.assert_array_equal(one.convert("RGB"), colours)
    overlay = np.asarray(Image.open(tmp_path / "out" / "overlays" / "a" / "one.jpg"), int)
    image = np.asarray(Image.open(tmp_path / "in" / "a" / "one.jpg"), int)
    assert np.abs(overlay - (image + colours) / 2).mean() < 6  # what JPEG loses


def test_format_of_voc(fixed):
    images = fixed("voc", 21)
    folder = "results/VOC2012/Segmentation/comp6_test_cls"
    assert set(images) == {f"{folder}/one.png", f"{folder}/two.v2.png"}
    assert images[f"{folder}/one.png"].mode == "P"
    np.testing.assert_array_equal(images[f"{folder}/two.v2.png"], labels((30, 41), 21))


def test_format_of_cityscapes(fixed):
    images = fixed("cityscapes", 19)
    assert set(images) == {"results/one.png", "results/two.v2.png"}
    one = images["results/one.png"]
    ids = np.array([7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33])
    assert one.mode == "L"
    np.testing.assert_array_equal(one, ids[labels((70, 90), 19)])


def test_format_of_ade20k(fixed):
    one = fixed("ade20k", 150)["results/one.png"]
    assert one.mode == "L"
    np.testing.assert_array_equal(one, labels((70, 90), 150) + 1)


@pytest.mark.parametrize("format_name", ["voc", "cityscapes", "ade20k"])
def test_format_of_other_classes(fixed, format_name, tmp_path):
    with pytest.raises(configs.ConfigError, match=f"--format={format_name} has .* but this run has 6"):
        fixed(format_name, 6)
    assert not (tmp_path / "out").exists()


@pytest.mark.full
def test_probabilities(wide, tmp_path):
    image = scene(60, 70)
    save(tmp_path / "in.png", image)
    config = configs.load(wide / "config.json")
    out = tmp_path / "out"
    predict.predict(config, str(wide), str(out), images=str(tmp_path / "in.png"), probabilities=True)
    with np.load(out / "probabilities" / "in.npz") as stored:
        probs, names = stored["probabilities"].astype(np.float32), stored["class_names"]
    assert tuple(names) == ("sky", "hills", "water", "road", "boat", "car") and probs.shape == (60, 70, 6)
    np.testing.assert_allclose(probs.sum(-1), 1, atol=6e-3)
    np.testing.assert_allclose(probs, np.exp(log_probs_of(wide, image)), atol=1e-3)
    assert np.mean(np.asarray(Image.open(out / "labels" / "in.png")) == probs.argmax(-1)) > 0.99

    config.refine.num_iterations = 2
    refined = tmp_path / "refined"
    predict.predict(config, str(wide), str(refined), images=str(tmp_path / "in.png"), refine="full", probabilities=True)
    wanted, _ = refinement.refine_image(log_probs_of(wide, image), image, configs.refine_settings(config, "full"))
    np.testing.assert_allclose(
        np.load(refined / "probabilities" / "in.npz")["probabilities"], np.exp(wanted), atol=2e-3
    )


# --- classes and splits ------------------------------------------------------------------------------


def test_classes_are_kept_with_the_run(trained, tmp_path):
    config = configs.load(trained / "config.json")
    names, palette = predict.class_info(config, str(trained))
    dataset = load_dataset(**configs.dataset_options(config))
    assert names == dataset.class_names and palette == dataset.palette
    # A workdir of before.
    assert predict.class_info(config, str(tmp_path)) == (names, palette)
    config.data.name, config.data.num_classes = "camvid", 11
    names, palette = predict.class_info(config, str(tmp_path))
    assert names[3] == "Road" and palette[3] == (128, 64, 128)
    config.data.name, config.data.num_classes = "image_folder", 3
    assert predict.class_info(config, str(tmp_path))[0] == ("class_0", "class_1", "class_2")
    with pytest.raises(configs.ConfigError, match="num_classes = 3, but the run .* has 6"):
        predict.class_info(config, str(trained))
    (tmp_path / configs.CLASSES).write_text('[{"name": "a", "colour": [1, 2]}]')
    with pytest.raises(configs.ConfigError, match="classes.json cannot be used"):
        predict.class_info(config, str(tmp_path))


def test_submission_of_a_split_without_labels(tmp_path):
    voc.make(tmp_path / "source", np.random.default_rng(0))
    config = voc_vgg16.get_config()
    config.data.source_dir, config.data.data_dir = str(tmp_path / "source"), str(tmp_path / "prepared")
    config.data.partial = True
    config.data.eval_size = (64, 96)
    config.model.backbone, config.model.hidden, config.model.scales, config.model.block6 = "tiny", 4, (1.0,), ()
    config.model.input_scaling = "tf"
    work = tmp_path / "work"
    params = restore.init_params(configs.build_model(config), 0)
    with checkpoint.Store(str(work / "best"), configs.identity(config), 1) as store:
        store.save(1, {"params": params}, {})
        store.wait()
    with pytest.raises(DataError, match="has no split 'tset'"):
        predict.predict(config, str(work), str(tmp_path / "out"), split="tset")
    result = predict.predict(config, str(work), str(tmp_path / "out"), split="test")
    assert result["format"] == "voc" and result["num_images"] == 1
    (written,) = (tmp_path / "out" / "results").rglob("*.png")
    assert written == tmp_path / "out/results/VOC2012/Segmentation/comp6_test_cls/2008_000006.png"
    image = Image.open(written)
    assert image.mode == "P" and image.size == (96, 64) and image.getpalette()[3:6] == [128, 0, 0]
    val = predict.predict(config, str(work), str(tmp_path / "val"), split="val[:1]", format_name="palette")
    assert val["num_images"] == 1 and len(list((tmp_path / "val" / "labels").iterdir())) == 1


# --- the command -------------------------------------------------------------------------------------


def _predict(*args):
    return commands.run(["-m", "pwcrf_jax", "predict", *args])


def test_unreadable_images_are_named_and_the_others_predicted(trained, tmp_path):
    save(tmp_path / "in" / "a.png", scene(40, 50))
    save(tmp_path / "in" / "c.png", scene(300, 20))
    (tmp_path / "in" / "b.png").write_bytes(b"not a picture")
    out = tmp_path / "out"
    args = ["--workdir", trained, "--images", tmp_path / "in", "--output", out, "--config.tta.flip=true"]
    done = _predict(*args, "--config.data.source_dir=gone", "--refine", "spatial", "--config.refine.num_iterations=1")
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert f"error: {tmp_path / 'in' / 'b.png'}: cannot be decoded" in done.stderr
    assert done.stderr.splitlines()[-1] == f"1 images were not predicted: {tmp_path / 'in' / 'b.png'}"
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["num_images"] == 2 and result["failed"] == [str(tmp_path / "in" / "b.png")]
    assert sorted(p.name for p in (out / "labels").iterdir()) == ["a.png", "c.png"]
    assert Image.open(out / "labels" / "c.png").size == Image.open(out / "overlays" / "c.jpg").size == (20, 300)


def test_what_is_no_image_is_named_and_fails_nothing(trained, tmp_path):
    save(tmp_path / "in" / "a.png", scene(40, 50))
    (tmp_path / "in" / "two\nlines.txt").write_text("no image")
    done = _predict("--workdir", trained, "--images", tmp_path / "in", "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert f"left out: {tmp_path}/in/two\\nlines.txt: no image" in done.stderr.splitlines()
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["num_images"] == 1 and result["left_out"] == [f"{tmp_path}/in/two\nlines.txt"]


@pytest.mark.parametrize(
    ("args", "match"),
    [
        (["--images=a", "--images=b", "--output=out"], "--images is given 2 times"),
        full_row((["--images=", "--output=out"], "--images is empty")),
        full_row((["--images=a", "--output="], "--output must be given")),
        full_row((["--images=a", "--dataset=val", "--output=out"], "give one")),
        (["--images=a"], "--output must be given"),
        full_row((["--output=out"], "--images and --dataset are the sources; one must be given")),
        full_row((["--images=a", "--output=out", "--split=val"], "--split is of pwcrf eval, tune: see")),
        full_row((["--dataset=val", "--output=out", "--format=coco"], "format")),
    ],
)
def test_flags_that_do_not_go_together(trained, args, match):
    done = _predict("--workdir", trained, *args)
    assert done.returncode == 2 and match in done.stderr and "Traceback" not in done.stderr
