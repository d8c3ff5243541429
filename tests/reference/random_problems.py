"""Small random CRFs as plain NumPy float32 arrays."""

from typing import NamedTuple

import numpy as np


class GridProblem(NamedTuple):
    """unary, unary_log_probs [..., H, W, K]; hidden_p, hidden_q [..., H, W, M]; kernel [M, K, K]; bias [K, K];
    labels [..., H, W]."""

    unary: np.ndarray
    hidden_p: np.ndarray
    hidden_q: np.ndarray
    kernel: np.ndarray
    bias: np.ndarray
    unary_log_probs: np.ndarray
    labels: np.ndarray

    @property
    def parts(self):
        """The first four arguments of `factored_pairwise`."""
        return self.hidden_p, self.hidden_q, self.kernel, self.bias


def grid_problem(seed, height, width, classes=3, hidden=4, batch=(), scale=1.0):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    nodes = (*batch, height, width)
    unary = draw(*nodes, classes)
    unary_log_probs = draw(*nodes, classes)
    return GridProblem(
        unary=unary,
        hidden_p=draw(*nodes, hidden),
        hidden_q=draw(*nodes, hidden),
        kernel=np.float32(scale / np.sqrt(hidden)) * draw(hidden, classes, classes),
        bias=np.float32(scale) * draw(classes, classes),
        unary_log_probs=unary_log_probs - np.log(np.exp(unary_log_probs).sum(-1, keepdims=True)),
        labels=rng.integers(0, classes, nodes).astype(np.int32),
    )


class GraphProblem(NamedTuple):
    """unary, unary_log_probs [..., N, K]; scores [..., E, K, K]; p, q [E]; labels [..., N]."""

    unary: np.ndarray
    scores: np.ndarray
    p: np.ndarray
    q: np.ndarray
    unary_log_probs: np.ndarray
    labels: np.ndarray


def graph_problem(seed, nodes, edges, classes=3, batch=(), scale=1.0):
    """Any directed graph without loops; an edge may come twice, in one direction or in both."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    p = rng.integers(0, nodes, edges)
    q = (p + rng.integers(1, nodes, edges)) % nodes
    return GraphProblem(
        unary=draw(*batch, nodes, classes),
        scores=np.float32(scale) * draw(*batch, edges, classes, classes),
        p=p.astype(np.int32),
        q=q.astype(np.int32),
        unary_log_probs=draw(*batch, nodes, classes),
        labels=rng.integers(0, classes, (*batch, nodes)).astype(np.int32),
    )
