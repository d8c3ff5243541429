"""Confusion counts and figures by loops over pixels and classes."""

import numpy as np


def confusion(predictions, labels, classes, void=255):
    out = [[0] * classes for _ in range(classes)]
    for p, t in zip(np.ravel(predictions).tolist(), np.ravel(labels).tolist(), strict=True):
        if t != void:
            out[t][p] += 1
    return np.array(out)


def figures(predictions, labels, classes, void=255):
    """dict of the figures, from sets of pixels rather than from a matrix."""
    seen = [(p, t) for p, t in zip(np.ravel(predictions), np.ravel(labels), strict=True) if t != void]
    iou, accuracy, weighted = [], [], 0.0
    for k in range(classes):
        true = {i for i, (_, t) in enumerate(seen) if t == k}
        given = {i for i, (p, _) in enumerate(seen) if p == k}
        iou.append(len(true & given) / len(true | given) if true | given else float("nan"))
        accuracy.append(len(true & given) / len(true) if true else float("nan"))
        weighted += len(true) * iou[-1] if true else 0.0
    mean = lambda xs: float(np.mean([x for x in xs if x == x])) if any(x == x for x in xs) else float("nan")
    total = len(seen)
    return dict(
        mean_iou=mean(iou),
        pixel_accuracy=sum(p == t for p, t in seen) / total if total else float("nan"),
        mean_accuracy=mean(accuracy),
        frequency_weighted_iou=weighted / total if total else float("nan"),
        iou_per_class=np.array(iou),
        accuracy_per_class=np.array(accuracy),
    )


def boundary_band(labels, width, mask=None):
    """Pixels with another label within `width` rows and columns, by loops."""
    height, wide = labels.shape
    mask = np.ones(labels.shape, bool) if mask is None else mask
    out = np.zeros(labels.shape, bool)
    for y in range(height):
        for x in range(wide):
            window = np.s_[max(y - width, 0) : y + width + 1, max(x - width, 0) : x + width + 1]
            out[y, x] = mask[y, x] and np.any((labels[window] != labels[y, x]) & mask[window])
    return out
