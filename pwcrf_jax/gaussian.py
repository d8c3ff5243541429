"""Gaussian filters of values at points: exact, on the permutohedral lattice, and separable on the pixel grid.

    out_i = sum_j exp(-|f_i - f_j|^2 / 2) v_j        j = i included; features f in units of the standard deviation

`prepare` does what depends on the features alone, `apply` filters values with it.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from pwcrf_jax import arguments, arrays, permutohedral

METHODS = ("auto", "lattice", "exact")
"""Ways of filtering points; see `prepare`."""

EXACT_POINTS = {"cpu": 512, "gpu": 16384, "tpu": 16384}
"""Points of one image up to which "auto" takes the exact filter, by backend. On a CPU, where it breaks even with
building a lattice and applying it 10 times to 21 values (benchmarks/dense_crf.py); for accelerators a guess from their
arithmetic rate."""

_TILE = (512, 2048)  # points that receive, points that send


class Points(NamedTuple):
    """Points of the exact filter.

    Attributes:
      features: float32 [..., N, d].
      mask: bool [..., N].
    """

    features: jax.Array
    mask: jax.Array


def prepare(
    features: ArrayLike, mask: ArrayLike | None = None, method: str = "auto", capacity: int | None = None
) -> Points | permutohedral.Lattice:
    """The filter of points.

    Args:
      features: float [..., N, d]; leading axes are images.
      mask: bool [..., N]; false points neither send nor receive. None: all valid.
      method: "exact", O(N^2) time and O(N) memory; "lattice", O(N); "auto": by N and the default device.
      capacity: of `permutohedral.build`.

    Returns:
      `Points` for the exact filter, else `permutohedral.Lattice`.

    Raises:
      ValueError: an unknown method, or features or a mask that `permutohedral.build` refuses.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    features, mask = arguments.points(features, mask)
    if resolve_method(method, features.shape[-2]) == "lattice":
        return permutohedral.build(features, mask, capacity)
    mask = jnp.ones(features.shape[:-1], bool) if mask is None else mask
    return Points(jnp.asarray(features, jnp.float32), jnp.asarray(mask))


def resolve_method(method: str, num_points: int) -> str:
    """What a method of `METHODS`, a str, comes to with num_points points of an image: "auto" goes by them and the
    default device, others are what they are."""
    if method != "auto":
        return method
    return "exact" if num_points <= EXACT_POINTS.get(jax.default_backend(), 0) else "lattice"


def apply(prepared: Points | permutohedral.Lattice, values: ArrayLike) -> jax.Array:
    """Filters values; masked points give and get zero.

    Args:
      prepared: from `prepare`.
      values: float [..., N, C].

    Returns:
      float32 [..., N, C].

    Raises:
      ValueError: values of another number of points.
    """
    if isinstance(prepared, permutohedral.Lattice):
        return permutohedral.apply(prepared, values)
    return exact(*prepared, values)


def exact(features: ArrayLike, mask: ArrayLike | None, values: ArrayLike, tile: tuple[int, int] = _TILE) -> jax.Array:
    """The sum itself, in tiles. Differentiable in values and features, to any order.

    Args:
      features: float [..., N, d].
      mask: bool [..., N]; None: all valid.
      values: float [..., N, C].
      tile: static, points that receive and that send, held at a time: their kernel values are the only temporary that
        grows with either.

    Returns:
      float32 [..., N, C].

    Raises:
      ValueError: features or a mask that `permutohedral.build` refuses, or values that do not fit them.
    """
    features, mask = arguments.points(features, mask)
    values = arguments.array("values", values)
    if features.shape[:-1] != values.shape[:-1] or values.ndim < 2:
        raise ValueError(f"expected values {features.shape[:-1]} and a channel axis, got {values.shape}")
    mask = jnp.ones(features.shape[:-1], bool) if mask is None else mask
    return _exact(features, mask, values, tile=(tile[0], tile[1]))


@arrays.compiled(out=lambda features, mask, values, **_: jax.P(*arrays.batch_spec(values, 2)))
def _exact(features: jax.Array, mask: jax.Array, values: jax.Array, *, tile: tuple[int, int]) -> jax.Array:
    if features.ndim > 2:
        return jax.lax.map(lambda args: _exact(*args, tile=tile), (features, mask, values))
    num_points, num_channels = values.shape
    receive, send = (min(t, num_points) for t in tile)
    # Masked points may hold anything.
    features, values = (jnp.where(mask[:, None], x.astype(jnp.float32), 0.0) for x in (features, values))

    def tiles(x: jax.Array, size: int) -> jax.Array:
        padded = jnp.pad(x, ((0, -num_points % size), (0, 0)))
        return padded.reshape(-1, size, x.shape[1])

    senders = tiles(features, send), tiles(values, send)

    @jax.checkpoint
    def add(total: jax.Array, sender: tuple[jax.Array, jax.Array], receivers: jax.Array) -> jax.Array:
        # Differences, not |f|^2 + |g|^2 - 2 f g, which would lose the digits of points that are close together.
        pairs = zip(receivers.T, sender[0].T, strict=True)
        distance = sum(jnp.square(f[:, None] - g[None, :]) for f, g in pairs)
        return total + arrays.matmul(jnp.exp(-0.5 * distance), sender[1])

    def row(receivers: jax.Array) -> jax.Array:
        zero: Any = sum(jnp.zeros_like(x, shape=(receive, num_channels)) for x in (features, values))
        total, _ = jax.lax.scan(lambda total, sender: (add(total, sender, receivers), None), zero, senders)
        return total

    out = jax.lax.map(row, tiles(features, receive)).reshape(-1, num_channels)[:num_points]
    return jnp.where(mask[:, None], out, 0.0)


def spatial(values: ArrayLike, sigma: Any, mask: ArrayLike | None = None, radius: int | None = None) -> jax.Array:
    """The Gaussian filter of the pixel grid, separable: one pass along the columns and one along the rows.

    Args:
      values: float [..., H, W, C].
      sigma: standard deviation in pixels, one or (x, y). Differentiable.
      mask: bool [..., H, W]; false pixels neither send nor receive.
      radius: static; taps further away are left out. None: four standard deviations where sigma is a plain number
        (3e-4 of the peak), the whole image where it is traced.

    Returns:
      float32 [..., H, W, C]. Pixels beyond the image count as zero.

    Raises:
      ValueError: values without pixels, a mask that is not bool of the pixels, or a sigma or radius that is no number
        of its kind.
    """
    values = arguments.array("values", values)
    if values.ndim < 3 or not values.size:
        raise ValueError(f"expected values [..., H, W, C], none of them 0, got {values.shape}")
    if mask is not None:
        mask = arguments.array("mask", mask)
        if mask.shape != values.shape[:-1] or mask.dtype != bool:
            raise ValueError(f"expected mask bool {values.shape[:-1]}, got {mask.dtype} {mask.shape}")
    arguments.integer("radius", radius, 0)
    sigma = arguments.numbers("sigma", sigma, ((), (2,)), "a number or 2 of them", positive=True)
    return _spatial(values, sigma, mask, radius=radius_of(sigma) if radius is None else int(radius))


@arrays.compiled(out=lambda values, *_, **__: jax.P(*arrays.batch_spec(values, 3)))
def _spatial(values: jax.Array, sigma: jax.Array, mask: jax.Array | None, *, radius: int | None) -> jax.Array:
    height, width, channels = values.shape[-3:]
    sigma_x, sigma_y = pair(sigma)
    x = values.astype(jnp.float32)
    if mask is not None:
        x = jnp.where(mask[..., None], x, 0.0)
    x = x.reshape(-1, height, width * channels)
    rows, cols = _reach(height, radius), _reach(width, radius)
    if rows is None or cols is None:
        x = arrays.einsum("ij,bjx->bix", _matrix(height, sigma_y, radius), x)
        x = x.reshape(-1, height, width, channels)
        x = arrays.einsum("ij,bhjc->bhic", _matrix(width, sigma_x, radius), x)
    else:
        # The barriers keep the sums apart: fused, XLA tests for the border at each tap of each pixel.
        border = cols * channels
        x = jax.lax.optimization_barrier(jnp.pad(x, ((0, 0), (rows, rows), (border, border))))
        x = jax.lax.optimization_barrier(_taps(x, sigma_y, rows, axis=1, stride=1))
        x = _taps(x, sigma_x, cols, axis=2, stride=channels)
    x = x.reshape(values.shape)
    return x if mask is None else jnp.where(mask[..., None], x, 0.0)


def pair(sigma: Any) -> tuple[Any, Any]:
    """(x, y) of sigma, one standard deviation or two: a number, a pair of numbers or an array of both."""
    if isinstance(sigma, (tuple, list)):
        x, y = sigma
        return x, y
    return (sigma, sigma) if jnp.ndim(sigma) == 0 else (sigma[0], sigma[1])


_MOST_TAPS = 32  # radius; beyond it the sum would be long, and a product with the matrix of the kernel is taken


def radius_of(sigma: Any) -> int | None:
    """The default radius of `spatial`: an int, four times the larger standard deviation in sigma; None where one is
    traced."""
    return math.ceil(4 * float(np.max(np.asarray(sigma)))) if arguments.visible(sigma) else None


def _reach(size: int, radius: int | None) -> int | None:
    """How far the taps reach; None where the matrix of the kernel is used instead."""
    return None if radius is None or radius > _MOST_TAPS else min(radius, size - 1)


def _kernel(distance: np.ndarray, sigma: jax.Array, radius: int | None) -> jax.Array:
    weight = jnp.exp(-0.5 * jnp.square(distance / sigma))
    return weight if radius is None else jnp.where(jnp.abs(distance) <= radius, weight, 0.0)


def _matrix(size: int, sigma: jax.Array, radius: int | None) -> jax.Array:
    place = np.arange(size, dtype=np.float32)
    return _kernel(place[:, None] - place[None, :], sigma, radius)


def _taps(x: jax.Array, sigma: jax.Array, reach: int, axis: int, stride: int) -> jax.Array:
    """Along an axis with neighbours `stride` apart and a border of reach * stride on both sides."""
    size = x.shape[axis] - 2 * reach * stride
    weight = _kernel(np.arange(reach + 1, dtype=np.float32), sigma, reach)
    at = lambda k: jax.lax.slice_in_dim(x, (reach + k) * stride, (reach + k) * stride + size, axis=axis)
    return weight[0] * at(0) + sum(weight[k] * (at(-k) + at(k)) for k in range(1, reach + 1))
