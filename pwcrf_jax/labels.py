"""Which labels count: the one place that decides, for likelihoods, balance weights, objectives and metrics.

A label is a class, 0..K-1, or void. Where values can be seen all others are refused (`checked`). Traced values cannot
be looked at: there all others are void, for every function alike (`split`).
"""

import operator
from collections.abc import Sequence
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from pwcrf_jax.arrays import as_array, seen

VOID = 255
"""The label of nodes and pixels that count for nothing."""


def integers(labels: ArrayLike, name: str = "labels") -> jax.Array:
    """labels as an array; lists and tuples are taken. ValueError: values that are not integers."""
    labels = as_array(labels)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(f"expected integer {name}, got {labels.dtype}")
    return labels


def narrow(labels: jax.Array) -> jax.Array:
    """Labels as JAX can take them: of NumPy's 64 bits it keeps 32, which would make class 0 of a void such as -2^63."""
    wide = isinstance(labels, np.ndarray) and labels.dtype.itemsize == 8
    return cast(jax.Array, np.clip(labels, -(2**31), 2**31 - 1)) if wide else labels


def checked(
    labels: ArrayLike,
    num_classes: int,
    void: int | None,
    shape: Sequence[int] | None = None,
    *,
    mask: ArrayLike | None = None,
    name: str = "labels",
    remedy: str | None = None,
) -> jax.Array:
    """labels as an array, after all of them that can be seen were found to be classes or void.

    Of 64 bits void may come back as another number outside 0..K-1: `split` tells what is a class.

    Args:
      labels: int [...], an array or nested lists.
      num_classes: K.
      void: static, outside 0..K-1; None: there is no void.
      shape: what labels must have; None: any.
      mask: bool, broadcasting to labels; where it is false labels may be anything. None: true.
      name: of the labels in messages.
      remedy: what to do about a label that is neither, where it is not to pass another void.

    Raises:
      ValueError: labels that are not integers, not of the shape, neither class nor void; a void that is a class.
    """
    labels = integers(labels, name)
    if shape is not None and tuple(labels.shape) != tuple(shape):
        raise ValueError(f"expected {name} of shape {tuple(shape)}, one a node, got {tuple(labels.shape)}")
    if void is not None and 0 <= operator.index(void) < num_classes:
        known = f"the {num_classes} classes, 0..{num_classes - 1}"
        raise ValueError(f"void={void} is one of {known}: pass another that the labels have, as void=-1")
    kept = narrow(labels)
    if not seen(labels) or not (mask is None or seen(mask)):
        return kept
    # 64 bits hold any label and any void; those of 8 may hold neither.
    values = np.asarray(jax.device_get(labels)).astype(np.int64)
    wrong = (values < 0) | (values >= num_classes)
    if void is not None:
        wrong &= values != operator.index(void)
    if mask is not None:
        wrong = wrong & np.asarray(jax.device_get(mask))
    if wrong.any():
        value, number = int(values[wrong][0]), int(wrong.sum())
        known = f"0..{num_classes - 1}" + ("" if void is None else f" or void ({void})")
        remedy = remedy or f"pass void={value} if that is what it means, else correct the {name}"
        raise ValueError(f"expected {name} {known}, got {value} ({number} of {wrong.size} are neither); {remedy}")
    return kept


def split(labels: jax.Array, num_classes: int) -> tuple[jax.Array, jax.Array]:
    """(int32 classes, 0 where there is none; bool: where there is one) of traced labels, whatever their integers."""
    wide = labels.astype(jnp.int64 if labels.dtype.itemsize == 8 else jnp.int32)
    valid = (wide >= 0) & (wide < num_classes)
    return jnp.where(valid, wide, 0).astype(jnp.int32), valid
