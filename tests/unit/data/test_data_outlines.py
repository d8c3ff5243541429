"""Outlines of labelme, CVAT and COCO's tools in image_folder: read as painted, and refused in one line."""

import base64
import io
import json

import annotated as layout
import numpy as np
import pytest
from PIL import Image

from pwcrf_jax.cli import check
from pwcrf_jax.data import DataError, load_dataset
from pwcrf_jax.data.sets.image_folder import ImageFolder

SQUARE = [[2, 3], [6, 3], [6, 8], [2, 8]]  # x, y
INSIDE = (slice(3, 8), slice(2, 6))  # its pixels by their centres
BORDERED = (slice(3, 9), slice(2, 7))  # and with its border


@pytest.fixture
def root(tmp_path):
    return tmp_path / "own"


def planned(root, **options):
    return ImageFolder.plan(str(root), **options)


def labels(root):
    """Id -> mask, without preparing anything."""
    plan = planned(root)
    pairs = [pair for split in plan.splits.values() for pair in split]
    return {p.id: plan.coding(p.mask, p.image, 1e6) for p in pairs if p.mask}


def filled(*areas, fill=0):
    label = np.full(layout.SIZE, fill, np.uint8)
    for area, value in areas:
        label[area] = value
    return label


def refused(root, says):
    with pytest.raises(DataError, match=says) as e:
        labels(root)
    assert "\n" not in str(e.value) and len(str(e.value)) < 500


# labelme ------------------------------------------------------------------------------------------------


def labelme(root, *shapes, name="a", **more):
    layout.image(root / f"{name}.jpg", seed=len(name) + ord(name[-1]))
    layout.labelme(root / f"{name}.json", list(shapes), **more)


def png(inside):
    out = io.BytesIO()
    Image.fromarray(inside).save(out, "PNG")
    return base64.b64encode(out.getvalue()).decode()


@pytest.fixture
def two(root):
    """Two images, one in a folder; the second shape covers a part of the first."""
    labelme(root, layout.shape("car", SQUARE), layout.shape("sky", [[4, 3], [20, 5]], "rectangle"))
    labelme(root, layout.shape("__ignore__", SQUARE), name="sub/b")
    return root


def test_labelme_shapes_are_painted_in_their_order(two):
    plan = planned(two)
    assert (
        plan.class_names == ("background", "car", "sky")
        and plan.form == "labelme polygons, unpainted pixels background"
    )
    assert {s: len(pairs) for s, pairs in plan.splits.items()} == {"train": 1, "val": 1}
    found = labels(two)
    np.testing.assert_array_equal(found["a"], filled((BORDERED, 1), ((slice(3, 6), slice(4, 21)), 2)))
    np.testing.assert_array_equal(found["sub/b"], filled((BORDERED, 255)))


@pytest.mark.parametrize(
    ("text", "fill", "values"),
    [("sky\ncar\n", 255, (1, 0)), ("sky\ncar\nBackground\n", 2, (1, 0)),
     ("__ignore__\n_background_\ncar\nsky", 0, (1, 2)),
     ("1: car\n0: sky", 255, (1, 0)), ("car 1 2 3\nsky 4 5 6\nvoid 0 0 0\n", 255, (0, 1))],
)  # fmt: skip
@pytest.mark.parametrize("file", ["classes.txt", "labels.txt"])
def test_unpainted_pixels_are_background_if_it_is_listed_else_void(two, text, fill, values, file):
    (two / file).write_text(text)
    car, sky = values
    expected = filled((BORDERED, car), ((slice(3, 6), slice(4, 21)), sky), fill=fill)
    np.testing.assert_array_equal(labels(two)["a"], expected)
    assert planned(two).form.endswith("void" if fill == 255 else ("Background", "_background_")[file and fill == 0])


def test_labelme_kinds_of_shapes(root):
    inside = np.array([[0, 255, 255], [255, 0, 0]], np.uint8)
    labelme(
        root,
        layout.shape("circle", [[20, 10], [23, 14]], "circle"),
        layout.shape("turned", SQUARE, "oriented_rectangle"),
        layout.shape("mask", [[10, 15], [12, 16]], "mask", mask=png(inside)),
        {"label": "old", "points": [[0, 0], [1, 0], [1, 1]]},
    )
    labelme(root, name="b")
    plan = planned(root)
    assert plan.class_names == ("background", "circle", "mask", "old", "turned")
    label = labels(root)["a"]
    assert (label[BORDERED] == 4).all() and (label[5:16, 20] == 1).all() and label[4, 20] == 0
    np.testing.assert_array_equal(label[15:17, 10:13], (inside > 0) * 2)
    assert label[0, 0] == label[0, 1] == label[1, 1] == 3


def test_labelme_beside_in_folders_with_spaces_and_other_places(root):
    labelme(root / "images/été 1", layout.shape("car", SQUARE))
    layout.image(root / "images/b.PNG")
    layout.labelme(root / "json/b.json", [], imagePath="..\\images\\b.PNG", imageHeight=None, imageWidth=None)
    layout.image(root / "images/free.jpg")
    (root / "package.json").write_text('{"name": "x"}')
    assert set(labels(root)) == {"été 1/a", "b"}


def test_labelme_says_what_it_leaves_out(two, caplog):
    layout.image(two / "c.jpg")
    (two / "package.json").write_text('{"name": "x"}')
    planned(two)
    assert (
        "1 images without .json are left out: c" in caplog.text and "1 JSON files are none of labelme's" in caplog.text
    )


def test_folders_of_splits_are_splits_and_val_is_drawn_where_it_is_missing(root):
    for split, count in (("train", 6), ("test", 2)):
        for i in range(count):
            labelme(root / split, layout.shape("car", SQUARE), name=str(i))
    splits = planned(root, val_fraction=0.3).splits
    assert {s: len(p) for s, p in splits.items()} == {"train": 4, "val": 2, "test": 2}
    assert all(p.id.startswith("train/") for p in splits["val"])
    for i in range(3):
        labelme(root / "valid", layout.shape("car", SQUARE), name=str(i))
    assert {s: len(p) for s, p in planned(root).splits.items()} == {"train": 6, "val": 3, "test": 2}
    (root / "train.txt").write_text("train/1\nvalid/0.jpg\n")
    assert {s: [p.id for p in pairs] for s, pairs in planned(root).splits.items()} == {"train": ["train/1", "valid/0"]}
    (root / "train.txt").unlink()
    labelme(root, name="astray")
    refused(root, r"own: has folders of splits \(test, train, val\), but 'astray' lies in none of them")


SPOILED_SHAPES = {
    "line": (layout.shape("car", [[0, 0], [3, 3]], "line"), r"a\.json, shape 1: shape_type 'line' has no area"),
    "point": (layout.shape("car", [[0, 0]], "point"), r"shape_type 'point' has no area"),
    "kind": (layout.shape("car", SQUARE, ["x"] * 2), r"shape_type .*has no area"),
    "few": (layout.shape("car", SQUARE[:2]), r"shape 1: has 2 points, expected 3 or more"),
    "many": (layout.shape("car", SQUARE, "circle"), r"a circle has 4 points, expected 2"),
    "outside": (layout.shape("car", [[0, 0], [300, 0], [0, 5]]), r"point \(300, 0\) lies outside of its image"),
    "infinite": (layout.shape("car", [[0, 0], [1e999, 0], [0, 5]]), r"Infinity is no number"),
    "text": (layout.shape("car", [[0, 0], ["x", 0], [0, 5]]), r"coordinate 'x' is no finite number"),
    "points": (layout.shape("car", {"x": 1}), r"shape 1: points \(dict of 1\) is no list"),
    "label": (layout.shape(7, SQUARE), r"shape 1: label 7 is no name"),
    "empty": (layout.shape(" ", SQUARE), r"shape 1: label ' ' is no name"),
    "shape": (3, r"shape 1: it 3 is no object"),
    "base64": (layout.shape("car", SQUARE[::2], "mask", mask="?"), r"its mask '\?' is not base64"),
    "no mask": (layout.shape("car", SQUARE[::2], "mask"), r"its mask None is not base64"),
    "no png": (layout.shape("car", SQUARE[::2], "mask", mask="AAAA"), r"shape 1, mask: cannot be decoded"),
    "large": (layout.shape("car", SQUARE[::2], "mask", mask=png(np.ones((50, 50), np.uint8))),
              r"mask: has more pixels"),
}  # fmt: skip


@pytest.mark.parametrize("name", SPOILED_SHAPES)
@pytest.mark.parametrize("listed", [False, True])
def test_spoiled_labelme_shapes_are_refused(root, name, listed):
    shape, says = SPOILED_SHAPES[name]
    labelme(root, shape)
    labelme(root, layout.shape("sky", SQUARE), name="b")
    if listed:
        (root / "classes.txt").write_text("car\nsky\n")
    refused(root, says)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"shapes": None}, r"a\.json: shapes None is no list"),
        ({"imageHeight": 40, "imageWidth": 60}, r"a\.json: says that .*a\.jpg has 60x40 pixels, but it has 30x20"),
        ({"imageHeight": "x"}, r"a\.json: imageHeight or imageWidth 'x' is no finite number"),
        ({"imageHeight": -1}, r"imageWidth -1 is no finite number of 1 or more"),
        ({"imagePath": "b.jpg"}, r"a\.json: its imagePath is .*b\.jpg, but .*a\.jpg is beside it"),
        ({"imagePath": 3}, r"a\.json: imagePath 3 is no name"),
    ],
)
def test_spoiled_labelme_files_are_refused(two, more, says):
    layout.image(two / "b.jpg")
    content = json.loads((two / "a.json").read_text())
    layout.write_json(two / "a.json", content | more)
    refused(two, says)


def test_labelme_files_without_their_image_are_refused(two):
    (two / "a.jpg").unlink()
    refused(two, r"a\.json: image 'a\.jpg' is not in .*own; add it, or remove its annotations")
    content = json.loads((two / "a.json").read_text())
    layout.write_json(two / "a.json", content | {"imageData": "AAAA"})
    refused(two, r"only a copy within the JSON; write it out: labelme_export_json .*a\.json, then")
    layout.image(two / "a.jpg"), layout.image(two / "a.png")
    refused(two, r"a\.json: may be of .*a\.jpg or .*a\.png; rename or remove one")
    (two / "a.png").unlink()
    layout.labelme(two / "more/a.json", [], imagePath="../a.jpg")
    refused(two, r"more/a\.json: is of .*a\.jpg, as is .*a\.json; remove one")


def test_labels_that_are_not_listed_are_refused(two):
    (two / "classes.txt").write_text("car\nroad\n")
    refused(two, r"a\.json, shape 2: label 'sky' is not in .*classes\.txt; add it there, or rename the shape")


def test_turned_images_are_annotated_as_viewers_show_them(two):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (20, 30)).save(two / "a.jpg", exif=exif)  # shown as 30x20
    data = load_dataset("image_folder", source_dir=str(two), data_dir=str(two.parent / "p"))
    found = {
        r["id"]: r
        for s in data.splits
        for source in [data.source(s)]
        for r in map(source.__getitem__, range(len(source)))
    }
    assert found["a"]["image"].shape == (20, 30, 3) and found["a"]["label"][4, 3] == 1


# CVAT ---------------------------------------------------------------------------------------------------

POLYGON = (
    '<polygon label="car" source="manual" occluded="0" points="2.00,3.00;6.00,3.00;6.00,8.00;2.00,8.00" '
    'z_order="{z}">\n</polygon>'
)
BOX = (
    '<box label="sky" source="manual" occluded="0" xtl="4.00" ytl="3.00" xbr="20.00" ybr="5.00" z_order="{z}">\n</box>'
)
TAG = '<tag label="sky" source="manual">\n</tag>'


def cvat(root, *elements, **more):
    for name in ("a.jpg", "sub/b.jpg"):
        layout.image(root / "images" / name, seed=len(name))
    layout.cvat(root / "annotations.xml", {"a.jpg": "\n".join(elements), "sub/b.jpg": TAG}, **more)


@pytest.mark.parametrize(("heights", "top"), [((0, 0), 2), ((1, 0), 1), ((-1, 0), 2)])
def test_cvat_paints_by_z_order(root, heights, top):
    cvat(root, POLYGON.format(z=heights[0]), BOX.format(z=heights[1]))
    plan = planned(root)
    assert plan.class_names == ("background", "car", "sky") and plan.form.startswith("CVAT for images, unpainted")
    assert plan.palette == ((0, 0, 0), (255, 1, 2), (0, 0, 254))
    areas = [(INSIDE, 1), ((slice(3, 5), slice(4, 20)), 2)]
    found = labels(root)
    np.testing.assert_array_equal(found["a"], filled(*(areas if top == 2 else areas[::-1])))
    assert not found["sub/b"].any()


def test_cvat_masks_ellipses_and_turned_boxes(root):
    cvat(
        root,
        '<mask label="car" occluded="0" rle="1, 2, 3" left="4" top="5" width="3" height="2" z_order="0"/>',
        '<ellipse label="sky" occluded="0" cx="20" cy="10" rx="5" ry="2" z_order="0"/>',
        '<box label="car" occluded="0" xtl="8" ytl="2" xbr="10" ybr="8" rotation="90.00" z_order="0"/>',
    )
    label = labels(root)["a"]
    np.testing.assert_array_equal(label[5:7, 4:7], [[0, 1, 1], [0, 0, 0]])
    assert (label[10, 16:25] == 2).all() and label[10, 27] == 0
    assert (label[4:6, 6:12] == 1).all() and label[2, 9] == 0


def test_cvat_subsets_are_splits(root):
    body = POLYGON.format(z=0)
    for i in range(4):
        layout.image(root / f"images/{i}.jpg", seed=i)
    layout.cvat(root / "annotations.xml", {f"{i}.jpg": body for i in range(4)}, attributes='subset="default"')
    assert {s: len(p) for s, p in planned(root).splits.items()} == {"train": 3, "val": 1}
    text = (root / "annotations.xml").read_text()
    for i, subset in enumerate(("Train", "Train", "Validation", "Test")):
        text = text.replace(f'name="{i}.jpg" subset="default"', f'name="{i}.jpg" subset="{subset}"')
    (root / "annotations.xml").write_text(text)
    assert {s: [p.id for p in pairs] for s, pairs in planned(root).splits.items()} == {
        "train": ["0", "1"], "val": ["2"], "test": ["3"]}  # fmt: skip


@pytest.mark.parametrize(
    ("element", "says"),
    [
        ('<polyline label="car" points="0,0;1,1"/>', r"'a\.jpg', polyline 1: has no area.*'Segmentation mask 1\.1'"),
        ('<points label="car" points="0,0"/>', r"points 1: has no area"),
        ('<skeleton label="car"/>', r"skeleton 1: has no area"),
        ('<polygon label="road" points="0,0;1,1;1,0"/>', r"polygon 1: label 'road' is not in the labels"),
        ('<polygon points="0,0;1,1;1,0"/>', r"polygon 1: label None is no name"),
        ('<polygon label="car" points="0,0;1,1"/>', r"polygon 1: has 2 points"),
        ('<polygon label="car" points="0,0;1,1;1"/>', r"is no point x, y"),
        ('<polygon label="car" points="0,0;1,1;1,inf"/>', r"coordinate 'inf' is no finite number"),
        ('<polygon label="car" points="0,0;1,1;1,99"/>', r"point \(1, 99\) lies outside of its image of 30x20"),
        ('<polygon label="car" points="0,0;1,1;1,9" z_order="x"/>', r"z_order 'x' is no finite number"),
        ('<box label="car" xtl="1" ytl="1" xbr="99" ybr="2"/>', r"point \(99, 2\) lies outside"),
        ('<box label="car" xtl="1" ytl="1" xbr="9"/>', r"ybr None is no finite number"),
        ('<box label="car" xtl="1" ytl="1" xbr="9" ybr="2" rotation="nan"/>', r"rotation 'nan' is no finite"),
        ('<ellipse label="car" cx="5" cy="5" rx="1e9" ry="1"/>', r"its radii 1e\+09 and 1 are none"),
        ('<mask label="car" rle="1, 2" left="4" top="5" width="3" height="2"/>', r"runs make up 3 pixels, not 3x2"),
        ('<mask label="car" rle="1, x" left="4" top="5" width="3" height="2"/>', r"run 'x' is no finite number"),
        ('<mask label="car" rle="6" left="29" top="5" width="3" height="2"/>', r"reaches \(32, 7\), beyond its image"),
        ('<mask label="car" rle="6" left="9" top="5" width="99999999999" height="2"/>', r"beyond its image"),
    ],
)
def test_spoiled_cvat_shapes_are_refused(root, element, says):
    cvat(root, element)
    refused(root, says)


def test_spoiled_cvat_files_are_refused(root):
    cvat(root, POLYGON.format(z=0))
    path, text = root / "annotations.xml", (root / "annotations.xml").read_text()

    def with_text(text, says):
        path.write_text(text)
        refused(root, says)

    with_text(text.replace('name="a.jpg"', 'name="c.jpg"'), r"image 'c\.jpg': image 'c\.jpg' is not in .*own; add it")
    with_text(text.replace('name="a.jpg"', 'name="sub/b.jpg"'), r"b\.jpg is there twice")
    with_text(text.replace(' width="30"', ' width="31"'), r"says that .*a\.jpg has 31x20 pixels, but it has 30x20")
    with_text(text.replace(' width="30"', ""), r"width None is no finite number")
    with_text(
        text.replace("<image ", '<track id="0" label="car"/><image ', 1),
        r"tracks of a video; export .*'CVAT for images 1\.1'",
    )
    with_text(text.replace("annotations>", "annotation>") + "<!-- <annotations -->", r"its root is <annotation>")
    with_text("<!DOCTYPE annotations>" + text.partition("\n")[2], r"annotations\.xml: has a DTD")
    with_text(text[: text.index("  <image")] + "</annotations>", r"has no image; export the task")
    with_text(text[:-20], r"annotations\.xml: is not XML")
    path.write_text(text)
    (root / "task2.xml").write_text(text)
    refused(root, r"has 2 files of CVAT, annotations\.xml and task2\.xml; keep one")


# COCO ---------------------------------------------------------------------------------------------------

FLAT = [float(x) for point in SQUARE for x in point]
BRUSH = {"size": list(layout.SIZE), "counts": [20 * 4 + 3, 2, 18, 2, 495]}  # along columns


def coco(root, *annotations, path="annotations/instances_default.json", images=("a.jpg", "sub/b.jpg"), **more):
    for i, name in enumerate(images):
        layout.image(root / "images" / name, seed=i)
    layout.coco(
        root / path, list(images), [{"image": 0, "category": 0, "segmentation": FLAT} | a for a in annotations], **more
    )


@pytest.mark.parametrize("packed", [False, True])
def test_coco_paints_in_the_order_of_annotations(root, packed):
    brush = dict(BRUSH)
    if packed:
        mask = pytest.importorskip("pycocotools.mask")
        brush["counts"] = mask.frPyObjects(BRUSH, *layout.SIZE)["counts"].decode()
    far = [10.0, 10, 13, 10, 13, 12, 10, 12]
    coco(root, {"segmentation": [FLAT, far]}, {"category": 1, "segmentation": brush})
    plan = planned(root)
    assert (
        plan.class_names == ("background", "car", "sky") and plan.form == "COCO polygons, unpainted pixels background"
    )
    found = labels(root)
    expected = filled((INSIDE, 1), ((slice(10, 12), slice(10, 13)), 1), ((slice(3, 5), slice(4, 6)), 2))
    np.testing.assert_array_equal(found["a"], expected)
    assert set(found) == {"a", "sub/b"} and not found["sub/b"].any()


def test_coco_files_are_splits(root):
    """As Roboflow lays them: a file in each folder, the images beside it."""
    for split, count in (("train", 3), ("valid", 2), ("test", 1)):
        names = [f"{i}.jpg" for i in range(count)]
        for i, name in enumerate(names):
            layout.image(root / split / name, seed=i)
        layout.coco(
            root / split / "_annotations.coco.json", names, [{"image": 0, "category": 0, "segmentation": [FLAT]}]
        )
    plan = planned(root)
    assert {s: [p.id for p in pairs] for s, pairs in plan.splits.items()} == {
        "train": ["train/0", "train/1", "train/2"], "val": ["valid/0", "valid/1"], "test": ["test/0"]}  # fmt: skip
    assert {p.image.parent.name for p in plan.splits["val"]} == {"valid"}


def test_coco_files_beside_are_splits_and_test_may_be_without_annotations(root):
    coco(root, {"segmentation": [FLAT]}, path="train.json", images=("a.jpg", "b.jpg"))
    coco(root, path="test.json", images=("c.jpg",))
    assert {s: len(p) for s, p in planned(root).splits.items()} == {"train": 1, "val": 1, "test": 1}
    content = json.loads((root / "test.json").read_text())
    del content["annotations"]
    layout.write_json(root / "test.json", content)
    assert planned(root).unlabelled == ("test",)
    coco(root, path="more.json", images=("d.jpg",))
    refused(root, r"more\.json: which split it is of cannot be told from its name.*train\.json")
    (root / "more.json").rename(root / "val.json")
    coco(root, path="val.json", images=("c.jpg",))
    refused(root, r"val\.json: .*c\.jpg is in .*test\.json, too")


@pytest.mark.parametrize(
    ("annotation", "says"),
    [
        ({"segmentation": []}, r"annotation 1 of a\.jpg: has no segmentation, only a box"),
        ({"segmentation": [FLAT[:4]]}, r"annotation 1 of a\.jpg: has 2 points"),
        ({"segmentation": [FLAT[:7]]}, r"a polygon has 7 numbers, expected x, y"),
        ({"segmentation": [[*FLAT, 99, 1]]}, r"point \(99, 1\) lies outside of its image of 30x20"),
        ({"segmentation": [["x"] * 6]}, r"coordinate 'x' is no finite"),
        ({"segmentation": [7]}, r"polygon 7 is no list"),
        ({"segmentation": "x"}, r"segmentation 'x' is no list"),
        ({"segmentation": {"size": [20, 30], "counts": [1, 2]}}, r"runs make up 3 pixels, not 20x30"),
        ({"segmentation": {"size": [20, 30], "counts": [-1, 601]}}, r"run -1 is no finite number of 0"),
        ({"segmentation": {"size": [20, 30], "counts": "~"}}, r"its compressed runs hold '~'"),
        ({"segmentation": {"size": [20, 30], "counts": 5}}, r"counts 5 is no list"),
        ({"segmentation": {"size": [200000, 300000], "counts": [1]}}, r"runs are of size \[200000, 300000\], its"),
        ({"image": 7}, r"annotation 1: image_id 12 is not there"),
        ({"category": 7}, r"annotation 1: category_id 8 is not there"),
    ],
)  # fmt: skip
def test_spoiled_coco_annotations_are_refused(root, annotation, says):
    coco(root, annotation)
    refused(root, says)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda c: c["images"][0].update(file_name="c.jpg"), r"image 1: image 'c\.jpg' is not in .*own"),
        (lambda c: c["images"][0].update(file_name="../../etc/x.jpg"), r"image '\.\./\.\./etc/x\.jpg' is not in"),
        (lambda c: c["images"][0].update(file_name=None), r"image 1: image None is no name"),
        (lambda c: c["images"][0].update(id=6), r"image 2: id 6 is there twice"),
        (lambda c: c["images"][0].update(file_name="sub/b.jpg"), r"image 2: .*b\.jpg is there twice"),
        (lambda c: c["images"][0].update(width=10**12), r"says that .*a\.jpg has 1000000000000x20 pixels"),
        (lambda c: c["images"][0].update(width="wide"), r"image 1: width 'wide' is no finite number"),
        (lambda c: c.update(images=[]), r"has no image; export it again"),
        (lambda c: c.update(images={}), r"images \(dict of 0\) is no list"),
        (lambda c: c["categories"][0].update(id=2), r"category 2: id 2 is there twice"),
        (lambda c: c["categories"][0].update(name="sky"), r"category 2: 'sky' is there twice"),
        (lambda c: c["annotations"][0].update(image_id=[]), r"annotation 1: image_id \(list of 0\) is not there"),
        (lambda c: c["annotations"].append(3), r"annotation 2: it 3 is no object"),
        (lambda c: c["annotations"][0].update(segments_info=[]), r"is COCO panoptic.*panoptic2detection_coco"),
    ],
)  # fmt: skip
def test_spoiled_coco_files_are_refused(root, spoil, says):
    coco(root, {"segmentation": [FLAT]})
    path = root / "annotations/instances_default.json"
    content = json.loads(path.read_text())
    spoil(content)
    layout.write_json(path, content)
    refused(root, says)


# All of them --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["labelme", "cvat", "coco"])
def test_check_tells_the_form(root, tmp_path, capsys, form):
    if form == "labelme":
        labelme(root, layout.shape("car", SQUARE))
        labelme(root, layout.shape("car", SQUARE), name="b")
    elif form == "cvat":
        cvat(root, POLYGON.format(z=0))
    else:
        coco(root, {"segmentation": [FLAT]})
    assert check.main(["image_folder", "--source_dir", str(root), "--data_dir", str(tmp_path / "p")]) == 0
    out = capsys.readouterr().out
    said = {"labelme": "labelme polygons", "cvat": "CVAT for images", "coco": "COCO polygons"}[form]
    assert f"read as: {said}, unpainted pixels background, 2 images\n" in out and "background" in out


def test_masks_come_before_annotations(two):
    layout.image(two / "images/a.jpg"), layout.image(two / "images/b.jpg")
    layout.mask(two / "masks/a.png"), layout.mask(two / "masks/b.png")
    (two / "classes.txt").write_text("a\nb\n")
    assert planned(two).form == "images and masks of values"


def test_the_fingerprint_knows_annotations_and_classes(two):
    keys = [planned(two).fingerprint]
    labelme(two, layout.shape("car", SQUARE[:3]))
    keys.append(planned(two).fingerprint)
    for text in ("car\nsky\n", "sky\ncar\n", "sky\ncar\nbackground\n"):
        (two / "classes.txt").write_text(text)
        keys.append(planned(two).fingerprint)
    assert len(set(keys)) == len(keys)
