"""Gaussian filters and the dense CRF by loops: NumPy float64, one image, kernels as dense matrices."""

import numpy as np


def exact_kernel(features, mask=None):
    """K [N, N]: exp(-|f_i - f_j|^2 / 2), zero where either point is masked."""
    features = np.asarray(features, np.float64)
    valid = np.ones(len(features), bool) if mask is None else mask
    out = np.zeros((len(features),) * 2)
    for i, f in enumerate(features):
        for j, g in enumerate(features):
            if valid[i] and valid[j]:
                out[i, j] = np.exp(-((f - g) ** 2).sum() / 2)
    return out


def embed(features):
    """[N, d] -> [N, d + 1], on the hyperplane of zero sum, where the lattice's vertices have integer coordinates."""
    d = features.shape[1]
    basis = np.zeros((d + 1, d))
    for i in range(d):
        basis[: i + 1, i] = 1
        basis[i + 1, i] = -(i + 1)
    basis /= np.linalg.norm(basis, axis=0)
    return (d + 1) * np.sqrt(2 / 3) * np.asarray(features, np.float64) @ basis.T


def simplex(position):
    """The d + 1 vertices (tuples of integers) around a position and its barycentric weights."""
    size = len(position)
    base = size * np.round(position / size).astype(int)
    order = np.argsort(base - position, kind="stable")
    excess = base.sum() // size
    if excess > 0:
        base[order[-excess:]] -= size
    if excess < 0:
        base[order[:-excess]] += size
    order = np.argsort(base - position, kind="stable")
    corners = []
    for r in range(size):
        corner = base + r
        corner[order[size - r :]] -= size
        corners.append(tuple(corner.tolist()))
    equations = np.vstack([np.array(corners).T, np.ones(size)])
    weights = np.linalg.lstsq(equations, np.append(position, 1.0), rcond=None)[0]
    assert weights.min() > -1e-9, "the point is not in its simplex"
    return corners, weights


def splat(features, values, mask=None):
    """Values at the lattice's vertices, and for each point its vertices and weights (None where masked)."""
    table, points = {}, []
    for i, position in enumerate(embed(np.asarray(features))):
        points.append(None if mask is not None and not mask[i] else simplex(position))
        for vertex, weight in zip(*points[-1], strict=True) if points[-1] else ():
            table[vertex] = table.get(vertex, 0.0) + weight * values[i]
    return table, points


def lattice(features, values, mask=None):
    """The filter of values [N, C] on the permutohedral lattice, and the number of vertices."""
    values = np.asarray(values, np.float64)
    table, points = splat(features, values, mask)
    d = np.shape(features)[1]
    for direction in range(d + 1):
        step = [1 - (d + 1) * (k == direction) for k in range(d + 1)]
        ends = {v: [tuple(c + sign * s for c, s in zip(v, step, strict=True)) for sign in (-1, 1)] for v in table}
        table = {v: x + sum(table[e] for e in ends[v] if e in table) / 2 for v, x in table.items()}
    out = np.zeros_like(values)
    for i, point in enumerate(points):
        for vertex, weight in zip(*point, strict=True) if point else ():
            out[i] += weight * table[vertex]
    return out / (1 + 2.0**-d), len(table)


def lattice_kernel(features, mask=None):
    return lattice(features, np.eye(len(features)), mask)[0]


def spatial_kernel(height, width, sxy, mask=None):
    """K [H W, H W] of pixels, rows first."""
    sigma_x, sigma_y = np.broadcast_to(np.asarray(sxy, np.float64), 2)
    places = [(x / sigma_x, y / sigma_y) for y in range(height) for x in range(width)]
    return exact_kernel(np.array(places), None if mask is None else mask.ravel())


def features(image, sxy, srgb):
    """[H, W, 3] -> [H W, 5]."""
    sigma_x, sigma_y = np.broadcast_to(np.asarray(sxy, np.float64), 2)
    colours = np.broadcast_to(np.asarray(srgb, np.float64), 3)
    image = np.asarray(image, np.float64)
    height, width = image.shape[:2]
    return np.array([(x / sigma_x, y / sigma_y, *(image[y, x] / colours)) for y in range(height) for x in range(width)])


def normalized(kernel, normalization):
    n = kernel @ np.ones(len(kernel))
    n = np.where(n == 0, 1.0, n)
    after = {"symmetric": n**-0.5, "before": n**0, "after": 1 / n, "none": n**0}[normalization]
    before = {"symmetric": n**-0.5, "before": 1 / n, "after": n**0, "none": n**0}[normalization]
    return after[:, None] * kernel * before


def energies(compat, classes):
    """mu [K, K] of a Potts weight, energies label by label, or a matrix."""
    compat = np.asarray(compat, np.float64)
    if compat.ndim == 0:
        return -compat * np.eye(classes)
    return np.diag(compat) if compat.ndim == 1 else (compat + compat.T) / 2


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def refine(unary, image, params, num_iterations, mask=None, normalization="symmetric", appearance_kernel=exact_kernel):
    """Log marginals [H, W, K] and the largest change of a marginal in each iteration."""
    height, width, classes = np.shape(unary)
    log_p = np.asarray(unary, np.float64).reshape(-1, classes)
    valid = np.ones(len(log_p), bool) if mask is None else mask.ravel()
    kernels = []
    if params.smoothness_compat is not None:
        kernels.append((params.smoothness_compat, spatial_kernel(height, width, params.smoothness_sxy, mask)))
    if params.appearance_compat is not None:
        places = features(image, params.appearance_sxy, params.appearance_srgb)
        kernels.append((params.appearance_compat, appearance_kernel(places, valid)))
    kernels = [(energies(compat, classes), normalized(k, normalization)) for compat, k in kernels]
    scores, changes = log_p, []
    for _ in range(num_iterations):
        q = softmax(scores)
        scores = log_p.copy()
        for mu, kernel in kernels:
            for i in range(len(scores)):
                scores[i] -= mu @ (kernel[i] @ q)
        changes.append(np.abs(softmax(scores) - q)[valid].max())
    with np.errstate(divide="ignore"):
        return np.log(softmax(scores)).reshape(np.shape(unary)), np.array(changes)


def derivative(function, x, step=1e-5):
    """Central finite differences of a scalar function, shape of x."""
    x = np.asarray(x, np.float64)
    out = np.zeros(x.shape)
    for i in np.ndindex(x.shape):
        up, down = x.copy(), x.copy()
        up[i] += step
        down[i] -= step
        out[i] = (function(up) - function(down)) / (2 * step)
    return out
