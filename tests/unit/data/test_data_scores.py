"""Scores in files: one reading of every form, and one line for each that has none or two."""

import json
import os
import re
import struct

import numpy as np
import pytest
from PIL import Image

from pwcrf_jax.data import DataError, scores

SIZE = HEIGHT, WIDTH, CLASSES = 6, 8, 4
LOGITS = np.random.default_rng(0).normal(0, 3, SIZE).astype(np.float32)
LOG_PROBS = LOGITS - np.log(np.exp(LOGITS).sum(-1, keepdims=True))
KINDS = {"logits": LOGITS, "log_probabilities": LOG_PROBS, "probabilities": np.exp(LOG_PROBS)}


def save(path, values, kind=None):
    """kind: safetensors' name of a type; None: that of values."""
    if path.suffix == ".npy":
        np.save(path, values)
    elif path.suffix == ".npz":
        np.savez_compressed(path, scores=values, class_names=["a", "b"], notes=np.array([{}], object))
    else:
        raw = values.tobytes()
        kind = kind or {2: "F16", 4: "F32", 8: "F64"}[values.itemsize]
        about = {"dtype": kind, "shape": values.shape, "data_offsets": [0, len(raw)]}
        header = json.dumps({"__metadata__": {"by": "somebody"}, "scores": about}).encode()
        path.write_bytes(struct.pack("<Q", len(header)) + header + raw)
    return path


def refusal(function, *given, **options):
    """The one line that says what is wrong."""
    with pytest.raises(DataError) as error:
        function(*given, **options)
    text = str(error.value)
    assert "\n" not in text and text.startswith("/"), text
    return text


# --- what can be read -------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", scores.array_files.SUFFIXES)
@pytest.mark.parametrize("layout", scores.LAYOUTS)
@pytest.mark.parametrize("kind", scores.KINDS)
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_every_form_is_found_out_and_read_as_the_same(tmp_path, suffix, layout, kind, dtype):
    values = KINDS[kind].astype(dtype)
    values = values if layout == "hwc" else np.ascontiguousarray(values.transpose(2, 0, 1))[None]
    path = save(tmp_path / f"a{suffix}", values)
    assert scores.form({"a": path}, {"a": (HEIGHT, WIDTH)}) == (layout, CLASSES)
    assert scores.kind_of(scores.read_values(path, size=(HEIGHT, WIDTH)), path) == kind
    found = scores.read(path, size=(HEIGHT, WIDTH))
    assert found.dtype == np.float32 and found.shape == SIZE
    np.testing.assert_allclose(found, LOG_PROBS, atol=2e-2 if dtype == np.float16 else 1e-5)
    assert np.array_equal(found, scores.read(path, layout, kind, CLASSES))


def test_bfloat16_other_byte_orders_and_fortran_order(tmp_path):
    upper = (LOGITS.view(np.uint32) >> 16).astype("<u2")
    found = scores.read(save(tmp_path / "a.safetensors", upper, "BF16"), "hwc")
    np.testing.assert_allclose(found, LOG_PROBS, atol=0.1)
    for values in (LOGITS.astype(">f4"), np.asfortranarray(LOGITS)):
        np.testing.assert_allclose(scores.read(save(tmp_path / "a.npy", values), "hwc"), LOG_PROBS, atol=1e-5)
    torch_alike = np.moveaxis(LOGITS, -1, 0)[:, None]  # [classes, 1, H, W], as nnU-Net writes 2D images
    assert scores.read(save(tmp_path / "a.npy", torch_alike), size=(HEIGHT, WIDTH)).shape == SIZE


def test_a_probability_of_zero_is_the_least_that_its_type_holds(tmp_path):
    given = np.zeros(SIZE, np.float16)
    given[..., 1] = 1
    least = scores.read(save(tmp_path / "a.npy", given), "hwc")[0, 0]
    assert least[1] == 0 and np.isclose(least[0], np.log(2.0**-24))


@pytest.mark.parametrize(
    ("shape", "size", "found"),
    [
        ((21, 128, 128), (375, 500), "chw"),  # a square map of a photograph
        ((47, 63, 21), (375, 500), "hwc"),  # stride 8
        ((21, 33, 33), (513, 513), "chw"),
        ((6, 6, 8), (6, 8), "chw"),  # as many classes as rows
        ((6, 8, 8), (6, 8), "hwc"),
        ((19, 1, 1), (32, 32), "chw"),  # one cell
        ((5, 6, 10), (48, 80), "chw"),  # stride 8, where 5 x 6 would be one of 11 to 12
        ((24, 32, 19), (375, 500), "hwc"),  # stride 16, padded
        ((150, 128, 128), (375, 500), "chw"),
        ((8, 8, 8), (8, 8), None),
        ((8, 8, 8), (64, 64), None),
    ],
)
def test_the_layout_that_fits_the_image_is_taken_and_none_of_two(tmp_path, shape, size, found):
    path = save(tmp_path / "a.npy", np.zeros(shape, np.float32))
    if found:
        assert scores.form({"a": path}, {"a": size}).layout == found
        return
    said = refusal(scores.form, {"a": path}, {"a": size})
    assert str(path) in said and f"shape {shape}" in said and "--layout hwc or --layout chw, or --num_classes" in said
    assert scores.form({"a": path}, {"a": size}, "chw") == ("chw", shape[0])
    if shape[0] != shape[2]:
        assert scores.form({"a": path}, {"a": size}, num_classes=shape[0]).layout == "chw"


def test_other_files_tell_the_layout_too(tmp_path):
    shapes = {"a": (8, 8, 5), "b": (8, 7, 5)}
    files = {name: save(tmp_path / f"{name}.npy", np.zeros(shape, np.float32)) for name, shape in shapes.items()}
    assert "--layout" in refusal(scores.form, files, {})
    files["c"] = save(tmp_path / "c.npy", np.zeros((9, 7, 5), np.float32))
    assert scores.form(files, {}) == ("hwc", 5)


def test_names_are_places_below_the_folder(tmp_path):
    (tmp_path / "street").mkdir()
    for name in ("b.npy", "street/a.b.npz", ".hidden.npy", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "street/circle").symlink_to(tmp_path)
    assert list(scores.find(tmp_path)) == ["b", "street/a.b"]


# --- label images -----------------------------------------------------------------------------------------


def test_label_images_are_right_with_their_confidence(tmp_path):
    labels = np.array([[0, 1, 2], [2, 255, 0]], np.uint8)
    Image.fromarray(labels).save(tmp_path / "a.png")
    found = np.exp(scores.read(tmp_path / "a.png", num_classes=3, confidence=0.7))
    np.testing.assert_allclose(found[0], np.eye(3) * 0.55 + 0.15, rtol=1e-6)
    np.testing.assert_allclose(found[1, 1], [1 / 3] * 3, rtol=1e-6)
    np.testing.assert_allclose(found.sum(-1), 1, rtol=1e-6)


@pytest.mark.parametrize(
    ("labels", "options", "says"),
    [
        ([[0, 1]], {}, "needs the number of classes and a confidence"),
        ([[0, 1]], {"num_classes": 2, "confidence": 1.0}, "got 2 and 1.0"),
        ([[0, 3]], {"num_classes": 3, "confidence": 0.5}, "has label 3; labels are 0..2"),
        ([[0, 255]], {"num_classes": 2, "confidence": 0.5}, "holds 0 and 255 alone"),
    ],
)
def test_label_images_that_cannot_be_meant(tmp_path, labels, options, says):
    Image.fromarray(np.array(labels, np.uint8)).save(tmp_path / "a.png")
    assert says in refusal(scores.read, tmp_path / "a.png", **options)


# --- what is refused --------------------------------------------------------------------------------------

SPOILED = {
    "nan": (np.where(LOGITS > 5, np.nan, LOGITS), {}, "holds nan at row 1, column 3, class 3; save finite values"),
    "infinite": (np.where(LOGITS > 5, -np.inf, LOGITS), {}, "holds -inf at row 1"),
    "too large": (LOGITS.astype(np.float64) * 1e300, {}, "e+299 at row"),
    "integers": (LOGITS.astype(np.int32), {}, "holds int32 [6, 8, 4]; scores are float16 to float64"),
    "complex": (LOGITS.astype(np.complex64), {}, "holds complex64"),
    "objects": (LOGITS.astype(object), {}, "holds Python objects"),
    "two axes": (LOGITS[..., 0], {}, "holds float32 [6, 8]"),
    "a batch": (np.stack([LOGITS, LOGITS]), {}, "holds float32 [2, 6, 8, 4]"),
    "empty": (LOGITS[:0], {}, "holds an empty array of shape (0, 8, 4)"),
    "one class": (LOGITS[..., :1], {}, "has one map (shape (6, 8, 1)); save one a class, of two classes p and 1 - p"),
    "swapped": (LOGITS.transpose(1, 0, 2), {}, "maps of 8 x 6 for an image of 6 x 8"),
    "larger": (np.repeat(LOGITS, 2, 0), {}, "maps of 12 x 8, larger than the image of 6 x 8"),
    "other layout": (LOGITS, {"layout": "chw"}, "maps of 8 x 4, larger than the image"),
    "other number": (LOGITS, {"num_classes": 5}, "has 4 classes (shape (6, 8, 4) as hwc), and 5 were asked for"),
    "energies": (-LOG_PROBS, {}, "holds energies (-log P"),
    "sigmoid": (1 / (1 + np.exp(-LOGITS)), {}, "logits or probabilities of a sigmoid; add --kind logits or --kind"),
    "small logits": (np.full(SIZE, 0.5, np.float32), {}, "sums of 2 to 2 over the classes"),
    "overshoot": (np.exp(LOG_PROBS) * 1.2 - 0.05, {}, "probabilities that were resized; add --kind logits or"),
    "no probabilities": (LOGITS, {"kind": "probabilities"}, "no probabilities; add another --kind"),
    "no log-probabilities": (LOGITS, {"kind": "log_probabilities"}, "no log-probabilities; add another --kind"),
}


@pytest.mark.parametrize("name", SPOILED)
def test_what_cannot_be_used_is_refused_by_name_and_value(tmp_path, name):
    values, options, says = SPOILED[name]
    path = tmp_path / "a.npy"
    np.save(path, values)
    said = refusal(scores.read, path, size=(HEIGHT, WIDTH), **options)
    assert str(path) in said and says in said, said


@pytest.mark.parametrize("kind", ["logits", "probabilities"])
def test_a_kind_that_is_named_settles_two(tmp_path, kind):
    given = 1 / (1 + np.exp(-LOGITS))
    found = scores.read(save(tmp_path / "a.npy", given), "hwc", kind)
    expected = np.exp(given) if kind == "logits" else given
    np.testing.assert_allclose(np.exp(found), expected / expected.sum(-1, keepdims=True), rtol=1e-4)


@pytest.mark.parametrize(
    ("kind", "values", "says"),
    [
        ("logits", KINDS["probabilities"], "holds probabilities, the files before it logits"),
        ("probabilities", LOGITS, "holds logits, the files before it probabilities"),
        ("probabilities", 1 / (1 + np.exp(-LOGITS)), "of a sigmoid"),
        ("logits", np.zeros(SIZE, np.float32), "holds 0 to 0"),
    ],
)
def test_another_kind_than_that_of_the_files_before(tmp_path, kind, values, says):
    assert says in refusal(scores.check_kind, values, kind, tmp_path / "a.npy")


def test_the_same_kind_as_before_may_look_like_another(tmp_path):
    scores.check_kind(1 / (1 + np.exp(-LOGITS)), "logits", tmp_path)
    for kind in ("logits", "log_probabilities"):
        scores.check_kind(LOG_PROBS, kind, tmp_path)


@pytest.mark.parametrize("suffix", scores.SUFFIXES)
@pytest.mark.parametrize("content", [b"", b"rubbish" * 30, b"\x93NUMPY\x09\x00junk", "cut", os.mkfifo, "link"])
def test_files_that_are_damaged_or_none(tmp_path, suffix, content):
    path = tmp_path / f"a{suffix}"
    if callable(content):
        content(path)
    elif content == "link":
        path.symlink_to("nothing")
    elif content == "cut" and suffix == ".png":
        Image.fromarray(np.zeros((4, 4), np.uint8)).save(path)
        path.write_bytes(path.read_bytes()[:-20])
    elif content == "cut":
        path.write_bytes(save(path, LOGITS).read_bytes()[:-5])
    else:
        path.write_bytes(content)
    assert str(path) in refusal(scores.shape_of, path)


def test_a_header_that_declares_more_than_there_is(tmp_path):
    about = {"dtype": "F32", "shape": [10**6, 10**6, 4], "data_offsets": [0, 16]}
    header = json.dumps({"a": about}).encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
    assert "needs 16,000,000,000,000 bytes, the file has 16" in refusal(scores.shape_of, tmp_path / "a.safetensors")


def test_values_that_are_damaged_behind_a_sound_header(tmp_path):
    path = save(tmp_path / "a.npz", LOGITS)
    assert scores.shape_of(path) == SIZE
    data = bytearray(path.read_bytes())
    data[300:340] = bytes(40)
    path.write_bytes(data)
    assert "is no .npz file, or damaged" in refusal(scores.read, path, "hwc")


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({}, "holds no scores; they are files"),
        ({"a.pt": LOGITS}, "holds no scores, 1 files of other kinds"),
        ({"a.npy": LOGITS, "a.npz": LOGITS}, "two scores for one image"),
        ({"a.npy": LOGITS, "b.npy": LOGITS[..., :3]}, "has 3 classes .*, and 4 are in .*a.npy; use scores of one"),
        ({"a.npy": LOGITS, "b.png": LOGITS}, "b.png is a label image, .*a.npy holds scores"),
    ],
)
def test_folders_that_do_not_fit_together(tmp_path, files, says):
    for name, values in files.items():
        if name.endswith(".pt"):
            (tmp_path / name).write_bytes(b"")
        elif name.endswith(".png"):
            Image.fromarray(values[..., 0].astype(np.uint8)).save(tmp_path / name)
        else:
            save(tmp_path / name, values)

    def both():
        found = scores.find(tmp_path)
        scores.form(found, dict.fromkeys(found, (HEIGHT, WIDTH)))

    assert re.search(says, refusal(both))


def test_two_arrays_that_may_be_scores(tmp_path):
    np.savez(tmp_path / "a.npz", logits=LOGITS, probs=LOGITS)
    assert "holds 2 arrays that may be scores (logits, probs)" in refusal(scores.shape_of, tmp_path / "a.npz")
