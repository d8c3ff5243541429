"""The functional API without images: three ways to train a CRF on a grid of 3 x 4 nodes, and two to decode it.

    python examples/toy_grid.py

Two labels. A label likes to be that of its right neighbour and to differ from that of the one below: label images have
stripes. Each node shows its label in noise. The graph is so small that all 4096 labellings can be enumerated, so the
exact likelihood and the exact marginals are there to compare with.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

import pwcrf_jax as pw

HEIGHT, WIDTH, CLASSES, VOID = 3, 4, 2, 255
RIGHT = pw.Relation("right", rows=(0, 0), cols=(1, 1), unit="cells")
BELOW = pw.Relation("below", rows=(1, 1), cols=(0, 0), unit="cells")
EDGES = [pw.edge_list(relation, HEIGHT, WIDTH) for relation in (RIGHT, BELOW)]
TRUE_PAIRS = np.array([[[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [1.0, 0.0]]])  # scores [label of p, label of q]
NOISE = 1.0
LABELLINGS = np.array(list(itertools.product(range(CLASSES), repeat=HEIGHT * WIDTH)))


def sample(count, rng):
    """Labels int [count, 12] from the CRF's prior, by enumeration, and what is seen of them, float [count, 12]."""
    score = sum(t[LABELLINGS[:, e.p], LABELLINGS[:, e.q]].sum(-1) for t, e in zip(TRUE_PAIRS, EDGES, strict=True))
    labels = LABELLINGS[rng.choice(len(LABELLINGS), count, p=np.exp(score) / np.exp(score).sum())]
    return labels, labels - 0.5 + NOISE * rng.standard_normal(labels.shape)


def model(params, seen):
    """Unary scores [..., 12, 2], and a table of scores for each relation, the same on all its edges."""
    unary = params["bias"] + seen[..., None] * params["slope"]
    tables = [jnp.broadcast_to(t, (len(e.p), *t.shape)) for t, e in zip(params["pairs"], EDGES, strict=True)]
    return unary, [pw.PairwiseTable(table, *edges) for table, edges in zip(tables, EDGES, strict=True)]


def piecewise(unary, potentials, labels):
    pairs = [pw.pairwise_log_likelihood(potential, labels)[0] for potential in potentials]
    return pw.unary_log_likelihood(unary, labels)[0] + sum(pairs)


OBJECTIVES = {
    "piecewise": piecewise,
    "pseudo-likelihood": lambda *args: pw.pseudo_log_likelihood(*args)[0],
    "exact likelihood": lambda *args: pw.exact_log_likelihood(*args)[0],
}


def train(objective, labels, seen, steps=150, rate=0.05):
    """Gradient ascent on the mean over images."""

    def loss(params):
        return -jnp.mean(jax.vmap(lambda y, x: objective(*model(params, x), y))(labels, seen))

    params = {"bias": jnp.zeros(CLASSES), "slope": jnp.zeros(CLASSES), "pairs": jnp.zeros(TRUE_PAIRS.shape)}
    ascend = lambda p, _: (jax.tree.map(lambda x, g: x - rate * g, p, jax.grad(loss)(p)), None)
    return jax.jit(lambda p: jax.lax.scan(ascend, p, None, length=steps)[0])(params)


@jax.jit
def exact_marginals(params, seen):
    """P(y_i = 1 | x), [12]: the likelihood of one label, all other nodes void and so summed out."""
    alone = jnp.where(jnp.eye(HEIGHT * WIDTH, dtype=bool), 1, VOID)
    return jnp.exp(jax.vmap(lambda y: pw.exact_log_likelihood(*model(params, seen), y)[0])(alone))


def main():
    rng = np.random.default_rng(0)
    labels, seen = sample(200, rng)
    test_labels, test_seen = sample(200, rng)
    print(f"{'share of labels right':22} unary  mean field  exact    mean error of mean field's marginals")
    for name, objective in OBJECTIVES.items():
        params = train(objective, labels, seen)
        unary, potentials = model(params, test_seen)
        exact = jax.lax.map(lambda x, params=params: exact_marginals(params, x), test_seen)
        settings = pw.mean_field.Settings(num_iterations=20, damping=0.5)
        mean_field = jnp.exp(pw.mean_field.run(unary, potentials, settings)[0])[..., 1]
        right = [np.mean((p > 0.5) == test_labels) for p in (jax.nn.softmax(unary)[..., 1], mean_field, exact)]
        error = jnp.mean(jnp.abs(mean_field - exact))
        print(f"{name:22} {right[0]:.1%}    {right[1]:.1%}    {right[2]:.1%}    {error:.3f}")


if __name__ == "__main__":
    main()
