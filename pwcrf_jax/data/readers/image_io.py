"""The void label, and decoding and encoding of images and masks, for every module of the data package.

Decoding is our own (PIL) because TFDS picks its decoder by what happens to be installed, and with
OpenCV a palette mask silently becomes colours instead of class indices.
"""

import contextlib
import io
import math
import re
import struct
import threading
import zlib
from collections.abc import Iterator

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

from pwcrf_jax.data.readers.files import (
    FOREIGN_REMEDY,
    IMAGE_FORMATS,
    MAX_PIXELS,
    DataError,
    foreign_format,
    read_lines,
)

__all__ = [
    "IMAGE_FORMATS", "MAX_PIXELS", "MEAN_COLOUR", "VOID", "DataError", "decode_colour_label", "decode_image",
    "decode_label", "encode_label", "encode_png", "image_size", "mask_palette", "not_png", "open_image", "orientation",
    "read_lines", "storable_image", "value_counts", "voc_palette",
]  # fmt: skip

VOID = 255
"""Label of pixels that are neither trained on nor scored."""

MEAN_COLOUR = (124, 116, 104)
"""ImageNet mean colour (RGB), used for padding: it is (nearly) zero after the usual normalisation."""


_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")
_ORIENTATION, _BITS_PER_SAMPLE = 0x0112, 0x0102  # tags of EXIF and TIFF
_UPRIGHT = {  # EXIF orientation -> what makes the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


_pil_limit = threading.Lock()


@contextlib.contextmanager
def _allowed_by_pil(pixels: float) -> Iterator[None]:
    """PIL checks sizes against a limit of the whole program; it is put aside only for images that need it, and not for
    longer."""
    limit = Image.MAX_IMAGE_PIXELS
    if limit is None or pixels <= limit:
        yield
        return
    with _pil_limit:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _opened(data: bytes) -> Image.Image:
    """`PIL.Image.open` without its limit of pixels, which is `_open`'s affair."""
    Image.init()
    for name in IMAGE_FORMATS:
        factory, accept = Image.OPEN[name]
        if accept and accept(data[:16]):
            with contextlib.suppress(SyntaxError, IndexError, TypeError, struct.error):
                return factory(io.BytesIO(data), "")
    raise UnidentifiedImageError


def _open(data: bytes, where: str, load: bool = True, max_pixels: float = MAX_PIXELS) -> Image.Image:
    if not data:
        raise DataError(f"{where}: the file is empty (0 bytes); restore it from the original data")
    too_large = DataError(
        f"{where}: has more pixels than config.data.max_pixels = {max_pixels:.0f} allows; raise that (--option "
        "max_pixels=N of pwcrf check) or cut it into tiles, or, if it should be smaller, restore the file"
    )
    if foreign := foreign_format(data):
        raise DataError(f"{where}: is an image of a format that is not read ({foreign}); {FOREIGN_REMEDY}")
    try:
        if data.startswith(b"\x89PNG"):
            data = _checked_png(data)
        try:
            im = _opened(data)
        except Image.DecompressionBombError:  # WebP, which must know before it opens a file
            if max_pixels <= 2 * (Image.MAX_IMAGE_PIXELS or 0):
                raise too_large from None
            with _allowed_by_pil(math.inf):
                im = _opened(data)
        if im.width * im.height > max_pixels:
            raise too_large
        # MPO is a JPEG with previews, or the other eye's view, behind it. Pages are not counted: there may be millions.
        if im.format != "MPO" and getattr(im, "is_animated", False):
            raise DataError(
                f"{where}: holds 2 pictures or more, an animation or pages; save the one that is meant as PNG"
            )
        if load:
            with _allowed_by_pil(im.width * im.height):
                im.load()
            if im.mode in ("P", "PA") and im.palette is None:
                raise ValueError("it has no palette")
    except DataError:
        raise
    except Exception as e:  # PIL raises OSError, SyntaxError, ValueError, zlib.error, struct.error, ...
        reason = f"none of {', '.join(IMAGE_FORMATS)}" if isinstance(e, UnidentifiedImageError) else e
        raise DataError(
            f"{where}: cannot be decoded, the file is damaged or not an image ({reason}); restore it from the original "
            "data"
        ) from e
    return im


def _checked_png(data: bytes) -> bytes:
    """A PNG without colour profile and texts, of whatever length they are: PIL would refuse some above 1 MB.

    Raises:
      ValueError: a checksum is wrong (PIL looks at few; a flipped bit would give wrong labels), or a part is missing.
    """
    kept, at, kind = [data[:8]], 8, b""
    while kind != b"IEND":
        if at + 12 > len(data):
            raise ValueError("it is truncated")
        (length,), kind = struct.unpack_from(">I", data, at), data[at + 4 : at + 8]
        if at == 8 and kind != b"IHDR":  # `_depth` counts on it
            raise ValueError("its header is not its first chunk")
        chunk = data[at : at + 12 + length]
        if len(chunk) != 12 + length or zlib.crc32(chunk[4:-4]) != int.from_bytes(chunk[-4:], "big"):
            raise ValueError(f"it is truncated, or the checksum of a part ({kind!r}) is wrong")
        if kind == b"iCCP":
            chunk = b""
        elif kind in (b"tEXt", b"zTXt", b"iTXt"):
            chunk = _orientation_text(kind, chunk[8:-4])
        kept.append(chunk)
        at += 12 + length
    return b"".join(kept)


def _orientation_text(kind: bytes, text: bytes) -> bytes:
    """A text chunk as PIL reads it at any length if it may tell an orientation (EXIF, XMP), else nothing."""
    key, _, value = text.partition(b"\0")
    if not re.search(rb"exif|xmp", key, re.IGNORECASE):
        return b""
    try:
        if kind == b"zTXt":
            kind, value = b"tEXt", zlib.decompressobj().decompress(value[1:], 32 << 20)
        elif kind == b"iTXt" and value[:1] == b"\1":  # packed; method, language, translated key, text
            start = value.index(b"\0", value.index(b"\0", 2) + 1) + 1
            value = b"\0\0\0\0" + zlib.decompressobj().decompress(value[start:], 32 << 20)
    except (ValueError, zlib.error):  # damaged EXIF says nothing
        return b""
    body = kind + key + b"\0" + value
    return struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))


def _depth(im: Image.Image, data: bytes) -> int:
    """Bits of a sample in the file; PIL's mode tells only what it makes of them."""
    if im.format == "PNG":
        return data[24]
    return max(im.tag_v2.get(_BITS_PER_SAMPLE, (8,))) if isinstance(im, TiffImageFile) else 8


def decode_image(data: bytes, where: str, max_pixels: float = MAX_PIXELS) -> np.ndarray:
    """Decodes an image of one of `IMAGE_FORMATS` to RGB, uint8 [H, W, 3]; its EXIF orientation is not applied.

    Args:
      data: the file's bytes.
      where: what an error message calls the file.
      max_pixels: that it may have, config.data.max_pixels.

    Raises:
      DataError: the bytes are empty, truncated, damaged, no image or several, of more than 8 bits a sample, partly
        transparent, or of more pixels than `max_pixels`.
    """
    return np.asarray(open_image(data, where, max_pixels))


def open_image(data: bytes, where: str, max_pixels: float = MAX_PIXELS) -> Image.Image:
    """`decode_image`, as a `PIL.Image` in RGB."""
    return _rgb(_open(data, where, max_pixels=max_pixels), data, where)


def image_size(data: bytes, where: str) -> tuple[int, int]:
    """(height, width) of an image, however large, from its header; DataError as `decode_image`."""
    im = _open(data, where, load=False, max_pixels=math.inf)
    return im.height, im.width


def _rgb(im: Image.Image, data: bytes, where: str) -> Image.Image:
    if im.mode not in _MODES or _depth(im, data) > 8:
        raise DataError(
            f"{where}: has more than 8 bits a sample, or unusual colours (PIL mode {im.mode!r}); which values are "
            "black and white only you know: convert it to 8-bit RGB"
        )
    if im.mode == "P" and np.asarray(im).max() >= len(im.getpalette() or ()) // 3:
        raise DataError(
            f"{where}: has pixels of a colour that its palette does not have; restore it from the original data"
        )
    if im.has_transparency_data and np.asarray(im.convert("RGBA").getchannel("A")).min() < 255:
        raise DataError(
            f"{where}: has transparent pixels, whose colours nobody has seen; put it on a background and save it "
            "without alpha channel"
        )
    return im if im.mode == "RGB" else im.convert("RGB")


def orientation(data: bytes, where: str) -> int:
    """The EXIF orientation of an image, 1 (upright as stored) to 8, from its header; 1 where it has none.

    Raises:
      DataError: as `decode_image`, as far as the header shows it.
    """
    return _orientation(_open(data, where, load=False, max_pixels=math.inf))


def _orientation(im: Image.Image) -> int:
    # Of a PNG that has no EXIF, getexif would decode the pixels to look behind them.
    if im.format == "PNG" and not any("exif" in key.lower() or "xmp" in key.lower() for key in map(str, im.info)):
        return 1
    try:
        turn = im.getexif().get(_ORIENTATION)
    except Exception:  # damaged EXIF says nothing
        return 1
    return turn if turn in _UPRIGHT else 1


def storable_image(
    data: bytes, where: str, mask_shape: tuple[int, int] | None, *, trusted: bool, max_pixels: float = MAX_PIXELS
) -> bytes:
    """The bytes that a record keeps of an image file: its own if they are a JPEG or PNG whose pixels fit the mask.

    An EXIF orientation leaves open which pixels a mask was made for, those in the file or those a viewer shows. Where
    the two differ in size, the mask's size tells. Else they are those in the file if `trusted`, and if not the image is
    refused; without a mask the image is made upright.

    Args:
      mask_shape: (height, width) of the mask; None: there is none.
      trusted: masks are known to go with the pixels in the file.
      max_pixels: as of `decode_image`.

    Returns:
      JPEG or PNG bytes, of which `decode_image` gives the pixels.

    Raises:
      DataError: as `decode_image`, and for an orientation that leaves it open.
    """
    im = _open(data, where, load=False, max_pixels=max_pixels)
    turn, size = _orientation(im), (im.height, im.width)
    upright = False
    if turn > 1:
        if im.format == "TIFF":
            raise DataError(f"{where}: a TIFF file with an orientation tag ({turn}); save it upright, without the tag")
        if mask_shape is None:
            upright = not trusted
        elif turn >= 5 and im.height != im.width:
            upright = mask_shape == size[::-1]
        elif not trusted:
            raise DataError(
                f"{where}: has EXIF orientation {turn}, so that viewers show it turned or mirrored, and its mask fits "
                "both ways; look which way they match, then turn the pixels or leave them, and remove the tag"
            )
    if im.format in ("JPEG", "MPO", "PNG") and not upright:
        return data
    picture = open_image(data, where, max_pixels)
    return encode_png(np.asarray(picture.transpose(_UPRIGHT[turn]) if upright else picture))


def decode_label(data: bytes, where: str, max_pixels: float = MAX_PIXELS) -> np.ndarray:
    """Decodes a mask of class indices (a PNG, 8-bit grey or palette), uint8 [H, W].

    Args:
      data: the file's bytes.
      where: what an error message calls the file.
      max_pixels: as of `decode_image`.

    Raises:
      DataError: as `decode_image`, and for a mask that is no PNG or of another mode (RGB, 16 bit, 1 bit, ...).
    """
    im = _open_mask(data, where, max_pixels)
    advice = "convert the mask to an 8-bit single-channel PNG of class indices"
    if im.mode not in ("L", "P"):
        if im.mode == "RGB" and not np.ptp(np.asarray(im), axis=-1).any():
            advice = "its three channels are equal: save one of them"
        elif im.mode in ("RGB", "RGBA"):
            advice += ", or describe its colours to the data set image_folder"
        colours = np.asarray(im.convert("RGB")) if im.mode in ("1", "LA", "RGB", "RGBA") else np.ones((1, 1, 3))
        if not np.ptp(colours, axis=-1).any() and np.isin(colours, (0, 255)).all():
            advice += "; or, if it is black and white, write two lines into classes.txt of image_folder: " \
                      "'background 0 0 0' and 'object 255 255 255'"  # fmt: skip
        raise DataError(
            f"{where}: mask has PIL mode {im.mode!r}, expected 'L' (8-bit grey) or 'P' (palette) with one "
            f"class index per pixel; {advice}"
        )
    if im.mode == "L" and _depth(im, data) != 8:
        # 1 is 17 of 4 bits: PIL stretches grey to 0..255, as the format says, where writers may have meant indices.
        raise DataError(
            f"{where}: mask has {_depth(im, data)} bits of grey a pixel, which stand for brightness; {advice}"
        )
    return np.asarray(im)


def decode_colour_label(data: bytes, where: str, max_pixels: float = MAX_PIXELS) -> np.ndarray:
    """Decodes a mask of colours (a PNG), uint8 [H, W, 3].

    Raises:
      DataError: as `decode_image`, and for a mask that is no PNG.
    """
    return np.asarray(_rgb(_open_mask(data, where, max_pixels), data, where))


def mask_palette(data: bytes, where: str) -> np.ndarray:
    """The colours of a palette mask, uint8 [<= 256, 3] RGB; of one without palette none."""
    palette = _open(data, where, load=False, max_pixels=math.inf).palette
    colours = np.frombuffer(bytes(palette.palette) if palette else b"", np.uint8)
    return colours[: len(colours) // 3 * 3].reshape(-1, 3)


def not_png(data: bytes, where: str) -> DataError:
    """The error for a mask that is no PNG file, or not called one; its advice depends on what the file has lost."""
    if foreign := foreign_format(data):
        return DataError(
            f"{where}: mask is an image of another format ({foreign}), masks are PNG files; if it has lost nothing, "
            "save it as PNG, value for value"
        )
    im = _open(data, where, load=False, max_pixels=math.inf)
    if im.format == "PNG":
        return DataError(f"{where}: mask is a PNG file by its contents; call it .png, as masks are")
    if _lossy(im, data):
        kind = "JPEG" if im.format == "MPO" else im.format
        advice = f"{kind} changes labels, so make it again from the original mask rather than convert it"
    else:
        advice = "this one has lost nothing: save it as PNG, value for value"
    return DataError(f"{where}: mask is a {im.format} file, masks are PNG files; {advice}")


def _lossy(im: Image.Image, data: bytes) -> bool:
    """Whether the compression of an image changes values."""
    if im.format == "TIFF":
        return im.info.get("compression") in ("jpeg", "tiff_jpeg")
    if im.format == "WEBP":
        at = 12
        while at + 8 <= len(data) and data[at : at + 4] not in (b"VP8 ", b"VP8L"):
            at += 8 + (int.from_bytes(data[at + 4 : at + 8], "little") + 1) // 2 * 2
        return data[at : at + 4] != b"VP8L"
    return im.format in ("JPEG", "MPO")


def _open_mask(data: bytes, where: str, max_pixels: float) -> Image.Image:
    if not data.startswith(b"\x89PNG") and data:
        raise not_png(data, where)
    return _open(data, where, max_pixels=max_pixels)


def voc_palette(num_colours: int) -> tuple[tuple[int, int, int], ...]:
    """The colours of PASCAL VOC's masks: bits of an index spread over red, green and blue, from the top bit down."""
    spread = lambda index, channel: sum((index >> (3 * bit + channel) & 1) << (7 - bit) for bit in range(8))
    return tuple((spread(index, 0), spread(index, 1), spread(index, 2)) for index in range(num_colours))


def value_counts(label: np.ndarray) -> np.ndarray:
    """How many pixels of a uint8 [H, W] have each value, [256]. (Faster than np.bincount, which widens them first.)"""
    return np.array(Image.fromarray(label).histogram())


def encode_label(label: np.ndarray) -> bytes:
    """Encodes uint8 [H, W] class indices as a palette PNG: rows are not filtered, so that it is decoded the faster."""
    im = Image.fromarray(label)
    im.putpalette([value for colour in voc_palette(256) for value in colour])
    out = io.BytesIO()
    im.save(out, format="PNG", compress_level=1)
    return out.getvalue()


def encode_png(array: np.ndarray) -> bytes:
    """Encodes uint8 [H, W] or [H, W, 3] as PNG bytes (fast rather than small)."""
    out = io.BytesIO()
    Image.fromarray(array).save(out, format="PNG", compress_level=1)
    return out.getvalue()
