"""High-dimensional Gaussian filtering on the permutohedral lattice (Adams, Baek and Davis, Eurographics 2010).

    out_i = sum_j exp(-|f_i - f_j|^2 / 2) v_j            approximated as        out = alpha S^T B S v

S splats each point's value onto the d + 1 vertices of its simplex with barycentric weights, B blurs along the d + 1
directions of the lattice with (1/2, 1, 1/2), S^T reads the values back, alpha = 1 / (1 + 2^-d). Only vertices that some
point touches exist; the blur takes the others as zero. This is what pydensecrf computes, vertex for vertex, where the
number of points is a multiple of 4; else it adds up to three points at the origin, which take part in its blur.

`build` depends on the features alone, `apply` on the values: build once an image, apply as often as needed. Shapes are
static, so a lattice has room for `capacity` vertices. The blur's work follows the number there are; room itself costs
memory, and time to fill it with zeros in each filtering.
"""

import functools
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from pwcrf_jax import arguments, arrays

_EMPTY = np.int32(2**31 - 1)
_PROBES = 64  # of the hash table, at most half full, before a vertex is given up; tests with noise need fewer than 20
_BLOCK = 4096  # vertices blurred at a time

_Prints = Sequence[jax.Array]  # two arrays of uint32, the halves of fingerprints


class Lattice(NamedTuple):
    """Points on a lattice. All images of a batch share it; their vertices are distinct.

    Attributes:
      vertex: int32 [d + 1, P], the vertices of each point's simplex, P points of all images; `capacity` where a point
        is masked or its vertex found no room.
      weight: float32 [d + 1, P], barycentric, zero there. Differentiable with respect to the features.
      neighbours: int32 [d + 1, 2, capacity + 1], the vertices before and after each vertex in each direction;
        `capacity` where there is none.
      num_vertices: int32 [], the vertices that the points touch. If it exceeds the capacity the filter is wrong
        (vertices are missing), and this number may itself be too low: build again with more. (d + 1) P are always
        enough.
    """

    vertex: jax.Array
    weight: jax.Array
    neighbours: jax.Array
    num_vertices: jax.Array

    @property
    def capacity(self) -> int:
        """Vertices that there is room for."""
        return self.neighbours.shape[-1] - 1

    @property
    def exceeded(self) -> jax.Array:
        """bool []: more vertices were needed than there was room for."""
        return self.num_vertices > self.capacity


def build(features: ArrayLike, mask: ArrayLike | None = None, capacity: int | None = None) -> Lattice:
    """The lattice of points, each a feature vector in units of the kernel's standard deviation.

    Args:
      features: float [..., N, d], positions f_i; leading axes are images, which do not see one another. Positions
        beyond about 1e6 lose their fraction to float32.
      mask: bool [..., N]; false points neither send nor receive, and touch no vertex.
      capacity: static, room for vertices of all images together; default: the number of points, and at least
        32,768 where so many can be needed at all.

    Returns:
      Lattice. Two vertices are told apart by 64-bit fingerprints: the chance that any two of n are confused is about
      n^2 / 2^64, 1e-8 for 400,000.

    Raises:
      ValueError: features that are not float [..., N, d], a mask that is not bool of their points, a capacity below 1,
        more points than 32-bit indices can number or, for features that are not traced, values at valid points that
        are not finite or beyond 1e6.
    """
    features, mask = arguments.points(features, mask)
    d = features.shape[-1]
    num_points = int(np.prod(features.shape[:-1]))
    arguments.integer("capacity", capacity, 1)
    if capacity is None:
        capacity = min((d + 1) * num_points, max(num_points, 1 << 15))
    if (d + 1) * num_points >= _EMPTY:
        raise ValueError(f"{num_points} points in {d} dimensions are too many for 32-bit indices; split the batch")

    return _build(features, mask, capacity=int(capacity))


@arrays.compiled()
def _build(features: jax.Array, mask: jax.Array | None, *, capacity: int) -> Lattice:
    per_image, d = features.shape[-2:]
    num_points = features.size // d
    points = features.reshape(num_points, d).astype(jnp.float32)
    if mask is not None:  # masked points may hold anything
        points = jnp.where(mask.reshape(num_points, 1), points, 0.0)
    base, rank, offset = _simplices(points.T)
    factors = _factors(d + 2)
    image = jnp.repeat(jnp.arange(num_points // per_image, dtype=jnp.uint32), per_image)

    def corner(r: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Vertex r of each simplex: r more in every coordinate of `base`, but d + 1 less in the r of highest rank."""
        this, before = d - r, (d + 1 - r) % (d + 1)
        pick = lambda k, x: jnp.where(k == this, x, 0.0) - jnp.where(k == before, x, 0.0)
        weight = (r == 0).astype(jnp.float32) + sum(pick(k, x) for k, x in zip(rank, offset, strict=True))
        key = [
            ((d + 1) * (b - (k > this).astype(jnp.int32)) + r).astype(jnp.uint32)
            for b, k in zip(base, rank, strict=True)
        ]
        # Fingerprints are linear in the coordinates, so that those of neighbours need no coordinates.
        a, b = (image * f[-1] + sum(k * c for k, c in zip(key, f[:-1], strict=True)) for f in factors)
        return weight, a, b

    # A loop, because XLA would compute the simplices again for each of their vertices.
    weight, *prints = jax.lax.map(corner, jnp.arange(d + 1))
    prints = tuple(p.reshape(-1) for p in prints)
    valid = jnp.ones_like(prints[0], dtype=bool)
    if mask is not None:
        valid &= jnp.tile(mask.reshape(num_points), d + 1)

    slots = 1 << int(2 * capacity - 1).bit_length()
    table, slot, found = _insert(prints, valid, slots)
    # Vertices are numbered in the order of the points, so that what is near in the image is near in memory.
    first = jnp.zeros((d + 1) * num_points, jnp.int32).at[table].set(1, mode="drop")
    number = jnp.cumsum(first) - 1
    num_vertices = number[-1] + 1
    ids = jnp.where(table == _EMPTY, capacity, number.at[table].get(mode="clip"))
    ids = jnp.minimum(ids, capacity)
    vertex = jnp.where(found, ids[slot], capacity).reshape(d + 1, num_points)
    weight = jnp.where(vertex < capacity, weight, 0.0)
    lost = jnp.any(valid & ~found)
    num_vertices = jnp.where(lost, jnp.maximum(num_vertices, capacity + 1), num_vertices)

    own = jnp.full(capacity + 1, 0, jnp.int32).at[ids].set(table, mode="drop")
    own = jnp.minimum(own, (d + 1) * num_points - 1)
    vertex_prints = tuple(p[own] for p in prints)
    neighbours = _neighbours(vertex_prints, factors, table, ids, prints, jnp.minimum(num_vertices, capacity))
    return Lattice(vertex, weight, neighbours, num_vertices)


def apply(lattice: Lattice, values: ArrayLike) -> jax.Array:
    """Filters values of the points; masked points give and get zero.

    Linear in values, and differentiable in them to any order by reverse mode (the blur has its own rule, so forward
    mode is not available). With respect to the features, gradients flow through the barycentric weights: they are those
    of the piecewise linear function that the lattice computes, exact almost everywhere for it, and an approximation to
    those of the true Gaussian filter.

    Args:
      lattice: of the points, from `build`.
      values: float [..., N, C].

    Returns:
      float32 [..., N, C].

    Raises:
      ValueError: values of another number of points.
    """
    values = arguments.array("values", values)
    num_points = lattice.weight.shape[1]
    if values.ndim < 2 or int(np.prod(values.shape[:-1])) != num_points:
        raise ValueError(f"expected values [..., N, C] of {num_points} points in all, got {values.shape}")
    return _apply(lattice, values)


@arrays.compiled(out=lambda lattice, values: jax.P(*arrays.batch_spec(values, 2)))
def _apply(lattice: Lattice, values: jax.Array) -> jax.Array:
    flat = values.astype(jnp.float32).reshape(-1, values.shape[-1])
    d = lattice.weight.shape[0] - 1
    touching = jnp.any(lattice.vertex < lattice.capacity, axis=0)[:, None]
    flat = jnp.where(touching, flat, 0.0)  # masked points may hold anything
    at_vertices = _splat(lattice, flat)
    blurred = _blur(at_vertices, lattice.neighbours, jnp.minimum(lattice.num_vertices, lattice.capacity), False)
    out = _slice(lattice, blurred) * (1.0 / (1.0 + 2.0**-d))
    return jnp.where(touching, out, 0.0).reshape(values.shape)  # and their cotangents too


def _splat(lattice: Lattice, values: jax.Array) -> jax.Array:
    """S v: float32 [P, C] -> [capacity + 1, C]; the last row, of no vertex, is zero."""

    corners, num_points = lattice.weight.shape
    # On a CPU in blocks of points, whose values stay in the cache for all their corners; elsewhere in few large steps.
    limit = 64 if jax.default_backend() == "cpu" else 1
    blocks = max(n for n in range(1, limit + 1) if num_points % n == 0)

    def add_block(table: jax.Array, block: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        vertices, weights, given = block

        def add(
            table: jax.Array, corner: tuple[jax.Array, jax.Array]
        ) -> tuple[jax.Array, None]:  # a loop, so that XLA adds in place
            vertex, weight = corner
            return table.at[vertex].add(weight[:, None] * given, mode="promise_in_bounds"), None

        return jax.lax.scan(add, table, (vertices, weights))[0], None

    split = lambda x: jnp.moveaxis(x.reshape(corners, blocks, -1), 1, 0)
    shape = lattice.capacity + 1, values.shape[-1]
    table = jnp.zeros_like(values, shape=shape) + jnp.zeros_like(lattice.weight, shape=shape)
    given = split(lattice.vertex), split(lattice.weight), values.reshape(blocks, -1, values.shape[-1])
    return jax.lax.scan(add_block, table, given)[0]


def _slice(lattice: Lattice, table: jax.Array) -> jax.Array:
    """S^T x: float32 [capacity + 1, C] -> [P, C]."""
    rows = zip(lattice.vertex, lattice.weight, strict=True)
    return sum(weight[:, None] * table.at[vertex].get(mode="promise_in_bounds") for vertex, weight in rows)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _blur(table: jax.Array, neighbours: jax.Array, num_vertices: jax.Array, backwards: bool) -> jax.Array:
    """B x, or its transpose: each direction is symmetric, so that is the directions in backward order."""
    capacity = table.shape[0] - 1
    block = min(_BLOCK, capacity)
    directions = neighbours[::-1] if backwards else neighbours

    def blur_block(b: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        source, target, pair = state
        # The last block starts early instead of reaching over the end; rows done twice come out the same.
        start = jnp.minimum(b * block, capacity - block)
        rows = jax.lax.dynamic_slice(source, (start, np.int32(0)), (block, source.shape[1]))
        ends = jax.lax.dynamic_slice(pair, (np.int32(0), start), (2, block))
        sums = source.at[ends[0]].get(mode="promise_in_bounds") + source.at[ends[1]].get(mode="promise_in_bounds")
        return source, jax.lax.dynamic_update_slice(target, rows + 0.5 * sums, (start, np.int32(0))), pair

    blocks = -(-num_vertices // block)
    source, target = table, jnp.zeros_like(table)
    for pair in directions:
        source, target, _ = jax.lax.fori_loop(0, blocks, blur_block, (source, target, pair))
        source, target = target, source
    return source


def _blur_forward(
    table: jax.Array, neighbours: jax.Array, num_vertices: jax.Array, backwards: bool
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _blur(table, neighbours, num_vertices, backwards), (neighbours, num_vertices)


def _blur_backward(
    backwards: bool, saved: tuple[jax.Array, jax.Array], cotangent: jax.Array
) -> tuple[jax.Array, None, None]:
    return _blur(cotangent, *saved, not backwards), None, None


_blur.defvjp(_blur_forward, _blur_backward)


def _simplices(features: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Where points lie in the lattice: features [d, P] -> three arrays [d + 1, P]: the remainder-0 vertex of the
    simplex in units of d + 1 (int32), the rank of each coordinate (int32) and its offset from that vertex (float32)."""
    d = features.shape[0]
    # Onto the hyperplane of zero sum, scaled so that the blur has the standard deviation 1 of the features.
    scaled = [f * np.float32((d + 1) * np.sqrt(2 / 3) / np.sqrt((i + 1) * (i + 2))) for i, f in enumerate(features)]
    elevated: list[Any] = [None] * (d + 1)
    total: Any = 0.0
    for i in range(d, 0, -1):
        elevated[i] = (total - i * scaled[i - 1]) / (d + 1)
        total = total + scaled[i - 1]
    elevated[0] = total / (d + 1)
    rounded = [jnp.round(e) for e in map(jax.lax.stop_gradient, elevated)]
    excess = functools.reduce(operator.add, rounded).astype(jnp.int32)
    offset = [jax.lax.stop_gradient(e) - r for e, r in zip(elevated, rounded, strict=True)]
    bases, ranks = [], []
    for i in range(d + 1):
        # The rank of its offset in descending order. Rounding left the hyperplane by `excess`: the coordinates
        # furthest out are rounded the other way.
        before = [offset[j] >= offset[i] if j < i else offset[j] > offset[i] for j in range(d + 1) if j != i]
        place = excess + sum(x.astype(jnp.int32) for x in before)
        wrap = (place < 0).astype(jnp.int32) - (place > d).astype(jnp.int32)
        ranks.append(place + (d + 1) * wrap)
        bases.append(rounded[i].astype(jnp.int32) + wrap)
    base = jnp.stack(bases)
    return base, jnp.stack(ranks), jnp.stack(elevated) - base.astype(jnp.float32)


def _factors(n: int) -> np.ndarray:
    """Two rows of n odd 32-bit factors; fixed, so that the same features give the same lattice everywhere."""
    return np.random.Generator(np.random.PCG64(2010)).integers(0, 2**31, (2, n), dtype=np.uint32) * 2 + 1


def _probe(prints: _Prints, attempt: jax.Array, slots: int) -> jax.Array:
    """The slot of each fingerprint at each attempt: double hashing, the step odd and so prime to the table's size."""
    a, b = prints
    mixed = (a ^ (b >> 15)) * np.uint32(0x9E3779B1)
    mixed = (mixed ^ (mixed >> 16)) * np.uint32(0x85EBCA6B)
    mixed = mixed ^ (mixed >> 13)
    step = ((b * np.uint32(0xC2B2AE35)) >> 7) | np.uint32(1)
    return ((mixed + attempt.astype(jnp.uint32) * step) & np.uint32(slots - 1)).astype(jnp.int32)


def _insert(prints: _Prints, wanted: jax.Array, slots: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Puts fingerprints into a hash table, all at once: in each round those still outside try their next slot, and of
    those that meet in an empty one the lowest index wins.

    Returns (table int32 [slots] of the winners' indices or _EMPTY, slot int32 of each fingerprint, found bool).
    """
    index = jnp.arange(len(prints[0]), dtype=jnp.int32)

    def outside(state: tuple[jax.Array, ...]) -> jax.Array:
        _, _, waiting, attempt = state
        return jnp.any(waiting) & (attempt < _PROBES)

    def try_slot(state: tuple[Any, ...]) -> Any:
        table, slot, waiting, attempt = state
        here = _probe(prints, attempt, slots)
        free = waiting & (table[here] == _EMPTY)
        table = table.at[jnp.where(free, here, slots)].min(index, mode="drop")
        winner = jnp.minimum(table[here], len(index) - 1)
        same = waiting & (prints[0][winner] == prints[0]) & (prints[1][winner] == prints[1])
        return table, jnp.where(same, here, slot), waiting & ~same, attempt + 1

    empty, nowhere = (jnp.full_like(prints[0], x, jnp.int32, shape) for x, shape in ((_EMPTY, slots), (0, None)))
    start = (empty, nowhere, wanted, jnp.int32(0))
    table, slot, waiting, _ = jax.lax.while_loop(outside, try_slot, start)
    return table, slot, wanted & ~waiting


def _neighbours(
    vertex_prints: _Prints,
    factors: np.ndarray,
    table: jax.Array,
    ids: jax.Array,
    prints: _Prints,
    num_vertices: jax.Array,
) -> jax.Array:
    """Looks up the vertex after each vertex in each direction; the one before follows. [d + 1, 2, capacity + 1]."""
    capacity = len(vertex_prints[0]) - 1
    directions = factors.shape[1] - 1
    block = min(_BLOCK, capacity)
    slots = len(table)
    # + 1 in every coordinate, and - (d + 1) in that of the direction; the image stays.
    steps = [f[:-1].sum(dtype=np.uint32) - np.uint32(directions) * f[:-1] for f in factors]
    steps = [s[:, None] for s in steps]

    def look_up(b: jax.Array, after: jax.Array) -> jax.Array:
        start = jnp.minimum(b * block, capacity - block)
        sought = [
            jax.lax.dynamic_slice(p, (start,), (block,))[None] + s for p, s in zip(vertex_prints, steps, strict=True)
        ]

        def searching(state: tuple[jax.Array, ...]) -> jax.Array:
            _, waiting, attempt = state
            return jnp.any(waiting) & (attempt < _PROBES)

        def try_slot(state: tuple[Any, ...]) -> Any:
            result, waiting, attempt = state
            here = _probe(sought, attempt, slots)
            owner = table[here]
            known = jnp.minimum(owner, len(prints[0]) - 1)
            same = waiting & (owner != _EMPTY) & (prints[0][known] == sought[0]) & (prints[1][known] == sought[1])
            return jnp.where(same, ids[here], result), waiting & ~same & (owner != _EMPTY), attempt + 1

        shape = (directions, block)
        none, all_ = (jnp.full_like(prints[0], x, dtype, shape) for x, dtype in ((capacity, jnp.int32), (True, bool)))
        result, _, _ = jax.lax.while_loop(searching, try_slot, (none, all_, jnp.int32(0)))
        return jax.lax.dynamic_update_slice(after, result, (np.int32(0), start))

    after = jnp.full_like(prints[0], capacity, jnp.int32, (directions, capacity + 1))
    after = jax.lax.fori_loop(0, -(-num_vertices // block), look_up, after)
    vertices = jnp.arange(capacity + 1, dtype=jnp.int32)
    after = jnp.where(vertices < num_vertices, after, capacity)
    reverse = lambda a: jnp.full(capacity + 1, capacity, jnp.int32).at[a].set(vertices).at[capacity].set(capacity)
    return jnp.stack([jax.vmap(reverse)(after), after], axis=1)
