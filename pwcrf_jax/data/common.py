"""What every module of the data package shares: the void label, the error, and PNG/JPEG decoding.

Decoding is our own (PIL) because TFDS picks its decoder by what happens to be installed, and with
OpenCV a palette mask silently becomes colours instead of class indices.
"""

import io
import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, UnidentifiedImageError

VOID = 255
"""Label of pixels that are neither trained on nor scored."""

MEAN_COLOUR = (124, 116, 104)
"""ImageNet mean colour (RGB), used for padding: it is (nearly) zero after the usual normalisation."""


class DataError(ValueError):
    """Something is wrong with the data or with how it was asked for; the message names it and the remedy."""


IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF")
"""What images may be, as PIL calls it; others are not even tried."""

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


def _open(data: bytes, where: str, load: bool = True) -> Image.Image:
    if not data:
        raise DataError(f"{where}: the file is empty (0 bytes); restore it from the original data")
    limit = Image.MAX_IMAGE_PIXELS or math.inf
    try:
        if data.startswith(b"\x89PNG") and load:
            # PIL checks PNG checksums in verify() only; a flipped bit would otherwise give wrong labels.
            Image.open(io.BytesIO(data), formats=("PNG",)).verify()
            if data[12:16] != b"IHDR":  # `_depth` counts on it
                raise ValueError("its header is not its first chunk")
        im = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
        if im.width * im.height > limit:
            raise Image.DecompressionBombError
        # MPO is a JPEG with previews, or the other eye's view, behind it.
        frames = 1 if im.format == "MPO" else getattr(im, "n_frames", 1)
        if load:
            im.load()
            if im.mode in ("P", "PA") and im.palette is None:
                raise ValueError("it has no palette")
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as e:
        raise DataError(
            f"{where}: its header claims more than {limit} pixels; restore it from the original data, or cut it into "
            "tiles"
        ) from e
    except Exception as e:  # PIL raises OSError, SyntaxError, ValueError, zlib.error, struct.error, ...
        reason = f"none of {', '.join(IMAGE_FORMATS)}" if isinstance(e, UnidentifiedImageError) else e
        raise DataError(
            f"{where}: cannot be decoded, the file is damaged or not an image ({reason}); restore it from the original "
            "data"
        ) from e
    if frames > 1:
        raise DataError(f"{where}: holds {frames} pictures, an animation or pages; save the one that is meant as PNG")
    return im


def _depth(im: Image.Image, data: bytes) -> int:
    """Bits of a sample in the file; PIL's mode tells only what it makes of them."""
    if im.format == "PNG":
        return data[24]
    return max(im.tag_v2.get(_BITS_PER_SAMPLE, (8,))) if im.format == "TIFF" else 8


def decode_image(data: bytes, where: str) -> np.ndarray:
    """Decodes an image of one of `IMAGE_FORMATS` to RGB, uint8 [H, W, 3]; its EXIF orientation is not applied.

    Args:
      data: the file's bytes.
      where: what an error message calls the file.

    Raises:
      DataError: the bytes are empty, truncated, damaged, no image or several, of more than 8 bits a sample, partly
        transparent, or more pixels than PIL's limit.
    """
    return np.asarray(open_image(data, where))


def open_image(data: bytes, where: str) -> Image.Image:
    """`decode_image`, as a `PIL.Image` in RGB."""
    return _rgb(_open(data, where), data, where)


def _rgb(im: Image.Image, data: bytes, where: str) -> Image.Image:
    if im.mode not in _MODES or _depth(im, data) > 8:
        raise DataError(
            f"{where}: has more than 8 bits a sample, or unusual colours (PIL mode {im.mode!r}); which values are "
            "black and white only you know: convert it to 8-bit RGB"
        )
    if im.mode == "P" and im.getextrema()[1] >= len(im.getpalette()) // 3:
        raise DataError(
            f"{where}: has pixels of a colour that its palette does not have; restore it from the original data"
        )
    if im.has_transparency_data and im.convert("RGBA").getchannel("A").getextrema()[0] < 255:
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
    return _orientation(_open(data, where, load=False))


def _orientation(im: Image.Image) -> int:
    # Of a PNG that has no EXIF, getexif would decode the pixels to look behind them.
    if im.format == "PNG" and not any("exif" in key.lower() or "xmp" in key.lower() for key in map(str, im.info)):
        return 1
    try:
        turn = im.getexif().get(_ORIENTATION)
    except Exception:  # damaged EXIF says nothing
        return 1
    return turn if turn in _UPRIGHT else 1


def storable_image(data: bytes, where: str, mask_shape: tuple[int, int] | None, *, trusted: bool) -> bytes:
    """What a record keeps of an image file: its own bytes if they are a JPEG or PNG whose pixels fit the mask.

    An EXIF orientation leaves open which pixels a mask was made for, those in the file or those a viewer shows. Where
    the two differ in size, the mask's size tells. Else they are those in the file if `trusted`, and if not the image is
    refused; without a mask the image is made upright.

    Args:
      mask_shape: (height, width) of the mask; None: there is none.
      trusted: masks are known to go with the pixels in the file.

    Returns:
      JPEG or PNG bytes, of which `decode_image` gives the pixels.

    Raises:
      DataError: as `decode_image`, and for an orientation that leaves it open.
    """
    im = _open(data, where, load=False)
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
    picture = open_image(data, where)
    return encode_png(np.asarray(picture.transpose(_UPRIGHT[turn]) if upright else picture))


def decode_label(data: bytes, where: str) -> np.ndarray:
    """Decodes a mask of class indices (a PNG, 8-bit grey or palette), uint8 [H, W].

    Args:
      data: the file's bytes.
      where: what an error message calls the file.

    Raises:
      DataError: as `decode_image`, and for a mask that is no PNG or of another mode (RGB, 16 bit, 1 bit, ...).
    """
    im = _open_mask(data, where)
    advice = "convert the mask to an 8-bit single-channel PNG of class indices"
    if im.mode not in ("L", "P"):
        if im.mode == "RGB" and all(low == high == 0 for low, high in _channel_differences(im)):
            advice = "its three channels are equal: save one of them"
        elif im.mode in ("RGB", "RGBA"):
            advice += ", or describe its colours to the data set image_folder"
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


def decode_colour_label(data: bytes, where: str) -> np.ndarray:
    """Decodes a mask of colours (a PNG), uint8 [H, W, 3].

    Raises:
      DataError: as `decode_image`, and for a mask that is no PNG.
    """
    return np.asarray(_rgb(_open_mask(data, where), data, where))


def _open_mask(data: bytes, where: str) -> Image.Image:
    im = _open(data, where)
    if im.format != "PNG":
        raise DataError(
            f"{where}: mask is a {im.format} file, masks are PNG files; compression that loses changes labels, so make "
            "it again from the original mask rather than convert it"
        )
    return im


def _channel_differences(im: Image.Image) -> list[tuple[int, int]]:
    red, green, blue = im.split()
    return [ImageChops.difference(red, other).getextrema() for other in (green, blue)]


def read_lines(path: Path) -> list[str]:
    """The lines of a text file of names, with any of the usual line ends, without a byte order mark.

    Raises:
      DataError: it cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as e:
        raise DataError(f"{path}: is not UTF-8 text ({e.reason} at byte {e.start}); save it as UTF-8") from e
    except OSError as e:
        raise DataError(f"{path}: cannot be read ({e.strerror}); check that it is there and its permissions") from e


def voc_palette(num_colours: int) -> tuple[tuple[int, int, int], ...]:
    """The colours of PASCAL VOC's masks: bits of an index spread over red, green and blue, from the top bit down."""
    spread = lambda index, channel: sum((index >> (3 * bit + channel) & 1) << (7 - bit) for bit in range(8))
    return tuple(tuple(spread(index, channel) for channel in range(3)) for index in range(num_colours))


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
