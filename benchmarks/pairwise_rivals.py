"""Rivals of `pairwise.py` and their inputs."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from pwcrf_jax import likelihood, mean_field, relations
from pwcrf_jax.potentials import factored_pairwise

RELATIONS = (relations.SURROUNDING, relations.ABOVE_BELOW)
GRIDS = {"full": None, "grid5": 5}
ITERATIONS = 3


@dataclasses.dataclass(frozen=True)
class Size:
    height: int = 29
    width: int = 38
    features: int = 4608
    hidden: int = 512
    batch: int = 1
    dtype: str = "float32"
    product_rows: int = 4096
    concat_up_to: int = 60  # classes
    tables_up_to: int = 150

    @property
    def nodes(self):
        return self.batch * self.height * self.width


# Inputs.


class Problem:
    """Random inputs of one size, number of classes and sampling of the boxes.

    params: one tuple (w1 [2, D, M], b1 [M], kernel [M, K, K], bias [K, K]) a relation, w1[0] for x_p and w1[1] for x_q.
    """

    def __init__(self, size, boxes, num_classes):
        self.size, self.boxes, self.num_classes = size, boxes, num_classes
        grid = size.height, size.width
        chosen = [dataclasses.replace(r, grid=GRIDS[boxes]) for r in RELATIONS]
        self.offsets = [relations.offsets(r, *grid) for r in chosen]
        self.all_edges = [relations.edge_list(r, *grid) for r in chosen]
        self.num_edges = size.batch * sum(len(e.p) for e in self.all_edges)
        rng = np.random.default_rng(0)
        normal = lambda std, *shape: jnp.asarray(std * rng.standard_normal(shape, np.float32))
        d, m, k = size.features, size.hidden, num_classes
        self.features = jax.nn.relu(normal(1, size.batch, *grid, d)).astype(size.dtype)
        self.labels = jnp.asarray(rng.integers(0, k, (size.batch, *grid)), jnp.int32)
        self.unary = normal(1, size.batch, *grid, k)
        self.params = [(normal(d**-0.5, 2, d, m), normal(0.1, m), normal(m**-0.5, m, k, k), normal(0.1, k, k))
                       for _ in RELATIONS]  # fmt: skip

    def quieter(self):
        """Parameters whose messages are of the order of the unary: else every marginal is 0 or 1 and proves nothing."""
        scale = 4 * self.num_classes**0.5 * self.size.nodes / (2 * self.num_edges)
        return [(w1, b1, scale * kernel, scale * bias) for w1, b1, kernel, bias in self.params]

    def edges(self, fraction):
        """A fixed random fraction of each relation's edges, in their order: [(p, q)]."""
        out = []
        for i, (p, q) in enumerate(self.all_edges):
            order = np.random.default_rng(i).permutation(len(p))
            keep = np.sort(order[: max(1, int(fraction * len(p)))])
            out.append((jnp.asarray(p[keep]), jnp.asarray(q[keep])))
        return out


# What is computed. The rivals are written out here so that they stay what they are when the package changes.


def nodes(x):
    """[..., H, W, C] -> [..., N, C]"""
    return x.reshape(*x.shape[:-3], -1, x.shape[-1])


def first_layer(x, net):
    """x [..., D] -> A and B [..., M], in the dtype of x."""
    w1, b1 = (p.astype(x.dtype) for p in net[:2])
    return x @ w1[0] + b1, x @ w1[1]


def last_layer(hidden, net):
    """[..., M] -> float32 [..., K^2]; products in the dtype of `hidden`, sums in float32."""
    _, _, kernel, bias = net
    kernel = kernel.reshape(kernel.shape[0], -1).astype(hidden.dtype)
    return jnp.matmul(hidden, kernel, preferred_element_type=jnp.float32) + bias.ravel()


def concat_scores(x, net, edge):
    """Features x [..., N, D] -> scores of all edges [..., E, K^2]."""
    (p, q), (w1, b1) = edge, (param.astype(x.dtype) for param in net[:2])
    both = jnp.concatenate([x[..., p, :], x[..., q, :]], axis=-1)
    return last_layer(jax.nn.relu(both @ w1.reshape(-1, w1.shape[-1]) + b1), net)


def table_scores(a, b, net, edge):
    """First layer's outputs [..., N, M] -> scores of all edges [..., E, K^2]."""
    p, q = edge
    return last_layer(jax.nn.relu(a[..., p, :] + b[..., q, :]), net)


def picked(scores, labels, edge, num_classes):
    """Sum of the log-likelihoods of labels [..., N] over the edges, from stored scores."""
    p, q = edge
    index = (labels[..., p] * num_classes + labels[..., q])[..., None]
    value = jnp.take_along_axis(scores, index, axis=-1)[..., 0] - jax.nn.logsumexp(scores, axis=-1)
    return jnp.sum(value)


def stored_mean_field(unary, tables, edges):
    """Log marginals [..., N, K] from scores [..., E, K, K] made before the iterations."""

    def body(log_marginals, _):
        marginals, total = jnp.exp(log_marginals), unary
        for scores, (p, q) in zip(tables, edges, strict=True):
            to_p = jnp.einsum("...ekl,...el->...ek", scores, marginals[..., q, :])
            to_q = jnp.einsum("...ekl,...ek->...el", scores, marginals[..., p, :])
            total = total.at[..., p, :].add(to_p).at[..., q, :].add(to_q)
        return jax.nn.log_softmax(total, axis=-1), None

    return jax.lax.scan(body, jax.nn.log_softmax(unary, axis=-1), None, length=ITERATIONS)[0]


@dataclasses.dataclass
class Rival:
    """run(*args) is what is timed; run(*args, edges) if it takes its edges and so can do with fewer.

    flops: useful work, a function of the number of edges.
    per_edge_bytes: of the arrays that any program of this kind must hold.
    """

    name: str
    run: Callable
    args: tuple
    flops: Callable[[int], float]
    per_edge_bytes: int = 0
    takes_edges: bool = False


def loss_rivals(problem):
    size, k = problem.size, problem.num_classes
    d, m, itemsize = size.features, size.hidden, jnp.dtype(size.dtype).itemsize
    offsets = problem.offsets
    args = problem.features, problem.params, problem.labels
    last = lambda e: 6 * e * m * k**2
    factored = lambda e: last(e) + len(RELATIONS) * 12 * size.nodes * d * m

    def concat(x, params, labels, edges):
        x, labels = nodes(x), nodes(labels[..., None])[..., 0]
        scores = [concat_scores(x, net, edge) for net, edge in zip(params, edges, strict=True)]
        return sum(picked(z, labels, edge, k) for z, edge in zip(scores, edges, strict=True))

    def tables(x, params, labels, edges):
        x, labels = nodes(x), nodes(labels[..., None])[..., 0]
        scores = [table_scores(*first_layer(x, net), net, edge) for net, edge in zip(params, edges, strict=True)]
        return sum(picked(z, labels, edge, k) for z, edge in zip(scores, edges, strict=True))

    def ours(x, params, labels):
        total = 0.0
        for net, box in zip(params, offsets, strict=True):
            potential = factored_pairwise(*first_layer(x, net), *net[2:], box)
            total += likelihood.pairwise_log_likelihood(potential, labels)[0]
        return total

    gradient = lambda f: jax.value_and_grad(f, argnums=(0, 1))
    out = [
        Rival("tables", gradient(tables), args, factored, 4 * k**2, takes_edges=True),
        Rival("ours", gradient(ours), args, factored),
    ]
    if k <= size.concat_up_to:
        flops = lambda e: last(e) + 12 * e * d * m
        out.insert(0, Rival("concat", gradient(concat), args, flops, 2 * d * itemsize, takes_edges=True))
    return out


def mean_field_rivals(problem):
    size, k = problem.size, problem.num_classes
    d, m, itemsize = size.features, size.hidden, jnp.dtype(size.dtype).itemsize
    offsets, params = problem.offsets, problem.quieter()
    halves = jax.block_until_ready(jax.jit(lambda x, p: [first_layer(x, net) for net in p])(problem.features, params))
    table_flops = lambda e: 2 * e * m * k**2 + ITERATIONS * 4 * e * k**2
    factored_flops = lambda e: ITERATIONS * (4 * e * m * k + len(RELATIONS) * 4 * size.nodes * m * k**2)
    square = lambda scores: scores.reshape(*scores.shape[:-1], k, k)

    def concat(x, params, unary, edges):
        z = [square(concat_scores(nodes(x), net, edge)) for net, edge in zip(params, edges, strict=True)]
        return stored_mean_field(nodes(unary), z, edges).reshape(unary.shape)

    def tables(halves, params, unary, edges):
        z = [
            square(table_scores(nodes(a), nodes(b), net, edge))
            for (a, b), net, edge in zip(halves, params, edges, strict=True)
        ]
        return stored_mean_field(nodes(unary), z, edges).reshape(unary.shape)

    def ours(algorithm="auto"):
        settings = mean_field.Settings(num_iterations=ITERATIONS, algorithm=algorithm)

        def run(halves, params, unary):
            potentials = [
                factored_pairwise(*half, *net[2:], box) for half, net, box in zip(halves, params, offsets, strict=True)
            ]
            return mean_field.run(unary, potentials, settings)[0]

        return run

    args = halves, params, problem.unary
    out = [
        Rival("tables", tables, args, table_flops, 4 * k**2, takes_edges=True),
        # Its useful work is that of the algorithm it takes: see `prepare_all`.
        Rival("ours", ours(), args, lambda e: min(factored_flops(e), table_flops(e))),
        Rival("ours factored", ours("factored"), args, factored_flops),
        Rival("ours table", ours("table"), args, table_flops, 4 * k**2),
    ]
    if k > size.tables_up_to:
        return out[1:2]
    if k <= size.concat_up_to:
        args = problem.features, params, problem.unary
        flops = lambda e: table_flops(e) + 4 * e * d * m
        out.insert(0, Rival("concat", concat, args, flops, 2 * d * itemsize, takes_edges=True))
    return out


RIVALS = {"loss": loss_rivals, "mean field": mean_field_rivals}
