"""Arguments of the filters and the dense CRF, as callers have them: arrays, or what NumPy makes arrays of."""

from typing import Any, NoReturn, cast

import jax
import jax.numpy as jnp
import numpy as np

from pwcrf_jax import arrays

FURTHEST = 1e6
"""Features beyond it have no fraction left in float32, and the lattice's integers no room."""


def fail(expected: str, got: Any) -> NoReturn:
    """Raises ValueError with both on one line."""
    raise ValueError(f"{expected}; got {' '.join(str(got).split())}")


def visible(*trees: Any) -> bool:
    """Whether the values of all arrays can be looked at, see `arrays.seen`."""
    return all(map(arrays.seen, jax.tree.leaves(trees)))


def array(name: str, x: Any) -> jax.Array:
    """x, or the array of a list or a tuple of numbers, or of what another library calls an array.

    Raises:
      ValueError: there is none.
    """
    try:
        made = arrays.as_array(x)
    except (TypeError, ValueError):
        made = None
    if made is None or made.dtype.kind in "OSU":
        fail(f"{name}: expected an array", type(x).__name__)
    return made


def numbers(
    name: str, x: Any, shapes: tuple[tuple[int, ...], ...], wanted: str, *, positive: bool = False
) -> jax.Array:
    """A float32 array of one of the shapes, with finite values.

    Args:
      wanted: the shapes in words.
      positive: whether they are standard deviations.

    Raises:
      ValueError: no numbers, another shape or, where they can be seen, other values.
    """
    made = array(name, x)
    if not (jnp.issubdtype(made.dtype, jnp.floating) or jnp.issubdtype(made.dtype, jnp.integer)):
        fail(f"{name}: expected {wanted}", made.dtype)
    if made.shape not in shapes:
        fail(f"{name}: expected {wanted}", f"shape {made.shape}")
    if not visible(made):
        return made.astype(jnp.float32)
    with np.errstate(over="ignore"):
        values = np.asarray(made).astype(np.float32)  # NumPy's, so that it stays visible where others are traced
    if not np.isfinite(values).all():
        fail(f"{name}: expected finite numbers", x)
    if positive and not (values > 0).all():
        fail(f"{name}: expected positive standard deviations", x)
    return cast(jax.Array, values)


def largest(x: jax.Array) -> jax.Array:
    """The maximum, NaN if there is any: on a CPU XLA's own passes over some."""
    return jnp.where(jnp.any(jnp.isnan(x)), jnp.nan, jnp.max(x))


def integer(name: str, x: Any, least: int) -> None:
    """Refuses, with ValueError, what is neither None nor an integer of at least so much."""
    if x is not None and not (isinstance(x, (int, np.integer)) and x >= least):
        fail(f"{name}: expected an integer, {least} or more, or None", repr(x))


def points(features: Any, mask: Any = None) -> tuple[jax.Array, jax.Array | None]:
    """Features float [..., N, d] and their mask, bool [..., N] or None, as arrays.

    Raises:
      ValueError: other shapes or dtypes, no points at all or, where they can be seen, valid points with features that
        are not finite or are beyond `FURTHEST`.
    """
    features = array("features", features)
    if features.ndim < 2 or not jnp.issubdtype(features.dtype, jnp.floating):
        raise ValueError(f"expected features float [..., N, d], got {features.dtype} {features.shape}")
    if not features.size:
        raise ValueError(f"expected features of at least one point and one dimension, got shape {features.shape}")
    if mask is not None:
        mask = array("mask", mask)
        if mask.shape != features.shape[:-1] or mask.dtype != bool:
            raise ValueError(f"expected mask bool {features.shape[:-1]}, got {mask.dtype} {mask.shape}")
    if visible(features, mask):
        with jax.ensure_compile_time_eval():  # constants of a function that is being traced
            furthest = float(_furthest(features, mask))
        if not furthest <= FURTHEST:
            raise ValueError(
                f"expected features of valid points finite and within {FURTHEST:.0e} standard deviations of 0, "
                f"got {furthest:.3g}"
            )
    return features, mask


@arrays.compiled()
def _furthest(features: jax.Array, mask: jax.Array | None) -> jax.Array:
    size = jnp.abs(features.astype(jnp.float32))
    return largest(size if mask is None else jnp.where(mask[..., None], size, 0.0))
