"""Arrays as pydensecrf takes them: of one dtype, C-contiguous. Errors are of the kinds that it raises."""

from typing import Any

import numpy as np

_NAMES = {np.dtype(np.float32): "float", np.dtype(np.uint8): "unsigned char"}


def typed(name: str, x: Any, dtype: type, axes: str) -> np.ndarray:
    """x as it lies in memory, an array of NumPy or of what shares its memory with NumPy.

    Args:
      name: of the argument.
      x: what was given.
      dtype: that it must have.
      axes: names of its axes, as "labels, points".

    Raises:
      TypeError: None, or no array.
      ValueError: another dtype, another number of axes, no values, or an array that is not C-contiguous.
    """
    if x is None:
        raise TypeError(f"Argument '{name}' must not be None; expected an array [{axes}]")
    shared = any(hasattr(x, way) for way in ("__array_interface__", "__array__", "__buffer__"))
    if not shared and not isinstance(x, (bytes, bytearray, memoryview)):
        raise TypeError(f"{name}: expected an array [{axes}] of {np.dtype(dtype)}; got {type(x).__name__}")
    array = np.asarray(x)
    ndim = axes.count(",") + 1
    if array.ndim != ndim:
        raise ValueError(
            f"{name}: Buffer has wrong number of dimensions (expected {ndim}, [{axes}]; got {array.ndim}, "
            f"shape {array.shape})"
        )
    if array.dtype != dtype:
        raise ValueError(
            f"{name}: Buffer dtype mismatch, expected '{_NAMES[np.dtype(dtype)]}', {np.dtype(dtype)}; got {array.dtype}"
        )
    if not array.size:
        raise ValueError(f"{name}: expected values, [{axes}]; got shape {array.shape}")
    if not array.flags.c_contiguous:
        raise ValueError(
            f"{name}: ndarray is not C-contiguous; expected the last axis of [{axes}] to lie together in memory, "
            "as np.ascontiguousarray makes it; got strides " + str(array.strides)
        )
    return array


def finite(name: str, x: np.ndarray) -> np.ndarray:
    """x, if none of its values is NaN or infinite; else ValueError."""
    if not np.isfinite(x).all():
        raise ValueError(f"{name}: expected finite numbers; got {'NaN' if np.isnan(x).any() else 'infinite ones'}")
    return x
