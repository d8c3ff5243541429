"""Augmentation of training images beyond scale, flip and crop: of colours, and by functions of the user's own."""

from typing import Any

import numpy as np

from pwcrf_jax.data.readers.image_io import VOID, DataError
from pwcrf_jax.runtime import functions

_LUMA = np.array([0.299, 0.587, 0.114])  # of red, green, blue: BT.601
_YIQ = np.array([_LUMA, [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
_RGB = np.linalg.inv(_YIQ)
_GREY = np.outer(np.ones(3), _LUMA)

Strengths = tuple[float, ...]
"""Of brightness, contrast, saturation and hue."""


def jitter(image: np.ndarray, rng: np.random.Generator, strengths: Strengths) -> np.ndarray:
    """The image with random brightness, contrast, saturation and hue, in this order.

    The first three are blends of the image with black, with its mean grey and with its own greys, by factors that are
    uniform over 1 - s .. 1 + s; the last turns the chrominance of YIQ by an angle that is uniform over -s .. s turns.
    All four are linear, so they are one 3 x 3 matrix and one rounding.

    image: uint8 [H, W, 3], RGB; returned is an array of the same kind. strengths: s of each, 0 <= s <= 1.
    """
    drawn = [rng.uniform(-s, s) for s in strengths]  # in all cases four numbers
    brightness, contrast, saturation = (1.0 + x for x in drawn[:3])
    angle = 2.0 * np.pi * drawn[3]
    cos, sin = np.cos(angle), np.sin(angle)
    turned = _RGB @ np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]]) @ _YIQ
    matrix = brightness * contrast * turned @ (saturation * np.eye(3) + (1.0 - saturation) * _GREY)
    # Sums of integers are exact, and single products are rounded alike everywhere, as those of BLAS are not.
    mean = brightness * float(_LUMA @ image.sum((0, 1), dtype=np.int64)) / (image.size // 3)
    matrix, shift = matrix.astype(np.float32), np.float32((1.0 - contrast) * mean + 0.5)
    red, green, blue = (image[..., i].astype(np.float32) for i in range(3))
    out = np.empty_like(image)
    for i in range(3):
        value = red * matrix[i, 0] + green * matrix[i, 1]
        value += blue * matrix[i, 2]
        value += shift
        out[..., i] = np.clip(value, 0, 255, out=value)
    return out


class Custom:
    """A function of the user's own, (image, mask, rng) -> (image, mask), and checks of what it returns.

    It is given an image uint8 [H, W, 3], its mask uint8 [H, W] of classes and void (255), both to be kept or changed,
    and a `numpy.random.Generator` of the sample's own; it returns such a pair, of any size, the mask of any integers.
    """

    def __init__(self, name: str, num_classes: int):
        """name: "module:function"; ConfigError where it cannot be loaded."""
        self._name, self._num_classes = name, num_classes
        self._function = functions.load(name, "data.augment")

    def __reduce__(self) -> tuple[Any, ...]:
        return Custom, (self._name, self._num_classes)  # a process loads the function by its name

    def __call__(
        self, image: np.ndarray, mask: np.ndarray, rng: np.random.Generator, of: str
    ) -> tuple[np.ndarray, np.ndarray]:
        """The pair that the function returns, the mask as uint8; of: the id of the image, for messages."""
        given = f"config.data.augment = {self._name!r}, image {of!r}"
        try:
            found = self._function(image, mask, rng)
        except Exception as error:  # whatever the user's code raises
            raise DataError(f"{given}: {functions.described(error)}") from None
        if not isinstance(found, tuple | list) or len(found) != 2:
            raise DataError(f"{given}: must return (image, mask), got {type(found).__name__}")
        image, mask = map(np.asarray, found)
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise DataError(f"{given}: the image must be uint8 [H, W, 3], got {image.dtype} {list(image.shape)}")
        if not np.issubdtype(mask.dtype, np.integer) or mask.shape != image.shape[:2]:
            wanted = f"integers {list(image.shape[:2])} as the image"
            raise DataError(f"{given}: the mask must be {wanted}, got {mask.dtype} {list(mask.shape)}")
        wrong = mask[((mask < 0) | (mask >= self._num_classes)) & (mask != VOID)]
        if wrong.size:
            raise DataError(
                f"{given}: the mask must hold 0..{self._num_classes - 1} or void ({VOID}), got {int(wrong[0])} in "
                f"{wrong.size} pixels"
            )
        return image, mask.astype(np.uint8)
