"""The label guard: what it counts, warns of and refuses, its report, and the command."""

import codecs
import io
import json
import logging
import os
import sys
from pathlib import Path

import commands
import numpy as np
import pytest
from layouts import image_folder as layout
from PIL import Image

from pwcrf_jax.cli import check
from pwcrf_jax.data import DataError, label_guard, load_dataset
from pwcrf_jax.data.readers.image_io import encode_png

REPO = Path(__file__).resolve().parents[3]
CLASSES = ("sky", "road", "car", "tree")


class Examples:
    """Feeds a guard with made-up examples; every image differs unless it is given."""

    def __init__(self, *unlabelled):
        self.guard = label_guard.LabelGuard(CLASSES, unlabelled)
        self.rng = np.random.default_rng(0)

    def add(self, split, key, label=None, pixels=None):
        label = (
            np.arange(4, dtype=np.uint8).repeat(36).reshape(12, 12) if label is None else np.asarray(label, np.uint8)
        )
        if pixels is None:
            pixels = self.rng.integers(0, 256, (*label.shape, 3), np.uint8)
        self.guard.add(split, key, encode_png(pixels), pixels, label)

    @property
    def warnings(self):
        return self.guard.report()["warnings"]


@pytest.fixture
def examples():
    return Examples()


def test_counts(examples):
    examples.add("train", "a", [[0, 0, 1], [1, 1, 255]])
    examples.add("train", "b", [[2, 255, 255, 2]])
    examples.add("val", "c", [[0, 1], [2, 0]])
    report = examples.guard.report()
    assert report["classes"] == list(CLASSES)
    assert report["splits"]["train"] == {
        "images": 2, "smallest": [1, 3], "usual": [1, 3], "largest": [2, 4], "labelled": True,
        "void": 0.3, "pixels": [2, 3, 2, 0], "images_with": [1, 1, 1, 0],
    }  # fmt: skip
    assert report["splits"]["val"]["pixels"] == [2, 1, 1, 0]
    assert json.loads(json.dumps(report)) == report
    assert examples.warnings == ["never in training masks: tree"]
    text = label_guard.format_report(report)
    assert "train: 2 images, 1-2 high, 3-4 wide, 30.0% void" in text and "warning: never" in text
    sizes = '--config.data.crop_size="(40,40)" --config.data.eval_size="(40,40)"'
    assert text.endswith(f"\nto train: --config.data.num_classes=4 {sizes} --config.train.steps=100")
    (road,) = (line for line in text.splitlines() if line.startswith("  1 road"))
    assert road.split() == ["1", "road", "42.86%", "1", "25.00%", "1"]


def test_sizes_to_train_with_are_of_the_largest_image_of_any_split(examples):
    examples.add("train", "a", np.zeros((40, 7), np.uint8))
    examples.add("val", "b", np.zeros((2, 81), np.uint8))
    assert '"(40,120)"' in label_guard.format_report(examples.guard.report())


def test_nothing_to_warn_of(examples):
    for split, key in (("train", "a"), ("train", "b"), ("val", "c")):
        examples.add(split, key)
    examples.guard.close("train")
    assert examples.warnings == [] and "no warnings" in label_guard.format_report(examples.guard.report())


def test_unlabelled_splits_count_for_duplicates_only():
    examples = Examples("test")
    examples.add("train", "a")
    pixels = np.zeros((5, 4, 3), np.uint8)
    examples.add("train", "b", np.full((5, 4), 1), pixels)
    examples.add("test", "c", np.full((5, 4), 255), pixels)
    examples.guard.close("test")
    report = examples.guard.report()
    sizes = dict.fromkeys(("smallest", "usual", "largest"), [5, 4])
    assert report["splits"]["test"] == {"images": 1, "labelled": False} | sizes
    assert report["warnings"] == ["1 image is in both 'train' and 'test': b = c"]
    assert "test: 1 images, 5-5 high, 4-4 wide, no labels" in label_guard.format_report(report)


def test_void(examples):
    examples.add("train", "a", [[0, 1, 2, 3]])
    examples.add("train", "b", np.full((2, 2), 255))
    examples.add("train", "nearly", [[255, 255], [255, 0]])
    examples.add("train", "d", [[0, 1, 2, 3, 0, 1, 2, 3]])
    examples.add("val", "c", [[0, 1, 2, 3]])
    examples.guard.close("train")
    assert examples.warnings == ["split 'train': 1 mask is void all over: b"]
    for i in range(7):
        examples.add("val", f"v{i}", np.full((1, 1), 255))
    assert examples.warnings[1:] == [
        "split 'val': 64% of all pixels are void",
        "split 'val': 7 masks are void all over: v0, v1, v2, v3, v4 and 2 more",
    ]


@pytest.mark.parametrize(("split", "refused"), [("train", True), ("train_aug", True), ("val", False)])
def test_nothing_to_learn_is_refused(examples, split, refused):
    for key in "ab":
        examples.add(split, key, np.full((2, 2), 255))
    if refused:
        with pytest.raises(DataError, match=rf"split '{split}': all 2 masks are void all over.*\(a, b\)"):
            examples.guard.close(split)
    else:
        examples.guard.close(split)


def test_classes_that_are_not_learnt(examples):
    examples.add("train", "a", [[0, 1, 255]])
    examples.add("val", "b", [[0, 1, 2]])
    examples.add("trainval", "b", [[0, 1, 2]], np.zeros((1, 3, 3), np.uint8))
    assert examples.warnings == [
        "never in training masks: car, tree",
        "split 'val' holds classes that training never sees: car",
    ]


def test_off_by_one(examples):
    examples.add("test", "void", [[255]])
    assert not any("count from 1" in w for w in examples.warnings)
    examples.add("train", "a", [[1, 3]])
    examples.add("val", "b", [[1]])
    assert any(w.startswith("class 0 (sky) occurs nowhere: do the masks count from 1") for w in examples.warnings)
    examples.add("val", "c", [[0]])
    assert not any("count from 1" in w for w in examples.warnings)


def test_masks_of_0_and_255(examples):
    examples.add("train", "a", [[0, 0, 255]])
    assert any(
        "the only class in training masks is sky; if they are masks of 0 and 255" in w for w in examples.warnings
    )


@pytest.mark.parametrize(
    "label",
    [np.full((2, 2), 4, np.uint8), np.full((2, 2), 254, np.uint8), np.zeros((2, 3), np.uint8), np.zeros((2, 2), int)],
)
def test_impossible_labels_are_refused(label):
    pixels = np.zeros((2, 2, 3), np.uint8)
    with pytest.raises(DataError, match=r"'a' of split 'train'"):
        label_guard.LabelGuard(CLASSES).add("train", "a", encode_png(pixels), pixels, label)


def test_duplicates(examples):
    same = examples.rng.integers(0, 256, (12, 12, 3), np.uint8)
    for split, key in (
        ("train", "a"),
        ("train", "b"),
        ("train_aug", "a"),
        ("trainval", "a"),
        ("val", "c"),
        ("val", "d"),
    ):
        examples.add(split, key, pixels=same)
    examples.add("val", "other shape", np.zeros((6, 24)), same.reshape(6, 24, 3))
    assert sorted(examples.warnings) == [
        "2 images are in both 'train' and 'val': a = c, a = d",
        "2 images are in both 'train_aug' and 'val': a = c, a = d",
        "split 'train': 1 pair is the same image under two names: a = b",
        "split 'val': 1 pair is the same image under two names: c = d",
    ]


# Interpolation ----------------------------------------------------------------------------------------


def scene(rng, classes=8, size=(96, 128)):
    """Boxes and discs of classes one upon the other, some of them 1 to 3 pixels wide."""
    label = np.zeros(size, np.uint8)
    y, x = np.mgrid[: size[0], : size[1]]
    for _ in range(25):
        cy, cx, k = rng.integers(size[0]), rng.integers(size[1]), rng.integers(classes)
        if rng.random() < 0.5:
            label[(y - cy) ** 2 + (x - cx) ** 2 < rng.integers(3, 25) ** 2] = k
        else:
            label[cy : cy + rng.integers(1, 30), cx : cx + rng.integers(1, 4)] = k
    return label


def resized(label, scale, how):
    size = (round(label.shape[1] * scale), round(label.shape[0] * scale))
    return np.asarray(Image.fromarray(label).resize(size, how))


@pytest.mark.parametrize("seed", range(3))
def test_interpolated_masks_are_found(seed):
    rng = np.random.default_rng(seed)
    examples = Examples()
    examples.guard = label_guard.LabelGuard([f"c{i}" for i in range(20)])
    spoiled = []
    for i in range(5):
        label = scene(rng) * 2
        examples.add("train", f"clean{i}", label)
        examples.add("train", f"nearest{i}", resized(label, 1.3, Image.Resampling.NEAREST))
        for scale in (0.7, 1.5, 2, 3):
            spoiled.append(f"scaled{i} by {scale}")
            examples.add("train", spoiled[-1], resized(label, scale, Image.Resampling.BILINEAR))
    (warning,) = (w for w in examples.warnings if "interpolation" in w)
    assert f"{len(spoiled)} masks are blurred" in warning and "scaled0 by 0.7" in warning
    seen = examples.guard._splits["train"].interpolated
    assert seen == spoiled


@pytest.mark.parametrize(
    ("label", "blurred", "borders"),
    [
        ([[0, 0, 3, 6, 6]], 1, 1),
        ([[6, 4, 4, 1, 1]], 1, 1),
        ([[0, 2, 2, 2, 6]], 0, 2),
        ([[0, 0, 1, 1, 0]], 0, 1),
        ([[0, 0, 0, 1, 1]], 0, 0),
        ([[0, 2, 2, 2, 2, 4]] * 2, 0, 4),  # not from one row to the next
        ([[0], [0], [3], [6], [6]], 1, 1),
        ([[0, 5]], 0, 0),
    ],
)
def test_thin_lines_in_between(label, blurred, borders):
    assert label_guard._blur(np.array(label, np.uint8)) == (blurred, 0, borders)


def test_noise_and_void_borders_are_no_interpolation(examples):
    rng = np.random.default_rng(1)
    examples.add("train", "noise", rng.integers(0, 4, (80, 90)))
    label = scene(rng, classes=4)
    edges = np.zeros(label.shape, bool)
    edges[1:] |= label[1:] != label[:-1]
    edges[:, 1:] |= label[:, 1:] != label[:, :-1]
    examples.add("train", "outlined", np.where(edges, 255, label))
    assert not any("interpolation" in w for w in examples.warnings)


def outlined(label, value, width):
    edges = np.zeros(label.shape, bool)
    edges[1:] |= label[1:] != label[:-1]
    edges[:, 1:] |= label[:, 1:] != label[:, :-1]
    if width == 2:
        edges[:-1] |= edges[1:]
        edges[:, :-1] |= edges[:, 1:]
    return np.where(edges, np.uint8(value), label)


def kerbs(rng, width):
    """A road 3, kerbs of two classes 1 and 2 along its sides, grass 0."""
    label = np.zeros((60, 80), np.uint8)
    label[:, 20:60] = 3
    label[:, 20 : 20 + width], label[:, 60 - width : 60] = 1, 2
    return label


@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize(
    "draw",
    [
        lambda rng, w: outlined((scene(rng, classes=2) * 2).astype(np.uint8), 1, w),
        lambda rng, w: outlined((scene(rng, classes=3) * 2).astype(np.uint8), 3, w),
        lambda rng, w: outlined(np.where(scene(rng, classes=2) > 0, 19, 0).astype(np.uint8), 9, w),
        lambda rng, w: outlined(scene(rng, classes=20), 10, w),
        kerbs,
    ],
    ids=["two classes", "few", "object and background", "many", "kerbs"],
)
def test_thin_things_that_were_drawn_are_no_interpolation(width, draw):
    examples = Examples()
    examples.guard = label_guard.LabelGuard([f"c{i}" for i in range(20)])
    for seed in range(3):
        label = draw(np.random.default_rng(seed), width)
        examples.add("train", f"drawn{seed}", label)
    assert not any("interpolation" in w for w in examples.warnings)
    if width == 1:  # the rule of before would have said so
        blurred, _, borders = label_guard._blur(label)
        assert blurred > 0


@pytest.mark.parametrize("value", [5, 9, 100, 254])
def test_a_thin_value_that_is_no_class_is_no_interpolation(value):
    known = np.arange(256) < 5
    known[255] = True
    label = np.zeros((20, 30), np.uint8)
    label[:, 15:] = 255
    label[:, 15] = value
    assert "complete it" in str(label_guard.bad_value("m.png", label, known, "wrong", "complete it"))


def test_advice_for_values_that_are_no_class():
    known = np.arange(256) < 5
    error = lambda label: str(label_guard.bad_value("m.png", np.asarray(label, np.uint8), known, "wrong", "mend it"))
    assert error([[0, 0, 9], [4, 4, 4]]) == (
        "m.png: label value 9 is wrong, first at row 0, column 2, in all 1 pixels with 9; mend it"
    )
    assert "off by one? Classes count from 0; mend it" in error([[1, 2, 5]])
    known[255] = True
    blurred = resized(np.array([[0, 4, 255]], np.uint8).repeat(8, 1).repeat(8, 0), 3, Image.Resampling.BILINEAR)
    assert "resized or turned with interpolation? Do it with nearest neighbour" in error(blurred)


# Data sets --------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    layout.make(tmp_path / "own", np.random.default_rng(0))
    return tmp_path / "own", tmp_path / "prepared"


def load(folder, **options):
    return load_dataset("image_folder", source_dir=str(folder[0]), data_dir=str(folder[1]), **options)


def test_report_is_kept_and_logged_once(folder, caplog):
    Image.open(folder[0] / "images/inner city/c.png").save(folder[0] / "images/d.bmp")
    with caplog.at_level(logging.WARNING):
        data = load(folder)
    logged = [r.message for r in caplog.records]
    assert logged == ["image_folder: split 'train': 1 pair is the same image under two names: inner city/c = d"]
    report = json.loads(Path(data.folder, label_guard.REPORT).read_text())
    assert logged == [f"image_folder: {w}" for w in report["warnings"]] and report == data.label_report()
    caplog.clear()
    with caplog.at_level(logging.INFO):
        assert load(folder).label_report() == report
    assert not caplog.records


def test_a_lost_report_is_made_anew_from_the_records(folder):
    data = load(folder)
    path = Path(data.folder, label_guard.REPORT)
    report = data.label_report()
    for spoil in (path.unlink, lambda: path.write_text("{")):
        spoil()
        assert sorted(load(folder).label_report()) == sorted(report)
        anew = json.loads(path.read_text())
        assert anew["splits"] == report["splits"] and anew["classes"] == report["classes"]


def test_refused_data_leave_nothing(folder):
    for path in (folder[0] / "masks").rglob("*.png"):
        layout.write_mask(path, np.full((24, 36), 255, np.uint8))
    with pytest.raises(DataError, match=r"split 'train': all 6 masks are void all over"):
        load(folder)
    assert not list(folder[1].rglob(label_guard.REPORT)) and not list(folder[1].rglob("*.array_record*"))


def test_command(folder, capsys):
    arguments = ["image_folder", "--source_dir", str(folder[0]), "--data_dir", str(folder[1])]
    assert check.main(arguments) == 0
    out = capsys.readouterr().out
    assert "train: 6 images, 24-24 high, 36-36 wide" in out and "test: 1 images" in out and "street lamp" in out
    assert check.main([*arguments, "--option", "seed=3", "--option", "val_fraction=0.5"]) == 0
    capsys.readouterr()
    assert check.main([*arguments, "--option", "val_fraction=x"]) == 2
    assert capsys.readouterr().out.startswith("refused: data.image_folder.val_fraction: 'x' is no float")
    assert check.main(["image_foldre"]) == 2
    assert "did you mean 'image_folder'" in capsys.readouterr().out
    with pytest.raises(SystemExit) as usage:
        check.main([*arguments, "--option", "seed"])
    assert usage.value.code == 2 and "KEY=VALUE" in capsys.readouterr().err


class Notebook:
    """As little of a stream as a notebook's may be: no reconfigure, no encoding, no file below it."""

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text


def ascii_file():
    return io.TextIOWrapper(io.BytesIO(), encoding="ascii")


STREAMS = {
    "notebook": (Notebook, lambda s: s.text),
    "string": (io.StringIO, lambda s: s.getvalue()),
    "ascii-file": (ascii_file, lambda s: s.buffer.getvalue().decode("ascii")),
    "ascii-codec": (lambda: codecs.getwriter("ascii")(io.BytesIO()), lambda s: s.stream.getvalue().decode("ascii")),
    "latin-file": (lambda: io.TextIOWrapper(io.BytesIO(), "latin-1"), lambda s: s.buffer.getvalue().decode("latin-1")),
    "none": (lambda: None, None),
    "closed": (lambda: open(os.devnull, "w"), None),
}


@pytest.mark.parametrize("name", STREAMS)
def test_command_whatever_standard_output_is(folder, monkeypatch, name):
    make, read = STREAMS[name]
    stream = make()
    if name == "closed":
        stream.close()
    (folder[0] / "classes.txt").write_text("caf\u00e9\n\u8def\nstreet lamp\n", encoding="utf-8")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        got = check.main(["image_folder", "--source_dir", str(folder[0]), "--data_dir", str(folder[1])])
        refused = check.main(["no_such_set"])
    assert got == 0 and refused == 2
    if read:
        text = read(stream)
        assert "train: 6 images" in text and "street lamp" in text and "refused: " in text
        assert ("\u8def" in text) == (name in ("notebook", "string")) != ("\\u8def" in text)
        assert name != "latin-file" or "caf\u00e9" in text


@pytest.mark.parametrize("key", ["name", "source_dir", "data_dir", "partial", "cls"])
def test_what_is_no_option_is_refused_in_a_line(folder, capsys, key):
    with pytest.raises(SystemExit, match="2"):
        check.main(["image_folder", "--source_dir", str(folder[0]), "--option", f"{key}=x"])
    assert f"{key!r} is no option of a data set" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    "arguments",
    [
        ["voc", "--source_dir", "nowhere"],
        ["image_folder", "--option", "max_pixels=True"],
        ["coco", "--option", "seed=1"],
        ["synthetic", "--option", "num_train=0"],
        ["synthetic", "--data_dir", "s3://bucket/x"],
        ["synthetic", "--data_dir", "/dev/null"],
    ],
)
def test_refusals_end_with_2_and_one_line(capsys, arguments):
    assert check.main(arguments) == 2
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("refused: ")


def test_command_as_a_module(folder):
    layout.write_mask(folder[0] / "masks/b.png", np.full((24, 36), 3, np.uint8))
    command = ["-m", "pwcrf_jax", "check", "image_folder", "--source_dir", folder[0], "--data_dir", folder[1]]
    run = commands.run(command)
    assert run.returncode == 2 and not run.stderr
    assert run.stdout.startswith("refused: ") and "b.png: label value 3 is neither a class (0..2)" in run.stdout
    assert "off by one?" in run.stdout
