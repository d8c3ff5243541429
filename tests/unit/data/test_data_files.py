"""Files of data sets: lists and folders that are not what they seem, special files, and what counts as an image."""

import logging
import os
import socket
import struct
import zlib

import commands
import numpy as np
import pytest
from layouts import image_folder as layout
from PIL import Image, PngImagePlugin

from pwcrf_jax.data import DataError, load_dataset
from pwcrf_jax.data.readers.files import image_kind, open_file, present, read_file, read_lines
from pwcrf_jax.data.readers.image_io import decode_colour_label, decode_image, decode_label, orientation, storable_image
from pwcrf_jax.data.sets.camvid import CamVid
from pwcrf_jax.data.sets.image_folder import ImageFolder
from pwcrf_jax.data.sets.voc import Voc

RNG = np.random.default_rng(5)
PIXELS = RNG.integers(0, 256, (24, 36, 3), dtype=np.uint8)
LABEL = layout.label(RNG)


@pytest.fixture
def own(tmp_path):
    layout.make(tmp_path / "own", np.random.default_rng(3), lists=False)
    return tmp_path / "own"


@pytest.fixture
def load(own, tmp_path):
    return lambda **kw: load_dataset("image_folder", source_dir=str(own), data_dir=str(tmp_path / "p"), **kw)


# What has a name but is no file -------------------------------------------------------------------------


def dangling(path):
    path.symlink_to("nowhere")


def endless(path):
    path.symlink_to(path.name)


def bound(path):
    with socket.socket(socket.AF_UNIX) as s:
        here = os.getcwd()
        os.chdir(path.parent)  # such names are short
        try:
            s.bind(path.name)
        finally:
            os.chdir(here)


def device(path):
    path.symlink_to("/dev/zero")


SPECIAL = [dangling, endless, os.mkfifo, os.mkdir, bound, device]


@pytest.mark.parametrize("make", SPECIAL)
def test_only_files_are_opened(tmp_path, make):
    path = tmp_path / "x.txt"
    assert not present(path)
    make(path)
    for use in (open_file, read_file, read_lines, present):
        with pytest.raises(DataError, match=r"x\.txt: (is|cannot be read)"):
            use(path)


@pytest.mark.parametrize("make", SPECIAL)
@pytest.mark.parametrize("file", ["train.txt", "val.txt", "test.txt", "classes.txt", "masks"])
def test_parts_of_a_folder_that_are_no_files(own, make, file):
    path = own / file
    if path.exists():
        path.rename(own / "moved")
    if file == "masks" and make is os.mkdir:
        pytest.skip("that is what it should be")
    make(path)
    with pytest.raises(DataError, match=rf"{file}: (is|cannot be read)"):
        ImageFolder.plan(str(own))


@pytest.mark.parametrize("make", SPECIAL)
@pytest.mark.parametrize("file", ["images/a.jpg", "masks/a.png"])
def test_images_and_masks_that_are_no_files(own, load, make, file):
    (own / file).unlink()
    make(own / file)
    with pytest.raises(DataError, match=r"(a\.(jpg|png): (image |mask )?(is|cannot)|images/a\.jpg: has no mask|"
                                        r"masks/a\.png: has no image)"):  # fmt: skip
        load()


@pytest.mark.parametrize("make", SPECIAL)
@pytest.mark.parametrize("file", ["val.txt", "test.txt"])
def test_lists_of_camvid_that_are_no_files(camvid, make, file):
    (camvid.root / file).unlink(missing_ok=True)
    make(camvid.root / file)
    with pytest.raises(DataError, match=rf"{file}: (is|cannot be read)"):
        CamVid.plan(str(camvid.root))


@pytest.mark.parametrize("make", SPECIAL)
@pytest.mark.parametrize("file", ["ImageSets/Segmentation/val.txt", "SegmentationClass/d.png", "JPEGImages/x.jpg"])
def test_parts_of_voc_that_are_no_files(voc, make, file):
    (voc.root / file).unlink(missing_ok=True)
    make(voc.root / file)
    with pytest.raises(DataError, match=rf"{file}: (\w+ )?(is|cannot be read)"):
        Voc.plan(str(voc.root), data_dir=str(voc.root / "d"))


@pytest.mark.parametrize(
    "place", ["VOCdevkit", "ADEChallengeData2016/images/validation", "leftImg8bit/val", "coco.json"]
)
def test_folders_of_other_layouts_that_are_links_to_nothing(tmp_path, place):
    from layouts import ade20k, cityscapes, coco

    root = tmp_path / "s"
    if place.startswith("ADE"):
        ade20k.make(root, np.random.default_rng(0))
        name = "ade20k"
    elif place.startswith("left"):
        cityscapes.make(root, np.random.default_rng(0))
        name = "cityscapes"
    else:
        coco.make(root, np.random.default_rng(0))
        name, place = "coco", "annotations/instances_val2017.json"
    (root / place).rename(root / "moved")
    dangling(root / place)
    with pytest.raises(DataError, match=rf"{place}: is a link to nothing"):
        load_dataset(name, source_dir=str(root), data_dir=str(tmp_path / "p"), partial=True)


@pytest.mark.parametrize("size", [3 << 30, 1 << 40])
def test_a_file_that_claims_to_be_huge_is_not_read(tmp_path, size):
    with open(tmp_path / "x.txt", "wb") as file:
        file.truncate(size)
    for use in (read_file, read_lines):
        with pytest.raises(DataError, match=rf"x\.txt: holds {size} bytes"):
            use(tmp_path / "x.txt")


# Lists under other names --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "file", ["Train.txt", "train.TXT", "train.lst", "val.csv", "test", "validation.list", "train_ids.txt", "test.json"]
)
def test_lists_under_other_names_are_refused(own, camvid, file):
    ImageFolder.plan(str(own)), CamVid.plan(str(camvid.root))
    for plan, root in ((ImageFolder.plan, own), (CamVid.plan, camvid.root)):
        if (root / file).is_dir():
            continue  # the images of split test
        (root / file).write_text("a\n")
        with pytest.raises(DataError, match=rf"{file}: looks like the list of a split, which are train\.txt"):
            plan(str(root))


@pytest.mark.parametrize("file", ["trainer.py", "README.txt", "testing.log", "labels.json", "validate.sh"])
def test_other_files_beside_are_no_lists(own, file):
    (own / file).write_text("a\n")
    assert set(ImageFolder.plan(str(own)).splits) == {"train", "val"}


@pytest.mark.parametrize("file", ["train.lst", "val.csv", "test", "trainval.TXT"])
def test_lists_of_voc_under_other_names_are_refused(voc, file):
    (voc.root / "ImageSets/Segmentation" / file).write_text("a\n")
    with pytest.raises(DataError, match=rf"{file}: looks like the list of a split"):
        Voc.plan(str(voc.root), data_dir=str(voc.root / "d"))


@pytest.mark.parametrize("names", [("train", "val"), ("Train", "test"), ("training", "validation"), ("valid", "test")])
def test_folders_of_splits_without_lists_are_not_mixed(own, names):
    for k, name in enumerate(names):
        layout.write_image(own / f"images/{name}/n{k}.png", PIXELS)
        layout.write_mask(own / f"masks/{name}/n{k}.png", LABEL)
    with pytest.raises(DataError, match=rf"images: has the folders .*{names[1]}.*write train\.txt"):
        ImageFolder.plan(str(own))
    (own / "train.txt").write_text(f"{names[0]}/n0\n")
    assert [p.id for p in ImageFolder.plan(str(own)).splits["train"]] == [f"{names[0]}/n0"]


# What counts as an image --------------------------------------------------------------------------------


def encoded(path, name, **options):
    with open(path, "wb+") as file:
        Image.fromarray(PIXELS).save(file, name, **options)


@pytest.mark.parametrize(
    ("suffix", "name"),
    [(".JFIF", "JPEG"), (".jpe", "JPEG"), (".Jpg", "JPEG"), ("", "PNG"), (".jpg_large", "JPEG"), (".apng", "PNG"),
     (".dib", "BMP"), (".gif", "WEBP"), (".0001", "TIFF")],
)  # fmt: skip
def test_images_are_known_by_what_they_hold(own, load, suffix, name):
    encoded(own / f"images/n{suffix}", name)
    layout.write_mask(own / ("masks/n.0001.png" if suffix == ".0001" else "masks/n.png"), LABEL)
    assert image_kind(own / f"images/n{suffix}") == "image"
    assert sum(load().splits.values()) == 9


@pytest.mark.parametrize(
    ("file", "data"),
    [
        ("n.gif", b"GIF89a" + bytes(20)),
        ("n.heic", bytes(4) + b"ftypheic" + bytes(20)),
        ("n.avif", b""),
        ("n", bytes(4) + b"ftypavif" + bytes(20)),
        ("n.ppm", b"P6\n1 1\n255\n123"),
        ("n.tga", b"\0\0\2"),
        ("n.CR2", b"II*\0" + bytes(30)),
    ],
)
def test_images_of_other_formats_are_refused_by_name(own, file, data):
    (own / "images" / file).write_bytes(data)
    with pytest.raises(DataError, match=rf"images/{file}: images are JPEG, PNG, .*\.jfif.*convert it, or remove it"):
        ImageFolder.plan(str(own))
    layout.write_image(own / "images/n.png", PIXELS)  # of a raw photograph
    layout.write_mask(own / "masks/n.png", LABEL)
    assert ImageFolder.plan(str(own)).splits


FOREIGN = {
    "GIF": b"GIF89a" + bytes(20),
    "HEIC": b"\0\0\0\x18ftypheic" + bytes(20),
    "AVIF": b"\0\0\0\x1cftypavif" + bytes(20),
    "JPEG 2000": b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(20),
    "JPEG XL": b"\xff\x0a" + bytes(20),
    "PNM": b"P5\n1 1\n255\n1",
}


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("file", ["images/a.jpg", "masks/a.png", "masks/a.gif"])
def test_other_formats_by_a_wrong_suffix_are_not_called_damaged(own, load, name, file):
    if file == "masks/a.gif":
        (own / "masks/a.png").unlink()
    (own / file).write_bytes(FOREIGN[name])
    with pytest.raises(DataError, match=rf"{file}: (is|mask is) an image of .* \({name}\)") as e:
        load()
    assert "damaged" not in str(e.value) and "restore" not in str(e.value)


@pytest.mark.parametrize("file", ["Thumbs.db", "desktop.ini", "classes.txt", "sub/Thumbs.db", "labels.json"])
def test_stray_files_change_neither_classes_nor_splits(own, file):
    before = ImageFolder.plan(str(own))
    (own / "images" / file).parent.mkdir(exist_ok=True)
    (own / "images" / file).write_text("x\ny\nz\n")
    after = ImageFolder.plan(str(own))
    assert after == before and after.class_names == layout.NAMES


@pytest.mark.parametrize(("data", "kind"), [(b"\0\5\x16\7\0\2\0\0Mac OS X", "other"), (b"", "other"), (None, "image")])
def test_what_macos_keeps_beside_an_image_is_none(tmp_path, data, kind):
    layout.write_image(tmp_path / "._a.jpg", PIXELS)
    if data is not None:
        (tmp_path / "._a.jpg").write_bytes(data)
    assert image_kind(tmp_path / "._a.jpg") == kind


@pytest.mark.parametrize("file", ["n.json", "n.txt", "n.mp4", "BM notes", "n.xml"])
def test_what_is_no_image_is_named_and_left_out(own, caplog, file):
    (own / "images" / file).write_bytes(b"BMW, or P1 and what else there is in it")
    with caplog.at_level(logging.WARNING):
        assert ImageFolder.plan(str(own)).splits
    assert file in caplog.text and "no images" in caplog.text
    layout.write_mask(own / "masks/n.png", LABEL)
    with pytest.raises(DataError, match=r"masks/n\.png: has no image .*images are JPEG.*\.jfif"):
        ImageFolder.plan(str(own))


LOSSLESS = [
    dict(format="TIFF"),
    dict(format="TIFF", compression="tiff_lzw"),
    dict(format="TIFF", compression="tiff_adobe_deflate"),
    dict(format="TIFF", compression="packbits"),
    dict(format="WEBP", lossless=True),
    dict(format="BMP"),
]
LOSSY = [
    dict(format="JPEG"),
    dict(format="WEBP", quality=80),
    dict(format="WEBP", quality=50, exif=b"Exif\0\0MM\0*"),
    dict(format="TIFF", compression="jpeg"),
]


@pytest.mark.parametrize("options", LOSSLESS)
@pytest.mark.parametrize("renamed", [False, True])
def test_masks_that_lost_nothing_are_told_so(own, load, options, renamed):
    name = options["format"]
    (own / "masks/a.png").unlink()
    Image.fromarray(LABEL).save(own / ("masks/a.png" if renamed else f"masks/a.{name.lower()}"), **options)
    with pytest.raises(DataError, match=rf"mask is a {name} file, masks are PNG files; this one has lost nothing") as e:
        load()
    assert "JPEG" not in str(e.value)


@pytest.mark.parametrize("options", LOSSY)
def test_masks_that_lost_something_are_told_so(own, load, options):
    Image.fromarray(LABEL).convert("RGB").save(own / "masks/a.png", **options)
    with pytest.raises(DataError, match=r"masks are PNG files; \w+ changes labels.*rather than convert"):
        load()


# Limits -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["PNG", "JPEG", "BMP", "WEBP", "TIFF"])
@pytest.mark.parametrize("limit", [100, 864 // 2 - 1])  # PIL refuses above twice its limit, and warns above it
def test_pixels_are_limited_by_the_key_and_not_by_pil(tmp_path, monkeypatch, recwarn, name, limit):
    encoded(tmp_path / "x", name, **({"lossless": True} if name == "WEBP" else {}))
    data = (tmp_path / "x").read_bytes()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    image = decode_image(data, "x", 864)
    assert image.shape == PIXELS.shape and Image.MAX_IMAGE_PIXELS == limit and not recwarn.list
    assert decode_image(storable_image(data, "x", None, trusted=True, max_pixels=864), "x", 864).shape == PIXELS.shape
    with pytest.raises(DataError, match=r"x: has more pixels than config\.data\.max_pixels = 863"):
        decode_image(data, "x", 863)
    assert Image.MAX_IMAGE_PIXELS == limit


@pytest.mark.parametrize("most", [863, 864])
def test_a_data_set_is_prepared_within_the_key(load, most):
    if most == 864:
        source = load(max_pixels=most).source("train")
        assert source[0]["label"].size == 864 and source.image_size(0) == (24, 36)
    else:
        with pytest.raises(DataError, match=r"has more pixels than config\.data\.max_pixels = 863"):
            load(max_pixels=most)


@pytest.mark.parametrize("value", [0, -5, 1.5, "many"])
def test_a_limit_that_is_none(load, value):
    with pytest.raises(DataError, match=r"data\.max_pixels: .* is no number of pixels, such as 89478485"):
        load(max_pixels=value)


def test_the_key_of_a_config_is_the_limit():
    import pwcrf_jax.configs.default as default
    from pwcrf_jax import config as configs
    from pwcrf_jax.config import keys

    config = default.get_config()
    config.data.max_pixels = 123
    assert configs.dataset_options(config)["max_pixels"] == 123
    kind = keys.of("data.max_pixels").kind
    assert not kind.accepts(0) and kind.accepts(2_000_000_000)


def text_chunk(kind, key, size):
    info = PngImagePlugin.PngInfo()
    if kind == "iTXt":
        info.add_itxt(key, "x" * size, zip=True)
    else:
        info.add_text(key, "x" * size, zip=kind == "zTXt")
    return dict(pnginfo=info)


@pytest.mark.parametrize(
    "options",
    [
        text_chunk("zTXt", "labels", 3 << 20),
        text_chunk("iTXt", "workflow", 2 << 20),
        text_chunk("tEXt", "prompt", 70 << 20),  # PIL takes 64 MB in all
        text_chunk("zTXt", "Raw profile type xmp", 2 << 20),
        text_chunk("iTXt", "XML:com.adobe.xmp", 2 << 20),
        dict(icc_profile=bytes(5 << 20)),
    ],
    ids=["zTXt", "iTXt", "tEXt", "profile", "xmp", "icc"],
)
def test_metadata_of_any_length_is_no_damage(tmp_path, options):
    before = PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY
    encoded(tmp_path / "x.png", "PNG", **options)
    data = (tmp_path / "x.png").read_bytes()
    np.testing.assert_array_equal(decode_image(data, "x"), PIXELS)
    np.testing.assert_array_equal(decode_colour_label(data, "x"), PIXELS)
    assert orientation(data, "x") == 1 and storable_image(data, "x", (24, 36), trusted=False) == data
    Image.fromarray(LABEL).save(tmp_path / "m.png", **options)
    np.testing.assert_array_equal(decode_label((tmp_path / "m.png").read_bytes(), "m"), LABEL)
    assert before == (PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY)


def test_an_orientation_in_a_long_text_counts(tmp_path):
    info = PngImagePlugin.PngInfo()
    xmp = '<x:xmpmeta xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/>'
    info.add_itxt("XML:com.adobe.xmp", xmp + " " * (2 << 20), zip=True)
    encoded(tmp_path / "x.png", "PNG", pnginfo=info)
    assert orientation((tmp_path / "x.png").read_bytes(), "x") == 6


@pytest.mark.parametrize("kind", [b"IHDR", b"tEXt", b"IDAT", b"IEND"])
def test_checksums_of_all_parts_count(tmp_path, kind):
    encoded(tmp_path / "x.png", "PNG", **text_chunk("tEXt", "a", 50))
    data = bytearray((tmp_path / "x.png").read_bytes())
    data[data.index(kind) + (4 if kind != b"IEND" else 5)] ^= 1
    with pytest.raises(DataError, match=r"x: cannot be decoded, the file is damaged"):
        decode_image(bytes(data), "x")


def many_pages(count):
    """A TIFF whose pages are headers only, 18 bytes each."""
    page = lambda at, last: (
        struct.pack("<H", 1) + struct.pack("<HHII", 256, 4, 1, 8) + struct.pack("<I", 0 if last else at + 18)
    )
    return b"II*\0" + struct.pack("<I", 8) + b"".join(page(8 + 18 * i, i == count - 1) for i in range(count))


def animated_png(frames):
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, 8, 0, 0, 0, 0)) + chunk(
        b"acTL", struct.pack(">II", frames, 0)
    )
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0\0\0")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("make", [lambda: many_pages(300_000), lambda: animated_png(2_000_000_000),
                                  lambda: many_pages(2)], ids=["tiff", "apng", "two"])  # fmt: skip
def test_pages_are_not_counted(make):
    with pytest.raises(DataError, match=r"x: (holds 2 pictures or more|cannot be decoded)"):
        decode_image(make(), "x")


def test_tiff_of_many_real_pages_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    other = [Image.fromarray(PIXELS)] * 5
    encoded(tmp_path / "x.tif", "TIFF", save_all=True, append_images=other)
    from PIL import TiffImagePlugin

    monkeypatch.setattr(TiffImagePlugin.TiffImageFile, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(DataError, match=r"holds 2 pictures or more"):
        decode_image((tmp_path / "x.tif").read_bytes(), "x")


@pytest.mark.slow
def test_a_pipe_among_the_images_ends_the_check_command(own, tmp_path):
    (own / "images/a.jpg").unlink()
    os.mkfifo(own / "images/a.jpg")
    command = ["-m", "pwcrf_jax", "check", "image_folder", "--source_dir", own, "--data_dir", tmp_path / "p"]
    done = commands.run(command, timeout=300)
    assert done.returncode == 2 and "a.jpg: is a pipe (FIFO)" in done.stdout
