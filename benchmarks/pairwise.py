"""The pairwise part of the model at the paper's size: the package against the plain ways to compute the same.

    python benchmarks/pairwise.py [--quick]

Rivals side by side in one process, each with both relations in one program:

* concat: the features of every edge concatenated, [x_p ; x_q], as public re-implementations do it. Not at K = 150:
  beside its first layer it has all that the tables have.
* tables: the first layer once a node, then the K x K scores of all edges at once, stored.
* ours: the package with its defaults; in mean field also with its algorithm forced, "ours factored" and "ours table".

`loss`: value and gradient of the summed log-likelihood, from the features to the features and all parameters.
`mean field`: three iterations, from the first layer's outputs (concat: from the features) and the unary scores.

Seconds are medians of interleaved calls; temporary bytes are the compiler's. GFLOP/s count useful work alone: what is
recomputed, or done for edges beyond the map, counts for nothing. With E edges and N nodes, features of D, M hidden:

* loss: 6 E M K^2, and for the first layer 12 N D M (concat: 12 E D M).
* mean field from tables: 2 E M K^2 and 4 E K^2 an iteration (concat: 4 E D M before).
* mean field, factored: 4 E M K + 4 N M K^2 an iteration.

share is that of a plain product [4096, M] [M, K^2], timed between the rivals' calls.

A program that needs more than 80 % of the memory there is, by the compiler's analysis, is run on half the edges, or
half of those again, and its row is scaled up and marked. Ends with one line of JSON.
"""

import argparse
import dataclasses
import gc
import json
import math
import os
import statistics
import sys
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import timing

from pwcrf_jax import config as configs
from pwcrf_jax import mean_field, piecewise, relations
from pwcrf_jax.configs import voc_vgg16
from pwcrf_jax.potentials import factored_pairwise
from pwcrf_jax.prediction import restore
from pwcrf_jax.runtime import files, parallel
from pwcrf_jax.training import steps
from pwcrf_jax.training.optimizer import make_optimizer

RELATIONS = (relations.SURROUNDING, relations.ABOVE_BELOW)
GRIDS = {"full": None, "grid5": 5}
TASKS = ("mean field", "loss", "sweep")
ITERATIONS = 3
FITS = 0.8  # share of the memory available that a program may need
SWEEP_BOX = (7, 8)  # rows and columns either way


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


QUICK = Size(16, 21, features=1024, hidden=256, product_rows=1024, concat_up_to=21, tables_up_to=60)


class Disagreement(SystemExit):
    """Two rivals computed different things: no time of theirs means anything."""


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
            total += piecewise.pairwise_log_likelihood(potential, labels)[0]
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


# Memory.


def available_bytes(device):
    if stats := device.memory_stats():  # None on the CPU
        return stats["bytes_limit"] - stats["bytes_in_use"]
    try:
        with open("/proc/meminfo") as file:
            return next(1024 * int(line.split()[1]) for line in file if line.startswith("MemAvailable:"))
    except FileNotFoundError:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def needed_bytes(memory):
    return (
        memory.temp_size_in_bytes
        + memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
    )


def out_of_memory(error):
    return "RESOURCE_EXHAUSTED" in str(error)


# Measuring.


@dataclasses.dataclass
class Prepared:
    """A rival compiled for the number of edges that fits, called once already."""

    rival: Rival
    compiled: Callable
    args: tuple
    text: str
    edges: int
    output: object

    @property
    def temp_bytes(self):
        return self.compiled.memory_analysis().temp_size_in_bytes


def prepare(rival, problem, limit, programs):
    """Compiles and calls a rival, on half the edges as long as it does not fit; None if it cannot do with fewer.

    programs: {text: compiled}, of this size so far; a forced algorithm is often the default one.
    """
    fraction = 1.0
    while fraction * problem.num_edges >= 1:
        args, num_edges = rival.args, problem.num_edges
        if rival.takes_edges:
            edges = problem.edges(fraction)
            args, num_edges = (*args, edges), problem.size.batch * sum(len(p) for p, _ in edges)
        # Asked first: the compiler is slow on shapes far beyond the memory.
        if num_edges * rival.per_edge_bytes <= limit:
            lowered = jax.jit(rival.run).lower(*args)
            text = lowered.as_text()
            compiled = programs[text] = programs.get(text) or lowered.compile()
            if needed_bytes(compiled.memory_analysis()) <= limit:
                try:
                    output = jax.block_until_ready(compiled(*args))
                    return Prepared(rival, compiled, args, text, num_edges, output)
                except jax.errors.JaxRuntimeError as error:
                    if not out_of_memory(error):
                        raise
        if not rival.takes_edges:
            return None
        fraction /= 2
    return None


def prepare_all(rivals, problem):
    """Those of the rivals that fit, and what is to be said about them."""
    limit, ready, notes, programs = FITS * available_bytes(jax.devices()[0]), [], [], {}
    for rival in rivals:
        if one := prepare(rival, problem, limit, programs):
            ready.append(one)
        else:
            notes.append(f"{rival.name}: does not fit in {limit / 1e9:.1f} GB, left out")
    for one in ready:
        if one.edges < problem.num_edges:
            notes.append(
                f"* {one.rival.name}: does not fit in {limit / 1e9:.1f} GB, run on {one.edges} of {problem.num_edges} "
                f"edges; its seconds and bytes are those measured times {problem.num_edges / one.edges:.2f}"
            )
    ours = next((one for one in ready if one.rival.name == "ours"), None)
    forced = [one for one in ready if one.rival.name.startswith("ours ")]
    if ours and forced:
        same = next((one for one in forced if one.text == ours.text), None)
        if same:
            ours.rival.flops = same.rival.flops
        algorithm = (
            same.rival.name.removeprefix("ours ") if same else "neither of the two alone, lower count of work taken"
        )
        notes.append(f"ours: algorithm {algorithm}")
    return ready, notes


def tolerances(size):
    """Largest relative difference of losses and gradients, largest difference of marginals."""
    # Accelerators may round the factors of float32 products.
    if size.dtype == "float32" and jax.default_backend() == "cpu":
        return dict(loss=1e-4, gradient=1e-3, marginals=1e-3)
    if size.dtype == "float32":
        return dict(loss=1e-4, gradient=2e-2, marginals=5e-3)
    return dict(loss=5e-3, gradient=5e-2, marginals=3e-2)


@jax.jit
def loss_differences(one, other):
    relative = lambda x, y: jnp.linalg.norm((x - y).ravel()) / jnp.linalg.norm(y.ravel())
    single = lambda tree: jax.tree.map(lambda x: x.astype(jnp.float32), tree)
    gradients = jax.tree.leaves(jax.tree.map(relative, single(one[1]), single(other[1])))
    return dict(loss=jnp.abs(one[0] - other[0]) / jnp.abs(other[0]), gradient=jnp.max(jnp.stack(gradients)))


@jax.jit
def marginal_differences(one, other):
    return dict(marginals=jnp.max(jnp.abs(jnp.exp(one) - jnp.exp(other))))


def check_agreement(task, ready, problem):
    """Compares the rivals that were run on the same edges, frees their outputs, says what could not be compared."""
    differences = loss_differences if task == "loss" else marginal_differences
    notes, first = [], {}
    for one in ready:
        against = first.setdefault(one.edges, one)
        if against is one:
            continue
        for what, value in jax.device_get(differences(one.output, against.output)).items():
            # Not "value > ...": NaN must fail.
            if not value <= tolerances(problem.size)[what]:
                raise Disagreement(
                    f"{task}, {problem.boxes} boxes, K = {problem.num_classes}: {one.rival.name} and "
                    f"{against.rival.name} differ in {what} by {value:.3g}, more than {tolerances(problem.size)[what]}"
                )
    for edges, one in first.items():
        if len(ready) > 1 and sum(other.edges == edges for other in ready) == 1:
            notes.append(f"{one.rival.name}: no other rival ran on its edges, agreement not checked")
    for one in ready:
        one.output = None
    return notes


def plain_product(size, num_classes):
    """A function that returns the seconds of one product."""
    x = jnp.ones((size.product_rows, size.hidden), size.dtype)
    y = jnp.ones((size.hidden, num_classes**2), size.dtype)
    out = jnp.zeros((size.product_rows, num_classes**2), jnp.float32)
    # Written into the result before it: fresh memory would cost time that is none of the product's.
    product = lambda x, y, out: jnp.matmul(x, y, preferred_element_type=out.dtype)
    run = jax.jit(product, donate_argnums=2, keep_unused=True)

    def products(count):
        nonlocal out
        for _ in range(count):
            out = run(x, y, out)
        return out

    timing.timed(products, 1)
    # Short ones in a row, so that starting them does not count.
    count = max(1, min(100, int(0.02 / timing.timed(products, 1))))
    return lambda: timing.timed(products, count) / count


def measure(task, size, boxes, num_classes, repeats, patience):
    """Rows of one table, printed as well."""
    problem = Problem(size, boxes, num_classes)
    ready, notes = prepare_all(RIVALS[task](problem), problem)
    notes += check_agreement(task, ready, problem)
    offsets = " + ".join(str(len(box)) for box in problem.offsets)
    print(f"\n{task}, {boxes} boxes, K = {num_classes}: {offsets} offsets, {problem.num_edges} edges")
    if not ready:
        print("\n".join(notes), flush=True)
        return []
    product, turns = plain_product(size, num_classes), {}
    for one in ready:
        turns["product before", one.rival.name] = product
        turns[one.rival.name] = partial(timing.timed, one.compiled, *one.args)
    seconds = timing.interleaved(turns, repeats, warm=0, patience=patience)
    products = [s for key, values in seconds.items() if key[0] == "product before" for s in values]
    product_rate = 2 * size.product_rows * size.hidden * num_classes**2 / statistics.median(products) / 1e9
    rows = []
    for one in ready:
        name, scale = one.rival.name, problem.num_edges / one.edges
        median = statistics.median(seconds[name])
        rate = one.rival.flops(one.edges) / median / 1e9
        rows.append(
            dict(
                task=task,
                boxes=boxes,
                classes=num_classes,
                rival=name,
                seconds=scale * median,
                temp_bytes=round(scale * one.temp_bytes),
                gflops_per_second=rate,
                gemm_share=rate / product_rate,
                calls=len(seconds[name]),
                edges=problem.num_edges,
                scaled_from_edges=one.edges if one.edges < problem.num_edges else None,
            )
        )
    print(f"{'':14s}{'seconds':>12s}{'temp MB':>12s}{'GFLOP/s':>12s}{'share':>9s}")
    for row in rows:
        print(
            f"{row['rival']:13s}{'*' if row['scaled_from_edges'] else ' '}{row['seconds']:12.4f}"
            f"{row['temp_bytes'] / 1e6:12.1f}{row['gflops_per_second']:12.1f}{row['gemm_share']:9.2f}"
        )
    print(f"{'plain product':13s} {statistics.median(products):12.4f}{'':12s}{product_rate:12.1f}{1:9.2f}")
    print("".join(f"{note}\n" for note in notes), end="", flush=True)
    return rows


# Cost against the number of offsets.


def sweep(size, counts, repeats, patience):
    """Loss and gradient of one relation from the first layer's outputs, K = 21: {rows, fits of seconds and bytes}."""
    num_classes, (rows, cols) = 21, (min(SWEEP_BOX[0], size.height - 1), min(SWEEP_BOX[1], size.width - 1))
    box = np.array([(r, c) for r in range(-rows, rows + 1) for c in range(-cols, cols + 1) if (r, c) != (0, 0)])
    # The corners come first: every subset reaches as far, so borders are of one width.
    corner = (np.abs(box) == (rows, cols)).all(-1)
    rest = np.random.default_rng(0).permutation(box[~corner])
    box = np.concatenate([box[corner], rest]).astype(np.int32)
    rng = np.random.default_rng(1)
    normal = lambda std, *shape: jnp.asarray(std * rng.standard_normal(shape, np.float32))
    grid, m, k = (size.batch, size.height, size.width), size.hidden, num_classes
    parts = normal(1, *grid, m).astype(size.dtype), normal(1, *grid, m).astype(size.dtype)
    parts = (*parts, normal(m**-0.5, m, k, k), normal(0.1, k, k))
    labels = jnp.asarray(rng.integers(0, k, grid), jnp.int32)
    turns, temp = {}, {}
    for n in counts:
        objective = lambda parts, labels, n=n: piecewise.pairwise_log_likelihood(
            factored_pairwise(*parts, box[:n]), labels
        )[0]
        compiled = jax.jit(jax.value_and_grad(objective)).lower(parts, labels).compile()
        temp[n] = compiled.memory_analysis().temp_size_in_bytes
        turns[n] = partial(timing.timed, compiled, parts, labels)
    seconds = timing.medians(turns, repeats, patience=patience)
    out = {
        "rows": [dict(offsets=n, seconds=seconds[n], temp_bytes=temp[n]) for n in counts],
        "seconds": line_fit(counts, [seconds[n] for n in counts]),
        "temp_bytes": line_fit(counts, [temp[n] for n in counts]),
    }
    print(f"\nours, loss, one relation, K = {k}: cost against the number of offsets")
    print(f"{'offsets':>14s}{'seconds':>12s}{'temp MB':>12s}")
    for row in out["rows"]:
        print(f"{row['offsets']:14d}{row['seconds']:12.4f}{row['temp_bytes'] / 1e6:12.1f}")
    fit = out["seconds"]
    print(f"seconds = {fit['intercept']:.4g} + {fit['slope']:.4g} offsets, R^2 = {fit['r_squared']:.4f}")
    print(f"temp: {out['temp_bytes']['slope'] / 1e6:.3f} MB more for each offset", flush=True)
    return out


def line_fit(x, y):
    x, y = np.asarray(x, float), np.asarray(y, float)
    slope, intercept = np.polyfit(x, y, 1)
    rest, spread = np.sum((y - intercept - slope * x) ** 2), np.sum((y - y.mean()) ** 2)
    return dict(slope=float(slope), intercept=float(intercept), r_squared=float(1 - rest / spread) if spread else 1.0)


def import_pyplot():
    try:
        import matplotlib
    except ImportError:
        sys.exit('matplotlib is not installed, and the plot needs it: pip install -e ".[bench]"')
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def plot(pyplot, swept, title, path):
    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    x = np.array([row["offsets"] for row in swept["rows"]])
    for panel, key, unit, label in zip(
        panels, ("seconds", "temp_bytes"), (1, 1e6), ("seconds", "temporaries, MB"), strict=True
    ):
        panel.plot(x, [row[key] / unit for row in swept["rows"]], "o")
        panel.set(xlabel="offsets", ylabel=label)
    fit = swept["seconds"]
    panels[0].plot(x, fit["intercept"] + fit["slope"] * x, label=f"line, $R^2$ = {fit['r_squared']:.4f}")
    panels[0].legend()
    for panel in panels:
        panel.set(xlim=0, ylim=0)
    figure.suptitle(title, fontsize="medium")
    with files.replacing(path) as file:
        figure.savefig(file, dpi=150, format="png")
    pyplot.close(figure)


# The complete train step.


def paper_config():
    config = voc_vgg16.get_config()
    for relation in config.relations.values():
        relation.grid = 0
    return config


def train_step_rows(config, image_size=(375, 500), dtypes=("float32", "bfloat16"), repeats=5, max_batch=None):
    """Images per second of the train step on one device, random images, the batch doubled while it fits."""
    device, rng, rows = jax.devices()[0], np.random.default_rng(0), []
    print(f"\ntrain step, {config.model.backbone}, {image_size[0]} x {image_size[1]}, one device")
    print(f"{'':14s}{'batch':>8s}{'seconds':>12s}{'images/s':>12s}{'needs GB':>12s}", flush=True)
    for dtype in dtypes:
        gc.collect()
        limit = FITS * available_bytes(device)
        config.model.dtype = dtype
        model = configs.build_model(config)
        tx = make_optimizer(config.optimizer, config.model, config.train.steps)
        step = parallel.pmap_train(steps.from_config(config, model, tx), devices=[device])
        params = jax.jit(lambda model=model: restore.init_params(model, config.seed))()
        state = steps.TrainState(jnp.int32(0), params, jax.jit(tx.init)(params))
        del params  # donated with the state
        batch = 1
        while max_batch is None or batch <= max_batch:
            shape = batch, *image_size
            arrays = parallel.split(
                {
                    "image": rng.integers(0, 256, (*shape, 3)).astype(np.uint8),
                    "label": rng.integers(0, config.data.num_classes, shape).astype(np.uint8),
                },
                1,
            )
            arrays = {name: jax.device_put(x, device) for name, x in arrays.items()}
            try:
                compiled = step.lower(state, arrays).compile()
                needs = needed_bytes(compiled.memory_analysis())
                if needs > limit:
                    print(f"{dtype:14s}{batch:8d}  does not fit: needs {needs / 1e9:.1f} of {limit / 1e9:.1f} GB")
                    break

                def take(compiled=compiled, arrays=arrays):
                    nonlocal state  # the one before is donated
                    state, metrics = compiled(state, arrays)
                    return state, metrics

                median = timing.medians({"step": partial(timing.timed, take)}, repeats)["step"]
            except jax.errors.JaxRuntimeError as error:
                if not out_of_memory(error):
                    raise
                print(f"{dtype:14s}{batch:8d}  does not fit: {str(error).splitlines()[0]}")
                break
            row = dict(dtype=dtype, batch=batch, seconds=median, images_per_second=batch / median, bytes=needs)
            rows.append(row)
            print(f"{dtype:14s}{batch:8d}{median:12.4f}{batch / median:12.2f}{needs / 1e9:12.2f}", flush=True)
            batch *= 2
        del state
    return rows


# All of it.


def summary(rows, boxes="full"):
    """The figures that the targets are about; None where the rows are not there."""
    table = {(r["task"], r["classes"], r["rival"]): r for r in rows if r["boxes"] == boxes}

    def value(task, k, rival, key):
        row = table.get((task, k, rival))
        return row and row[key]

    def ratio(task, k, rival, key):
        a, b = value(task, k, rival, key), value(task, k, "ours", key)
        return a / b if a and b else None

    temp = value("mean field", 150, "ours", "temp_bytes")
    return dict(
        loss_speedup_k21=ratio("loss", 21, "concat", "seconds"),
        loss_memory_ratio_k21=ratio("loss", 21, "concat", "temp_bytes"),
        mf_speedup_k21=ratio("mean field", 21, "tables", "seconds"),
        mf_speedup_k60=ratio("mean field", 60, "tables", "seconds"),
        mf_memory_ratio_k60=ratio("mean field", 60, "tables", "temp_bytes"),
        mf_temp_gb_k150=temp and temp / 1e9,
        gemm_share_k60=value("loss", 60, "ours", "gemm_share"),
    )


def rounded(x):
    """Four significant figures."""
    if isinstance(x, dict):
        return {k: rounded(v) for k, v in x.items()}
    if isinstance(x, list):
        return [rounded(v) for v in x]
    return float(f"{x:.4g}") if isinstance(x, float) and math.isfinite(x) else x


def choices(known, kind=str):
    def parse(text):
        values = [kind(part.strip()) for part in text.split(",")]
        for value in values:
            if known and value not in known:
                raise argparse.ArgumentTypeError(f"{value!r} is not one of {', '.join(known)}")
        return values

    return parse


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small map and few repeats; writes no JSON file")
    parser.add_argument(
        "--tasks", type=choices(TASKS), default=list(TASKS), help="comma-separated: " + ", ".join(TASKS)
    )
    parser.add_argument("--classes", type=choices((), int), default=[21, 60, 150], help="comma-separated")
    parser.add_argument("--boxes", type=choices(GRIDS), default=None, help="comma-separated: " + ", ".join(GRIDS))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of features, A and B")
    parser.add_argument("--repeats", type=int, default=None)
    parser.add_argument(
        "--patience",
        type=float,
        default=60.0,
        help=f"seconds of calls after which {timing.MIN_TURNS} repeats are enough",
    )
    parser.add_argument(
        "--train-step",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="images per second of the whole train step; by default on accelerators",
    )
    parser.add_argument("--output", help="folder of the plot and the JSON; --quick writes none but the plot, if given")
    args = parser.parse_args()
    args.boxes = args.boxes or (["full"] if args.quick else list(GRIDS))
    args.repeats = args.repeats or (2 if args.quick else 5)
    if args.train_step is None:
        args.train_step = not args.quick and jax.default_backend() != "cpu"
    if args.output is None and not args.quick:
        args.output = os.path.join(os.path.dirname(__file__), "results")
    return args


def main():
    args = arguments()
    pyplot = import_pyplot() if args.output and "sweep" in args.tasks else None
    size = dataclasses.replace(QUICK if args.quick else Size(), batch=args.batch, dtype=args.dtype)
    print(f"{jax.devices()[0].device_kind}, {size}", flush=True)
    rows, swept, train_rows = [], None, None
    for task in (t for t in TASKS if t in RIVALS and t in args.tasks):
        for boxes in args.boxes:
            for num_classes in args.classes:
                if args.quick and (task, num_classes) == ("loss", 150):
                    continue  # no figure of the summary needs it
                rows += measure(task, size, boxes, num_classes, args.repeats, args.patience)
                gc.collect()
    if "sweep" in args.tasks:
        counts = (8, 48, 120) if args.quick else (8, 24, 48, 80, 120, 168, 240)
        swept = sweep(size, counts, args.repeats, args.patience)
        if pyplot:
            os.makedirs(args.output, exist_ok=True)
            title = f"Loss and gradient of one relation on {size.height} x {size.width}, K = 21, {size.hidden} hidden"
            plot(pyplot, swept, title, os.path.join(args.output, "pairwise_offsets.png"))
    if args.train_step:
        train_rows = train_step_rows(paper_config(), repeats=args.repeats)
    out = summary(rows) | dict(
        size=dataclasses.asdict(size),
        classes=args.classes,
        boxes=args.boxes,
        device=jax.devices()[0].device_kind,
        jax=jax.__version__,
        repeats=args.repeats,
        rows=rows,
        sweep=swept,
        train_step=train_rows,
    )
    out = rounded(out)
    if args.output and not args.quick:
        os.makedirs(args.output, exist_ok=True)
        files.write(os.path.join(args.output, "pairwise.json"), json.dumps(out, indent=1) + "\n")
    print("\n" + json.dumps(out))


if __name__ == "__main__":
    main()
