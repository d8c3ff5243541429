"""Two trees of images and masks in image_folder: mmsegmentation, Cityscapes-like, VOC's layout; and binary masks."""

import logging

import annotated as layout
import numpy as np
import pytest
from layouts import image_folder
from PIL import Image

from pwcrf_jax.cli import check
from pwcrf_jax.data import DataError, load_dataset
from pwcrf_jax.data.sets.image_folder import ImageFolder

BINARY = "'background 0 0 0' and 'object 255 255 255'"


@pytest.fixture
def root(tmp_path):
    (tmp_path / "own").mkdir()
    (tmp_path / "own/classes.txt").write_text("road\nsky\n")
    return tmp_path / "own"


def load(root):
    return load_dataset("image_folder", source_dir=str(root), data_dir=str(root.parent / "p"))


def paired(root, **options):
    """Split -> id -> the mask's place."""
    plan = ImageFolder.plan(str(root), **options)
    place = lambda path: path and path.relative_to(root).as_posix()
    return {split: {p.id: place(p.mask) for p in pairs} for split, pairs in plan.splits.items()}


def refused(root, says):
    with pytest.raises(DataError, match=says) as e:
        ImageFolder.plan(str(root))
    assert "\n" not in str(e.value)


def tree(root, images, masks):
    for i, name in enumerate(images):
        layout.image(root / name, seed=i)
    for name in masks:
        layout.mask(root / name)


# mmsegmentation -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("image", "mask", "key"),
    [("x.jpg", "x.png", "x"), ("x_leftImg8bit.png", "x_gtFine_labelTrainIds.png", "x"),
     ("x.jpg", "x_labelTrainIds.png", "x"),
     ("x_img.png", "x_img.png", "x_img"), ("x.rgb.jpg", "x.seg.png", "x")],
)  # fmt: skip
def test_mmsegmentation(root, image, mask, key):
    put = lambda split, n: tree(
        root,
        [f"img_dir/{split}/{image.replace('x', f'x_{i}')}" for i in range(n)],
        [f"ann_dir/{split}/{mask.replace('x', f'x_{i}')}" for i in range(n) if split != "test"],
    )
    put("train", 3), put("val", 2)
    of = lambda split, n: {f"{split}/{key.replace('x', f'x_{i}')}": f"ann_dir/{split}/{mask.replace('x', f'x_{i}')}"
                           for i in range(n)}  # fmt: skip
    assert paired(root) == {"train": of("train", 3), "val": of("val", 2)}
    assert ImageFolder.plan(str(root)).form.startswith("mmsegmentation (img_dir and ann_dir")
    put("test", 1)
    assert ImageFolder.plan(str(root)).unlabelled == ("test",)
    for folder, name in (("img_dir", image), ("ann_dir", mask)):
        (root / folder / "val" / name.replace("x", "x_0")).unlink()
        (root / folder / "val" / name.replace("x", "x_1")).unlink()
    assert {s: len(found) for s, found in paired(root).items()} == {"train": 2, "val": 1, "test": 1}


def test_mmsegmentation_is_read_back(root):
    tree(root, ["img_dir/train/a.jpg", "img_dir/val/b.jpg"], ["ann_dir/train/a.png", "ann_dir/val/b.png"])
    data = load(root)
    np.testing.assert_array_equal(data.source("val")[0]["label"], np.eye(*layout.SIZE))
    assert data.splits == {"train": 1, "val": 1} and data.class_names == ("road", "sky")


def test_lists_and_draws_of_trees(root):
    names = [f"{i}.png" for i in range(6)]
    tree(root, [f"img_dir/{n}" for n in names], [f"ann_dir/{n}" for n in names])
    assert {s: len(found) for s, found in paired(root, val_fraction=0.4).items()} == {"train": 4, "val": 2}
    (root / "train.txt").write_text("0\n1.png\n")
    assert paired(root) == {"train": {"0": "ann_dir/0.png", "1": "ann_dir/1.png"}}


def test_what_does_not_go_together_is_refused(root):
    tree(root, ["img_dir/train/a.jpg", "img_dir/train/b.jpg"], [])
    refused(root, r"own: has img_dir but no ann_dir; put it beside")
    (root / "ann_dir").mkdir()
    refused(root, r"ann_dir: holds no image")
    layout.mask(root / "ann_dir/train/zzz.png")
    refused(root, r"ann_dir: no mask is called like an image, 'train/zzz' unlike 'train/a'")
    layout.mask(root / "ann_dir/train/a.png")
    refused(root, r"zzz\.png: has no image .*img_dir/train/zzz\.\*")
    (root / "ann_dir/train/zzz.png").unlink()
    refused(root, r"b\.jpg: has no mask or annotations of the form it was read as \(mmsegmentation")
    layout.image(root / "ann_dir/train/b.jpg")
    refused(root, r"b\.jpg: mask is a JPEG file, masks are PNG files")
    (root / "ann_dir/train/b.jpg").unlink()
    layout.mask(root / "ann_dir/train/b.png")
    (root / "classes.txt").unlink()
    refused(root, r"classes\.txt: is missing; write one class a line")


# Cityscapes ---------------------------------------------------------------------------------------------

CITY = ("train/aachen/aachen_000000_000019", "train/bochum/bochum_000000_000313", "val/ulm/ulm_000000_000019")


@pytest.mark.parametrize("images", ["leftImg8bit", "imgsFine/leftImg8bit"])
@pytest.mark.parametrize(
    ("kinds", "text", "taken"),
    [(("labelIds", "instanceIds", "color"), "road\nsky\n", "labelIds"),
     (("labelIds", "labelTrainIds", "color"), "road\nsky\n", "labelTrainIds"),
     (("labelIds", "labelTrainIds", "color"), "road 1 2 3\nsky 4 5 6\n", "color")],
)  # fmt: skip
def test_cityscapes_like_folders(root, images, kinds, text, taken):
    (root / "classes.txt").write_text(text)
    tree(
        root,
        [f"{images}/{c}_leftImg8bit.png" for c in CITY],
        [f"gtFine/{c}_gtFine_{k}.png" for c in CITY for k in kinds],
    )
    layout.write_json(root / f"gtFine/{CITY[0]}_gtFine_polygons.json", {"imgHeight": 20, "objects": []})
    of = lambda *keys: {key: f"gtFine/{key}_gtFine_{taken}.png" for key in keys}
    assert paired(root) == {"train": of(*CITY[:2]), "val": of(CITY[2])}
    form = ImageFolder.plan(str(root)).form
    assert form == f"Cityscapes ({images} and gtFine, masks *_gtFine_{taken}.png)"


@pytest.mark.parametrize(
    ("images", "masks"), [("frames", "labels"), ("photos", "gt"), ("images", "annotations"), ("x", "Masks2")]
)
def test_folders_of_ones_own_names(root, images, masks):
    names = ("train/north/a", "train/south/a", "train/south/a_b", "val/a")
    tree(root, [f"{images}/{n}_rgb.jpg" for n in names], [f"{masks}/{n}_mask.png" for n in names])
    assert paired(root)["train"] == {n: f"{masks}/{n}_mask.png" for n in names[:3]}
    assert ImageFolder.plan(str(root)).form == f"two folders ({images} and {masks}, masks *_mask.png)"


def test_several_masks_of_an_image_are_refused(root):
    names = ("a", "b", "c")
    tree(root, [f"frames/{n}.jpg" for n in names], [f"labels/{n}_{k}.png" for n in names for k in ("one", "two")])
    refused(root, r"labels: has several masks of an image, \*_one\.png, \*_two\.png; leave those there")
    for n in names[:2]:
        (root / f"labels/{n}_two.png").unlink()
    assert {m for found in paired(root).values() for m in found.values()} == {f"labels/{n}_one.png" for n in names}


def test_two_folders_that_cannot_be_told_apart_are_not_read(root):
    tree(root, ["one/a.jpg", "two/a.png"], [])
    refused(root, r"own: has no folder images; expected images/NAME\.jpg.*labelme, CVAT, COCO or mmsegmentation")


# VOC's layout -------------------------------------------------------------------------------------------

LABELMAP = "# label:color_rgb:parts:actions\nbackground:0,0,0::\ncar:10,20,30::\nsky:128,0,64::\n"


def cvat_masks(root, palette=False):
    """CVAT's "Segmentation mask 1.1", with images."""
    (root / "classes.txt").unlink(missing_ok=True)
    (root / "labelmap.txt").write_text(LABELMAP)
    table = np.zeros((256, 3), np.uint8)
    table[1:3] = (10, 20, 30), (128, 0, 64)
    values = np.zeros(layout.SIZE, np.uint8)
    values[:4], values[4:8] = 1, 2
    for i, name in enumerate("abc"):
        layout.image(root / f"JPEGImages/{name}.jpg", seed=i)
        for folder in ("SegmentationClass", "SegmentationObject") if name != "c" else ():
            layout.mask(root / folder / f"{name}.png", values if palette else table[values],
                        table.ravel().tolist() if palette else None)  # fmt: skip
    (root / "ImageSets/Segmentation").mkdir(parents=True, exist_ok=True)
    (root / "ImageSets/Segmentation/default.txt").write_text("a\nb\nc\n")
    return values


@pytest.mark.parametrize("palette", [False, True])
def test_cvat_masks(root, caplog, palette):
    values = cvat_masks(root, palette)
    with caplog.at_level(logging.WARNING):
        data = load(root)
    assert data.form == "masks of colours in SegmentationClass (labelmap.txt)" and data.splits == {"train": 1, "val": 1}
    assert data.class_names == ("background", "car", "sky") and data.palette[1] == (10, 20, 30)
    np.testing.assert_array_equal(data.source("val")[0]["label"], values)
    assert "1 images without mask are left out: c" in caplog.text


def test_cvat_masks_with_subsets_and_what_is_missing(root):
    cvat_masks(root)
    (root / "ImageSets/Segmentation/Train.txt").write_text("a\n")
    (root / "ImageSets/Segmentation/Validation.txt").write_text("b\n")
    assert {s: list(found) for s, found in paired(root).items()} == {"train": ["a"], "val": ["b"]}
    (root / "JPEGImages").rename(root / "images")
    assert paired(root)["train"]
    (root / "images").rename(root / "elsewhere")
    refused(root, r"has SegmentationClass but no JPEGImages; .*tick 'Save images'")
    (root / "labelmap.txt").unlink()
    refused(root, r"has SegmentationClass but neither labelmap\.txt nor classes\.txt.*data\.name=voc")


def test_labelme2voc_masks(root):
    (root / "classes.txt").unlink()
    (root / "class_names.txt").write_text("_background_\ncar\n")
    tree(root, ["JPEGImages/a.jpg", "JPEGImages/b.jpg"], ["SegmentationClass/a.png", "SegmentationClass/b.png"])
    data = load(root)
    assert data.class_names == ("_background_", "car") and data.form.startswith("masks of values in SegmentationClass")


# Masks of 0 and 255 -------------------------------------------------------------------------------------


@pytest.fixture
def binary(root):
    """images/ and masks/ whose object is 255."""
    for i in range(4):
        layout.image(root / f"images/{i}.jpg", seed=i)
        layout.mask(root / f"masks/{i}.png", np.eye(*layout.SIZE, dtype=np.uint8) * 255)
    return root


def checked(root, capsys):
    code = check.main(["image_folder", "--source_dir", str(root), "--data_dir", str(root.parent / "p")])
    return code, capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "lines"),
    [("road\nsky\n", "'road 0 0 0' and 'sky 255 255 255'"), (None, BINARY),
     ("cat\n", "'background 0 0 0' and 'cat 255 255 255'"),
     ("0: road\n255: cat\n", "'background 0 0 0' and 'cat 255 255 255'"),
     ("road\nsky\nvoid 255\n", "'road 0 0 0' and 'sky 255 255 255'")],
)  # fmt: skip
def test_binary_masks_are_told_their_two_lines_and_these_work(binary, capsys, text, lines):
    (binary / "classes.txt").unlink()
    if text:
        (binary / "classes.txt").write_text(text)
    code, out = checked(binary, capsys)
    assert code == 2 and lines in out and len(out.splitlines()) == 1
    with pytest.raises(DataError, match="255 255 255"):  # as training says
        load(binary)
    first, second = lines.replace("'", "").split(" and ")
    (binary / "classes.txt").write_text(f"{first}\n{second}\n")
    code, out = checked(binary, capsys)
    assert code == 0 and "read as: images and masks of colours, 4 images" in out and "0.0% void" in out
    label = load(binary).source("train")[0]["label"]
    np.testing.assert_array_equal(label, np.eye(*layout.SIZE))


@pytest.mark.parametrize("mode", ["1", "RGB"])
def test_binary_masks_of_other_modes(binary, capsys, mode):
    for path in (binary / "masks").iterdir():
        Image.open(path).convert(mode).save(path)
    code, out = checked(binary, capsys)
    assert code == 2 and f"has PIL mode {mode!r}" in out and BINARY in out
    (binary / "classes.txt").write_text("background 0 0 0\nobject 255 255 255\n")
    assert checked(binary, capsys)[0] == 0


def test_other_masks_are_not_called_binary(binary, capsys):
    layout.mask(binary / "masks/0.png", np.eye(*layout.SIZE, dtype=np.uint8))  # holds 1, too
    layout.mask(binary / "masks/1.png", np.eye(*layout.SIZE, dtype=np.uint8))
    code, out = checked(binary, capsys)
    assert code == 0 and "255 255 255" not in out
    (binary / "classes.txt").unlink()
    code, out = checked(binary, capsys)
    assert code == 2 and "255 255 255" not in out


def test_more_classes_get_a_warning(binary, capsys):
    (binary / "classes.txt").write_text("road\nsky\ntree\n")
    code, out = checked(binary, capsys)
    assert code == 0 and "the only class in training masks is road" in out and BINARY in out


def test_existing_folders_are_read_as_before(tmp_path):
    """Splits, ids and fingerprints depend on nothing new."""
    image_folder.make(tmp_path / "own", np.random.default_rng(3))
    plan = ImageFolder.plan(str(tmp_path / "own"))
    from pwcrf_jax.data.builder import _file_states, fingerprint

    states = {split: _file_states(split, pairs) for split, pairs in plan.splits.items()}
    classes = [[0, 0], [1, 1], [2, 2], [255, 255]]
    assert plan.fingerprint == fingerprint(
        "1.0.0", str(tmp_path / "own"), states, list(image_folder.NAMES), False, classes
    )
