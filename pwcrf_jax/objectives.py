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

from pwcrf_jax import mean_field, pairwise, piecewise

MAX_LABELLINGS = 2**20
"""The most that `exact_log_likelihood` enumerates: beyond it the table of all labellings takes hundreds of MB."""


def pseudo_log_likelihood(
    unary,
    potentials,
    labels,
    weights=None,
    normalize=False,
    void=piecewise.VOID,
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
      potentials: sequence of one encoding, as in `mean_field.step`.
      labels: int of the nodes' shape, [..., num_nodes] or [..., H, W]; nodes of label `void` count for nothing and send
        nothing.
      void: the void label.
      weights, normalize, chunk_edges, route: as in `mean_field.run`.
      node_weights: float of the nodes' shape or None (1), for the sum and the count.

    Returns:
      (sum, count): float32 scalars.

    Raises:
      ValueError: labels that are not integers or not of the nodes' shape, and what `mean_field.run` refuses.
    """
    known, truth = _truth(unary, labels, void)
    potentials = [pairwise.prepare_messages(p, 1, route) for p in potentials]
    log_probs, _ = mean_field.step(truth, unary, potentials, weights, 0.0, normalize, known, chunk_edges)
    return piecewise.unary_log_likelihood(log_probs, labels, void, node_weights)


def unrolled_log_likelihood(
    unary,
    potentials,
    labels,
    num_iterations=3,
    weights=None,
    damping=0.0,
    normalize=False,
    void=piecewise.VOID,
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
      ValueError: labels that are not integers or not of the nodes' shape, and what `mean_field.run` refuses.
    """
    settings = (num_iterations, weights, damping, normalize, node_mask, route, chunk_edges)
    log_marginals, _ = mean_field.run(unary, potentials, *settings)
    if node_mask is not None:
        labels = jnp.where(node_mask, labels, void)
    return piecewise.unary_log_likelihood(log_marginals, labels, void, node_weights)


def exact_log_likelihood(unary, potentials, labels, weights=None, void=piecewise.VOID):
    """log P(y | x) of the CRF itself, with its partition function by enumeration: tiny graphs, for tests and lessons.

        log P(y | x) = log sum_{y' agrees with y} exp s(y') - log sum_{y'} exp s(y'),
        s(y) = sum_i z_i[y_i] + sum_r w_r sum_(p,q) z_pq[y_p, y_q]

    where y' agrees with y if it is the same on all nodes that are not void: void nodes are summed out.

    Args:
      unary: scores of one graph, [num_nodes, K] or [H, W, K]; batch with `jax.vmap`.
      potentials: sequence of `PairwiseTable` or `FactoredPairwise` (which is expanded).
      labels: int [num_nodes] or [H, W].
      weights: as in `mean_field.run`.
      void: the void label.

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
    known, _ = _truth(unary, labels, void)
    num_classes = unary.shape[-1]
    tables = [p if isinstance(p, pairwise.PairwiseTable) else pairwise.to_table(p) for p in potentials]
    if any(table.num_classes != num_classes for table in tables):
        raise ValueError(f"unary scores have {num_classes} classes, potentials {[t.num_classes for t in tables]}")
    if weights is not None and len(weights) != len(tables):
        raise ValueError(f"expected {len(tables)} weights, one a potential, got {len(weights)}")
    scores, labels, known = unary.reshape(-1, num_classes).astype(jnp.float32), labels.reshape(-1), known.reshape(-1)
    if num_classes ** len(scores) > MAX_LABELLINGS:
        raise ValueError(
            f"{num_classes} classes on {len(scores)} nodes are more than {MAX_LABELLINGS} labellings; take a smaller "
            "graph, or another objective"
        )
    every = jnp.asarray(np.array(list(itertools.product(range(num_classes), repeat=len(scores))), np.int32))
    total = jnp.sum(scores[np.arange(len(scores)), every], axis=1)
    for i, table in enumerate(tables):
        edges = np.arange(table.p.shape[-1])
        pairs = table.scores.astype(jnp.float32)[edges, every[:, table.p], every[:, table.q]]
        total = total + (1.0 if weights is None else weights[i]) * jnp.sum(pairs, axis=1)
    agrees = jnp.all((every == labels) | ~known, axis=1)
    log_p = jax.nn.logsumexp(total, where=agrees) - jax.nn.logsumexp(total)
    return log_p, jnp.sum(known, dtype=jnp.float32)


def _truth(unary, labels, void):
    """(bool, which nodes are labelled; log marginals that are certain of the labels)."""
    if not jnp.issubdtype(labels.dtype, jnp.integer) or labels.shape != unary.shape[:-1]:
        raise ValueError(
            f"expected integer labels of shape {unary.shape[:-1]}, one a node, got {labels.dtype} {labels.shape}"
        )
    known = labels != void
    one_hot = jax.nn.one_hot(jnp.where(known, labels, 0), unary.shape[-1], dtype=jnp.float32)
    # log 0 without an infinity, which damping would multiply by zero.
    return known, jnp.where(one_hot > 0, 0.0, -1e9)
