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
from jax.typing import ArrayLike

from pwcrf_jax.arrays import as_array, batch_spec, compiled
from pwcrf_jax.labels import VOID, checked, split
from pwcrf_jax.likelihood import Sums


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
