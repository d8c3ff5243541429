"""One table of spoiled data, and what becomes of each: a refusal that names file and remedy, a warning, or a record.

A row is a function that spoils the folder of layouts/image_folder.py, and one of
  refused(pattern)  load_dataset raises DataError with such a message,
  warned(pattern)   it prepares, and warns so,
  taken(function)   it prepares without warning, and the function asserts what the records are; records are by id.
"""

import os
import re
import shutil
import struct
import unicodedata
import zlib

import numpy as np
import pytest
from layouts import image_folder as layout
from PIL import Image

from pwcrf_jax.data import DataError, load_dataset

SIZE = (24, 36)
RNG = np.random.default_rng(11)
PIXELS, LABEL = layout.image(RNG), layout.label(RNG)
TABLE = []


def row(outcome, **options):
    def add(spoil):
        TABLE.append(pytest.param(spoil, outcome, options, id=spoil.__name__))
        return spoil

    return add


def refused(pattern):
    def check(load, caplog):
        with pytest.raises(DataError, match=pattern):
            load()

    return check


def warned(pattern):
    def check(load, caplog):
        load()
        assert any(re.search(pattern, r.message) for r in caplog.records), caplog.text

    return check


def taken(assertion):
    def check(load, caplog):
        data = load()
        assert not caplog.records, caplog.text
        records = {}
        for split in data.splits:
            source = data.source(split)
            records |= {r["id"]: r for r in (source[i] for i in range(len(source)))}
        assertion(records)

    return check


@pytest.fixture
def root(tmp_path):
    return tmp_path / "own"


def png(depth, colour_type, rows, width, height=None, extra=b""):
    """A PNG of any bit depth; PIL writes only some."""
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    header = struct.pack(">IIBBBBB", width, len(rows) if height is None else height, depth, colour_type, 0, 0, 0)
    lines = zlib.compress(b"".join(b"\0" + bytes(line) for line in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", lines) + chunk(b"IEND", b"")


def cut(path, keep):
    path.write_bytes(path.read_bytes()[:keep])


def flip(path, where=0.5):
    data = bytearray(path.read_bytes())
    data[int(len(data) * where)] ^= 4
    path.write_bytes(data)


def save(path, array, **options):
    Image.fromarray(array).save(path, **options)


# Images -----------------------------------------------------------------------------------------------


@row(refused(r"a\.jpg: cannot be decoded.*truncated.*restore"))
def truncated_jpeg(root):
    cut(root / "images/a.jpg", -300)


@row(refused(r"c\.png: cannot be decoded.*restore"))
def truncated_png(root):
    cut(root / "images/inner city/c.png", -300)


@row(refused(r"f\.tif: cannot be decoded.*restore"))
def truncated_tiff(root):
    cut(root / "images/f.tif", 900)


@row(refused(r"e\.webp: cannot be decoded.*restore"))
def truncated_webp(root):
    cut(root / "images/e.webp", 500)


@row(refused(r"d\.bmp: cannot be decoded.*restore"))
def truncated_bmp(root):
    cut(root / "images/d.bmp", 900)


@row(refused(r"c\.png: cannot be decoded.*restore"))
def flipped_bit_in_png(root):
    flip(root / "images/inner city/c.png")


@row(refused(r"c\.png: cannot be decoded.*header is not its first chunk.*restore"))
def png_with_something_before_its_header(root):
    path = root / "images/inner city/c.png"
    data = path.read_bytes()
    note = struct.pack(">I", 3) + b"tEXta\0b" + struct.pack(">I", zlib.crc32(b"tEXta\0b"))
    path.write_bytes(data[:8] + note + data[8:])


@row(refused(r"a\.jpg: the file is empty \(0 bytes\); restore"))
def empty_image(root):
    cut(root / "images/a.jpg", 0)


@row(refused(r"a\.jpg: cannot be decoded.*none of JPEG, PNG.*restore"))
def html_named_jpg(root):
    (root / "images/a.jpg").write_text("<!DOCTYPE html><title>404</title>")


@row(refused(r"a\.jpg: is an image of a format that is not read \(GIF\).*convert it"))
def gif_named_jpg(root):
    save(root / "images/a.jpg", PIXELS, format="GIF")


@row(taken(lambda r: np.testing.assert_array_equal(r["a"]["image"], PIXELS)))
def png_named_jpg(root):
    save(root / "images/a.jpg", PIXELS, format="PNG")


@row(refused(r"c\.png: has more than 8 bits a sample.*convert it to 8-bit RGB"))
def grey_image_of_16_bits(root):
    save(root / "images/inner city/c.png", PIXELS[..., 0].astype(np.uint16) * 16)


@row(refused(r"c\.png: has more than 8 bits a sample.*convert it to 8-bit RGB"))
def colour_image_of_16_bits(root):
    rows = RNG.integers(0, 4096, (24, 36 * 3)).astype(">u2")
    (root / "images/inner city/c.png").write_bytes(png(16, 2, [r.tobytes() for r in rows], 36))


@row(refused(r"f\.tif: has more than 8 bits a sample.*convert it to 8-bit RGB"))
def image_of_floats(root):
    save(root / "images/f.tif", PIXELS[..., 0].astype(np.float32))


@row(taken(lambda r: np.testing.assert_array_equal(r["inner city/c"]["image"], PIXELS)))
def opaque_rgba_image(root):
    save(root / "images/inner city/c.png", np.dstack([PIXELS, np.full(SIZE, 255, np.uint8)]))


@row(refused(r"c\.png: has transparent pixels.*without alpha channel"))
def transparent_rgba_image(root):
    alpha = np.full(SIZE, 255, np.uint8)
    alpha[3, 4] = 128
    save(root / "images/inner city/c.png", np.dstack([PIXELS, alpha]))


@row(refused(r"c\.png: has transparent pixels.*without alpha channel"))
def transparent_palette_image(root):
    im = Image.fromarray(PIXELS).quantize(16)
    im.save(root / "images/inner city/c.png", transparency=int(np.asarray(im)[0, 0]))


def _is_quantized(r):
    np.testing.assert_array_equal(r["inner city/c"]["image"], Image.fromarray(PIXELS).quantize(16).convert("RGB"))


@row(taken(_is_quantized))
def palette_image(root):
    Image.fromarray(PIXELS).quantize(16).save(root / "images/inner city/c.png")


def _is_smooth_cmyk(r):
    assert np.abs(r["a"]["image"].astype(int) - (200, 100, 50)).max() <= 3


@row(taken(_is_smooth_cmyk))
def cmyk_jpeg(root):
    im = Image.new("RGB", SIZE[::-1], (200, 100, 50)).convert("CMYK")
    im.save(root / "images/a.jpg", quality=98)
    assert Image.open(root / "images/a.jpg").mode == "CMYK"


@row(taken(lambda r: np.testing.assert_array_equal(r["inner city/c"]["image"], PIXELS[..., :1].repeat(3, 2))))
def grey_image(root):
    save(root / "images/inner city/c.png", PIXELS[..., 0])


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


@row(refused(r"a\.jpg: has EXIF orientation 3.*mask fits both ways.*remove the tag"))
def image_turned_by_exif(root):
    save(root / "images/a.jpg", PIXELS, exif=exif(3))


@row(taken(lambda r: np.testing.assert_array_equal(r["inner city/c"]["image"], np.rot90(PIXELS))))
def image_turned_by_exif_and_its_mask_shows_how(root):
    save(root / "images/inner city/c.png", PIXELS, exif=exif(8))
    layout.write_mask(root / "masks/inner city/c.png", np.rot90(LABEL).copy())


@row(taken(lambda r: None))
def damaged_exif(root):
    save(root / "images/inner city/c.png", PIXELS, exif=b"Exif\0\0MM\0*")


@row(refused(r"e\.webp: holds 2 pictures.*save the one"))
def animated_webp(root):
    other = [Image.fromarray(255 - PIXELS)]
    Image.fromarray(PIXELS).save(root / "images/e.webp", save_all=True, append_images=other, lossless=True)


@row(refused(r"c\.png: holds 2 pictures.*save the one"))
def animated_png(root):
    other = [Image.fromarray(255 - PIXELS)]
    Image.fromarray(PIXELS).save(root / "images/inner city/c.png", save_all=True, append_images=other)


@row(refused(r"f\.tif: holds 2 pictures.*save the one"))
def tiff_of_two_pages(root):
    other = [Image.fromarray(255 - PIXELS)]
    Image.fromarray(PIXELS).save(root / "images/f.tif", save_all=True, append_images=other)


def _is_first_frame(r):
    assert (r["a"]["image"] == 40).all()


@row(taken(_is_first_frame))
def jpeg_with_a_preview_behind_it(root):
    flat = lambda value: Image.fromarray(np.full((*SIZE, 3), value, np.uint8))
    flat(40).save(root / "images/a.jpg", format="MPO", save_all=True, append_images=[flat(90)])
    assert Image.open(root / "images/a.jpg").format == "MPO"


@row(refused(r"c\.png: has more pixels than config.data.max_pixels = \d+ allows; raise.*tiles"))
def decompression_bomb(root):
    (root / "images/inner city/c.png").write_bytes(png(8, 2, [b"\0" * 6], 60_000, 60_000))


@row(refused(r"c\.png: has more pixels than config.data.max_pixels = \d+ allows; raise.*tiles"))
def small_decompression_bomb(root):
    (root / "images/inner city/c.png").write_bytes(png(1, 0, [b"\0" * 6], 10_000, 10_000))


@row(refused(r"c\.png: cannot be decoded.*restore"))
def image_of_no_pixels(root):
    (root / "images/inner city/c.png").write_bytes(png(8, 2, [b""], 0, 0))


@row(refused(r"train\.txt, line 1: 'a' is no image in .*images; .*add the image"))
def folder_named_like_an_image(root):
    (root / "images/a.jpg").unlink()
    (root / "masks/a.png").unlink()
    (root / "images/a.jpg").mkdir()


@row(refused(r"a\.jpg: image is a link to nothing but .*train\.txt names it.*add the file"))
def broken_link(root):
    (root / "images/a.jpg").unlink()
    (root / "images/a.jpg").symlink_to("nowhere.jpg")


@row(refused(r"(a\.jpg|masks): cannot be read \(Permission denied\); check"))
def unreadable_image(root):
    if os.geteuid() == 0:
        pytest.skip("root reads everything")
    (root / "images/a.jpg").chmod(0)


@row(refused(r"images/more: is a link to a folder.*copy the folder"))
def link_to_a_folder(root):
    (root / "images/more").symlink_to(root / "images", target_is_directory=True)


@row(taken(lambda r: None), lists=False)
def hidden_and_other_files(root):
    for name in ("images/._a.jpg", "images/.DS_Store", "images/Thumbs.db", "masks/._a.png", "masks/notes.txt"):
        (root / name).write_bytes(b"\0\5\x16\7")
    (root / "images/.cache").mkdir()
    (root / "images/.cache/a.jpg").write_bytes(b"")


# Masks ------------------------------------------------------------------------------------------------


@row(refused(r"masks/a\.png: cannot be decoded.*restore"))
def truncated_mask(root):
    cut(root / "masks/a.png", -20)


@row(refused(r"masks/a\.png: cannot be decoded.*restore"))
def flipped_bit_in_mask(root):
    flip(root / "masks/a.png", 0.6)


@row(refused(r"masks/a\.png: the file is empty \(0 bytes\); restore"))
def empty_mask(root):
    cut(root / "masks/a.png", 0)


@row(refused(r"masks/a\.png: cannot be decoded.*restore"))
def text_named_png(root):
    (root / "masks/a.png").write_text("0 0 1 1\n0 0 1 1\n")


@row(refused(r"masks/a\.png: mask is a JPEG file, masks are PNG.*from the original mask"))
def jpeg_mask_named_png(root):
    save(root / "masks/a.png", LABEL, format="JPEG")


@row(refused(r"masks/a\.jpg: mask is a JPEG file, masks are PNG files; JPEG changes labels.*from the original mask"))
def jpeg_mask(root):
    (root / "masks/a.png").unlink()
    save(root / "masks/a.jpg", LABEL)


@row(refused(r"masks/a\.png: mask is a TIFF file, masks are PNG"))
def tiff_mask_named_png(root):
    save(root / "masks/a.png", LABEL, format="TIFF")


def _is_label(r):
    np.testing.assert_array_equal(r["a"]["label"], LABEL)


@row(taken(_is_label))
def palette_mask(root):
    layout.write_mask(root / "masks/a.png", LABEL, palette=True)


@row(refused(r"masks/a\.png: cannot be decoded.*it has no palette.*restore"))
def palette_mask_without_palette(root):
    (root / "masks/a.png").write_bytes(png(2, 3, [[0b00011000] * 9] * 24, 36))


@row(refused(r"c\.png: has pixels of a colour that its palette does not have; restore"))
def palette_too_short(root):
    palette = struct.pack(">I", 6) + b"PLTE" + bytes(6) + struct.pack(">I", zlib.crc32(b"PLTE" + bytes(6)))
    (root / "images/inner city/c.png").write_bytes(png(2, 3, [[0b00011000] * 9] * 24, 36, extra=palette))


@row(taken(_is_label))
def palette_mask_with_transparent_void(root):
    layout.write_mask(root / "masks/a.png", LABEL, palette=True)
    Image.open(root / "masks/a.png").save(root / "masks/a.png", transparency=255)


def _is_repeated(r):
    np.testing.assert_array_equal(r["a"]["label"], np.tile([0, 1, 2, 0], (24, 9)))


@row(taken(_is_repeated))
def palette_mask_of_2_bits(root):
    colours = bytes(np.array(layout.COLOURS, np.uint8))
    palette = struct.pack(">I", 9) + b"PLTE" + colours + struct.pack(">I", zlib.crc32(b"PLTE" + colours))
    (root / "masks/a.png").write_bytes(png(2, 3, [[0b00011000] * 9] * 24, 36, extra=palette))


@row(warned(r"value 0 is \(.*\) in the palette of .*\.png but \(7, 7, 7\) in that of .*\.png.*colours in classes\.txt"))
def palettes_that_differ(root):
    mask = Image.fromarray(LABEL)
    mask.putpalette([7] * 768)
    mask.save(root / "masks/d.png")


@row(refused(r"masks/a\.png: mask has PIL mode 'RGB'.*its three channels are equal: save one of them"))
def grey_mask_as_rgb(root):
    save(root / "masks/a.png", LABEL[..., None].repeat(3, 2))


@row(refused(r"masks/a\.png: mask has PIL mode 'RGB'.*colours to the data set image_folder"))
def colour_mask_without_colours(root):
    layout.write_mask(root / "masks/a.png", LABEL, colours=True)


@row(refused(r"masks/a\.png: mask has PIL mode 'RGBA'.*convert"))
def rgba_mask(root):
    save(root / "masks/a.png", LABEL[..., None].repeat(4, 2))


@row(refused(r"masks/a\.png: mask has PIL mode 'LA'.*convert"))
def grey_mask_with_alpha(root):
    Image.fromarray(LABEL).convert("LA").save(root / "masks/a.png")


@row(refused(r"masks/a\.png: mask has PIL mode 'I;16'.*convert"))
def mask_of_16_bits(root):
    save(root / "masks/a.png", LABEL.astype(np.uint16))


@row(refused(r"masks/a\.png: mask has PIL mode '1'.*convert"))
def mask_of_1_bit(root):
    save(root / "masks/a.png", LABEL == 1)


@row(refused(r"masks/a\.png: mask has 4 bits of grey a pixel.*convert the mask to an 8-bit"))
def mask_of_4_bits_of_grey(root):
    (root / "masks/a.png").write_bytes(png(4, 0, [[0x12] * 18] * 24, 36))


@row(refused(r"masks/a\.png: holds 2 pictures"))
def animated_mask(root):
    im = Image.fromarray(LABEL)
    im.save(root / "masks/a.png", save_all=True, append_images=[im.rotate(180)])


@row(refused(r"masks/a\.png: mask is 36x23 pixels but its image .*a\.jpg is 36x24.*nearest"))
def mask_of_another_size(root):
    layout.write_mask(root / "masks/a.png", LABEL[1:])


@row(refused(r"masks/a\.png: mask is 24x36 pixels but its image .*a\.jpg is 36x24"))
def transposed_mask(root):
    layout.write_mask(root / "masks/a.png", LABEL.T.copy())


@row(
    refused(
        r"masks/a\.png: label value 3 is neither a class \(0\.\.2\) nor void \(255\).*off by one\?.*correct the mask"
    )
)
def labels_off_by_one(root):
    layout.write_mask(root / "masks/a.png", np.where(LABEL < 3, LABEL + 1, 255).astype(np.uint8))


@row(warned(r"class 0 \(road\) occurs nowhere: do the masks count from 1"))
def labels_off_by_one_within_the_classes(root):
    for path in (root / "masks").rglob("*.png"):
        layout.write_mask(path, np.where(LABEL == 0, 1, 2).astype(np.uint8))


@row(
    refused(r"masks/a\.png: label value 77 is neither .*in all 1 pixels with 77; correct the mask, or complete classes")
)
def stray_label(root):
    label = LABEL.copy()
    label[0, 0] = 77
    layout.write_mask(root / "masks/a.png", label)


@row(warned(r"the only class in training masks is road; if they are masks of 0 and 255, write the object as 1"))
def binary_masks(root):
    for path in (root / "masks").rglob("*.png"):
        layout.write_mask(path, np.where(LABEL == 0, 0, 255).astype(np.uint8))


@row(warned(r"split 'train': 1 mask is void all over: a"))
def mask_void_all_over(root):
    layout.write_mask(root / "masks/a.png", np.full(SIZE, 255, np.uint8))


@row(refused(r"split 'train': all 6 masks are void all over, there is nothing to learn; check what the masks hold"))
def all_masks_void(root):
    for path in (root / "masks").rglob("*.png"):
        layout.write_mask(path, np.full(SIZE, 255, np.uint8))


def blurred(top):
    label = np.zeros((6, 9), np.uint8)
    label[2:5, 2:7] = top
    return np.asarray(Image.fromarray(label).resize(SIZE[::-1], Image.Resampling.BILINEAR))


@row(refused(r"masks/a\.png: label value \d+ is neither.*with interpolation\? Do it with nearest neighbour"))
def interpolated_mask(root):
    layout.write_mask(root / "masks/a.png", blurred(255))


@row(warned(r"split 'train': 1 mask is blurred.*make them again with nearest neighbour: a"))
def interpolated_mask_within_the_classes(root):
    reclass(root, "".join(f"class {i}\n" for i in range(13)))
    layout.write_mask(root / "masks/a.png", blurred(12))


@row(taken(lambda r: None))
def outlines_of_two_pixels(root):
    label = np.zeros(SIZE, np.uint8)
    label[4:20, 5:30] = 1
    label[6:18, 7:28] = 2
    layout.write_mask(root / "masks/a.png", label)


@row(refused(r"masks/a\.png: mask is a link to nothing but .*train\.txt names it"))
def broken_link_to_a_mask(root):
    (root / "masks/a.png").unlink()
    (root / "masks/a.png").symlink_to("nowhere.png")


# Masks of colours -------------------------------------------------------------------------------------


@row(refused(r"masks/a\.png: colour \(1, 2, 3\) is not in classes\.txt, first at row 5, column 7, in all 1 pixels"
             r".*correct classes\.txt \(a line 'void R G B'"), colours=True)  # fmt: skip
def unknown_colour(root):
    mask = np.array(Image.open(root / "masks/a.png"))
    mask[5, 7] = 1, 2, 3
    save(root / "masks/a.png", mask)


@row(refused(r"masks/a\.png: colour .* such colours; if the mask was resized or smoothed, make it again"), colours=True)
def smoothed_colours(root):
    im = Image.open(root / "masks/a.png")
    im.resize((18, 12), Image.Resampling.BICUBIC).resize(SIZE[::-1], Image.Resampling.NEAREST).save(
        root / "masks/a.png"
    )


@row(
    refused(r"masks/a\.png: colour \(1, 1, 1\) is not in .*grey values are class numbers, take the colours out"),
    colours=True,
)
def numbers_where_colours_are_given(root):
    layout.write_mask(root / "masks/a.png", np.where(LABEL == 255, 0, LABEL).astype(np.uint8))


@row(refused(r"masks/a\.png: mask is a JPEG file, masks are PNG"), colours=True)
def colour_mask_as_jpeg(root):
    im = Image.open(root / "masks/a.png")
    im.save(root / "masks/a.png", format="JPEG")


@row(taken(_is_label), colours=True)
def palette_in_another_order(root):
    order = np.array([2, 0, 1, *range(3, 256)])
    palette = np.zeros((256, 3), np.uint8)
    palette[order[:3]], palette[order[255]] = layout.COLOURS, layout.VOID
    mask = Image.fromarray(order.astype(np.uint8)[LABEL])
    mask.putpalette(palette.tobytes())
    mask.save(root / "masks/a.png")


@row(refused(r"masks/a\.png: has transparent pixels"), colours=True)
def transparent_colour_mask(root):
    Image.open(root / "masks/a.png").convert("RGBA").save(root / "masks/a.png")
    im = np.array(Image.open(root / "masks/a.png"))
    im[0, 0, 3] = 0
    save(root / "masks/a.png", im)


# Which images there are -------------------------------------------------------------------------------


@row(refused(r"a\.png and .*a\.jpg have the same name but for the suffix; rename or remove one"))
def one_name_with_two_suffixes(root):
    save(root / "images/a.png", PIXELS)


@row(refused(r"A\.PNG and .*A\.jpg have the same name|A\.jpg and .*A\.PNG have the same name"))
def one_name_with_suffixes_in_two_cases(root):
    save(root / "images/A.PNG", PIXELS)
    save(root / "images/A.jpg", PIXELS)


@row(refused(r"images/a\.jpg: has no mask .*masks/a\.png \(split 'train'; and 1 more: inner city/c\); add it"))
def images_without_masks(root):
    (root / "masks/a.png").unlink()
    (root / "masks/inner city/c.png").unlink()


@row(refused(r"images/.*: has no mask .* \(split 'train'"), lists=False)
def no_masks_at_all(root):
    shutil.rmtree(root / "masks")


@row(refused(r"images/g\.jpg: has no mask .*g\.png \(split 'test'; nothing else\).*none of them with one"))
def some_masks_in_split_test(root):
    with (root / "test.txt").open("a") as file:
        file.write("a\n")


@row(refused(r"masks/x\.png: has no image .*images/x\.\* \(and 1 more: y/z\); add it, or remove the mask"))
def masks_without_images(root):
    layout.write_mask(root / "masks/x.png", LABEL)
    layout.write_mask(root / "masks/y/z.png", LABEL)


@row(warned(r"1 image is in both 'train' and 'val': inner city/c = copy"))
def training_image_in_val(root):
    shutil.copy(root / "images/inner city/c.png", root / "images/copy.png")
    layout.write_mask(root / "masks/copy.png", LABEL)
    with (root / "val.txt").open("a") as file:
        file.write("copy\n")


@row(warned(r"1 image is in both 'train' and 'val': a = a"))
def id_in_two_lists(root):
    with (root / "val.txt").open("a") as file:
        file.write("a\n")


@row(warned(r"split 'train': 1 pair is the same image under two names: inner city/c = d"))
def image_twice_in_a_split(root):
    Image.open(root / "images/inner city/c.png").save(root / "images/d.bmp")


@row(refused(r"own: has no folder images; expected images/NAME\.jpg.*check data\.source_dir"))
def wrong_folder(root):
    (root / "images").rename(root / "imgs")


@row(refused(r"images: holds no image; expected"))
def no_images(root):
    shutil.rmtree(root / "images")
    (root / "images").mkdir()


@row(refused(r"its name is not UTF-8, or holds control characters; rename it"))
def name_that_is_not_utf8(root):
    shutil.copy(root / "images/a.jpg", os.fsencode(root / "images") + b"/\xe9t\xe9.jpg")


@row(refused(r"its name is not UTF-8, or holds control characters; rename it"))
def name_with_a_line_break(root):
    shutil.copy(root / "images/a.jpg", root / "images/a\nb.jpg")


# Lists ------------------------------------------------------------------------------------------------


def relist(root, text, split="train", encoding="utf-8"):
    (root / f"{split}.txt").write_bytes(text.encode(encoding))


def _ids(*expected):
    def check(records):
        assert set(records) == {*expected, "été", "inner city/a", "g"}

    return taken(check)


@row(_ids("a", "b", "inner city/c"))
def list_from_windows(root):
    relist(root, "a\r\nb.JPG\r\ninner city\\c.png\r\n\r\n", encoding="utf-8-sig")


@row(_ids("a", "b"))
def list_of_an_old_mac(root):
    relist(root, "a\rb\r")


@row(_ids("a"))
def names_decomposed_as_macos_does(root):
    decomposed = unicodedata.normalize("NFD", "été")
    relist(root, f"{decomposed}\ninner city/a", split="val")
    (root / "masks/été.png").rename(root / f"masks/{decomposed}.png")
    relist(root, "a\n")


@row(refused(r"val\.txt: is not UTF-8 text \(.*at byte 0\); save it as UTF-8"))
def list_in_latin_1(root):
    relist(root, "été\n", split="val", encoding="latin-1")


@row(refused(r"train\.txt: is not UTF-8 text \(.*\); save it as UTF-8"))
def list_in_utf_16(root):
    relist(root, "a\n", encoding="utf-16")


@row(refused(r"train\.txt: the list is empty, split 'train' has no images; fill it or remove it"))
def empty_list(root):
    relist(root, "\n \n")


@row(refused(r"train\.txt, line 2: 'missing\.jpg' is no image in .*images; write ids or file names"))
def list_of_a_missing_file(root):
    relist(root, "a\nmissing.jpg\n")


@row(refused(r"train\.txt, line 1: 'A' is no image"))
def list_in_the_wrong_case(root):
    relist(root, "A\n")


@row(refused(r"train\.txt, line 1: 'a b' is no image"))
def two_names_in_a_line(root):
    relist(root, "a b\n")


@row(refused(r"train\.txt: 'a' is in split 'train' twice; remove one"))
def name_twice_in_a_list(root):
    relist(root, "a\nb\na.jpg\n")


@row(refused(r"train\.txt, line 1: '\\x00' is no image"))
def zero_byte_in_a_list(root):
    relist(root, "\0\n")


# classes.txt ------------------------------------------------------------------------------------------


def reclass(root, text):
    (root / "classes.txt").write_text(text)


@row(refused(r"classes\.txt: is missing; write one class a line"))
def no_classes(root):
    (root / "classes.txt").unlink()


@row(refused(r"classes\.txt: names no class; write one a line"))
def empty_classes(root):
    reclass(root, "# nothing\n\nvoid 255\n")


@row(refused(r"classes\.txt, line 3: class 'road' is there twice; rename or remove one"))
def class_twice(root):
    reclass(root, "road\nsky\nroad\n")


@row(refused(r"classes\.txt: 256 classes are too many, 8-bit masks have room for 255 and void"))
def too_many_classes(root):
    reclass(root, "".join(f"c{i}\n" for i in range(256)))


@row(refused(r"classes\.txt, line 2: \(0, 256, 0\) is no colour; R, G and B are 0\.\.255"))
def bad_colour(root):
    reclass(root, "road 1 2 3\nsky 0 256 0\n")


@row(refused(r"classes\.txt, line 2: 'sky' and 'road' have the same colour \(1, 2, 3\); change one"))
def colour_twice(root):
    reclass(root, "road 1 2 3\nsky 1 2 3\n")


@row(refused(r"classes\.txt: some lines have a colour, but not sky; give every class a colour, or none"))
def colour_missing(root):
    reclass(root, "road 1 2 3\nsky\n")


@row(refused(r"classes\.txt: some lines have a colour, but not void; give every class a colour, or none"))
def void_value_among_colours(root):
    reclass(root, "road 1 2 3\nsky 4 5 6\nvoid 255\n")


@row(taken(_is_label))
def numbered_classes(root):
    reclass(root, "1: road\n0: sky\n2: lamp\n")
    layout.write_mask(root / "masks/a.png", LABEL)


@row(taken(_is_label), colours=True)
def colours_before_names(root):
    reclass(root, "128 64 128 road\n153 153 153 street lamp\n70 130 180 sky\nvoid 0 0 0\n")
    layout.write_mask(root / "masks/a.png", LABEL, colours=True)


@row(refused(r"classes\.txt, line 1: void needs its value \('void 255'\) or its colour"))
def void_without_value(root):
    reclass(root, "void\nroad\nsky\n")


@row(refused(r"classes\.txt, line 3: 256 is no value of an 8-bit mask"))
def void_out_of_range(root):
    reclass(root, "road\nsky\nvoid 256\n")


@row(refused(r"classes\.txt: is not UTF-8 text"))
def classes_in_latin_1(root):
    (root / "classes.txt").write_bytes("rue\nété\n".encode("latin-1"))


@row(refused(r"masks/a\.png: label value 2 is neither a class \(0\.\.1\).*off by one\?.*complete classes\.txt"))
def classes_too_few(root):
    reclass(root, "road\nlamp\n")


@row(taken(_is_label))
def values_behind_names(root):
    reclass(root, "lamp 2\nsky 1\nroad 0\nvoid 255\n")
    layout.write_mask(root / "masks/a.png", LABEL)


@row(taken(_is_label))
def values_before_names_and_void(root):
    reclass(root, "2 lamp\n1 sky\n0 road\nvoid 255\n")
    layout.write_mask(root / "masks/a.png", LABEL)


@row(refused(r"masks/a\.png: label value 255 is neither a class \(1\.\.4\) nor void \(0\)"))
def void_in_capitals(root):
    reclass(root, "road\nsky\nlamp\nlane\nVoid 0\n")


@row(refused(r"classes\.txt, line 4: 'unlabeled' would be a class; write 'void VALUE' or 'void R G B' for what is not"))
def void_by_another_name(root):
    reclass(root, "road\nsky\nlamp\nunlabeled\n")


@row(taken(_is_label), colours=True)
def void_by_another_name_with_its_colour(root):
    reclass(root, "road 128 64 128\nlamp 153 153 153\nsky 70 130 180\nunlabeled 0 0 0\n")
    layout.write_mask(root / "masks/a.png", LABEL, colours=True)


@row(taken(_is_label), colours=True)
def colours_with_commas(root):
    reclass(root, "road,128,64,128\nlamp,153,153,153\nsky,70,130,180\nvoid,0,0,0\n")
    layout.write_mask(root / "masks/a.png", LABEL, colours=True)


@row(refused(r"classes\.txt, line 1: 'road 1' is no name; write 'name' or 'name R G B'"))
def colours_with_alpha(root):
    reclass(root, "road 1 2 3 255\nsky 4 5 6 255\n")


@row(refused(r"classes\.txt, line 2: 'sky # blue' is no name"))
def comment_behind_a_name(root):
    reclass(root, "road\nsky # blue\nlamp\n")


@row(refused(r"classes\.txt, line 1: .* holds control characters"))
def classes_in_utf_16(root):
    (root / "classes.txt").write_bytes("road\nsky\n".encode("utf-16-le"))


@row(refused(r"classes\.txt: names one class, expected two or more"))
def one_class(root):
    reclass(root, "road\n")


@row(refused(r"validation\.txt: looks like the list of a split, which are train\.txt, val\.txt and test\.txt"))
def list_by_another_name(root):
    (root / "validation.txt").write_text("a\n")


@pytest.mark.filterwarnings("ignore:Corrupt EXIF", "ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(("spoil", "outcome", "options"), TABLE)
def test_spoiled(root, tmp_path, caplog, spoil, outcome, options):
    layout.make(root, np.random.default_rng(3), **options)
    spoil(root)
    outcome(lambda: load_dataset("image_folder", source_dir=str(root), data_dir=str(tmp_path / "prepared")), caplog)


def test_the_table_is_long_and_the_folder_sound(root, tmp_path, caplog):
    assert len(TABLE) > 90
    for options in ({}, {"colours": True}, {"lists": False}):
        layout.make(root, np.random.default_rng(3), **options)
        load_dataset("image_folder", source_dir=str(root), data_dir=str(tmp_path / "prepared"))
        shutil.rmtree(root)
    assert not caplog.records


# Other layouts ----------------------------------------------------------------------------------------


def test_camvid_masks_that_count_from_1(camvid, tmp_path, caplog):
    """Class 11 is then void, so no value is out of range."""
    label = np.arange(1, 12, dtype=np.uint8).repeat(60).reshape(20, 33)[:, :30]
    for path in camvid.root.glob("*annot/*.png"):
        save(path, label)
    load_dataset("camvid", source_dir=str(camvid.root), data_dir=str(tmp_path / "prepared"), partial=True)
    assert "class 0 (Sky) occurs nowhere: do the masks count from 1" in caplog.text


def test_camvid_list_that_is_not_utf8(camvid, tmp_path):
    (camvid.root / "val.txt").write_bytes("val/été.jpg valannot/été.png\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"not UTF-8 text.*save it as UTF-8"):
        load_dataset("camvid", source_dir=str(camvid.root), data_dir=str(tmp_path / "prepared"), partial=True)


def test_voc_masks_with_values_along_the_borders(voc, tmp_path):
    label = np.zeros((20, 30), np.uint8)
    label[:, 15:] = 255
    small = Image.fromarray(label).resize((15, 10), Image.Resampling.BILINEAR)
    small.resize((30, 20), Image.Resampling.BILINEAR).save(voc.root / "SegmentationClass/b.png")
    with pytest.raises(
        DataError, match=r"b\.png: label value \d+ is neither .*with interpolation\? Do it with nearest"
    ):
        load_dataset("voc", source_dir=str(voc.root), data_dir=str(tmp_path / "prepared"), partial=True)
