"""Max pooling as maxima of shifted slices.

XLA's gradient of `reduce_window` (select-and-scatter) is slow on CPU; slices and `maximum` are fast on every
backend. Ties share the gradient instead of giving it to the first position.
"""

from collections.abc import Sequence
from functools import partial, reduce

import jax
import jax.numpy as jnp
from jax import lax


def _pad(x: jax.Array, axis: int, before: int, after: int, fill: float = -jnp.inf) -> jax.Array:
    """Pads one axis; with -inf, so that padding never wins a maximum, if not told otherwise."""
    widths = [(0, 0, 0)] * x.ndim
    widths[axis] = (before, after, 0)
    return lax.pad(x, jnp.asarray(fill, x.dtype), widths)


def _shifts(x: jax.Array, axis: int, window: int, fill: float) -> list[jax.Array]:
    """x moved by -window // 2 ... window // 2 along one axis, filled at the borders."""
    size = x.shape[axis]
    padded = _pad(x, axis, window // 2, window // 2, fill)
    return [lax.slice_in_dim(padded, start, start + size, axis=axis) for start in range(window)]


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _window_max(x: jax.Array, axis: int, window: int) -> jax.Array:
    """Maximum over `window` neighbours along one axis, stride 1, same size (window odd)."""
    return reduce(jnp.maximum, _shifts(x, axis, window, -jnp.inf))


def _window_max_forward(x: jax.Array, axis: int, window: int) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    out = _window_max(x, axis, window)
    return out, (x, out)


def _window_max_backward(
    axis: int, window: int, residuals: tuple[jax.Array, jax.Array], grad: jax.Array
) -> tuple[jax.Array]:
    # That of the chain of maxima, derived by JAX, takes twenty times as long on CPU.
    x, out = residuals
    zero = jnp.zeros((), grad.dtype)
    ties = sum(((part == out).astype(grad.dtype) for part in _shifts(x, axis, window, -jnp.inf)), start=zero)
    shares = _shifts(grad / ties, axis, window, 0.0)
    maxima = _shifts(out, axis, window, 0.0)
    pairs = zip(maxima, shares, strict=True)
    return (sum((jnp.where(x == maximum, share, 0) for maximum, share in pairs), start=zero),)


_window_max.defvjp(_window_max_forward, _window_max_backward)


def max_pool_same(x: jax.Array, window: int) -> jax.Array:
    """Max pooling with an odd square window, stride 1, same size; padding does not count.

    Args:
      x: floating [B, h, w, C].
      window: rows and columns of the window.

    Returns:
      The shape and dtype of x.

    Raises:
      ValueError: an even or nonpositive window.
    """
    if window < 1 or window % 2 == 0:
        raise ValueError(f"window must be odd and positive, got {window}")
    return _window_max(_window_max(x, 1, window), 2, window)


def sliding_pyramid(x: jax.Array, windows: Sequence[int] = (5, 9)) -> jax.Array:
    """The map itself followed by its max poolings with each of `windows`, concatenated over channels.

    Args:
      x: floating [B, h, w, C].
      windows: rows and columns of each window.

    Returns:
      [B, h, w, C * (1 + len(windows))] in the dtype of x, the poolings in the order of `windows`.

    Raises:
      ValueError: an even or nonpositive window.
    """
    pooled = {1: x}
    done = 1
    for window in sorted(set(windows)):
        if window < 1 or window % 2 == 0:
            raise ValueError(f"pyramid windows must be odd and positive, got {window}")
        # A maximum over windows of maxima over windows is a maximum over a larger window: 9 is 5 after 5.
        pooled[window] = max_pool_same(pooled[done], window - done + 1)
        done = window
    return jnp.concatenate([x, *(pooled[window] for window in windows)], axis=-1)


def max_pool_2x2(x: jax.Array, stride: int) -> jax.Array:
    """Max pooling with a 2x2 window and "SAME" padding (at the bottom and right); padding does not count.

    Args:
      x: floating [B, H, W, C].
      stride: 1 or 2.

    Returns:
      [B, ceil(H / stride), ceil(W / stride), C] in the dtype of x.

    Raises:
      ValueError: another stride.
    """
    if stride not in (1, 2):
        raise ValueError(f"stride must be 1 or 2, got {stride}")
    for axis in (1, 2):
        size = x.shape[axis]
        if stride == 1:
            x = _pad(x, axis, 0, 1)
            first, second = (lax.slice_in_dim(x, start, start + size, axis=axis) for start in (0, 1))
        else:
            x = _pad(x, axis, 0, size % 2)
            # Pairs as an axis of their own: their gradient is a concatenation, not a strided scatter.
            pairs = x.reshape(*x.shape[:axis], -1, 2, *x.shape[axis + 1 :])
            first, second = (lax.index_in_dim(pairs, i, axis + 1, keepdims=False) for i in (0, 1))
        x = jnp.maximum(first, second)
    return x


def max_pool_3x3_stride_2(x: jax.Array) -> jax.Array:
    """Max pooling with a 3x3 window, stride 2 and PyTorch's padding of 1 at every side; padding does not count.

    Args:
      x: floating [B, H, W, C].

    Returns:
      [B, ceil(H / 2), ceil(W / 2), C] in the dtype of x: cell i is the maximum over rows 2 i - 1 to 2 i + 1.
    """
    for axis in (1, 2):
        x = _pad(x, axis, 0, x.shape[axis] % 2)
        # Pairs as an axis of their own, as in `max_pool_2x2`: no strided scatter in the gradient.
        pairs = x.reshape(*x.shape[:axis], -1, 2, *x.shape[axis + 1 :])
        even, odd = (lax.index_in_dim(pairs, i, axis + 1, keepdims=False) for i in (0, 1))
        before = lax.slice_in_dim(_pad(odd, axis, 1, 0), 0, odd.shape[axis], axis=axis)
        x = jnp.maximum(jnp.maximum(even, odd), before)
    return x
