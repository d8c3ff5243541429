"""Piecewise training (Lin et al., CVPR 2016, section 4; Sutton & McCallum, 2005).

The likelihood of a CRF is replaced by the product over all factors of independent softmaxes:

    log P_piecewise(y | x) = sum_p log P_U(y_p | x) + sum_relations sum_(p,q) log P_V(y_p, y_q | x)

No inference, no partition function of the graph: each factor is a classifier of its own. Every term is returned as
(sum, count), so that a data-parallel caller can add both over devices before dividing once; a mean of per-device
means is wrong as soon as void pixels are spread unevenly.
"""

import jax
import jax.numpy as jnp
import numpy as np

from pwcrf_jax import pairwise

VOID = 255
"""The label of nodes and pixels that count for nothing."""


def unary_log_likelihood(scores, labels, void=VOID, node_weights=None):
    """Sum and count of log P_U(y_p | x) = z_p[y_p] - log sum_k exp z_p[k] over the nodes.

    Args:
      scores: float [..., K], z_p = -U; any leading axes. Log-sum-exp is taken in float32 whatever the dtype.
      labels: int [...], 0..K-1, or `void` for nodes that count for nothing. Other values are a caller's error and
        are not checked here (they cannot be, under jit); `pwcrf_jax.data` refuses them when a set is prepared.
      void: the void label.
      node_weights: float [...] or None (1): class balancing, from `balance_weights`.

    Returns:
      (sum, count): float32 scalars, weighted sum of log-likelihoods and sum of weights.

    Raises:
      ValueError: labels that are not integers or not of the shape of the nodes.

    Examples:
      >>> scores = jnp.zeros((2, 3, 4))  # 2 x 3 nodes, 4 classes of probability 1/4 each
      >>> total, count = pw.unary_log_likelihood(scores, jnp.array([[0, 1, 2], [3, 0, 255]]))
      >>> round(float(total), 3), float(count)  # 5 log 1/4
      (-6.931, 5.0)
    """
    _check_labels(scores.shape[:-1], labels)
    valid = labels != void
    safe = jnp.where(valid, labels, 0).astype(jnp.int32)
    log_probs = jax.nn.log_softmax(scores.astype(jnp.float32), axis=-1)
    value = jnp.take_along_axis(log_probs, safe[..., None], axis=-1)[..., 0]
    weight = _weights(valid, node_weights)
    return jnp.sum(weight * value), jnp.sum(weight)


def pairwise_log_likelihood(potential, labels, void=VOID, node_weights=None, chunk_edges=None, sample=None):
    """Sum and count of log P_V(y_p, y_q | x) over the edges of one relation; void at either end leaves an edge out.

    An edge weighs w_p w_q: a softmax trained with class weights w models w(k) P(k), so only with the product do the
    weighted pair and the two weighted unaries agree where there is no interaction; with any other weight each message
    would carry a prior for or against rare classes.

    Args:
      potential: `PairwiseTable` or `FactoredPairwise`; leading batch axes allowed in both.
      labels: int [..., num_nodes] for a table, [..., H, W] for a factored potential; 0..K-1 or `void`.
      void, node_weights: as in `unary_log_likelihood`.
      chunk_edges, sample: as in `pwcrf_jax.pairwise.edge_log_likelihood`, which has the equation too.

    Returns:
      (sum, count): float32 scalars.

    Raises:
      ValueError: labels that are not integers or not of the shape of the nodes, and what
        `pwcrf_jax.pairwise.edge_log_likelihood` refuses.

    Examples:
      >>> chain = pw.PairwiseTable(jnp.zeros((2, 3, 3)), p=jnp.array([0, 1]), q=jnp.array([1, 2]))
      >>> total, count = pw.pairwise_log_likelihood(chain, jnp.array([0, 2, 255]))
      >>> round(float(total), 3), float(count)  # log 1/9; the second edge has a void end
      (-2.197, 1.0)
    """
    if isinstance(potential, pairwise.FactoredPairwise):
        _check_labels(potential.a.shape[:-1], labels)
    elif isinstance(potential, pairwise.PairwiseTable):  # without evidence a table does not know its number of nodes
        nodes = labels.shape if potential.evidence is None else potential.evidence.shape[:-1]
        _check_labels(nodes, labels)
    return pairwise.edge_log_likelihood(potential, labels, labels != void, node_weights, chunk_edges, sample)


def balance_weights(labels, num_classes, void=VOID, power=1.0):
    """Per-image inverse-frequency weights of the nodes.

        w_p = (n_{y_p} / n)^-power, scaled so that the weights of the valid nodes of each image sum to their number.

    Args:
      labels: int [..., H, W]; leading axes are images.
      num_classes: K, static.
      void: the void label.
      power: 0 weighs all nodes alike, 1 all classes present in the image alike.

    Returns:
      float32 [..., H, W]; 0 at void nodes. An image without valid nodes gets zeros.

    Examples:
      >>> pw.balance_weights(jnp.array([[0, 0, 0, 1]]), num_classes=2).round(2).tolist()[0][3]  # 2 for the rare class
      2.0
    """
    valid = labels != void
    one_hot = jax.nn.one_hot(jnp.where(valid, labels, num_classes), num_classes, dtype=jnp.float32)
    count = jnp.sum(one_hot, axis=(-3, -2), keepdims=True)
    weight = jnp.sum(one_hot * jnp.maximum(count, 1.0) ** -power, axis=-1)
    total = jnp.sum(weight, axis=(-2, -1), keepdims=True)
    return weight * jnp.sum(valid, axis=(-2, -1), keepdims=True) / jnp.maximum(total, 1e-12)


def grid_labels(labels, height, width):
    """Labels of an H x W grid: the label at each cell's centre pixel.

    The grid covers the image evenly, so the centre of cell i is pixel floor((i + 1/2) * image_height / height). Void
    pixels stay void. Static index arithmetic.

    Args:
      labels: int [..., image_height, image_width], of NumPy or JAX.
      height, width: size of the grid in cells; Python integers.

    Returns:
      [..., height, width], of the same dtype.

    Examples:
      >>> pw.grid_labels(np.array([[0, 0, 1, 1], [0, 0, 1, 1]]), 1, 2).tolist()
      [[0, 1]]
    """
    sizes = zip((height, width), labels.shape[-2:], strict=True)
    rows, cols = ((2 * np.arange(n) + 1) * size // (2 * n) for n, size in sizes)
    return labels[..., rows[:, None], cols[None, :]]


def _check_labels(shape, labels):
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(f"expected integer labels, got {labels.dtype}")
    if tuple(labels.shape) != tuple(shape):
        raise ValueError(f"expected labels of shape {tuple(shape)}, one a node, got {tuple(labels.shape)}")


def _weights(valid, node_weights):
    weight = 1.0 if node_weights is None else node_weights.astype(jnp.float32)
    return jnp.where(valid, weight, 0.0)
