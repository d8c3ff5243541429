"""Damaged and arbitrary bytes wherever a file of the user is read: the only exception is DataError.

The short profile is the same few hundred examples every time. `pytest -m slow tests/unit/data/test_data_fuzz.py -s`
goes on with new ones for PWCRF_FUZZ_MINUTES (20), and prints how many there were.
"""

import base64
import functools
import io
import json
import os
import struct
import time
import warnings
import zlib

import annotated
import h5py
import hypothesis
import numpy as np
import pytest
import scipy.io
import scipy.sparse
from hypothesis import strategies as st
from layouts import image_folder as layout
from PIL import Image

from pwcrf_jax.data import DataError
from pwcrf_jax.data.prepare import _listing
from pwcrf_jax.data.readers.archives import open_mat73, read_mat
from pwcrf_jax.data.readers.classes import read_classes
from pwcrf_jax.data.readers.image_io import (
    decode_colour_label,
    decode_image,
    decode_label,
    orientation,
    storable_image,
)
from pwcrf_jax.data.sets.camvid import CamVid
from pwcrf_jax.data.sets.image_folder import ImageFolder
from pwcrf_jax.data.sets.voc import Voc

SHORT = 60  # examples of each target
RNG = np.random.default_rng(5)
PIXELS, LABEL = layout.image(RNG, (12, 18)), layout.label(RNG, (12, 18))


# Bytes ------------------------------------------------------------------------------------------------


@st.composite
def damaged(draw, seeds):
    """Bytes, up to four times spoiled, and those they were made from (None: a PNG whose checksums were mended)."""
    seed = draw(st.sampled_from(seeds))
    data = bytearray(seed)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        match draw(st.integers(0, 6)):
            case 0 if at < len(data):
                data[at] ^= 1 << draw(st.integers(0, 7))
            case 1 if at < len(data):
                data[at] = draw(st.integers(0, 255))
            case 2:
                del data[at:]
            case 3:
                data[at:at] = draw(st.binary(min_size=1, max_size=9))
            case 4:
                del data[at : at + draw(st.integers(1, 9))]
            case 5:
                extreme = (b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\0\x80")
                data[at : at + 4] = draw(st.sampled_from(extreme))
            case _:
                start = draw(st.integers(0, len(data)))
                data[at : at + 8] = data[start : start + 8]
    mended = data.startswith(b"\x89PNG") and draw(st.booleans())
    return _with_checksums(bytes(data)) if mended else bytes(data), None if mended else seed


def _with_checksums(data):
    out, at = bytearray(data), 8
    while at + 12 <= len(out):
        (length,) = struct.unpack_from(">I", out, at)
        if at + 12 + length > len(out):
            break
        struct.pack_into(">I", out, at + 8 + length, zlib.crc32(out[at + 4 : at + 8 + length]))
        at += 12 + length
    return bytes(out)


def arbitrary(seeds):
    heads = [b"", *(seed[:n] for seed in seeds for n in (8, 130) if len(seed) > n)]
    body = st.tuples(st.sampled_from(heads), st.binary(max_size=300)).map(b"".join)
    return body.map(lambda data: (data, None))


def encoded(array, **options):
    out = io.BytesIO()
    im = array if isinstance(array, Image.Image) else Image.fromarray(array)
    im.save(out, **options)
    return out.getvalue()


@functools.cache
def images():
    exif = Image.Exif()
    exif[0x0112] = 6
    im = Image.fromarray(PIXELS)
    return [
        encoded(im, format="JPEG"),
        encoded(im, format="JPEG", progressive=True, exif=exif),
        encoded(im.convert("CMYK"), format="JPEG"),
        encoded(im, format="MPO", save_all=True, append_images=[im]),
        encoded(im, format="PNG", exif=exif),
        encoded(im.convert("RGBA"), format="PNG"),
        encoded(im.quantize(7), format="PNG", transparency=3),
        encoded(im, format="BMP"),
        encoded(im, format="WEBP"),
        encoded(im, format="WEBP", lossless=True, exif=exif),
        encoded(im, format="TIFF"),
        encoded(im, format="TIFF", compression="tiff_lzw"),
        encoded(im, format="TIFF", compression="jpeg"),
    ]


@functools.cache
def masks():
    palette = Image.fromarray(LABEL)
    palette.putpalette(RNG.integers(0, 256, 768).astype(np.uint8).tobytes())
    return [
        encoded(LABEL, format="PNG"),
        encoded(palette, format="PNG"),
        encoded(palette.remap_palette(range(4)), format="PNG", bits=2),
        encoded(LABEL.astype(np.uint16), format="PNG"),
        encoded(PIXELS, format="PNG"),
    ]


@functools.cache
def mat_files():
    variables = {
        "S": np.arange(35, dtype=np.uint8).reshape(5, 7),
        "names": np.array(["a", "bé"], object),
        "GTcls": {
            "Segmentation": np.eye(4),
            "Boundaries": np.array([scipy.sparse.csc_matrix(np.eye(3)), scipy.sparse.csc_matrix((2, 3))], object),
            "more": [{"x": 1j, "y": "text"}, {"x": np.zeros((0, 3)), "y": True}],
        },
    }
    out = []
    for options in ({}, {"do_compression": True}):
        file = io.BytesIO()
        scipy.io.savemat(file, variables, **options)
        out.append(file.getvalue())
    return out


@functools.cache
def mat73_files():
    out = []
    for options in ({}, {"compression": "gzip", "chunks": (1, 2)}, {"fletcher32": True, "shuffle": True}):
        file = io.BytesIO()
        with h5py.File(file, "w", userblock_size=512) as content:
            content.create_dataset("S", data=np.arange(24, dtype=np.uint16).reshape(4, 6), **options)
            cells = [content.create_dataset(f"#refs#/{k}", data=np.frombuffer(b"ab", np.uint8)).ref for k in "ab"]
            content.create_dataset("names", data=np.array(cells, h5py.ref_dtype))
        out.append(file.getvalue())
    return out


MOST = 100_000  # pixels: what is below is decoded, and takes its time

# Targets ----------------------------------------------------------------------------------------------


def read_image(data, seed, root):
    assert _is(decode_image(data, "x", MOST), 3)
    assert orientation(data, "x") in range(1, 9)
    for shape in ((12, 18), (18, 12), None):
        stored = storable_image(data, "x", shape, trusted=len(data) % 2 == 0, max_pixels=MOST)
        assert stored[:4] == b"\x89PNG" or stored[:2] == b"\xff\xd8"
        assert _is(decode_image(stored, "x", MOST), 3)


def read_label(data, seed, root):
    label = decode_label(data, "x", MOST)
    assert _is(label, 2)
    if seed is not None:  # checksums let nothing wrong pass
        np.testing.assert_array_equal(label, decode_label(seed, "x"))


def read_colours(data, seed, root):
    colours = decode_colour_label(data, "x", MOST)
    assert _is(colours, 3)
    if seed is not None:
        np.testing.assert_array_equal(colours, decode_colour_label(seed, "x"))


def _is(array, ndim):
    return array.dtype == np.uint8 and array.ndim == ndim and array.size


def read_own_list(data, seed, root):
    (root / "own/train.txt").write_bytes(data)
    (split,) = ImageFolder.plan(str(root / "own")).splits.values()
    assert {pair.id for pair in split} <= {"a", "été", "x/b c"} and split


def read_own_classes(data, seed, root):
    (root / "classes.txt").write_bytes(data)
    names, colours, coding = read_classes(root / "classes.txt")
    assert names and len(set(names)) == len(names) and len(colours) in (0, len(names))
    assert set(coding.classes.values()) - {255} == set(range(len(names)))


def read_voc_list(data, seed, root):
    (root / "voc/ImageSets/Segmentation/train.txt").write_bytes(data)
    with _listing(str(root)):
        Voc.plan(str(root / "voc"), data_dir=str(root / "unpacked"))


def read_camvid_list(data, seed, root):
    (root / "camvid/train.txt").write_bytes(data)
    with _listing(str(root)):
        CamVid.plan(str(root / "camvid"))


def read_old_mat(data, seed, root):
    (root / "x.mat").write_bytes(data)
    for names in (("S",), ("names",), ("GTcls", "S")):
        assert len(read_mat(root / "x.mat", *names)) == len(names)


def read_new_mat(data, seed, root):
    (root / "x.mat").write_bytes(data)
    with open_mat73(root / "x.mat", "S", "names") as (array, names):
        array[()], array[0:1]
        for reference in names[()]:
            names.file[reference][()]


def read_outlines(file, data, seed, root):
    if not (root / "outlines").exists():
        for name in "ab":
            layout.write_image(root / f"outlines/{name}.png", PIXELS)
        if file == "a.json":
            annotated.labelme(root / "outlines/b.json", [], (12, 18), imagePath="b.png")
    (root / "outlines" / file).write_bytes(data)
    with _listing(str(root)):
        plan = ImageFolder.plan(str(root / "outlines"))
        for pair in (pair for pairs in plan.splits.values() for pair in pairs if pair.mask):
            label = plan.coding(pair.mask, pair.image, MOST)
            assert _is(label, 2) and set(np.unique(label)) <= {*range(len(plan.class_names)), 255}


@functools.cache
def outlines(kind):
    square = [[2, 3], [6, 3], [6, 8], [2, 8]]
    if kind == "labelme":
        shapes = [
            annotated.shape("a", square),
            annotated.shape("b", square[::2], "rectangle"),
            annotated.shape("c", square[::2], "mask", mask=base64.b64encode(encoded(LABEL, format="PNG")).decode()),
        ]
        files = [{"shapes": shapes[:k], "imagePath": "a.png", "imageData": None, "imageHeight": 12, "imageWidth": 18}
                 for k in (1, 2, 3)]  # fmt: skip
        return [json.dumps(file).encode() for file in files]
    if kind == "cvat":
        bodies = (
            '<polygon label="car" points="2,3;6,3;6,8" z_order="2"/><box label="sky" xtl="1" ytl="1" xbr="4" ybr="5"/>',
            '<mask label="car" rle="1, 2, 3" left="4" top="5" width="3" height="2"/>',
            '<ellipse label="sky" cx="9" cy="5" rx="3" ry="2" rotation="30"/>',
        )
        images = '<image name="{}" width="18" height="12">{}</image>'
        return [annotated.CVAT.replace("{body}", images.format("a.png", b) + images.format("b.png", b)).encode()
                for b in bodies]  # fmt: skip
    flat = [float(x) for point in square for x in point]
    found = ([flat], {"size": [12, 18], "counts": [20, 5, 191]}, {"size": [12, 18], "counts": "d05o5"})
    return [
        json.dumps({
            "images": [{"id": i, "file_name": f"{n}.png", "height": 12, "width": 18} for i, n in enumerate("ab")],
            "annotations": [{"id": 1, "image_id": 0, "category_id": 1, "iscrowd": 0, "segmentation": outline}],
            "categories": [{"id": 1, "name": "car"}],
        }).encode()
        for outline in found
    ]  # fmt: skip


TEXTS = {
    "own": ["a\nété.jpg\nx/b c\n", "\ufeffa\r\n\r\nx\\b c.png\r\n", "images/a.jpg\n./a"],
    "classes": [
        "road\nstreet lamp\nvoid 0\nvoid 255\n",
        "# c\nroad 1 2 3\nsky 9 9 9\nvoid 0 0 0\n",
        "a\nb 2\nvoid 1\n",
        "names: [a, 'b']\n",
        "- a\n- b\n",
        '{"a": 0, "b": 1}',
        "id,name\n1,a\n2,b\n",
        "# label:color_rgb:parts:actions\nroad:1,2,3::\nsky:9,9,9::\n",
        "classes = ('a', 'b')\n",
    ],
    "voc": ["a\nb\n", "a \r\n\r\nb\r\n", "é\n"],
    "camvid": [
        "train/a.jpg trainannot/a.png\n",
        "/SegNet/train/a.jpg /SegNet/trainannot/a.png;\n",
        "x\\y\\train\\a.jpg b/c",
    ],
}
texts = lambda key: [text.encode() for text in TEXTS[key]]
TARGETS = {
    "image": (read_image, images),
    "label": (read_label, masks),
    "colours": (read_colours, masks),
    "own list": (read_own_list, functools.partial(texts, "own")),
    "own classes": (read_own_classes, functools.partial(texts, "classes")),
    "voc list": (read_voc_list, functools.partial(texts, "voc")),
    "camvid list": (read_camvid_list, functools.partial(texts, "camvid")),
    "labelme": (functools.partial(read_outlines, "a.json"), functools.partial(outlines, "labelme")),
    "cvat": (functools.partial(read_outlines, "annotations.xml"), functools.partial(outlines, "cvat")),
    "coco": (functools.partial(read_outlines, "annotations.json"), functools.partial(outlines, "coco")),
    "mat": (read_old_mat, mat_files),
    "mat73": (read_new_mat, mat73_files),
}


@pytest.fixture
def root(tmp_path):
    for name in ("a.jpg", "été.jpg", "x/b c.png"):
        layout.write_image(tmp_path / "own/images" / name, PIXELS)
        layout.write_mask((tmp_path / "own/masks" / name).with_suffix(".png"), LABEL)
    layout.write_classes(tmp_path / "own")
    for name in ("voc/JPEGImages/a.jpg", "voc/JPEGImages/b.jpg", "camvid/train/a.jpg"):
        layout.write_image(tmp_path / name, PIXELS)
    for name in ("voc/SegmentationClass/a.png", "voc/SegmentationClass/b.png", "camvid/trainannot/a.png"):
        layout.write_mask(tmp_path / name, LABEL)
    (tmp_path / "voc/ImageSets/Segmentation").mkdir(parents=True)
    return tmp_path


def hunt(target, root, counts, **settings):
    """Runs examples of a target; counts: how many there were, and how many were read."""
    read, make = TARGETS[target]
    seeds = make()

    @hypothesis.settings(deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck), **settings)
    @hypothesis.given(st.one_of(damaged(seeds), damaged(seeds), arbitrary(seeds)))
    def example(pair):
        counts[0] += 1
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL's, of damaged files
            try:
                read(*pair, root)
                counts[1] += 1
            except DataError as e:
                assert str(e)

    return example


@pytest.mark.parametrize("target", TARGETS)
def test_only_data_errors(target, root):
    hunt(target, root, [0, 0], max_examples=SHORT, derandomize=True)()


@pytest.mark.parametrize("target", TARGETS)
def test_undamaged_files_are_read(target, root):
    read, make = TARGETS[target]
    good = 0
    for data in make():
        try:
            read(data, None, root)
            good += 1
        except DataError:
            pass
    assert good >= 2


def test_mat_files_are_read_as_written(tmp_path):
    """What is checked before scipy.io reads a file lets all kinds of variables pass."""
    for data in mat_files():
        (tmp_path / "x.mat").write_bytes(data)
        array, names, gt = read_mat(tmp_path / "x.mat", "S", "names", "GTcls")
        np.testing.assert_array_equal(array, np.arange(35).reshape(5, 7))
        assert list(names) == ["a", "bé"]
        np.testing.assert_array_equal(gt["Segmentation"], np.eye(4))
        np.testing.assert_array_equal(gt["Boundaries"][0].toarray(), np.eye(3))
        assert gt["more"][0] == {"x": 1j, "y": "text"} and gt["more"][1]["x"].size == 0


def test_checksums_of_chunks_are_refused(tmp_path):
    """HDF5 2.0 ends the process where a chunk is shorter than its checksum."""
    (tmp_path / "x.mat").write_bytes(mat73_files()[2])
    with pytest.raises(DataError, match=r"x\.mat: 'S' has checksums"), open_mat73(tmp_path / "x.mat", "S"):
        pass


@pytest.mark.parametrize("kind", [0, 19, 200, 65535, 1 << 31])
@pytest.mark.parametrize("variable", ["S", "empty"])
def test_a_type_that_would_end_the_process_is_refused(tmp_path, kind, variable):
    """scipy.io 1.17 looks types up in a table of 20 without looking whether they are in it."""
    file = io.BytesIO()
    scipy.io.savemat(file, {"S": np.arange(35, dtype=np.uint8), "empty": np.zeros((0, 3))})
    data = bytearray(file.getvalue())
    at = data.rindex({"S": struct.pack("<II", 2, 35), "empty": struct.pack("<II", 9, 0)}[variable])
    data[at : at + 4] = struct.pack("<I", kind)
    (tmp_path / "x.mat").write_bytes(data)
    with pytest.raises(DataError, match=r"x\.mat: cannot be read as a \.mat file"):
        read_mat(tmp_path / "x.mat", variable)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_only_data_errors_for_long(target, root):
    end = time.monotonic() + 60 * float(os.environ.get("PWCRF_FUZZ_MINUTES", 20)) / len(TARGETS)
    seed = time.time_ns()
    print(f"\n{target}: seeds from {seed}", flush=True)  # should the process end
    counts = [0, 0]
    while time.monotonic() < end:
        try:
            hypothesis.seed(seed)(hunt(target, root, counts, max_examples=200, phases=[hypothesis.Phase.generate]))()
        except BaseException:
            print(f"{target}: seed {seed}")
            raise
        seed += 1
    print(f"{target}: {counts[0]} examples, {counts[1]} of them read")
