"""Costs predicted from shapes against XLA's own figures, and the choices made from them. Compiles, runs nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rows import full_but, full_row

import pwcrf_jax as pw
from pwcrf_jax import costs, mean_field
from pwcrf_jax.relations import ABOVE_BELOW, SURROUNDING, offsets

SHAPES = {
    "paper-21": dict(height=29, width=38, num_classes=21, hidden=512),
    "paper-60": dict(height=29, width=38, num_classes=60, hidden=512),
    "batch-4": dict(height=16, width=20, num_classes=40, hidden=128, batch=4),
    "batch-2": dict(height=23, width=30, num_classes=21, hidden=256, batch=2),
}
# Terms that weigh little above, and much here: a border of the gradient, borders of K channels.
LARGE_BATCH = dict(height=30, width=40, num_classes=40, hidden=512, batch=8)
FEW_HIDDEN = dict(height=29, width=38, num_classes=150, hidden=32, batch=8)


@pytest.fixture(autouse=True)
def quick_compilation():
    """Full optimisation: the numbers are the compiler's."""


def box(relation, shape):
    return tuple(map(tuple, offsets(relation, shape["height"], shape["width"]).tolist()))


def arguments(shape):
    """Shapes of (a, b, kernel, bias), labels and marginals."""
    floats = lambda *size: jax.ShapeDtypeStruct(size, jnp.float32)
    nodes = (shape.get("batch", 1), shape["height"], shape["width"])
    m, k = shape["hidden"], shape["num_classes"]
    parts = floats(*nodes, m), floats(*nodes, m), floats(m, k, k), floats(k, k)
    return parts, jax.ShapeDtypeStruct(nodes, jnp.int32), floats(*nodes, k)


def measured(function, *args):
    """(multiply-adds, bytes of temporaries); of a loop XLA counts the body once."""
    compiled = jax.jit(function).lower(*args).compile()
    return compiled.cost_analysis()["flops"] / 2, compiled.memory_analysis().temp_size_in_bytes


def check(multiply_adds, temp_bytes, got):
    np.testing.assert_allclose((multiply_adds, temp_bytes), got, rtol=0.2)


@pytest.mark.parametrize("relation", [SURROUNDING, ABOVE_BELOW], ids=lambda r: r.name)
@pytest.mark.parametrize(
    "shape",
    [
        pytest.param(SHAPES["paper-21"], id="paper-21"),
        *(full_row(SHAPES[name], id=name) for name in ("paper-60", "batch-4", "batch-2")),
        pytest.param(LARGE_BATCH, id="large-batch"),
        # Scaling the sum, as every mean does, copies the gradient of kernel, which at this size weighs a fifth.
        full_row(SHAPES["paper-60"] | {"num_classes": 150}, id="paper-150"),
    ],
)
def test_loss(shape, relation):
    where, (parts, labels, _) = box(relation, shape), arguments(shape)

    def mean(parts, labels):
        total, count = pw.likelihood.pairwise_log_likelihood(pw.factored_pairwise(*parts, where), labels)
        return -total / count

    cost = costs.pairwise_loss(where, **shape)
    chunk_edges = costs.default_chunk_edges(shape["num_classes"], shape["hidden"])
    _, chunks = costs.chunk_rows(where, shape["height"], shape.get("batch", 1) * shape["width"], chunk_edges)
    assert chunks > 1
    check(cost.multiply_adds / chunks, cost.temp_bytes, measured(jax.value_and_grad(mean), parts, labels))


@pytest.mark.parametrize("name", full_but(["paper-21", "batch-4"], "batch-4"))
def test_sampled_loss(name):
    shape, size = SHAPES[name], 9
    where, (parts, labels, _) = box(SURROUNDING, shape), arguments(shape)

    def mean(parts, labels, sample):
        potential = pw.factored_pairwise(*parts, where)
        total, count = pw.likelihood.pairwise_log_likelihood(potential, labels, sample=sample)
        return -total / count

    cost = costs.pairwise_loss(where, **shape, num_sampled_offsets=size)
    got = measured(jax.value_and_grad(mean), parts, labels, jax.ShapeDtypeStruct((size,), jnp.int32))
    chunk_edges = costs.default_chunk_edges(shape["num_classes"], shape["hidden"])
    rows = min(shape["height"], chunk_edges // (shape.get("batch", 1) * shape["width"]))
    check(cost.multiply_adds / (size * -(-shape["height"] // rows)), cost.temp_bytes, got)


@pytest.mark.parametrize("relation", [SURROUNDING, ABOVE_BELOW], ids=lambda r: r.name)
@pytest.mark.parametrize(
    "shape",
    full_but([*SHAPES.values(), FEW_HIDDEN], SHAPES["paper-60"], SHAPES["batch-4"], FEW_HIDDEN),
    ids=[*SHAPES, "few-hidden"],
)
def test_factored_messages(shape, relation):
    where, (parts, _, marginals) = box(relation, shape), arguments(shape)
    send = lambda parts, marginals: pw.compute_messages(pw.factored_pairwise(*parts, where), marginals)[0]
    cost = costs.factored_messages(where, **shape)
    rows, width = shape.get("batch", 1) * shape["height"], shape["width"]
    chunk_edges = costs.default_chunk_edges(shape["num_classes"], shape["hidden"], messages=True)
    run, runs = costs.sender_runs(len(where), rows, width, chunk_edges)
    steps = -(-rows * -(-width // run) // runs)
    assert steps > 1
    check(cost.multiply_adds / steps, cost.temp_bytes, measured(send, parts, marginals))


@pytest.mark.parametrize("name", full_but(SHAPES, "paper-21", "batch-4"))
def test_messages_from_a_table(name):
    shape = SHAPES[name]
    where, (parts, _, unary) = box(SURROUNDING, shape), arguments(shape)

    def infer(parts, unary):
        return mean_field.run(unary, [pw.factored_pairwise(*parts, where)], mean_field.Settings(algorithm="table"))[0]

    # Both loops are over offsets, and that over iterations around them is a loop too.
    once = costs.table_messages(where, **shape, num_iterations=1).multiply_adds / len(where)
    check(once, costs.table_messages(where, **shape).temp_bytes, measured(infer, parts, unary))


# Relations are listed in either form. Numbers are Python's: NumPy's int32 overflows at 2^31.


@pytest.mark.parametrize(
    "function", [costs.pairwise_loss, costs.factored_messages, costs.table_messages, costs.algorithm]
)
def test_offsets_may_be_an_array(function):
    shape = SHAPES["paper-60"] | {"batch": 64}
    expected = function(box(SURROUNDING, shape), **shape)
    got = function(offsets(SURROUNDING, shape["height"], shape["width"]), **shape)
    assert got == expected
    if isinstance(got, tuple):
        assert all(type(x) is int and x > 0 for x in got)


def test_nothing_costs_nothing():
    shape = SHAPES["batch-2"]
    assert costs.pairwise_loss((), **shape) == costs.factored_messages((), **shape) == costs.Cost(0, 0)
    assert costs.table_messages((), **shape) == costs.Cost(0, 0)
    assert costs.algorithm((), **shape) == "factored"


@pytest.mark.parametrize("name", SHAPES)
def test_loss_is_flat_in_the_number_of_offsets(name):
    shape = SHAPES[name]
    where = box(SURROUNDING, shape)
    few = [offset for offset in where if max(map(abs, offset)) == max(abs(c) for _, c in where)]
    assert len(few) < len(where)
    chunk_edges = 10 * shape.get("batch", 1) * shape["width"]
    many, few = (costs.pairwise_loss(offsets, **shape, chunk_edges=chunk_edges) for offsets in (where, few))
    assert many.temp_bytes < 1.3 * few.temp_bytes and many.multiply_adds > few.multiply_adds


# --- how work is cut up ----------------------------------------------------------------------------

boxes = st.lists(st.tuples(st.integers(-9, 9), st.integers(-9, 9)), min_size=1, max_size=12)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(boxes, st.integers(1, 12), st.integers(1, 60), st.integers(1, 5000))
def test_chunks_hold_all_edges_and_no_more_than_asked(where, height, row_edges, chunk_edges):
    rows, chunks = costs.chunk_rows(where, height, row_edges, chunk_edges)
    pairs = {}
    for down, right in where:
        pairs[right] = pairs.get(right, 0) + max(0, height - abs(down))
    assert 1 <= rows <= max(1, max(pairs.values()), 1)  # no chunk is larger than what there is to put into it
    assert rows == 1 or rows * row_edges <= chunk_edges
    assert chunks == sum(-(-n // rows) for n in pairs.values())


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.integers(1, 200), st.integers(1, 60), st.integers(1, 60), st.integers(1, 5000))
def test_runs_hold_all_senders_and_no_more_than_asked(num_offsets, rows, width, chunk_edges):
    run, runs = costs.sender_runs(num_offsets, rows, width, chunk_edges)
    assert 1 <= run <= width and 1 <= runs <= rows
    assert runs == 1 or run == width
    assert run * runs == 1 or run * runs * num_offsets <= chunk_edges
    # Less than a run of each row, less than a step in all is padding.
    per_row = -(-width // run)
    steps = -(-rows * per_row // runs)
    assert per_row * run < width + per_row
    assert steps * runs < rows * per_row + steps


@pytest.mark.parametrize("chunk_edges", [10**9, 2**40])
def test_chunks_beyond_all_edges_are_as_large_as_the_map(chunk_edges):
    height, width = 16, 20
    where = list(map(tuple, offsets(SURROUNDING, height, width)))
    rows, chunks = costs.chunk_rows(where, height, width, chunk_edges)
    assert rows * chunks <= len(where) * height
    assert costs.sender_runs(len(where), height, width, chunk_edges) == (width, height)


# --- the algorithm -------------------------------------------------------------------------------------

PAPER = dict(height=29, width=38, hidden=512)


@pytest.mark.parametrize("relation", [SURROUNDING, ABOVE_BELOW], ids=lambda r: r.name)
def test_algorithms_at_the_ends(relation):
    where = box(relation, PAPER)
    for num_classes in (2, 5, 11):
        assert costs.algorithm(where, **PAPER, num_classes=num_classes, num_iterations=50) == "table"
    for num_iterations in (0, 1, 3, 50):
        assert costs.algorithm(where, **PAPER, num_classes=150, num_iterations=num_iterations) == "factored"
    assert costs.algorithm(where, **PAPER, num_classes=2, num_iterations=0) == "factored"


@pytest.mark.parametrize("num_classes", [2, 11, 21, 40, 60, 150])
def test_more_iterations_never_turn_from_the_table(num_classes):
    where = box(SURROUNDING, PAPER)
    chosen = [costs.algorithm(where, **PAPER, num_classes=num_classes, num_iterations=n) for n in range(1, 40)]
    assert chosen == sorted(chosen)


def test_tables_too_large_are_never_chosen():
    where = box(SURROUNDING, PAPER)
    for num_classes in (2, 5, 11, 21):
        size = costs.table_messages(where, **PAPER, num_classes=num_classes).temp_bytes
        most = costs.TABLE_BYTES // size
        settings = PAPER | dict(num_classes=num_classes, num_iterations=50)
        assert costs.algorithm(where, **settings, batch=most) == "table"
        assert costs.algorithm(where, **settings, batch=most + 1) == "factored"


def test_auto_takes_the_algorithm_of_the_cost_model():
    parts, _, _ = arguments(dict(height=6, width=7, num_classes=3, hidden=64, batch=2))
    where = ((0, 1), (1, 0))
    kinds = set()
    for num_iterations in (0, 1, 3, 60):
        make = lambda parts, n=num_iterations: pw.prepare_messages(pw.factored_pairwise(*parts, where), n)
        chosen = "table" if isinstance(jax.eval_shape(make, parts), pw.GridScores) else "factored"
        assert chosen == costs.algorithm(where, 6, 7, 3, 64, 2, num_iterations=num_iterations)
        kinds.add(chosen)
    assert len(kinds) == 2
