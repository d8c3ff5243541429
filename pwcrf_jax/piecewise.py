"""Piecewise training (Lin et al., CVPR 2016, section 4; Sutton & McCallum, 2005).

The likelihood of a CRF is replaced by the product over all factors of independent softmaxes:

    log P_piecewise(y | x) = sum_p log P_U(y_p | x) + sum_relations sum_(p,q) log P_V(y_p, y_q | x)

No inference, no partition function of the graph: each factor is a classifier of its own. Every term is returned as
(sum, count), so that a data-parallel caller can add both over devices before dividing once; a mean of per-device
means is wrong as soon as void pixels are spread unevenly.
"""

import dataclasses
import operator

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from pwcrf_jax import inputs
from pwcrf_jax.arrays import as_array, batch_spec, compiled
from pwcrf_jax.labels import VOID, checked, split
from pwcrf_jax.likelihood import Sums, pairwise_log_likelihood
from pwcrf_jax.potentials import GridScores, PairwiseTable, Potential


def unary_log_likelihood(
    scores: ArrayLike, labels: ArrayLike, *, void: int | None = VOID, node_weights: ArrayLike | None = None
) -> Sums:
    """Sum and count of log P_U(y_p | x) = z_p[y_p] - log sum_k exp z_p[k] over the nodes.

    Args:
      scores: float [..., K], z_p = -U; any leading axes. Log-sum-exp is taken in float32 whatever the dtype.
      labels: int [...], 0..K-1, or `void` for nodes that count for nothing, whatever scores they have. Other values are
        refused where they can be seen; under `jit` they count for nothing too.
      void: the void label, static and outside 0..K-1; -1 in much other code.
      node_weights: float [...] or None (1): class balancing, from `balance_weights`.

    Returns:
      (sum, count): float32 scalars, weighted sum of log-likelihoods and sum of weights.

    Raises:
      ValueError: labels that are not integers, not of the shape of the nodes, or neither class nor void; a void that is
        a class.

    Examples:
      >>> scores = jnp.zeros((2, 3, 4))  # 2 x 3 nodes, 4 classes of probability 1/4 each
      >>> total, count = pw.unary_log_likelihood(scores, jnp.array([[0, 1, 2], [3, 0, 255]]))
      >>> round(float(total), 3), float(count)  # 5 log 1/4
      (-6.931, 5.0)
    """
    scores = as_array(scores)
    labels = checked(labels, scores.shape[-1], void, scores.shape[:-1])
    return _unary_sums(scores, labels, None if node_weights is None else as_array(node_weights))


@compiled()
def _unary_sums(scores: jax.Array, labels: jax.Array, node_weights: jax.Array | None) -> Sums:
    safe, valid = split(labels, scores.shape[-1])
    # What void nodes hold, NaN and infinities too, reaches neither the sum nor gradients.
    scores = jnp.where(valid[..., None], scores.astype(jnp.float32), 0.0)
    log_probs = jax.nn.log_softmax(scores, axis=-1)
    value = jnp.take_along_axis(log_probs, safe[..., None], axis=-1)[..., 0]
    weight = jnp.where(valid, 1.0 if node_weights is None else node_weights.astype(jnp.float32), 0.0)
    return jnp.sum(weight * value), jnp.sum(weight)


def uniform_log_likelihood(
    scores: ArrayLike, labels: ArrayLike, *, void: int | None = VOID, node_weights: ArrayLike | None = None
) -> Sums:
    """Sum and count of mean_k log P_U(k | x), over the nodes of `unary_log_likelihood`, for label smoothing.

    Cross-entropy with smoothed targets (Szegedy et al., CVPR 2016, section 7), at smoothing eps, is

        -(1 - eps) log P_U(y_p | x) - eps mean_k log P_U(k | x)

    Args:
      scores, labels, void, node_weights: as in `unary_log_likelihood`. A label that a score of -inf rules out at a node
        takes no part in the mean there.

    Returns:
      (sum, count): float32 scalars, weighted sum of the means and sum of weights.

    Raises:
      ValueError: as `unary_log_likelihood`.

    Examples:
      >>> total, count = pw.uniform_log_likelihood(jnp.zeros((2, 4)), jnp.array([1, 255]))
      >>> round(float(total), 3), float(count)  # log 1/4 of the one node that is not void
      (-1.386, 1.0)
    """
    scores = as_array(scores)
    labels = checked(labels, scores.shape[-1], void, scores.shape[:-1])
    return _uniform_sums(scores, labels, None if node_weights is None else as_array(node_weights))


@compiled()
def _uniform_sums(scores: jax.Array, labels: jax.Array, node_weights: jax.Array | None) -> Sums:
    _, valid = split(labels, scores.shape[-1])
    scores = jnp.where(valid[..., None], scores.astype(jnp.float32), 0.0)
    possible = scores != -jnp.inf
    log_probs = jnp.where(possible, jax.nn.log_softmax(scores, axis=-1), 0.0)
    value = jnp.sum(log_probs, axis=-1) / jnp.maximum(jnp.sum(possible, axis=-1, dtype=jnp.float32), 1.0)
    weight = jnp.where(valid, 1.0 if node_weights is None else node_weights.astype(jnp.float32), 0.0)
    return jnp.sum(weight * value), jnp.sum(weight)


def soft_dice(scores: ArrayLike, labels: ArrayLike, *, void: int | None = VOID) -> Sums:
    """Sum and count of the soft Dice coefficients of each image and each class that it shows.

        D_k = 2 sum_p P_p(k) [y_p = k] / sum_p (P_p(k) + [y_p = k]),   P_p = softmax of the scores of p

    Milletari et al. (3DV 2016) with the plain sums of Sudre et al. (DLMIA 2017) in the denominator, where the first has
    squares. Void nodes are in neither sum. Coefficients are of one image each, so sums over batches add up.

    Args:
      scores: float [..., H, W, K]; leading axes are images. Probabilities and sums are float32 whatever the dtype.
      labels: int [..., H, W], 0..K-1 or `void`, as in `unary_log_likelihood`.
      void: the void label, static and outside 0..K-1.

    Returns:
      (sum, count): float32 scalars, the sum of D_k over images and classes, and their number.

    Raises:
      ValueError: as `unary_log_likelihood`.

    Examples:
      >>> total, count = pw.soft_dice(jnp.zeros((1, 2, 2)), jnp.array([[0, 255]]))
      >>> round(float(total), 3), float(count)  # 2 * 1/2 / (1/2 + 1), of the one class that is shown
      (0.667, 1.0)
    """
    scores = as_array(scores)
    return _dice_sums(scores, checked(labels, scores.shape[-1], void, scores.shape[:-1]))


@compiled()
def _dice_sums(scores: jax.Array, labels: jax.Array) -> Sums:
    num_classes = scores.shape[-1]
    safe, valid = split(labels, num_classes)
    probs = jax.nn.softmax(jnp.where(valid[..., None], scores.astype(jnp.float32), 0.0), axis=-1)
    probs = jnp.where(valid[..., None], probs, 0.0)
    true = jax.nn.one_hot(jnp.where(valid, safe, num_classes), num_classes, dtype=jnp.float32)
    over_nodes = lambda x: jnp.sum(x, axis=(-3, -2))
    shown = over_nodes(true) > 0
    dice = 2.0 * over_nodes(probs * true) / jnp.where(shown, over_nodes(probs + true), 1.0)
    return jnp.sum(jnp.where(shown, dice, 0.0)), jnp.sum(shown, dtype=jnp.float32)


def piecewise_loss(
    unary: ArrayLike,
    potentials: inputs.Potentials,
    labels: ArrayLike,
    *,
    residual: bool = True,
    pairwise_weight: float = 1.0,
    balance_power: float = 0.0,
    chunk_edges: int | None = None,
    void: int | None = VOID,
) -> jax.Array:
    """The loss of piecewise training, as `pwcrf train` computes it: means over nodes and over each relation's edges.

        L = -(1 / N_U) sum_p log P_U(y_p | x) - c sum_r (1 / N_r) sum_(p,q) log P_V(y_p, y_q | x)

    N: the number of factors that count, or the sum of their weights. Under `jit` over devices the means are those of
    the whole batch. Where each device has a program of its own (`pmap`, `shard_map`), add the sums and counts of
    `unary_log_likelihood` and `pwcrf_jax.pairwise_log_likelihood` over devices instead, and divide then.

    Args:
      unary: scores z, float [..., H, W, K], or [..., num_nodes, K] for tables; leading axes are images.
      potentials: `FactoredPairwise` or `PairwiseTable`, one a relation: a sequence, a mapping of names, or one alone.
        May be empty: the unary's cross-entropy.
      labels: int, those of the nodes, [..., H, W] or [..., num_nodes]; or of the image [..., height, width] that a grid
        covers, no side shorter than the grid's, which are read at the centres of the cells (`grid_labels`).
      residual: potentials without unary_log_probs get the unary's, without its gradient, so that the pairwise networks
        learn what labels say about each other (docs/math.md, "Residual and free scores"); False: as they are, the
        paper's free form.
      pairwise_weight: c, float at least 0.
      balance_power: float, of `balance_weights`; 0: every node weighs 1.
      chunk_edges: int, of `pwcrf_jax.pairwise_log_likelihood`; None: chosen from the shapes.
      void: the label of nodes that count for nothing, int outside 0..K-1.

    Returns:
      float32 scalar. Differentiable in unary and potentials. Nothing that counts: 0.

    Raises:
      TypeError: what is no potential; `GridScores`, which are for inference.
      ValueError: labels of neither nodes nor image, or neither class nor void where they can be seen; potentials of
        another grid or number of classes than the unary; grids and tables mixed.

    Examples:
      >>> chain = pw.PairwiseTable(jnp.zeros((2, 3, 3)), p=jnp.array([0, 1]), q=jnp.array([1, 2]))
      >>> round(float(pw.piecewise_loss(jnp.zeros((3, 3)), chain, jnp.array([0, 2, 1]))), 3)  # log 3 + log 9
      3.296
    """
    scores, found, _ = inputs.model(unary, potentials)
    if any(isinstance(p, GridScores) for p in found):
        raise TypeError("GridScores are for messages: give the FactoredPairwise that they were made from")
    classes, of_tables = scores.shape[-1], any(isinstance(p, PairwiseTable) for p in found)
    nodes = as_array(labels)
    if not of_tables and _is_image(nodes.shape, scores.shape[:-1]):
        nodes = grid_labels(nodes, *scores.shape[-3:-1])
    weights = None
    if balance_power and of_tables:
        weights = balance_weights(nodes[..., None], classes, void=void, power=balance_power)[..., 0]
    elif balance_power:
        weights = balance_weights(nodes, classes, void=void, power=balance_power)
    total, count = unary_log_likelihood(scores, nodes, void=void, node_weights=weights)
    loss = -total / jnp.maximum(count, 1.0)
    for potential in found:
        if residual:
            potential = _beside(potential, scores)
        total, count = pairwise_log_likelihood(
            potential, nodes, void=void, node_weights=weights, chunk_edges=chunk_edges
        )
        loss -= pairwise_weight * total / jnp.maximum(count, 1.0)
    return loss


def _is_image(labels: tuple[int, ...], nodes: tuple[int, ...]) -> bool:
    """Whether labels of this shape are those of pixels around a grid of nodes: no side is shorter."""
    same_axes = len(labels) == len(nodes) >= 2 and labels[:-2] == nodes[:-2]
    return same_axes and labels != nodes and all(map(operator.ge, labels[-2:], nodes[-2:]))


def _beside(potential: Potential, unary: jax.Array) -> Potential:
    """The potential with the unary's log-probabilities, their gradient stopped, unless it has some."""
    if isinstance(potential, GridScores) or potential.unary_log_probs is not None:
        return potential
    log_probs = jax.lax.stop_gradient(jax.nn.log_softmax(unary.astype(jnp.float32), axis=-1))
    if isinstance(potential, PairwiseTable):
        return potential._replace(unary_log_probs=log_probs)
    return dataclasses.replace(potential, unary_log_probs=log_probs)


def balance_weights(
    labels: ArrayLike, num_classes: int, *, void: int | None = VOID, power: ArrayLike = 1.0
) -> jax.Array:
    """Per-image inverse-frequency weights of the nodes.

        w_p = (n_{y_p} / n)^-power, scaled so that the weights of the valid nodes of each image sum to their number.

    Args:
      labels: int [..., H, W]; leading axes are images. 0..K-1 or `void`, as in `unary_log_likelihood`.
      num_classes: K, static.
      void: the void label, static and outside 0..K-1.
      power: 0 weighs all nodes alike, 1 all classes present in the image alike.

    Returns:
      float32 [..., H, W]; 0 at void nodes. An image without valid nodes gets zeros.

    Raises:
      ValueError: labels that are not integers, or neither class nor void; a void that is a class.

    Examples:
      >>> pw.balance_weights(jnp.array([[0, 0, 0, 1]]), num_classes=2).round(2).tolist()[0][3]  # 2 for the rare class
      2.0
    """
    return _balance(checked(labels, num_classes, void), power, num_classes=num_classes)


@compiled(lambda labels, power, num_classes: jax.P(*batch_spec(labels, 2)))
def _balance(labels: jax.Array, power: ArrayLike, *, num_classes: int) -> jax.Array:
    safe, valid = split(labels, num_classes)
    one_hot = jax.nn.one_hot(jnp.where(valid, safe, num_classes), num_classes, dtype=jnp.float32)
    count = jnp.sum(one_hot, axis=(-3, -2), keepdims=True)
    weight = jnp.sum(one_hot * jnp.maximum(count, 1.0) ** -jnp.asarray(power, jnp.float32), axis=-1)
    total = jnp.sum(weight, axis=(-2, -1), keepdims=True)
    return weight * jnp.sum(valid, axis=(-2, -1), keepdims=True, dtype=jnp.float32) / jnp.maximum(total, 1e-12)


def grid_labels(labels: ArrayLike, height: int, width: int) -> jax.Array:
    """Labels of an H x W grid: the label at each cell's centre pixel.

    The grid covers the image evenly, so the centre of cell i is pixel floor((i + 1/2) * image_height / height). Void
    pixels stay void. Static index arithmetic.

    Args:
      labels: int [..., image_height, image_width], of NumPy or JAX, or nested lists; void or not.
      height, width: size of the grid in cells; Python integers.

    Returns:
      [..., height, width], of the same dtype.

    Examples:
      >>> pw.grid_labels(np.array([[0, 0, 1, 1], [0, 0, 1, 1]]), 1, 2).tolist()
      [[0, 1]]
    """
    labels = as_array(labels)
    return (_compiled_at_centres if isinstance(labels, jax.Array) else _at_centres)(labels, height=height, width=width)


def _at_centres(labels: jax.Array, *, height: int, width: int) -> jax.Array:
    sizes = zip((height, width), labels.shape[-2:], strict=True)
    rows, cols = ((2 * np.arange(n) + 1) * size // (2 * n) for n, size in sizes)
    return labels[..., rows[:, None], cols[None, :]]


_compiled_at_centres = compiled(lambda labels, height, width: jax.P(*batch_spec(labels, 2)))(_at_centres)
