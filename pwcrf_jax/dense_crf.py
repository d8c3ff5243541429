"""The fully connected CRF of pixels with Gaussian pairwise potentials (Krahenbuhl and Koltun, NIPS 2011).

    E(x) = -sum_i log P_i(x_i) + sum_{i<j} [ mu_s(x_i, x_j) k_s(i, j) + mu_a(x_i, x_j) k_a(i, j) ]
    k_s(i, j) = exp(-|p_i - p_j|^2 / (2 s_xy^2))                                              smoothness
    k_a(i, j) = exp(-|p_i - p_j|^2 / (2 a_xy^2) - |I_i - I_j|^2 / (2 a_rgb^2))                appearance

by mean field: log Q_i = log P_i - sum_kernels mu (K Q)_i - const, all pixels at once. p is the position in pixels,
(x, y), I the RGB colour 0..255, mu a compatibility and K the kernel's filter, normalised. Parameters, signs and
normalisations mean what they mean in pydensecrf, and a pixel's own marginal is part of what it receives, as there.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from pwcrf_jax import arguments, arrays, frames, gaussian, permutohedral

NORMALIZATIONS = ("symmetric", "before", "after", "none")
"""Normalisations of a kernel's filter; see `refine`."""

_Filter = Callable[[jax.Array], jax.Array]


class Params(NamedTuple):
    """Parameters of the two kernels; every number may be a traced scalar, and is differentiable.

    Attributes:
      smoothness_compat, appearance_compat: what the kernel does to labels. A number w: Potts, an energy of - w where
        labels are the same. [K]: these energies label by label, so that -w for each label is Potts with w. [K, K]:
        energies mu of all pairs of labels, made symmetric as (mu + mu^T) / 2. None: the kernel is left out.
      smoothness_sxy, appearance_sxy: standard deviation in pixels, one or (x, y).
      appearance_srgb: standard deviation of colours 0..255, one or (red, green, blue).
    """

    smoothness_compat: Any = 3.0
    smoothness_sxy: Any = 3.0
    appearance_compat: Any = 10.0
    appearance_sxy: Any = 80.0
    appearance_srgb: Any = 13.0


DEFAULT_PARAMS = Params()
"""The usual values of pydensecrf's users: smoothness 3 at 3 pixels, appearance 10 at 80 pixels and 13 of 255."""


class RefineInfo(NamedTuple):
    """Figures of a refinement, beside its result.

    Attributes:
      change: float32 [num_iterations, ...batch], the largest |Q_new - Q_old| over pixels and classes.
      num_vertices: int32 [], vertices of the lattice that all images of the call need together, at least so many where
        there was no room for them; 0 for other filters.
      exceeded: bool [], more than there was room for: the result is wrong, call again with a larger capacity.
    """

    change: jax.Array
    num_vertices: jax.Array
    exceeded: jax.Array


def refine(
    unary_log_probs: ArrayLike,
    image: ArrayLike,
    params: Params = DEFAULT_PARAMS,
    num_iterations: int = 10,
    *,
    mask: ArrayLike | None = None,
    normalization: str = "symmetric",
    method: str = "auto",
    capacity: int | None = None,
    radius: int | None = None,
) -> tuple[jax.Array, RefineInfo]:
    """Sharpens per-pixel log-probabilities along the edges of the image.

    Outside of `jit`, images lie in frames of a few sizes, see `frame_side`, so that a folder of images of all sizes
    compiles few programs; the rest of a frame is masked and changes nothing. On a CPU, images of a batch are then
    refined side by side, each with a lattice of its own, unless a capacity is given. Inside, all are compiled as they
    are.

    Args:
      unary_log_probs: float [..., H, W, K], log P; exp sums to 1 over K.
      image: [..., H, W, 3], RGB 0..255, uint8 or float.
      params: of the kernels.
      num_iterations: static, at least 0.
      mask: bool [..., H, W]; false pixels (padding) neither send nor receive, and keep log P.
      normalization: of a kernel's filter K, with n = K 1: "symmetric" n^-1/2 K n^-1/2, "before" K n^-1, "after" n^-1 K,
        "none" K. In pydensecrf NORMALIZE_SYMMETRIC, the default, NORMALIZE_BEFORE, NORMALIZE_AFTER, NO_NORMALIZATION.
      method: of the appearance filter, see `gaussian.prepare`; the smoothness filter is separable.
      capacity: vertices of the lattice an image, on average over the batch; default: of `permutohedral.build`, H W for
        large images. Photographs with the default parameters need about a tenth of that, noise or small standard
        deviations up to 6 H W.
      radius: of `gaussian.spatial`.

    Returns:
      (log_marginals float32 [..., H, W, K], RefineInfo).

    Raises:
      ValueError: wrong shapes, dtypes or options and, for arrays that are not traced, values: NaN, probabilities or
        scores in place of log-probabilities, colours outside 0..255 or scaled to 0..1.

    Examples:
      >>> image = np.zeros((4, 6, 3), np.uint8)
      >>> image[:, 3:] = 255  # the right half is white: class 1
      >>> truth = (image[..., 0] == 255).astype(int)
      >>> p = np.where(truth[..., None] == [0, 1], 0.7, 0.3)
      >>> p[1, 1] = 0.4, 0.6  # one pixel is for the wrong class
      >>> log_q, info = pw.dense_crf.refine(jnp.log(p), image)
      >>> bool((log_q.argmax(-1) == truth).all()), bool(info.exceeded)
      (True, False)
    """
    unary, image = arguments.array("unary_log_probs", unary_log_probs), arguments.array("image", image)
    mask = None if mask is None else arguments.array("mask", mask)
    _check(unary, image, mask)
    _check_options(num_iterations, normalization, method, capacity, radius)
    params = _checked_params(params, unary.shape[-1])
    if radius is None and params.smoothness_compat is not None:
        radius = gaussian.radius_of(params.smoothness_sxy)
    height, width = size = unary.shape[-3:-1]
    method = gaussian.resolve_method(method, height * width)  # not by the frame's
    settings: dict[str, Any] = dict(num_iterations=num_iterations, normalization=normalization, method=method)
    run: Callable[..., Any] = functools.partial(_refine, capacity=capacity, radius=radius, **settings)
    frame = frame_side(height), frame_side(width)
    by_hand = frames.on_one_device(unary, image, mask, params)
    if by_hand and frame != size:
        unary, image, mask = frames.padded(unary, image, mask, frame)
    _check_values(unary, image, mask)
    if by_hand and unary.ndim > 3 and method == "lattice" and capacity is None and jax.default_backend() == "cpu":
        framed, info = _joined(frames.one_by_one(run, unary, image, params, mask), unary.shape[:-3])
    else:
        framed, info = run(unary, image, params, mask)
    if framed.shape[-3:-1] == size:
        return framed, info
    if not arguments.visible(framed):  # constants of a function that is being traced
        return framed[..., :height, :width, :], info
    return frames.beside(np.asarray(framed)[..., :height, :width, :], framed), info


def frame_side(side: int) -> int:
    """The side in pixels of the frame in which `refine` puts an image with a side of so many: the same up to 64, else
    rounded up to one of four sizes an octave, as 320, 384, 448 and 512, or to 375 or 500, as most photographs of
    ImageNet and VOC are."""
    if side <= 64:
        return side
    step = 1 << ((side - 1).bit_length() - 3)
    return min(n for n in (375, 500, -(-side // step) * step) if n >= side)


def _joined(done: list[tuple[jax.Array, RefineInfo]], batch: tuple[int, ...]) -> tuple[jax.Array, RefineInfo]:
    """Results of single images as those of their batch."""
    xp: Any = np if arguments.visible(done) else jnp  # NumPy compiles nothing
    one, infos = done[0][0], [info for _, info in done]
    stack = lambda values, axis=0: xp.stack([xp.asarray(v) for v in values], axis)
    joined = (
        stack(q for q, _ in done).reshape(*batch, *one.shape),
        stack((info.change for info in infos), -1).reshape(-1, *batch),
        stack(info.num_vertices for info in infos).sum(dtype=np.int32),
        stack(info.exceeded for info in infos).any(),
    )
    first, *rest = (frames.beside(x, one) if xp is np else x for x in joined)
    return first, RefineInfo(*rest)


def _like_unary(unary: jax.Array, *_: Any, **__: Any) -> tuple[jax.Array, RefineInfo]:
    spec: Any = jax.P  # in place of arrays
    batch = arrays.batch_spec(unary, 3)
    return spec(*batch), RefineInfo(spec(None, *batch), spec(), spec())


@arrays.compiled(out=_like_unary)
def _refine(
    unary: jax.Array,
    image: jax.Array,
    params: Params,
    mask: jax.Array | None,
    *,
    num_iterations: int,
    normalization: str,
    method: str,
    capacity: int | None,
    radius: int | None,
) -> tuple[jax.Array, RefineInfo]:
    unary = given = unary.astype(jnp.float32)
    if mask is not None:  # masked pixels may hold anything
        unary, image = (jnp.where(mask[..., None], x, 0) for x in (unary, image))
    height, width = unary.shape[-3:-1]
    batch = unary.shape[:-3]
    kernels, num_vertices, exceeded = [], jnp.int32(0), jnp.bool_(False)
    if params.smoothness_compat is not None:
        kernels.append((params.smoothness_compat, lambda x: gaussian.spatial(x, params.smoothness_sxy, mask, radius)))
    if params.appearance_compat is not None:
        features = pixel_features(image, params.appearance_sxy, params.appearance_srgb)
        flat = features.reshape(*batch, height * width, features.shape[-1])
        flat_mask = None if mask is None else mask.reshape(*batch, height * width)
        room = None if capacity is None else capacity * int(np.prod(batch))
        prepared = gaussian.prepare(flat, flat_mask, method=method, capacity=room)
        if isinstance(prepared, permutohedral.Lattice):
            num_vertices, exceeded = prepared.num_vertices, prepared.exceeded
        over_pixels = lambda x: gaussian.apply(prepared, x.reshape(*flat.shape[:-1], x.shape[-1])).reshape(x.shape)
        kernels.append((params.appearance_compat, over_pixels))

    ones = jnp.ones_like(unary, shape=(*unary.shape[:-1], 1))
    messages = [_message(compat, _normalized(filter_, ones, normalization)) for compat, filter_ in kernels]

    largest = lambda x: jnp.max(x if mask is None else jnp.where(mask[..., None], x, 0.0), axis=(-3, -2, -1))

    # The state are scores, not marginals: so each iteration ends with the sum of the messages and XLA has no reason to
    # compute them again in each pass of a softmax.
    def body(state: tuple[jax.Array, jax.Array], _: None) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        scores, before = state
        marginals = jax.nn.softmax(scores, axis=-1)
        scores = sum((message(marginals) for message in messages), start=unary)
        return (scores, marginals), largest(jnp.abs(marginals - before))

    start = unary, jax.nn.softmax(unary, axis=-1)
    (scores, before), change = jax.lax.scan(jax.checkpoint(body), start, None, length=num_iterations)
    log_marginals = jax.nn.log_softmax(scores, axis=-1)
    last = largest(jnp.abs(jnp.exp(log_marginals) - before))
    change = jnp.concatenate([change[1:], last[None]]) if num_iterations else change
    if mask is not None:
        log_marginals = jnp.where(mask[..., None], log_marginals, given)
    return log_marginals, RefineInfo(change, num_vertices, exceeded)


def pixel_features(image: ArrayLike, sxy: Any, srgb: Any) -> jax.Array:
    """Features of the appearance kernel, (x, y) / sxy and colour / srgb.

    Args:
      image: [..., H, W, 3], RGB 0..255, uint8 or float.
      sxy: standard deviation in pixels, one or (x, y).
      srgb: standard deviation of colours 0..255, one or (red, green, blue).

    Returns:
      float32 [..., H, W, 5].

    Raises:
      ValueError: an image of another shape, or standard deviations of another shape or, where they are not traced, that
        are not positive.
    """
    image = arguments.array("image", image)
    if image.ndim < 3 or image.shape[-1] != 3:
        arguments.fail("image: expected RGB, [..., H, W, 3]", f"shape {image.shape}")
    sxy = arguments.numbers("sxy", sxy, ((), (2,)), "a number or 2 of them", positive=True)
    srgb = arguments.numbers("srgb", srgb, ((), (3,)), "a number or 3 of them", positive=True)
    return _pixel_features(image, sxy, srgb)


@arrays.compiled(out=lambda image, *_: jax.P(*arrays.batch_spec(image, 3)))
def _pixel_features(image: jax.Array, sxy: jax.Array, srgb: jax.Array) -> jax.Array:
    height, width = image.shape[-3:-1]
    sigma_x, sigma_y = gaussian.pair(sxy)
    y, x = jnp.mgrid[:height, :width].astype(jnp.float32)
    position = jnp.stack([x / sigma_x, y / sigma_y], axis=-1)
    position = jnp.broadcast_to(position, (*image.shape[:-1], 2))
    return jnp.concatenate([position, image.astype(jnp.float32) / jnp.broadcast_to(srgb, image.shape)], axis=-1)


def _normalized(filter_: _Filter, ones: jax.Array, normalization: str) -> _Filter:
    if normalization == "none":
        return filter_
    norm = filter_(ones)
    norm = jax.lax.rsqrt(norm + 1e-20) if normalization == "symmetric" else 1.0 / (norm + 1e-20)
    if normalization == "before":
        return lambda x: filter_(x * norm)
    if normalization == "after":
        return lambda x: filter_(x) * norm
    return lambda x: filter_(x * norm) * norm


def _message(compat: jax.Array, filter_: _Filter) -> _Filter:
    """Q -> the kernel's summand of the log marginals."""
    if compat.ndim == 0:
        return lambda q: compat * filter_(q)
    if compat.ndim == 1:
        return lambda q: jnp.broadcast_to(-compat, q.shape) * filter_(q)
    symmetric = 0.5 * (compat + compat.T)
    return lambda q: -arrays.matmul(filter_(q), symmetric)


def _expect(ok: Any, what: str, got: Any) -> None:
    if not ok:
        arguments.fail(what, got)


def _check(unary: jax.Array, image: jax.Array, mask: jax.Array | None) -> None:
    """Refuses shapes and dtypes that would silently give garbage."""
    _expect(unary.ndim >= 3, "unary_log_probs: expected [..., H, W, K], classes last", f"shape {unary.shape}")
    _expect(unary.size, "unary_log_probs: expected images, pixels and classes", f"shape {unary.shape}")
    _expect(jnp.issubdtype(unary.dtype, jnp.floating), "unary_log_probs: expected floats", unary.dtype)
    wanted = (*unary.shape[:-1], 3)
    _expect(image.shape == wanted, f"image: expected RGB of the unary's size, shape {wanted}", f"shape {image.shape}")
    floats = jnp.issubdtype(image.dtype, jnp.floating)
    _expect(floats or image.dtype == jnp.uint8, "image: expected uint8, or floats 0..255", image.dtype)
    if mask is not None:
        _expect(mask.shape == unary.shape[:-1], f"mask: expected shape {unary.shape[:-1]}", f"shape {mask.shape}")
        _expect(mask.dtype == bool, "mask: expected bool", mask.dtype)


def _check_values(unary: jax.Array, image: jax.Array, mask: jax.Array | None) -> None:
    """Refuses values that would silently give garbage, where they are at hand, outside of jit."""
    if not arguments.visible(unary, image, mask):
        return
    floats = jnp.issubdtype(image.dtype, jnp.floating)
    with jax.ensure_compile_time_eval():  # constants of a function that is being traced
        low, high, worst, darkest, brightest = (float(x) for x in _extremes(unary, image, mask))
    total = "unary_log_probs: expected log-probabilities whose exp sums to 1 over the last axis"
    _expect(not np.isnan(worst), total, "NaN, or infinite scores")
    if low >= 0 and high <= 1 and high > 0:
        arguments.fail(total, f"values {low:.3g} to {high:.3g}, which look like probabilities: take their logarithm")
    if low >= 0 and high > 0:
        arguments.fail(total, f"values {low:.3g} to {high:.3g}, none below 0: energies (-log P) must be negated")
    if worst > (5e-2 if unary.dtype.itemsize == 2 else 1e-2):  # log(1 / 150) in bfloat16 is off by 0.01
        arguments.fail(total, f"a sum off by {worst:.3g}: apply jax.nn.log_softmax to scores")
    colours = "image: expected colours 0..255"
    _expect(not (np.isnan(darkest) or np.isnan(brightest)), colours, "NaN")
    _expect(darkest >= 0 and brightest <= 255, colours, f"{darkest:.4g} to {brightest:.4g}: undo any normalisation")
    _expect(not floats or brightest == 0 or brightest > 1, colours, f"floats up to {brightest:.3g}: multiply by 255")


def _check_options(
    num_iterations: int, normalization: str, method: str, capacity: int | None, radius: int | None
) -> None:
    if not (isinstance(num_iterations, (int, np.integer)) and num_iterations >= 0):
        arguments.fail("num_iterations: expected an integer, 0 or more", repr(num_iterations))
    for name, value, known in (
        ("normalization", normalization, NORMALIZATIONS),
        ("method", method, gaussian.METHODS),
    ):
        if value not in known:
            arguments.fail(f"{name}: expected one of {known}", repr(value))
    arguments.integer("capacity", capacity, 1)
    arguments.integer("radius", radius, 0)


def _checked_params(params: Params, num_classes: int) -> Params:
    """Params of float32 arrays; those that are not needed are None."""
    if not (isinstance(params, tuple) and len(params) == len(Params._fields)):
        arguments.fail(f"params: expected dense_crf.Params({', '.join(Params._fields)})", type(params).__name__)
    params = Params(*params)
    compat_shapes: tuple[tuple[int, ...], ...] = (), (num_classes,), (num_classes, num_classes)
    compat = f"a number, [K] or [K, K], K = {num_classes}"
    made: dict[str, jax.Array | None] = {}
    for name, value in params._asdict().items():
        kernel, _, what = name.partition("_")
        if getattr(params, f"{kernel}_compat") is None:
            made[name] = None
        elif what == "compat":
            made[name] = arguments.numbers(f"params.{name}", value, compat_shapes, compat)
        else:
            length = len(what.removeprefix("s"))
            wanted = f"a number or {length} of them"
            made[name] = arguments.numbers(f"params.{name}", value, ((), (length,)), wanted, positive=True)
    return Params(**made)


@arrays.compiled()
def _extremes(unary: jax.Array, image: jax.Array, mask: jax.Array | None) -> tuple[jax.Array, ...]:
    """Extremes over valid pixels: lowest and highest log P, largest |sum of P - 1|, lowest and highest colour."""
    valid = jnp.ones(unary.shape[:-1], bool) if mask is None else mask
    unary, image = unary.astype(jnp.float32), image.astype(jnp.float32)
    inside = lambda x, fill: jnp.where(valid[..., None], x, fill)
    off = jnp.where(valid, jnp.abs(jnp.sum(jnp.exp(unary), axis=-1) - 1.0), 0.0)
    return (
        jnp.min(inside(unary, jnp.inf)),
        jnp.max(inside(unary, -jnp.inf)),
        arguments.largest(off),
        jnp.min(inside(image, 255.0)),
        arguments.largest(inside(image, 0.0)),
    )
