"""Images in frames of few sizes, outside of `jit`: by NumPy, which compiles nothing."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np

from pwcrf_jax import arguments

Result = TypeVar("Result")


def on_one_device(*trees: Any) -> bool:
    """Whether the values of all arrays can be looked at, and none is laid over several devices."""
    single = lambda x: not isinstance(x, jax.Array) or len(x.devices()) == 1
    return arguments.visible(*trees) and all(map(single, jax.tree.leaves(trees)))


def padded(
    unary: jax.Array, image: jax.Array, mask: jax.Array | None, frame: tuple[int, int]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """unary [..., H, W, K], image [..., H, W, 3] and mask [..., H, W] in the upper left corner of a frame, whose rest
    is masked, each where it lay. Those of NumPy are annotated as JAX's, as in `arrays.as_array`."""
    rows, cols = (n - m for n, m in zip(frame, unary.shape[-3:-1], strict=True))

    def pad(x: Any, axes_behind: int) -> Any:
        array = np.asarray(x)
        before = [(0, 0)] * (array.ndim - axes_behind - 2)
        return beside(np.pad(array, [*before, (0, rows), (0, cols), *[(0, 0)] * axes_behind]), x)

    valid = np.ones(unary.shape[:-1], bool) if mask is None else mask
    return pad(unary, 1), pad(image, 1), pad(valid, 0)


def one_by_one(
    run: Callable[..., Result], unary: jax.Array, image: jax.Array, params: Any, mask: jax.Array | None
) -> list[Result]:
    """run(unary, image, params, mask) of each image of a batch; all are begun before any is waited for."""
    each = lambda x, own: [beside(one, x) for one in np.asarray(x).reshape(-1, *x.shape[x.ndim - own :])]
    masks = [None] * int(np.prod(unary.shape[:-3])) if mask is None else each(mask, 2)
    return [run(u, i, params, m) for u, i, m in zip(each(unary, 3), each(image, 3), masks, strict=True)]


def beside(values: np.ndarray, other: Any) -> Any:
    """values on the device of an array that lies on one; as they are, if it is NumPy's."""
    if not isinstance(other, jax.Array):
        return values
    made = jax.device_put(values)  # jnp.asarray compiles a program for each shape
    return made if made.devices() == other.devices() else jax.device_put(values, *other.devices())
