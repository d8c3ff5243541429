"""What every module of the data package shares: the void label, the error, and PNG/JPEG decoding.

Decoding is our own (PIL) because TFDS picks its decoder by what happens to be installed, and with
OpenCV a palette mask silently becomes colours instead of class indices.
"""

import io

import numpy as np
from PIL import Image

VOID = 255
"""Label of pixels that are neither trained on nor scored."""

MEAN_COLOUR = (124, 116, 104)
"""ImageNet mean colour (RGB), used for padding: it is (nearly) zero after the usual normalisation."""


class DataError(ValueError):
    """Something is wrong with the data or with how it was asked for; the message names it and the remedy."""


def _open(data: bytes, where: str) -> Image.Image:
    if not data:
        raise DataError(f"{where}: the file is empty (0 bytes); restore it from the original data")
    try:
        if data.startswith(b"\x89PNG"):
            # PIL checks PNG checksums in verify() only; a flipped bit would otherwise give wrong labels.
            Image.open(io.BytesIO(data)).verify()
        im = Image.open(io.BytesIO(data))
        im.load()
    except Exception as e:  # PIL raises OSError, SyntaxError, ValueError, zlib.error, struct.error, ...
        raise DataError(
            f"{where}: cannot be decoded, the file is damaged or not an image ({e}); restore it from the original data"
        ) from e
    return im


def decode_image(data: bytes, where: str) -> np.ndarray:
    """Decodes a PNG or JPEG to RGB, uint8 [H, W, 3].

    Args:
      data: the file's bytes.
      where: what an error message calls the file.

    Raises:
      DataError: the bytes are empty, truncated, damaged or no image.
    """
    return np.asarray(_open(data, where).convert("RGB"))


def decode_label(data: bytes, where: str) -> np.ndarray:
    """Decodes a mask of class indices (8-bit grey or palette), uint8 [H, W].

    Args:
      data: the file's bytes.
      where: what an error message calls the file.

    Raises:
      DataError: as `decode_image`, and for a mask of any other mode (RGB, 16 bit, 1 bit, ...).
    """
    im = _open(data, where)
    if im.mode not in ("L", "P"):
        raise DataError(
            f"{where}: mask has PIL mode {im.mode!r}, expected 'L' (8-bit grey) or 'P' (palette) with one "
            "class index per pixel; convert the mask to an 8-bit single-channel PNG of class indices"
        )
    return np.asarray(im)


def voc_palette(num_colours: int) -> tuple[tuple[int, int, int], ...]:
    """The colours of PASCAL VOC's masks: bits of an index spread over red, green and blue, from the top bit down."""
    spread = lambda index, channel: sum((index >> (3 * bit + channel) & 1) << (7 - bit) for bit in range(8))
    return tuple(tuple(spread(index, channel) for channel in range(3)) for index in range(num_colours))


def encode_png(array: np.ndarray) -> bytes:
    """Encodes uint8 [H, W] or [H, W, 3] as PNG bytes (fast rather than small)."""
    out = io.BytesIO()
    Image.fromarray(array).save(out, format="PNG", compress_level=1)
    return out.getvalue()
