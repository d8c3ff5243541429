"""The fully connected CRF of points with any features, in frames: mean field on lattices, as pydensecrf has it.

    Q_i(x) = exp(-U_i(x) - sum_k sum_y mu_k(x, y) (K_k Q)_i(y)) / Z_i                        all points at once

U are energies, K_k the Gaussian filter of kernel k on the permutohedral lattice, normalised, mu_k its compatibility
(Krahenbuhl and Koltun, NIPS 2011). `dense_crf.refine` is for images and has gradients; this is for inference on any
number of points: they lie at the beginning of a frame of one of few sizes, and every loop runs over the blocks of
points that there are. So few programs are compiled, and the rest of a frame costs memory, not time.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from pwcrf_jax import arrays, permutohedral
from pwcrf_jax.dense_crf import NORMALIZATIONS

# Points at a time. On a CPU their values should stay in the cache for all their corners, and for the softmax that
# follows (500 x 375 pixels, 21 labels, one core: 1.0 s for 10 iterations with 8192 sliced at a time, 0.84 s with 2048).
# Elsewhere all of the frame: few large steps.
_SPLATTED, _SLICED = {"cpu": 1024}, {"cpu": 2048}
_VERTICES = 4096  # vertices blurred at a time


class Kernel(NamedTuple):
    """A kernel's filter of the points of a frame.

    Attributes:
      lattice: of the points.
      before, after: float32 [P], factors of the values that go in and of those that come out; 0 outside of the points.
    """

    lattice: permutohedral.Lattice
    before: jax.Array
    after: jax.Array


class Step(NamedTuple):
    """An iteration of mean field, and what it saw on its way.

    Attributes:
      marginals: float32 [P, K], the new ones.
      divergence: float32 [P], the points' summands of the free energy of the marginals that went in.
    """

    marginals: jax.Array
    divergence: jax.Array


def frame_size(num_points: int) -> int:
    """The frame of so many points, a power of 2: photographs of 100,000 to 250,000 pixels share two programs."""
    return max(256, 1 << (num_points - 1).bit_length())


def prepare(
    features: np.ndarray, num_points: ArrayLike, normalization: str = "symmetric", capacity: int | None = None
) -> Kernel:
    """The filter of a kernel.

    Args:
      features: float32 [d, P], in units of the kernel's standard deviation; P of `frame_size`, 0 beyond the points.
      num_points: int [], the first of them are points.
      normalization: one of `dense_crf.NORMALIZATIONS`.
      capacity: of `permutohedral.build`; static. None: a quarter of the frame, more for small ones. Photographs with
        the usual parameters need half of that, and small tables stay in the cache.

    Returns:
      Kernel; where `lattice.exceeded`, it is wrong and wants a larger capacity. Up to three points at the origin touch
      vertices, so that the number of all is a multiple of 4: pydensecrf's lattice has them.
    """
    corners, room = features.shape[0] + 1, features.shape[1]
    if capacity is None:
        capacity = min(corners * room, max(1 << 15, room // 4))
    code = np.int32(NORMALIZATIONS.index(normalization))
    return _prepare(*map(arrays.as_array, (features, num_points, code)), capacity=capacity)


@arrays.compiled()
def _prepare(features: jax.Array, num_points: jax.Array, normalization: jax.Array, *, capacity: int) -> Kernel:
    index = jnp.arange(features.shape[1])
    touching = index < num_points + (-num_points) % 4
    lattice = permutohedral.build(features.T, touching, capacity)
    inside = (index < num_points).astype(jnp.float32)
    plain = Kernel(lattice, inside, inside)
    sums = _blurred(_splat_and_blur(plain, inside[:, None], _tables(plain, 1), num_points), plain)
    size, blocks = _blocks(_SLICED, num_points, features.shape[1])
    put = lambda b, out: _put(out, b, _sliced(plain, sums, b, size))
    norm = _loop(blocks, put, jnp.zeros((features.shape[1], 1), jnp.float32))[:, 0] + 1e-20
    symmetric, before, after = (normalization == NORMALIZATIONS.index(n) for n in NORMALIZATIONS[:3])
    factor = lambda whole: jnp.where(symmetric, jax.lax.rsqrt(norm), jnp.where(whole, 1.0 / norm, 1.0))
    return Kernel(lattice, *(jnp.where(index < num_points, factor(whole), 0.0) for whole in (before, after)))


def infer(
    energies: ArrayLike,
    kernels: tuple[Kernel, ...],
    compats: tuple[ArrayLike, ...],
    num_points: ArrayLike,
    num_iterations: ArrayLike,
) -> jax.Array:
    """Marginals after iterations of mean field, from the softmax of the negative energies on.

    Args:
      energies: float32 [K, P], U = -log P, finite beyond the points.
      kernels: of `prepare`.
      compats: of each kernel the energies mu, float32 [K] of pairs of equal labels or [K, K] of all pairs, symmetric.
      num_points, num_iterations: int [].

    Returns:
      float32 [P, K]; beyond the points anything.
    """
    given, points, iterations = map(arrays.as_array, (energies, num_points, num_iterations))
    return _infer(given, kernels, tuple(map(arrays.as_array, compats)), points, iterations)


@arrays.compiled()
def _infer(
    energies: jax.Array,
    kernels: tuple[Kernel, ...],
    compats: tuple[jax.Array, ...],
    num_points: jax.Array,
    num_iterations: jax.Array,
) -> jax.Array:
    unary = -energies.T
    room, num_classes = unary.shape
    size, blocks = _blocks(_SLICED, num_points, room)

    def iterate(i: jax.Array, state: tuple[Any, Any]) -> tuple[Any, Any]:
        marginals, tables = state

        def update(b: jax.Array, out: jax.Array) -> jax.Array:
            scores = _at(unary, b, size)
            for kernel, compat, pair in zip(kernels, compats, tables, strict=True):
                scores = scores - _energy(compat, _sliced(kernel, _blurred(pair, kernel), b, size))
            # Else XLA computes the sums anew in each pass of the softmax.
            return _put(out, b, jax.nn.softmax(jax.lax.optimization_barrier(scores), axis=-1))

        marginals = _loop(blocks, update, marginals)
        more = jnp.where(i < num_iterations, num_points, 0)  # the last marginals go nowhere
        pairs = zip(kernels, tables, strict=True)
        return marginals, tuple(_splat_and_blur(kernel, marginals, pair, more) for kernel, pair in pairs)

    # The first time the tables are zero: softmax of the unary alone.
    start = jnp.zeros_like(unary), tuple(_tables(kernel, num_classes) for kernel in kernels)
    return _loop(num_iterations + 1, iterate, start)[0]


def step(
    marginals: ArrayLike,
    energies: ArrayLike,
    kernels: tuple[Kernel, ...],
    compats: tuple[ArrayLike, ...],
    num_points: ArrayLike,
) -> Step:
    """One iteration from marginals float32 [P, K], finite beyond the points; the rest as in `infer`."""
    before, given, points = map(arrays.as_array, (marginals, energies, num_points))
    return _step(before, given, kernels, tuple(map(arrays.as_array, compats)), points)


@arrays.compiled()
def _step(
    marginals: jax.Array,
    energies: jax.Array,
    kernels: tuple[Kernel, ...],
    compats: tuple[jax.Array, ...],
    num_points: jax.Array,
) -> Step:
    room, num_classes = marginals.shape
    size, blocks = _blocks(_SLICED, num_points, room)
    energies = energies.T
    scores = -energies
    # 0 log 0 = 0, also where the energy is infinite.
    term = lambda factor: jnp.sum(jnp.where(marginals > 0, marginals * factor, 0.0), axis=-1)
    divergence = term(jnp.log(jnp.maximum(marginals, 1e-20))) + term(energies)
    for kernel, compat in zip(kernels, compats, strict=True):
        table = _blurred(_splat_and_blur(kernel, marginals, _tables(kernel, num_classes), num_points), kernel)
        put = lambda b, out, kernel=kernel, compat=compat, table=table: _put(
            out, b, _energy(compat, _sliced(kernel, table, b, size))
        )
        pairs = _loop(blocks, put, jnp.zeros_like(energies))
        scores = scores - pairs
        divergence = divergence + jnp.sum(marginals * pairs, axis=-1)
    return Step(jax.nn.softmax(scores, axis=-1), divergence)


def _loop(count: Any, body: Callable[[jax.Array, Any], Any], state: Any) -> Any:
    return jax.lax.fori_loop(np.int32(0), count, body, state)


def _energy(compat: jax.Array, filtered: jax.Array) -> jax.Array:
    return filtered * compat[None] if compat.ndim == 1 else arrays.matmul(filtered, compat)


def _blocks(sizes: dict[str, int], num_points: jax.Array, room: int) -> tuple[int, jax.Array]:
    """(points of a block, number of blocks)."""
    size = min(sizes.get(jax.default_backend(), room), room)
    return size, (num_points + size - 1) // size


def _at(x: jax.Array, b: jax.Array, size: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, b * size, size)


def _put(x: jax.Array, b: jax.Array, block: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(x, block, b * block.shape[0], axis=0)


def _tables(kernel: Kernel, num_values: int) -> tuple[jax.Array, jax.Array]:
    """Values at the vertices, all 0, and room for the blur."""
    zeros = jnp.zeros((kernel.lattice.capacity + 1, num_values), jnp.float32)
    return zeros, zeros


def _sliced(kernel: Kernel, table: jax.Array, b: jax.Array, size: int) -> jax.Array:
    """What the filter gives to a block of points."""
    corners = kernel.lattice.vertex.shape[0]
    at = lambda x: jax.lax.dynamic_slice_in_dim(x, b * size, size, axis=1)
    vertices, weights = at(kernel.lattice.vertex), at(kernel.lattice.weight)
    weights = weights * (_at(kernel.after, b, size) / (1.0 + 2.0 ** (1 - corners)))
    pairs = zip(vertices, weights, strict=True)
    rows: Any = sum(w[:, None] * table.at[v].get(mode="promise_in_bounds") for v, w in pairs)
    return rows


def _splat_and_blur(
    kernel: Kernel, values: jax.Array, tables: tuple[jax.Array, jax.Array], num_points: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The tables after values [P, K] of so many points went in; with no points nothing happens."""
    lattice = kernel.lattice
    size, blocks = _blocks(_SPLATTED, num_points, values.shape[0])
    live = jnp.where(num_points > 0, jnp.minimum(lattice.num_vertices, lattice.capacity), 0)
    rows = min(_VERTICES, lattice.capacity)
    # The last block of vertices begins early instead of reaching over the end; the last row, of no vertex, stays 0.
    start = lambda b: jnp.minimum(b * rows, lattice.capacity - rows)
    over_vertices = lambda body, state: _loop((live + rows - 1) // rows, body, state)
    empty = jnp.zeros((rows, values.shape[1]), jnp.float32)
    clear = lambda b, table: jax.lax.dynamic_update_slice_in_dim(table, empty, start(b), axis=0)

    def add(b: jax.Array, table: jax.Array) -> jax.Array:
        given = _at(values, b, size) * _at(kernel.before, b, size)[:, None]

        def corner(r: jax.Array, table: jax.Array) -> jax.Array:  # a loop, so that XLA adds in place
            at = lambda x: jax.lax.dynamic_slice(x, (r, b * size), (1, size))[0]
            return table.at[at(lattice.vertex)].add(at(lattice.weight)[:, None] * given, mode="promise_in_bounds")

        return _loop(np.int32(lattice.vertex.shape[0]), corner, table)

    def blur(direction: Any, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        def block(b: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            source, target = state
            here = np.int32(0)
            before, after = jax.lax.dynamic_slice(lattice.neighbours, (direction, here, start(b)), (1, 2, rows))[0]
            row = lambda v: source.at[v].get(mode="promise_in_bounds")
            middle = jax.lax.dynamic_slice_in_dim(source, start(b), rows)
            blurred = middle + 0.5 * (row(before) + row(after))
            return source, jax.lax.dynamic_update_slice_in_dim(target, blurred, start(b), axis=0)

        return over_vertices(block, state)

    def two(pair: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        first, second = blur(2 * pair, state)
        second, first = blur(2 * pair + 1, (second, first))
        return first, second

    # A loop over pairs of directions is compiled once and swaps nothing, so that XLA need not copy the tables.
    directions = lattice.neighbours.shape[0]
    tables = _loop(blocks, add, over_vertices(clear, tables[0])), tables[1]
    tables = _loop(np.int32(directions // 2), two, tables)
    return blur(np.int32(directions - 1), tables) if directions % 2 else tables


def _blurred(tables: tuple[jax.Array, jax.Array], kernel: Kernel) -> jax.Array:
    """The one of the tables that the last direction was blurred into."""
    return tables[kernel.lattice.neighbours.shape[0] % 2]


def in_frame(values: Any, room: int) -> np.ndarray:
    """float32 [n, N] of NumPy -> [n, room], a copy with zeros behind."""
    framed = np.zeros((values.shape[0], room), np.float32)
    framed[:, : values.shape[1]] = values
    return framed
