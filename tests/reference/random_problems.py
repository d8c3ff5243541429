"""Small random CRFs as plain NumPy float32 arrays."""

from typing import NamedTuple

import numpy as np


class GridProblem(NamedTuple):
    """unary, evidence [..., H, W, K]; a, b [..., H, W, M]; w2 [M, K, K]; b2 [K, K]; labels [..., H, W]."""

    unary: np.ndarray
    a: np.ndarray
    b: np.ndarray
    w2: np.ndarray
    b2: np.ndarray
    evidence: np.ndarray
    labels: np.ndarray


def grid_problem(seed, height, width, classes=3, hidden=4, batch=(), scale=1.0):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    nodes = (*batch, height, width)
    unary = draw(*nodes, classes)
    evidence = draw(*nodes, classes)
    return GridProblem(
        unary=unary,
        a=draw(*nodes, hidden),
        b=draw(*nodes, hidden),
        w2=np.float32(scale / np.sqrt(hidden)) * draw(hidden, classes, classes),
        b2=np.float32(scale) * draw(classes, classes),
        evidence=evidence - np.log(np.exp(evidence).sum(-1, keepdims=True)),
        labels=rng.integers(0, classes, nodes).astype(np.int32),
    )


class GraphProblem(NamedTuple):
    """unary, evidence [..., N, K]; scores [..., E, K, K]; p, q [E]; labels [..., N]."""

    unary: np.ndarray
    scores: np.ndarray
    p: np.ndarray
    q: np.ndarray
    evidence: np.ndarray
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
        evidence=draw(*batch, nodes, classes),
        labels=rng.integers(0, classes, (*batch, nodes)).astype(np.int32),
    )
