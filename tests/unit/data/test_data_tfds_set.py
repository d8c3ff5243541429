"""Sets that TFDS prepared are read without TensorFlow: Pet by TFDS' own code, one with configs and named classes; what
happens where there is none, and damage."""

import dataclasses
import hashlib
import io
import json
import logging
import shutil
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from layouts import tfds as layout
from PIL import Image

from pwcrf_jax.data import DataError, load_dataset

SHAPES = dict(
    dataset="pwcrf_shapes/small", image_key="picture", label_key="areas", label_offset=-1, void=-1, num_classes=0
)


class PwcrfShapes(tfds.core.GeneratorBasedBuilder):
    """As in the catalogue, but prepared without TensorFlow; stored labels 1 and 2 are classes, 0 is void."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="small"), tfds.core.BuilderConfig(name="large")]
    failure = None

    def _info(self):
        features = {
            "picture": tfds.features.Image(),
            "areas": tfds.features.LabeledImage(labels=["nothing", "sky", "ground"]),
            "depth": tfds.features.Image(shape=(None, None, 1), dtype=np.uint16),
            "name": tfds.features.Text(),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        if self.failure:
            raise self.failure
        return {"train": self._records(3), "validation": self._records(1)}

    def _records(self, count):
        for i in range(count):
            picture, areas = shape(i)
            depth = np.zeros(areas.shape, np.uint16)
            yield i, {"picture": _png(picture), "areas": _png(areas), "depth": _png(depth), "name": str(i)}

    _generate_examples = _records  # abstract, but not called


def shape(i):
    rng = np.random.default_rng(i)
    size = (20 + i, 30)
    return rng.integers(0, 256, (*size, 3), dtype=np.uint8), rng.integers(0, 3, size, dtype=np.uint8)


def _png(array):
    out = io.BytesIO()
    Image.fromarray(array).save(out, format="PNG")
    out.seek(0)
    return out


@pytest.fixture(scope="module")
def prepared_pet(tmp_path_factory):
    """(what was downloaded, unpacked; TFDS' folder)."""
    downloads, root = tmp_path_factory.mktemp("downloads") / "pet", tmp_path_factory.mktemp("tfds")
    layout.write_downloads(downloads, np.random.default_rng(0))
    layout.prepare(downloads, root)
    return downloads, root


@pytest.fixture
def pet(prepared_pet, tmp_path):
    """TFDS' folder, to be spoiled."""
    shutil.copytree(prepared_pet[1] / "oxford_iiit_pet", tmp_path / "source/oxford_iiit_pet")
    return tmp_path / "source"


@pytest.fixture
def load(tmp_path):
    return lambda source="", **options: load_dataset(
        "tfds", source_dir=str(source), data_dir=str(tmp_path / "prepared"), **{**layout.OPTIONS, **options}
    )


def _records(data, split):
    source = data.source(split)
    return [source[i] for i in range(len(source))]


def test_pet(prepared_pet, load, caplog):
    downloads, root = prepared_pet
    with caplog.at_level(logging.INFO):
        data = load(root)
    assert {record.name for record in caplog.records} == {"pwcrf_jax.data.prepare"}
    assert data.splits == {"train": 3, "test": 2} and data.class_names == ("class_0", "class_1", "class_2")
    assert "tensorflow" not in sys.modules
    for split, names in (("train", layout.NAMES["trainval"]), ("test", layout.NAMES["test"])):
        records = {record["image"].tobytes(): record for record in _records(data, split)}
        for name in names:
            image = np.asarray(Image.open(downloads / f"images/{name}.jpg"))
            mask = np.asarray(Image.open(downloads / f"annotations/trimaps/{name}.png"))
            assert set(np.unique(mask)) == {1, 2, 3}
            np.testing.assert_array_equal(records.pop(image.tobytes())["label"], mask - 1)
        assert not records
    assert {r["id"] for r in _records(data, "train")} == {f"train_{i:06d}" for i in range(3)}


def test_the_border_of_pet_as_void(prepared_pet, load):
    data = load(prepared_pet[1], num_classes=0, class_names=("pet", "background"), void=2)
    assert data.class_names == ("pet", "background")
    assert all(set(np.unique(r["label"])) == {0, 1, 255} for r in _records(data, "train"))


def test_where_it_may_lie(prepared_pet, load, tmp_path):
    _, root = prepared_pet
    folder = load(root / "oxford_iiit_pet/4.0.0").folder
    assert load(root).folder == load(root, dataset="oxford_iiit_pet:4.0.0").folder == folder
    shutil.copytree(root / "oxford_iiit_pet", tmp_path / "prepared/oxford_iiit_pet")
    assert load().splits == load(root).splits and load().folder != folder
    (tmp_path / "empty").mkdir()
    assert load(tmp_path / "empty").folder == load().folder


def test_prepared_by_its_own_builder(load, tmp_path):
    data = load(**SHAPES)
    assert (tmp_path / "prepared/pwcrf_shapes/small/1.0.0").is_dir()
    assert data.splits == {"train": 3, "validation": 1} and data.class_names == ("sky", "ground")
    expected = {shape(i)[0].tobytes(): shape(i)[1] for i in range(3)}
    for record in _records(data, "train"):
        stored = expected.pop(record["image"].tobytes())
        np.testing.assert_array_equal(record["label"], np.where(stored == 0, 255, stored.astype(int) - 1))
    assert not expected


def test_configs_and_versions(load, tmp_path):
    load(**SHAPES)
    folder = load(**{**SHAPES, "dataset": "pwcrf_shapes"}).folder
    assert load(**{**SHAPES, "dataset": "pwcrf_shapes/large"}).folder != folder
    with pytest.raises(
        DataError, match="pwcrf_shapes: holds the configs large, small; .* such as 'pwcrf_shapes/large'"
    ):
        load(**{**SHAPES, "dataset": "pwcrf_shapes"})
    versions = tmp_path / "prepared/pwcrf_shapes/small"
    for version in ("1.9.0", "1.10.0", "incomplete.x_2.0.0"):
        shutil.copytree(versions / "1.0.0", versions / version)
    newest = load(**SHAPES).folder
    for version, same in (("1.10.0", True), ("1.9.0", False), ("1.0.0", False)):
        named = {**SHAPES, "dataset": f"pwcrf_shapes/small:{version}"}
        assert (load(**named).folder == newest) == same


def test_large_images_are_shrunk(load):
    shrunk, whole = (_records(load(**SHAPES, max_side=n), "train") for n in (15, 30))
    assert {r["image"].shape for r in whole} == {(20 + i, 30, 3) for i in range(3)}
    for small, large in zip(shrunk, whole, strict=True):
        height = large["label"].shape[0] // 2
        assert small["label"].shape == small["image"].shape[:2] == (height, 15)
        rows = np.floor((np.arange(height) + 0.5) * large["label"].shape[0] / height).astype(int)
        np.testing.assert_array_equal(small["label"], large["label"][rows][:, 1::2])
        assert 90 < small["image"].mean() < 165 and small["image"].std() < large["image"].std() * 0.8


def test_an_option_changes_the_records(pet, load):
    assert load(pet).folder != load(pet, void=3).folder


# Refusals ---------------------------------------------------------------------------------------------


def _refused(load, match, *args, **options):
    with pytest.raises(DataError, match=match) as error:
        load(*args, **options)
    return str(error.value)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (dict(dataset=""), r"data\.tfds\.dataset: '' is not the name"),
        (dict(dataset="oxford pet"), "'oxford pet' is not the name"),
        (dict(image_key="img"), r"data\.tfds\.image_key: .* 'img' .* it has .*segmentation_mask"),
        (dict(label_key="label"), r"data\.tfds\.label_key: .* 'label' .* it has .*segmentation_mask"),
        (dict(num_classes=0), r"data\.tfds\.class_names: .*num_classes.*'oxford_iiit_pet' does not name"),
        (dict(class_names=("a", "b")), r"data\.tfds\.num_classes: 3, but there are 2 names \(a, b\)"),
        (dict(class_names=("a", "b", "a")), "are not 2 to 255 different names"),
        (dict(void=1), r"data\.tfds\.void: 1 is one of the 3 classes"),
        (
            dict(num_classes=2),
            r"record 0 of split 'train', segmentation_mask: label value 3 .*label_offset -1 .*0\.\.1",
        ),
        (dict(label_offset=0), r"segmentation_mask: label value 3 .*label_offset \+0 neither a class \(0\.\.2\)"),
        (dict(label_offset=-2), r"segmentation_mask: label value 1 .*label_offset -2"),
        (dict(label_key="image"), "image: mask"),
        (dict(split="all"), "has no option 'split'; its options: dataset, image_key"),
    ],
)
def test_wrong_options(prepared_pet, load, options, match):
    _refused(load, match, prepared_pet[1], **options)


def _shard(pet):
    (path,) = (pet / "oxford_iiit_pet/4.0.0").glob("*-train.*")
    return path


def _flip(pet):
    content = bytearray(_shard(pet).read_bytes())
    content[content.index(b"\x89PNG") + 500] ^= 0x10
    _shard(pet).write_bytes(content)


def _info(pet, old, new):
    path = pet / "oxford_iiit_pet/4.0.0/dataset_info.json"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (_flip, r"4\.0\.0: record \d of split 'train' cannot be read .*prepare the set again"),
        (lambda p: _shard(p).unlink(), r"4\.0\.0: record 0 of split 'train' cannot be read"),
        (
            lambda p: (p / "oxford_iiit_pet/4.0.0/features.json").unlink(),
            r"4\.0\.0: is not a data set that TFDS prepared",
        ),
        (lambda p: _info(p, '"splits"', '"splits'), r"4\.0\.0: is not a data set that TFDS prepared"),
        (lambda p: _info(p, "array_record", "tfrecord"), r"4\.0\.0: is stored as tfrecord.*python -c .*array_record"),
        (lambda p: _info(p, '"name": "oxford_iiit_pet"', '"name": "cats"'), "holds 'cats', not data.tfds.dataset"),
    ],
)
def test_damage(pet, load, spoil, match):
    spoil(pet)
    _refused(load, match, pet)


def test_sizes_that_differ(load, tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "shape", lambda i: (np.zeros((20, 30, 3), np.uint8), np.ones((20, 29), np.uint8)))
    _refused(load, "record 0 of split 'train': areas is 29x20 pixels but picture is 30x20", **SHAPES)


def test_names_that_do_not_exist(load, tmp_path):
    text = _refused(load, "'oxford_pet' is neither prepared in .* not found", dataset="oxford_pet")
    assert "catalog" in text and "\n" not in text
    _refused(load, "'oxford_iiit_pet:9.9.9' is neither prepared in", dataset="oxford_iiit_pet:9.9.9")
    _refused(load, "'oxford_iiit_pet/big' is neither prepared in", dataset="oxford_iiit_pet/big")
    _refused(load, "nowhere is not a folder", tmp_path / "nowhere")


def test_a_builder_that_fails(load, monkeypatch):
    monkeypatch.setattr(PwcrfShapes, "failure", ConnectionError("no network\nand more"))
    _refused(load, "ConnectionError: no network.*pip install tensorflow-cpu.*python -c .*pwcrf_shapes/small", **SHAPES)
    monkeypatch.setattr(PwcrfShapes, "failure", None)
    assert load(**SHAPES).splits == {"train": 3, "validation": 1}


def test_pet_from_its_archives_takes_tensorflow(load, tmp_path, monkeypatch):
    """TFDS takes the archives from source_dir, and unpacks them with TensorFlow."""
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    root = tmp_path / "archives"
    layout.write_downloads(root, np.random.default_rng(0))
    layout.pack(root)
    _refused(load, "NonMatchingChecksumError.*tar.gz", root)
    builder = tfds.builder_cls("oxford_iiit_pet")
    infos = {}
    for url, info in builder.url_infos.items():
        content = (root / info.filename).read_bytes()
        infos[url] = dataclasses.replace(info, size=len(content), checksum=hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(builder, "url_infos", infos)
    text = _refused(load, "tensorflow.*pip install tensorflow-cpu", root)
    command = text[text.index("python -c") :]
    assert str(root) in command and str(tmp_path / "prepared") in command and "array_record" in command
    code = command.removeprefix('python -c "').removesuffix('"')
    compile(code, "command", "exec")


def test_too_many_records_in_the_description(pet, load):
    path = pet / "oxford_iiit_pet/4.0.0/dataset_info.json"
    content = json.loads(path.read_text())
    content["splits"][0]["shardLengths"] = ["5"]
    path.write_text(json.dumps(content))
    _refused(load, r"4\.0\.0: record 3 of split 'train' cannot be read", pet)
