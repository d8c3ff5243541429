"""What else a CRF can be trained with than its piecewise likelihood (`pwcrf_jax.piecewise`).

All take scores, potentials and labels and return (sum, count) like the piecewise terms: log-probabilities of the
labels, and the nodes they are of. Relation weights and `normalize` (of the first two) mean what they mean in
`pwcrf_jax.mean_field`, so that what is trained is what is decoded; with means of messages there is no joint
distribution behind the updates. Evidence of residual potentials plays no part: the unary is in the model already.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from pwcrf_jax import inputs, mean_field, pairwise, piecewise
from pwcrf_jax.arrays import as_array, compiled
from pwcrf_jax.labels import VOID, checked, split

MAX_LABELLINGS = 2**20
"""The most that `exact_log_likelihood` enumerates: beyond it the table of all labellings takes hundreds of MB."""


def pseudo_log_likelihood(
    unary,
    potentials,
    labels,
    weights=None,
    normalize=False,
    void=VOID,
    node_weights=None,
    chunk_edges=None,
    route="auto",
):
    """Sum and count of log P(y_i | labels of its neighbours, x) (Besag, 1975).

        log P(y_i | y_N(i)) = log softmax(z_i + sum_r w_r m_r)[y_i],
        m_r = sum_{q: (i,q)} z_iq[., y_q] + sum_{p: (p,i)} z_pi[y_p, .]

    One mean-field update from the true labels: no inference, but the neighbours are given the truth that they will not
    have at test time. Costs about one message pass and its gradient.

    Args:
      unary: scores z, float [..., num_nodes, K] for tables or [..., H, W, K] for factored potentials.
      potentials: of one encoding, as in `mean_field.step`.
      labels: int of the nodes' shape, [..., num_nodes] or [..., H, W]; nodes of label `void` count for nothing, send
        nothing and may hold anything. Other labels than 0..K-1 as in `piecewise.unary_log_likelihood`.
      void: the void label, static and outside 0..K-1.
      weights, normalize, chunk_edges, route: as in `mean_field.run`.
      node_weights: float of the nodes' shape or None (1), for the sum and the count.

    Returns:
      (sum, count): float32 scalars.

    Raises:
      ValueError: labels as in `piecewise.unary_log_likelihood`, and what `mean_field.run` refuses.
    """
    unary, potentials, weights = inputs.model(unary, potentials, weights)
    inputs.check_schedule(1, 0.0, route)
    labels = checked(labels, unary.shape[-1], void, unary.shape[:-1])
    arrays = (unary, potentials, labels, weights, as_array(node_weights))
    return _pseudo(*arrays, normalize=bool(normalize), chunk_edges=chunk_edges, route=route)


@compiled()
def _pseudo(unary, potentials, labels, weights, node_weights, *, normalize, chunk_edges, route):
    safe, known = split(labels, unary.shape[-1])
    one_hot = jax.nn.one_hot(safe, unary.shape[-1], dtype=jnp.float32)
    # log 0 without an infinity, which damping would multiply by zero.
    truth = jnp.where(one_hot > 0, 0.0, -1e9)
    log_probs, _ = mean_field.step(truth, unary, potentials, weights, 0.0, normalize, known, chunk_edges, route)
    return piecewise.unary_log_likelihood(log_probs, jnp.where(known, safe, -1), -1, node_weights)


def unrolled_log_likelihood(
    unary,
    potentials,
    labels,
    num_iterations=3,
    weights=None,
    damping=0.0,
    normalize=False,
    void=VOID,
    node_mask=None,
    node_weights=None,
    chunk_edges=None,
    route="auto",
):
    """Sum and count of log Q_i(y_i) after `num_iterations` of mean field, back-propagated through all of them.

    The objective of CRF-RNN (Zheng et al., ICCV 2015) with CNN pairwise potentials: inference is inside training. It
    needs the messages of every iteration and their gradients, and may learn parameters that suit few iterations better
    than the model. Void nodes take part (their labels are unknown, not absent) and are not scored.

    Args:
      unary, potentials, labels, void, node_weights: as in `pseudo_log_likelihood`.
      num_iterations, weights, damping, normalize, route, chunk_edges: as in `mean_field.run`. Differentiable in weights
        too.
      node_mask: bool of the nodes' shape; false nodes (padding) neither send nor receive, and are not scored.

    Returns:
      (sum, count): float32 scalars.

    Raises:
      ValueError: labels as in `piecewise.unary_log_likelihood`, and what `mean_field.run` refuses.
    """
    unary, potentials, weights = inputs.model(unary, potentials, weights)
    node_mask = inputs.mask(node_mask)
    labels = checked(labels, unary.shape[-1], void, unary.shape[:-1], node_mask)
    settings = (num_iterations, weights, damping, normalize, node_mask, route, chunk_edges)
    log_marginals, _ = mean_field.run(unary, potentials, *settings)
    return _of_nodes(log_marginals, labels, node_mask, as_array(node_weights))


@compiled()
def _of_nodes(log_marginals, labels, node_mask, node_weights):
    """The log marginals of the labels, of nodes that have one and are not masked."""
    safe, valid = split(labels, log_marginals.shape[-1])
    labels = jnp.where(valid if node_mask is None else valid & node_mask, safe, -1)
    return piecewise.unary_log_likelihood(log_marginals, labels, -1, node_weights)


def exact_log_likelihood(unary, potentials, labels, weights=None, void=VOID):
    """log P(y | x) of the CRF itself, with its partition function by enumeration: tiny graphs, for tests and lessons.

        log P(y | x) = log sum_{y' agrees with y} exp s(y') - log sum_{y'} exp s(y'),
        s(y) = sum_i z_i[y_i] + sum_r w_r sum_(p,q) z_pq[y_p, y_q]

    where y' agrees with y if it is the same on all nodes that are not void: void nodes are summed out.

    Args:
      unary: scores of one graph, [num_nodes, K] or [H, W, K]; batch with `jax.vmap`.
      potentials: of `PairwiseTable` or `FactoredPairwise` (which is expanded), as in `mean_field.step`.
      labels: int [num_nodes] or [H, W]; void and others as in `piecewise.unary_log_likelihood`.
      weights: as in `mean_field.run`.
      void: the void label, static and outside 0..K-1.

    Returns:
      (sum, count): log P(y | x) and the number of nodes that are not void, float32 scalars.

    Raises:
      ValueError: more than `MAX_LABELLINGS` labellings, or shapes that do not fit.

    Examples:
      >>> agree = pw.PairwiseTable(jnp.log(jnp.array([[[3.0, 1.0], [1.0, 3.0]]])), p=jnp.array([0]), q=jnp.array([1]))
      >>> total, count = pw.exact_log_likelihood(jnp.zeros((2, 2)), [agree], jnp.array([1, 1]))
      >>> round(float(jnp.exp(total)), 3), float(count)  # 3 / (3 + 1 + 1 + 3)
      (0.375, 2.0)
    """
    potentials, weights = inputs.relations(potentials, weights)
    tables = [p if isinstance(p, pairwise.PairwiseTable) else pairwise.to_table(p) for p in potentials]
    unary, tables, weights = inputs.model(unary, tables, weights)
    labels = checked(labels, unary.shape[-1], void, unary.shape[:-1])
    num_nodes, num_classes = labels.size, unary.shape[-1]
    if num_classes**num_nodes > MAX_LABELLINGS:
        raise ValueError(
            f"{num_classes} classes on {num_nodes} nodes are more than {MAX_LABELLINGS} labellings; take a smaller "
            "graph, or another objective"
        )
    every = np.array(list(itertools.product(range(num_classes), repeat=num_nodes)), np.int32)
    return _exact(unary, tables, labels, weights, every)


@compiled()
def _exact(unary, tables, labels, weights, every):
    num_classes = unary.shape[-1]
    labels, known = split(labels.reshape(-1), num_classes)
    scores = unary.reshape(-1, num_classes).astype(jnp.float32)
    total = jnp.sum(scores[np.arange(len(scores))[None], every], axis=1)
    for i, table in enumerate(tables):
        edges = np.arange(table.p.shape[-1])[None]
        pairs = table.scores.astype(jnp.float32)[edges, every[:, table.p], every[:, table.q]]
        pairs = jnp.where(pairs == -jnp.inf, pairwise.RULED_OUT, pairs)
        weight = 1.0 if weights is None else jnp.asarray(weights[i], jnp.float32)
        total = total + weight * jnp.sum(pairs, axis=1)
    agrees = jnp.all((every == labels[None]) | ~known[None], axis=1)
    log_p = jax.nn.logsumexp(total, where=agrees) - jax.nn.logsumexp(total)
    return log_p, jnp.sum(known, dtype=jnp.float32)
