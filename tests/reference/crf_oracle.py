"""A CRF by enumeration, its piecewise likelihood and mean field, by loops over nodes and edges, in float64.

A graph is unary scores [N, K] and a list of `Edge`. Grids are flattened row-major. No batch axes.
"""

import itertools
from fractions import Fraction
from typing import NamedTuple

import numpy as np


class Edge(NamedTuple):
    """One factor: nodes p and q, scores [K, K] (label of p, label of q)."""

    p: int
    q: int
    scores: np.ndarray


def log_sum_exp(x):
    x = np.asarray(x, np.float64)
    top = x.max()
    return top + np.log(np.exp(x - top).sum())


def log_softmax(x):
    x = np.asarray(x, np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


# --- edges -----------------------------------------------------------------------------------------


def box_axis(low, high, unit, short_side, size, grid=None):
    """Offsets of one axis of a range box, by trying every integer; bounds are read as exact decimals."""
    low, high = Fraction(str(low)), Fraction(str(high))
    if unit == "short_side":
        inside = lambda d: (
            (d >= min(low * short_side, -1) if low < 0 else d >= low * short_side)
            and (d <= max(high * short_side, 1) if high > 0 else d <= high * short_side)
            and not (d == 0 and (low == 0) != (high == 0))
        )
    else:
        inside = lambda d: low <= d <= high
    reach = 2 + int(max(abs(low), abs(high)) * (short_side if unit == "short_side" else 1))
    values = [d for d in range(-reach, reach + 1) if inside(d)]
    if grid is not None and values:
        span = Fraction(values[-1] - values[0], grid - 1)
        values = sorted({round(values[0] + i * span) for i in range(grid)})
    return [d for d in values if -size < d < size]


def box_edges(rows, cols, unit, height, width, grid=None):
    """Set of ((row, column) of p, (row, column) of q), by a loop over all pairs of nodes."""
    short_side = min(height, width)
    row_offsets = box_axis(*rows, unit, short_side, height, grid)
    col_offsets = box_axis(*cols, unit, short_side, width, grid)
    nodes = list(itertools.product(range(height), range(width)))
    return {
        (p, q) for p in nodes for q in nodes if p != q and q[0] - p[0] in row_offsets and q[1] - p[1] in col_offsets
    }


def grid_edges(a, b, kernel, bias, offsets):
    """All edges of a factored potential on a grid: z_pq = bias + sum_m max(a_p + b_q, 0)_m w2_m."""
    a, b, kernel, bias = (np.asarray(x, np.float64) for x in (a, b, kernel, bias))
    height, width = a.shape[:2]
    edges = []
    for dr, dc in offsets:
        for r, c in itertools.product(range(height), range(width)):
            if 0 <= r + dr < height and 0 <= c + dc < width:
                hidden = np.maximum(a[r, c] + b[r + dr, c + dc], 0)
                scores = bias + np.tensordot(hidden, kernel, axes=1)
                edges.append(Edge(r * width + c, (r + dr) * width + c + dc, scores))
    return edges


def table_edges(scores, p, q):
    return [Edge(int(i), int(j), np.asarray(s, np.float64)) for s, i, j in zip(scores, p, q, strict=True)]


def with_unary(edges, unary_log_probs):
    """Adds evidence_p[k] + evidence_q[l] to the scores of each edge; unary_log_probs [N, K]."""
    e = np.asarray(unary_log_probs, np.float64)
    return [Edge(p, q, s + e[p][:, None] + e[q][None, :]) for p, q, s in edges]


# --- the exact model, by enumeration ---------------------------------------------------------------


def log_score(labels, unary, edges):
    """-E(y): the sum of all scores of one labelling; labels [N]."""
    return sum(float(unary[i][y]) for i, y in enumerate(labels)) + sum(
        float(s[labels[p], labels[q]]) for p, q, s in edges
    )


def labellings(unary, edges):
    """Every labelling and its log score."""
    nodes, classes = np.shape(unary)
    ys = list(itertools.product(range(classes), repeat=nodes))
    return ys, np.array([log_score(y, unary, edges) for y in ys])


def log_partition(unary, edges):
    return log_sum_exp(labellings(unary, edges)[1])


def marginals(unary, edges):
    ys, value = labellings(unary, edges)
    probability = np.exp(value - log_sum_exp(value))
    out = np.zeros(np.shape(unary))
    for y, weight in zip(ys, probability, strict=True):
        for i, label in enumerate(y):
            out[i, label] += weight
    return out


def exact_log_likelihood(labels, unary, edges):
    return log_score(labels, unary, edges) - log_partition(unary, edges)


# --- piecewise -------------------------------------------------------------------------------------


def unary_log_likelihood(scores, labels, weights=None, void=255):
    """(sum, count) over nodes; scores [N, K]."""
    total = count = 0.0
    for i, y in enumerate(labels):
        if y != void:
            weight = 1.0 if weights is None else float(weights[i])
            total += weight * (float(scores[i][y]) - log_sum_exp(scores[i]))
            count += weight
    return total, count


def pairwise_log_likelihood(edges, labels, weights=None, void=255):
    """(sum, count) over edges whose two ends are not void."""
    total = count = 0.0
    for p, q, s in edges:
        if labels[p] != void and labels[q] != void:
            weight = 1.0 if weights is None else float(weights[p]) * float(weights[q])
            total += weight * (s[labels[p], labels[q]] - log_sum_exp(s))
            count += weight
    return total, count


def balance_weights(labels, classes, void=255, power=1.0):
    """One image; labels [H, W]."""
    labels = np.asarray(labels)
    valid = labels != void
    weights = np.zeros(labels.shape)
    for i in np.ndindex(labels.shape):
        if valid[i]:
            weights[i] = ((labels == labels[i]).sum() / valid.sum()) ** -power
    return weights * valid.sum() / weights.sum() if valid.any() else weights


# --- mean field ------------------------------------------------------------------------------------


def messages(edges, marginals, mask=None):
    """(message [N, K], count [N]) of every edge in both directions; masked nodes neither send nor receive."""
    q_of = np.asarray(marginals, np.float64)
    message, count = np.zeros(q_of.shape), np.zeros(len(q_of))
    for p, q, s in edges:
        if mask is not None and not (mask[p] and mask[q]):
            continue
        message[p] += s @ q_of[q]  # over the labels of q
        message[q] += q_of[p] @ s  # over the labels of p
        count[p] += 1
        count[q] += 1
    return message, count


def mean_field_step(log_q, unary, relations, weights=None, damping=0.0, normalize=False, mask=None):
    """relations: a list of edge lists. Returns (new log marginals, largest change of a marginal)."""
    old = np.asarray(log_q, np.float64)
    total = np.array(unary, np.float64)
    for r, edges in enumerate(relations):
        message, count = messages(edges, np.exp(old), mask)
        for i in range(len(total)):
            share = 1.0 / count[i] if normalize and count[i] else 1.0
            total[i] += (1.0 if weights is None else float(weights[r])) * share * message[i]
    new = log_softmax((1 - damping) * log_softmax(total) + damping * old)
    seen = [i for i in range(len(total)) if mask is None or mask[i]]
    change = max((np.abs(np.exp(new[i]) - np.exp(old[i])).max() for i in seen), default=0.0)
    return new, change


def mean_field(unary, relations, iterations, **settings):
    """Returns (log marginals, [change per iteration])."""
    log_q, changes = log_softmax(unary), []
    for _ in range(iterations):
        log_q, change = mean_field_step(log_q, unary, relations, **settings)
        changes.append(change)
    return log_q, changes


def free_energy(log_q, unary, edges):
    """F(Q) = E_Q[E(y)] - H(Q) of the fully factorised Q; never below -log Z."""
    q = np.exp(np.asarray(log_q, np.float64))
    energy = -(q * np.asarray(unary, np.float64)).sum()
    for i, j, s in edges:
        energy -= q[i] @ s @ q[j]
    return energy + (q * log_q).sum()


# --- finite differences ----------------------------------------------------------------------------


def numerical_gradient(function, x, step=1e-6):
    """Central differences of a scalar function of one array, in float64."""
    x = np.array(x, np.float64)
    grad = np.zeros_like(x)
    for i in np.ndindex(x.shape):
        here = x[i]
        x[i] = here + step
        above = function(x)
        x[i] = here - step
        below = function(x)
        x[i] = here
        grad[i] = (above - below) / (2 * step)
    return grad


# --- label smoothing and Dice ------------------------------------------------------------------------


def smoothed_cross_entropy(scores, labels, smoothing, weights=None, void=255):
    """(sum, count) of -sum_k t_k log P(k) over nodes, t = (1 - smoothing) one-hot + smoothing / K."""
    total = count = 0.0
    for i, (z, y) in enumerate(zip(scores, labels, strict=True)):
        if y == void:
            continue
        weight = 1.0 if weights is None else float(weights[i])
        target = np.full(len(z), smoothing / len(z))
        target[y] += 1 - smoothing
        total -= weight * float(target @ log_softmax(z))
        count += weight
    return total, count


def dice(scores, labels, void=255):
    """[Dice of each class that one image shows]; scores [N, K], labels [N]."""
    probs, found = np.exp(log_softmax(scores)), []
    for k in range(probs.shape[1]):
        both = predicted = true = 0.0
        for p, y in zip(probs[:, k], labels, strict=True):
            if y != void:
                both, predicted, true = both + p * (y == k), predicted + p, true + (y == k)
        found += [2 * both / (predicted + true)] if true else []
    return found
