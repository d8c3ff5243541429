"""The factored pairwise potential on a grid with its gradients, written out in float64.

Closed forms, offset by offset: no automatic differentiation and no compilation, so that random shapes stay cheap.
Every array has its batch axes, [..., H, W, ...]. `crf_oracle` has the same by loops over edges, without gradients.
"""

import numpy as np


def slices(offset, height, width):
    """Index pairs (rows and columns of p, those of q) of the edges of one offset; None if it leaves the map."""
    if any(abs(d) >= size for d, size in zip(offset, (height, width), strict=True)):
        return None
    at_p = tuple(slice(max(0, -d), size - max(0, d)) for d, size in zip(offset, (height, width), strict=True))
    at_q = tuple(slice(max(0, d), size - max(0, -d)) for d, size in zip(offset, (height, width), strict=True))
    return (..., *at_p, slice(None)), (..., *at_q, slice(None))


def _edges(a, b, kernel, bias, offsets):
    """(index of p, index of q, a_p + b_q, scores) of each offset that has edges."""
    for offset in offsets:
        index = slices(offset, *a.shape[-3:-1])
        if index is not None:
            before = a[index[0]] + b[index[1]]
            yield *index, before, np.einsum("...m,mkl->...kl", np.maximum(before, 0), kernel) + bias


def _backward(gradients, p, q, before, d_scores, kernel):
    """Adds the gradient that the scores of one offset pass on to a, b, kernel and bias."""
    axes = tuple(range(before.ndim - 1))
    d_before = np.einsum("...kl,mkl->...m", d_scores, kernel) * (before > 0)
    gradients["hidden_p"][p] += d_before
    gradients["hidden_q"][q] += d_before
    gradients["kernel"] += np.tensordot(np.maximum(before, 0), d_scores, axes=(axes, axes))
    gradients["bias"] += d_scores.sum(axes)


def _double(arrays):
    return {name: None if x is None else np.asarray(x, np.float64) for name, x in arrays.items()}


def log_likelihood(parts, offsets, labels, mask, weights, only=None):
    """(sum, count, gradients of the sum) of log P_V over the edges.

    Args:
      parts: dict of a, b [..., H, W, M], kernel [M, K, K], bias [K, K], unary_log_probs [..., H, W, K] or None.
      labels: int [..., H, W]; anything where mask is false.
      mask, weights: bool and float [..., H, W]; an edge weighs w_p w_q, and 0 if an end is masked.
      only: the offsets of the sum, else all; the count is that of all.

    Returns:
      gradients: dict of the parts and "weights"; None where a part is None.
    """
    parts = _double(parts)
    unary_log_probs, kernel = parts["unary_log_probs"], parts["kernel"]
    weights = np.where(mask, np.asarray(weights, np.float64), 0)[..., None]
    picked = np.eye(len(parts["bias"]))[np.where(mask, labels, 0)]
    gradients = {name: None if x is None else np.zeros_like(x) for name, x in parts.items()}
    gradients["weights"] = np.zeros_like(weights)
    layers = parts["hidden_p"], parts["hidden_q"], kernel, parts["bias"]
    total = 0.0
    for p, q, before, scores in _edges(*layers, offsets if only is None else only):
        if unary_log_probs is not None:
            scores = scores + unary_log_probs[p][..., :, None] + unary_log_probs[q][..., None, :]
        target = picked[p][..., :, None] * picked[q][..., None, :]
        highest = scores.max((-2, -1), keepdims=True)
        norm = np.exp(scores - highest).sum((-2, -1), keepdims=True)
        log_prob = scores - highest - np.log(norm)
        value = (target * log_prob).sum((-2, -1))[..., None]
        total += (weights[p] * weights[q] * value).sum()
        gradients["weights"][p] += weights[q] * value
        gradients["weights"][q] += weights[p] * value
        d_scores = (weights[p] * weights[q])[..., None] * (target - np.exp(log_prob))
        _backward(gradients, p, q, before, d_scores, kernel)
        if unary_log_probs is not None:
            gradients["unary_log_probs"][p] += d_scores.sum(-1)
            gradients["unary_log_probs"][q] += d_scores.sum(-2)
    gradients["weights"] = gradients["weights"][..., 0] * mask
    pairs = [slices(offset, *parts["hidden_p"].shape[-3:-1]) for offset in offsets]
    return total, sum((weights[p] * weights[q]).sum() for p, q in filter(None, pairs)), gradients


def messages(parts, offsets, marginals, mask, probe):
    """(message, count, gradients of sum(probe * message)); mask bool [..., H, W], marginals and probe [..., H, W, K].

    Returns:
      gradients: dict of a, b, kernel, bias and "marginals".
    """
    parts = _double({name: parts[name] for name in ("hidden_p", "hidden_q", "kernel", "bias")})
    mask = np.asarray(mask, np.float64)[..., None]
    sent, heard = np.asarray(marginals, np.float64) * mask, np.asarray(probe, np.float64) * mask
    message, count = np.zeros_like(sent), np.zeros_like(mask)
    gradients = {name: np.zeros_like(x) for name, x in (parts | {"marginals": sent}).items()}
    for p, q, before, scores in _edges(*parts.values(), offsets):
        message[p] += np.einsum("...kl,...l->...k", scores, sent[q])
        message[q] += np.einsum("...kl,...k->...l", scores, sent[p])
        count[p] += mask[q]
        count[q] += mask[p]
        gradients["marginals"][q] += np.einsum("...kl,...k->...l", scores, heard[p])
        gradients["marginals"][p] += np.einsum("...kl,...l->...k", scores, heard[q])
        d_scores = heard[p][..., :, None] * sent[q][..., None, :] + sent[p][..., :, None] * heard[q][..., None, :]
        _backward(gradients, p, q, before, d_scores, parts["kernel"])
    gradients["marginals"] *= mask
    return message * mask, (count * mask)[..., 0], gradients
