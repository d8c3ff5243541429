"""Names of classes as annotation tools write them: read right or refused with the line; and names beside other sets."""

import json

import numpy as np
import pytest
from layouts import coco as coco_layout
from PIL import Image

from pwcrf_jax.data import DataError, load_dataset
from pwcrf_jax.data.readers.classes import read_classes
from pwcrf_jax.data.sets.coco import Coco, CocoStuff
from pwcrf_jax.data.sets.tfds_set import _class_names, _Options
from pwcrf_jax.data.sets.voc import Voc

ZERO, ONE = {0: 0, 1: 1, 2: 2, 255: 255}, {1: 0, 2: 1, 3: 2, 255: 255}
FROM_1 = {0: 255, 1: 0, 2: 1, 3: 2}
PLAIN = ("wheat", "bare soil", "drone pad")


def read(tmp_path, text):
    path = tmp_path / "classes.txt"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return read_classes(path)


@pytest.mark.parametrize(
    ("text", "classes"),
    [
        # Numbered lines, from 0 or 1, with or without a heading.
        ("0 wheat\n1 bare soil\n2 drone pad\n", ZERO),
        ("1 wheat\n2 bare soil\n3 drone pad\n", ONE),
        ("Index Name\n0 wheat\n1 bare soil\n2 drone pad\n", ZERO),
        ("class_id;class_name\n1;wheat\n2;bare soil\n3;drone pad\n", ONE),
        ("id\tlabel\n0\twheat\n1\tbare soil\n2\tdrone pad\n", ZERO),
        ("name,value\nwheat,0\nbare soil,1\ndrone pad,2\n", ZERO),
        ('"id","name"\n0,"wheat"\n1,"bare soil"\n2,"drone pad"\n', ZERO),
        ("1) wheat\n2) bare soil\n3) drone pad\n", ONE),
        ("1. wheat\n2. bare soil\n3. drone pad\n", ONE),
        ("0 - wheat\n1 - bare soil\n2 - drone pad\n", ZERO),
        ("0:wheat\n1:bare soil\n2:drone pad\n", ZERO),
        ("wheat=0\nbare soil=1\ndrone pad=2\n", ZERO),
        ("wheat 1\nbare soil 2\ndrone pad 3\n", ONE),
        ("2: drone pad\n0: wheat\n1: bare soil\n", ZERO),
        # YAML, JSON, Python.
        ("- wheat\n- bare soil\n- drone pad\n", ZERO),
        ("---\n- 'wheat'\n- \"bare soil\"\n- drone pad\n", ZERO),
        ("path: ../x\ntrain: images/train\nnc: 3\nnames: ['wheat', 'bare soil', 'drone pad']\n", ZERO),
        ("names:\n  0: wheat\n  1: bare soil\n  2: drone pad\n", ZERO),
        ("Classes:\n- wheat\n- bare soil\n- drone pad\n", ZERO),
        ("bare soil: 2\nwheat: 1\ndrone pad: 3\n", ONE),
        ('["wheat", "bare soil", "drone pad"]', ZERO),
        ('{"wheat": 0,\t"bare soil": 1, "drone pad": 2}', ZERO),
        ('{"1": "wheat", "2": "bare soil", "3": "drone pad"}', ONE),
        (json.dumps({"categories": [{"id": k, "name": name} for k, name in enumerate(PLAIN, 1)]}), ONE),
        ("CLASSES = (\n    'wheat',\n    'bare soil',\n    'drone pad',\n)\n", ZERO),
        ("('wheat', 'bare soil', 'drone pad')", ZERO),
        ("labels = ['wheat', 'bare soil', 'drone pad',]\n", ZERO),
        ('[{"class_id": 1, "name": "wheat"}, {"class_id": 2, "name": "bare soil"}, '
         '{"class_id": 3, "parent_id": 2, "name": "drone pad"}]', ONE),
        ("- {pixel_value: 2, name: bare soil}\n- {pixel_value: 1, name: wheat}\n- {pixel_value: 3, name: drone pad}\n",
         ONE),
        # Quotes, commas, marks, line ends.
        ("'wheat'\n'bare soil'\n'drone pad'\n", ZERO),
        ('"wheat",\n"bare soil",\n"drone pad"\n', ZERO),
        ("\ufeffwheat,\r\n\r\n# fields\r\nbare soil,\r\n\tdrone pad\r\n", ZERO),
        # Void, by any name.
        ("__ignore__\nwheat\nbare soil\ndrone pad\n", ZERO),
        ("-1 ignore\n0 wheat\n1 bare soil\n2 drone pad\n", ZERO),
        ("wheat\nbare soil\ndrone pad\n255 unlabelled\n", ZERO),
        ("no data 0\nwheat\nbare soil\ndrone pad\n", FROM_1),
        ("ignore_region 255\nwheat\nbare soil\ndrone pad\n", ZERO),
        ("0: unlabeled\n1: wheat\n2: bare soil\n3: drone pad\n", FROM_1),
        ("Void 0\nwheat\nbare soil\ndrone pad\n", FROM_1),
        ("dont-care: 3\nwheat: 0\nbare soil: 1\ndrone pad: 2\n", {0: 0, 1: 1, 2: 2, 3: 255}),
        ("7: wheat\n9: bare soil\n33: drone pad\n", {7: 0, 9: 1, 33: 2, 255: 255}),
    ],
)  # fmt: skip
def test_forms_that_are_read(tmp_path, text, classes):
    names, colours, coding = read(tmp_path, text)
    assert (names, colours, coding) == (PLAIN, (), (classes, False))


@pytest.mark.parametrize(
    "text",
    [
        "wheat 1 2 3\nbare soil 4 5 6\nvoid 0 0 0\n",
        "wheat,1,2,3\nbare soil,4,5,6\nignore,0,0,0\n",
        "name,r,g,b\nwheat,1,2,3\nbare soil,4,5,6\nunlabeled,0,0,0\n",
        "# label:color_rgb:parts:actions\nvoid:0,0,0::\nwheat:1,2,3::\nbare soil:4,5,6::\n",
        "1 2 3\twheat\n4 5 6\tbare soil\n0 0 0\tVoid\n",
        "id;name;r;g;b\n0;wheat;1;2;3\n1;bare soil;4;5;6\n255;void;0;0;0\n",
        '[{"name": "wheat", "color": [1, 2, 3]}, {"name": "bare soil", "color": [4, 5, 6]}, '
        '{"name": "void", "color": [0, 0, 0]}]',
        "1 bare soil 4 5 6\n0 wheat 1 2 3\nvoid 0 0 0\n",
        "wheat: [1, 2, 3]\nbare soil: [4, 5, 6]\nvoid: [0, 0, 0]\n",
        "wheat: '#010203'\nbare soil: '#040506'\nvoid: '#000000'\n",
        '[{"name": "wheat", "color": "#010203"}, {"name": "bare soil", "color": "#040506"}, '
        '{"name": "void", "color": "#000000"}]',
    ],
)
def test_forms_of_colours(tmp_path, text):
    names, colours, coding = read(tmp_path, text)
    assert names == ("wheat", "bare soil") and colours == ((1, 2, 3), (4, 5, 6)) and coding.colours
    assert coding.classes == {0x010203: 0, 0x040506: 1, 0: 255}


@pytest.mark.parametrize(
    "names",
    [
        ("traffic light", "sky-blue", "class 1", "road (paved)"),
        ("été", "Straße", "道路", "सड़क", "тротуар"),
        ("lane 1", "lane 2", "lane 3"),
        ("car1", "bus2", "class_3"),
        ("car2", "u-turn", "person's", "2 wheels"),
        ("building, edifice", "wall", "sky"),
        ("red", "green", "blue"),
        ("background", "label_1", "number plate"),
        ("class 1", "class 2", "class 3"),
        ("object", "other classes", "none of the above", "unknown object"),
        ("E. coli", "S. aureus", "B. subtilis"),
        ("B&W", "50% shade", "A/C unit", "vehicle:car"),
    ],
)
def test_names_that_stay_as_they_are(tmp_path, names):
    assert read(tmp_path, "\n".join(names))[0] == names
    coloured = "".join(f"{name} {k} 0 7\n" for k, name in enumerate(names))
    if not any(name[-1].isdigit() for name in names):  # which might be a channel
        assert read(tmp_path, coloured)[0] == names


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("labels\nwheat\nsoil\n", r"line 1: 'labels' looks like a heading"),
        ("Class Name\nwheat\nsoil\n", r"line 1: 'Class Name' looks like a heading"),
        ("class,color\nwheat\nsoil\n", r"line 1: 'class,color' looks like a heading"),
        ("names:\nwheat\nsoil\n", r"line 1: 'names:' is no name"),
        ("wheat\nname: soil\n", r"line \d: .*(no name|neither)"),
        ("item {\n  id: 1\n}\n", r"line 1: 'item \{' is no name"),
        ("wheat\nignore\nsoil\n", r"line 2: 'ignore' would be a class"),
        ("wheat\nsoil\nNULL\n", r"line 3: 'NULL' would be a class"),
        ("wheat\n__ignore__\nsoil\n", r"line 2: '__ignore__' would be a class"),
        ("- wheat\n- dontcare\n- soil\n", r"line 2: 'dontcare' would be a class"),
        ("wheat\nsoil\n255\n", r"line 3: '255' (is a number|would be a class)"),
        ("0\n1\n2\n", r"line 1: '0' is a number"),
        ("wheat\n* soil\n", r"line 2: '\* soil' is no name"),
        ("wheat\n'soil'\n", r"line 2: \"'soil'\" is no name"),
        ("wheat\n-soil\n", r"line 2: '-soil' is no name"),
        ("0 wheat\n2 soil\n", r"starts with a number, but they are not 0, 1, 2"),
        ("0 wheat\n0 soil\n", r"starts with a number, but they are not 0, 1, 2"),
        ("wheat 7\nsoil 11\n", r"ends with a number, but they are not 0, 1, 2"),
        ("lane 2\nlane 1\n", r"ends with a number"),
        ("4 wheels\n2 wheels\n", r"starts with a number"),
        ("wheat: 0\nsoil: 0\n", r"line 2: 'soil' and 'wheat' have the same value 0"),
        ('{"wheat": 0, "wheat": 1}', r"class 'wheat' is there twice"),
        ("300: wheat\n1: soil\n", r"'wheat' has the value 300"),
        ("255: wheat\n0: soil\n", r"'wheat' has the value 255"),
        ("wheat, soil, pad\n", r"names one class"),
        ("wheat,crop\nsoil,ground\n", r"line 1: 'wheat,crop' has columns"),
        ("wheat #ff0000\nsoil #00ff00\n", r"line 1: 'wheat #ff0000' is no name"),
        ("0 128 64 128 wheat\n1 1 1 1 soil\n", r"line 1: .* behind the value 0 is no name"),
        ("- {label: wheat}\n- {label: soil}\n", r"line 1: is no name in the list"),
        ("&a {names: *a}\n", r"nested without end"),
        ("[" * 1500, r"no name|long"),
        ("wheat\nsoil 1 2\n" + "x" * 300, r"line 3: is 300 characters long"),
        ("(0) wheat\n(1) soil\n", r"line 1: '\(0\) wheat', and so on, are names with an index"),
        ("0_wheat\n1_soil\n", r"line 1: '0_wheat', and so on, are names with an index"),
        ("label 1 wheat\nlabel 2 soil\n", r"line 1: 'label 1 wheat', and so on, are names with an index"),
        ("wheat (0)\nsoil (1)\n", r"line 1: 'wheat \(0\)', and so on, are names with an index"),
        ("0x0 wheat\n0x1 soil\n", r"line 1: '0x0 wheat', and so on, are names with an index"),
        ("① wheat\n② soil\n", r"line 1: '① wheat' is no name"),
        ("index,name,kind\n0,wheat,crop\n1,soil,ground\n", r"line 1: 'index,name,kind' has columns"),
        ("index,name,color\n0,wheat,red\n1,soil,blue\n", r"line 2: '0,wheat,red' has columns"),
        ("List of classes\nwheat\nsoil\n", r"line 1: 'List of classes' looks like a heading"),
        ("Object class\nwheat\nsoil\n", r"line 1: 'Object class' looks like a heading"),
        ("2 classes\nwheat\nsoil\n", r"line 1: '2 classes' looks like a heading"),
        ("classes: 2\nwheat: 0\nsoil: 1\n", r"line 1: 'classes' looks like a heading"),
        ("version: 0\nwheat: 1\nsoil: 2\n", r"line 1: 'version' looks like a key"),
        ("0 wheat\nsoil\n", r"line 1: '0 wheat' starts like a numbered line"),
        ("1. wheat\n2. soil\npad\n", r"line 1: '1. wheat' starts like a numbered line"),
        ("3: wheat\nsoil\n", r"line 1: '3: wheat' starts like a numbered line"),
        ("wheat\n1 soil\n2 pad\n", r"line 2: '1 soil', and so on, are names with an index"),
        ("a) wheat\nb) soil\n", r"line 1: 'a\) wheat', and so on, are names with an index"),
        ("I. wheat\nII. soil\nIII. pad\n", r"line 1: 'I. wheat', and so on, are names with an index"),
        ("wheat\nsoil\nborder 255\n", r"line 3: 'border 255' has a value, other classes have none"),
        ("rest 0\nwheat\nsoil\n", r"line 1: 'rest 0' has a value, other classes have none"),
        ("wheat\nsoil\ndo not care\n", r"line 3: 'do not care' would be a class"),
        ("wheat\nignore region\nsoil\n", r"line 2: 'ignore region' would be a class"),
        ("wheat\nsoil\nvoid/unlabelled\n", r"line 3: 'void/unlabelled' would be a class"),
        ("wheat 7 0 crop\nsoil 8 1 ground\n", r"line 1: 'wheat 7 0 crop' is no name"),
        ("wheat 0xff0000\nsoil 0x00ff00\n", r"line 1: 'wheat 0xff0000' is no name"),
        (
            "- {id: 7, trainId: 0, name: wheat}\n- {id: 8, trainId: 1, name: soil}\n",
            r"line 1: 'wheat' has id 7 and trainId 0",
        ),
        ("num_classes: 2\nwheat: 0\nsoil: 1\n", r"line 1: 'num_classes' looks like a key"),
        ("<names>wheat</names>\nsoil\n", r"line 1: .* is no name"),
    ],
)
def test_forms_that_are_refused_with_the_line(tmp_path, text, message):
    with pytest.raises(DataError, match=rf"classes\.txt(, |: ).*{message}") as e:
        read(tmp_path, text)
    assert "\n" not in str(e.value).replace(repr(text), "")


@pytest.mark.parametrize(
    "text",
    ["0: label\n1: bottle\n", "label 1 2 3\nbottle 4 5 6\n", "- {id: 0, name: label}\n- {id: 1, name: bottle}\n"],
)
def test_a_class_called_like_a_heading_is_told_by_its_value(tmp_path, text):
    assert read(tmp_path, text)[0] == ("label", "bottle")


# Files of names beside other sets ----------------------------------------------------------------------


@pytest.fixture
def voc_plan(voc):
    return lambda: Voc.plan(str(voc.root), data_dir=str(voc.root / "d"))


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("class_names.txt", "_background_\nleaf\nstem\n"),
        ("labelmap.txt", "# label:color_rgb:parts:actions\nbackground:0,0,0::\nleaf:0,128,0::\n"),
        ("classes.json", '["background", "leaf"]'),
        ("data.yaml", "nc: 2\nnames: [leaf, stem]\n"),
        ("labels.txt", "\n".join(Voc.class_names[1:])),  # all off by one
        ("Labels.txt", "\n".join([*Voc.class_names[:2], *reversed(Voc.class_names[2:])])),
        ("names.txt", "item {\n}\n"),
        ("_classes.csv", "Pixel Value, Class\n0, background\n1, leaf\n"),
        ("class_dict.csv", "name,r,g,b\nbackground,0,0,0\nleaf,0,128,0\n"),
        ("dataset.yaml", "names:\n  0: background\n  1: leaf\n"),
        ("id2label.json", '{"0": "background", "1": "leaf"}'),
    ],
)
@pytest.mark.parametrize("below", [".", "SegmentationClass"])
def test_own_names_in_a_known_layout_are_refused(voc, voc_plan, file, text, below):
    voc_plan()
    (voc.root / below / file).write_text(text)
    with pytest.raises(DataError, match=rf"{file}(: names \d+ classes of its own|, line 1)"):
        voc_plan()


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("class_names.txt", "\n".join(["_background_", *Voc.class_names[1:]])),
        ("labels.txt", "\n".join(["__ignore__", "_background_", *Voc.class_names[1:]])),
        ("classes.json", json.dumps({name: k for k, name in enumerate(Voc.class_names)})),
        ("label_map.txt", "\n".join(f"{k}: {name}" for k, name in enumerate(Voc.class_names) if k < 5)),
        ("notes.txt", "leaf\nstem\n"),
    ],
)
def test_the_layouts_own_names_are_taken(voc, voc_plan, file, text):
    (voc.root / file).write_text(text)
    assert voc_plan().splits


def test_names_of_coco_stuff_by_category(tmp_path):
    from layouts import coco_stuff

    coco_stuff.make(tmp_path / "s", np.random.default_rng(0))
    text = "".join(f"{k}: {name}\n" for k, name in CocoStuff.declared_values.items())
    (tmp_path / "s/labels.txt").write_text(text)
    assert CocoStuff.plan(str(tmp_path / "s")).splits
    (tmp_path / "s/labels.txt").write_text(text.replace("banner", "leaf"))
    with pytest.raises(DataError, match=r"labels\.txt: names \d+ classes of its own"):
        CocoStuff.plan(str(tmp_path / "s"))


def _renamed(categories):
    categories[2]["name"] = "fruit"


def _moved(categories):
    categories[0]["id"], categories[1]["id"] = 2, 1


def _hidden(categories):
    categories.insert(0, {"id": 3, "name": "fruit"})  # of two with one id the later would count


def _more(categories):
    categories.append({"id": 91, "name": "leaf"})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_renamed, r"its own \(3: fruit\)"),
        (_moved, r"its own \(2: person, 1: bicycle\)"),
        (_hidden, r"its own \(3: fruit\)"),
        (_more, r"its own \(91: leaf\)"),
        (list.clear, r"its own \(none\)"),
    ],
)
def test_own_categories_of_coco_are_refused(tmp_path, spoil, message):
    root = tmp_path / "c"
    coco_layout.make(root, np.random.default_rng(0))
    path = root / "annotations/instances_train2017.json"
    content = json.loads(path.read_text())
    spoil(content["categories"])
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=rf"instances_train2017\.json: its categories .*{message}.*image_folder"):
        load_dataset("coco", source_dir=str(root), data_dir=str(tmp_path / "p"), partial=True)


def test_some_of_cocos_categories_in_other_spelling(tmp_path):
    root = tmp_path / "c"
    coco_layout.make(root, np.random.default_rng(0))
    for path in root.glob("annotations/instances*.json"):
        content = json.loads(path.read_text())
        used = {a["category_id"] for a in content["annotations"]}
        content["categories"] = [c | {"name": c["name"].title()} for c in content["categories"] if c["id"] in used]
        path.write_text(json.dumps(content))
    data = load_dataset("coco", source_dir=str(root), data_dir=str(tmp_path / "p"), partial=True)
    assert data.class_names == Coco.class_names


class _Named:
    names = ("pet", "background", "border")


@pytest.mark.parametrize(
    ("offset", "names", "expected"),
    [
        (0, (), ("pet", "background", "border")),
        (-1, (), ("background", "border")),
        (0, ("animal", "rest", "edge"), ("animal", "rest", "edge")),
        (1, ("x", "pet", "background", "border"), ("x", "pet", "background", "border")),
    ],
)
def test_names_of_a_tfds_feature(offset, names, expected):
    assert _class_names(_Options("x", label_offset=offset, class_names=names), _Named) == expected


@pytest.mark.parametrize(
    ("offset", "names", "message"),
    [
        (0, ("background", "pet", "border"), r"class_names: 'background' is class 0 there, but class 1"),
        (-1, ("pet", "background"), r"class_names: 'background' is class 1 there, but class 0"),
        (1, (), r"label_offset: with \+1, class 0 is none that 'x' names"),
        (1, ("pet", "background", "border", "y"), r"class_names: 'pet' is class 0 there, but class 1"),
    ],
)
def test_names_that_contradict_a_tfds_feature(offset, names, message):
    with pytest.raises(DataError, match=message):
        _class_names(_Options("x", label_offset=offset, class_names=names), _Named)


def test_masks_are_read_by_written_values(tmp_path):
    """From the file to the record: 1, 2, 3 are the classes, and 0 is refused unless it is void."""
    root = tmp_path / "own"
    for k in range(3):
        for folder in ("images", "masks"):
            (root / folder).mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 9, 3), k, np.uint8)).save(root / f"images/{k}.png")
        Image.fromarray(np.arange(72, dtype=np.uint8).reshape(8, 9) % 3 + 1).save(root / f"masks/{k}.png")
    (root / "classes.txt").write_text("id,name\n1,wheat\n2,soil\n3,pad\n")
    data = load_dataset("image_folder", source_dir=str(root), data_dir=str(tmp_path / "p"))
    np.testing.assert_array_equal(data.source("val")[0]["label"].ravel(), np.arange(72) % 3)
    Image.fromarray(np.arange(72, dtype=np.uint8).reshape(8, 9) % 4).save(root / "masks/0.png")
    with pytest.raises(DataError, match=r"0\.png: label value 0 is neither a class \(1\.\.3\) nor void \(255\)"):
        load_dataset("image_folder", source_dir=str(root), data_dir=str(tmp_path / "p"))
