"""Cost of the pairwise likelihood against the number of offsets, for `pairwise.py`."""

import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import timing

from pwcrf_jax import likelihood
from pwcrf_jax.potentials import factored_pairwise
from pwcrf_jax.runtime import files

SWEEP_BOX = (7, 8)  # rows and columns either way


def sweep(size, counts, repeats, patience):
    """Loss and gradient of one relation from the first layer's outputs, K = 21: {rows, fits of seconds and bytes}."""
    num_classes, (rows, cols) = 21, (min(SWEEP_BOX[0], size.height - 1), min(SWEEP_BOX[1], size.width - 1))
    box = np.array([(r, c) for r in range(-rows, rows + 1) for c in range(-cols, cols + 1) if (r, c) != (0, 0)])
    # The corners come first: every subset reaches as far, so borders are of one width.
    corner = (np.abs(box) == (rows, cols)).all(-1)
    rest = np.random.default_rng(0).permutation(box[~corner])
    box = np.concatenate([box[corner], rest]).astype(np.int32)
    rng = np.random.default_rng(1)
    normal = lambda std, *shape: jnp.asarray(std * rng.standard_normal(shape, np.float32))
    grid, m, k = (size.batch, size.height, size.width), size.hidden, num_classes
    parts = normal(1, *grid, m).astype(size.dtype), normal(1, *grid, m).astype(size.dtype)
    parts = (*parts, normal(m**-0.5, m, k, k), normal(0.1, k, k))
    labels = jnp.asarray(rng.integers(0, k, grid), jnp.int32)
    turns, temp = {}, {}
    for n in counts:
        objective = lambda parts, labels, n=n: likelihood.pairwise_log_likelihood(
            factored_pairwise(*parts, box[:n]), labels
        )[0]
        compiled = jax.jit(jax.value_and_grad(objective)).lower(parts, labels).compile()
        temp[n] = compiled.memory_analysis().temp_size_in_bytes
        turns[n] = partial(timing.timed, compiled, parts, labels)
    seconds = timing.medians(turns, repeats, patience=patience)
    out = {
        "rows": [dict(offsets=n, seconds=seconds[n], temp_bytes=temp[n]) for n in counts],
        "seconds": line_fit(counts, [seconds[n] for n in counts]),
        "temp_bytes": line_fit(counts, [temp[n] for n in counts]),
    }
    print(f"\nours, loss, one relation, K = {k}: cost against the number of offsets")
    print(f"{'offsets':>14s}{'seconds':>12s}{'temp MB':>12s}")
    for row in out["rows"]:
        print(f"{row['offsets']:14d}{row['seconds']:12.4f}{row['temp_bytes'] / 1e6:12.1f}")
    fit = out["seconds"]
    print(f"seconds = {fit['intercept']:.4g} + {fit['slope']:.4g} offsets, R^2 = {fit['r_squared']:.4f}")
    print(f"temp: {out['temp_bytes']['slope'] / 1e6:.3f} MB more for each offset", flush=True)
    return out


def line_fit(x, y):
    x, y = np.asarray(x, float), np.asarray(y, float)
    slope, intercept = np.polyfit(x, y, 1)
    rest, spread = np.sum((y - intercept - slope * x) ** 2), np.sum((y - y.mean()) ** 2)
    return dict(slope=float(slope), intercept=float(intercept), r_squared=float(1 - rest / spread) if spread else 1.0)


def import_pyplot():
    try:
        import matplotlib
    except ImportError:
        sys.exit('matplotlib is not installed, and the plot needs it: pip install -e ".[bench]"')
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def plot(pyplot, swept, title, path):
    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    x = np.array([row["offsets"] for row in swept["rows"]])
    for panel, key, unit, label in zip(
        panels, ("seconds", "temp_bytes"), (1, 1e6), ("seconds", "temporaries, MB"), strict=True
    ):
        panel.plot(x, [row[key] / unit for row in swept["rows"]], "o")
        panel.set(xlabel="offsets", ylabel=label)
    fit = swept["seconds"]
    panels[0].plot(x, fit["intercept"] + fit["slope"] * x, label=f"line, $R^2$ = {fit['r_squared']:.4f}")
    panels[0].legend()
    for panel in panels:
        panel.set(xlim=0, ylim=0)
    figure.suptitle(title, fontsize="medium")
    with files.replacing(path) as file:
        figure.savefig(file, dpi=150, format="png")
    pyplot.close(figure)
