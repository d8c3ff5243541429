"""Input scalings of the published ImageNet weights."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class InputScaling(NamedTuple):
    """(image - mean) / std per channel, `mean` and `std` in 0..255 and RGB order; BGR order after, if so."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    bgr: bool = False


INPUT_SCALINGS: dict[str, InputScaling] = {
    "tf": InputScaling((127.5,) * 3, (127.5,) * 3),
    "caffe": InputScaling((123.68, 116.779, 103.939), (1.0,) * 3, bgr=True),
    "efficientnet_lite": InputScaling((127.0,) * 3, (128.0,) * 3),
    "torch": InputScaling((0.485 * 255, 0.456 * 255, 0.406 * 255), (0.229 * 255, 0.224 * 255, 0.225 * 255)),
}
"""The input scalings of published weights by name; see `scale_input`."""


def scale_input(images: jax.Array, name: str, dtype: Any = jnp.float32) -> jax.Array:
    """Scales RGB images to what a network was trained on.

    Args:
      images: uint8 or floating [..., 3] in 0..255, RGB.
      name: "tf": x / 127.5 - 1; "caffe": BGR minus the mean colour; "torch": (x / 255 - mean) / std;
        "efficientnet_lite": (x - 127) / 128.
      dtype: of the result; the arithmetic is float32.

    Returns:
      `dtype`, the shape of images.

    Raises:
      ValueError: an unknown name, or a last axis other than 3.
    """
    if name not in INPUT_SCALINGS:
        raise ValueError(f"unknown input scaling {name!r}; known: {', '.join(sorted(INPUT_SCALINGS))}")
    images = jnp.asarray(images)
    if images.ndim < 1 or images.shape[-1] != 3:
        raise ValueError(f"images must have 3 channels in the last axis, got shape {images.shape}")
    scaling = INPUT_SCALINGS[name]
    x = (images.astype(jnp.float32) - jnp.array(scaling.mean)) / jnp.array(scaling.std)
    return (x[..., ::-1] if scaling.bgr else x).astype(dtype)
