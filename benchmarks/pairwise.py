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
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import timing
from memory import FITS, available_bytes, needed_bytes, out_of_memory
from pairwise_rivals import GRIDS, RIVALS, Problem, Rival, Size
from pairwise_sweep import import_pyplot, plot, sweep
from train_step import paper_config, train_step_rows

from pwcrf_jax.runtime import files

TASKS = ("mean field", "loss", "sweep")
QUICK = Size(16, 21, features=1024, hidden=256, product_rows=1024, concat_up_to=21, tables_up_to=60)


class Disagreement(SystemExit):
    """Two rivals computed different things: no time of theirs means anything."""


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
