"""Calibration of mean field by the likelihood of held-out labels: `pwcrf tune --method nll`.

    NLL(T, w, a, b) = - mean_i log Q_i(y_i),     Q: mean field of z / T and the scores w_r a_r[k] b_r[l] z_pq[k, l]

over the cells of a split that have a label, without class weights. The nets are frozen: what they say of the images is
computed once and kept in memory. The gradient goes through all iterations of `pwcrf_jax.mean_field`. L-BFGS takes the
steps: each value, with its gradient, is a pass over the split.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize

from pwcrf_jax import config as configs
from pwcrf_jax import piecewise
from pwcrf_jax.evaluation import evaluate
from pwcrf_jax.labels import VOID
from pwcrf_jax.model import decode
from pwcrf_jax.model.segmenter import Potentials, potentials_of
from pwcrf_jax.potentials import factored_pairwise
from pwcrf_jax.runtime import parallel
from pwcrf_jax.runtime.logs import bar, log

METHODS = ("nll", "nll_labels")
"""What is sought: the temperature and a weight of each relation; also weights of the labels of each relation."""

CACHE_BYTES = 4 * 2**30
"""Memory for what the nets say of a split. Hidden units that would take more in float32 are kept in float16."""

RIDGE = 1e-3
"""Times the sum of the squared logarithms of labels' weights, in nats: few cells of a split show a rare label."""

TOLERANCE = 1e-5  # nats; a search ends where a step gained less
PASSES = 60  # of a search, at most
SUBSET = 4  # of so many batches one is taken to come near, where there are at least twice as many

Batch = dict[str, Any]
"""unary, parts {relation: (hidden_p, hidden_q)}, labels of cells and valid_box, an axis of devices first."""


class Values(NamedTuple):
    """What is sought, as it is sought; float32.

    Attributes:
      log_temperature: scalar, log T.
      weights: [R], w of the relations in the order of the config.
      log_labels: [R, 2, K], log a and log b; [0, 2, K] where they are not sought.
    """

    log_temperature: Any
    weights: Any
    log_labels: Any


LARGEST = Values(np.log(100.0), 1000.0, np.log(1000.0))
"""Sizes of values that are tried. Where the unary says nothing, no temperature is too high."""


class Calibration(NamedTuple):
    """What was found: {dotted key: value} as JSON; and the NLL, in nats a cell.

    Attributes:
      config: the values of the keys, rounded to five digits.
      nll_unary: of the unary alone, at temperature 1.
      nll_before: as configured.
      nll_after: with what was found.
    """

    config: dict[str, Any]
    nll_unary: float
    nll_before: float
    nll_after: float


def calibrate(config, model, params, dataset, split: str, method: str) -> Calibration:
    """The values of least NLL on a split, with the config's number of iterations; begins at the config's values.

    method: of `METHODS`.

    Raises:
      ConfigError: "nll_labels" without relations or iterations; a split that does not fit into `CACHE_BYTES`, or that
        has no label.
    """
    names = configs.crf_relations(config)
    labels = method == "nll_labels"
    if labels and not (names and config.crf.num_iterations):
        raise configs.ConfigError(
            "--method=nll_labels weighs messages, and without relations (config.crf.relations) or iterations "
            "(config.crf.num_iterations) there are none; take --method=nll"
        )
    batches, unary = _outputs(config, model, params, dataset, split)
    layers = {name: tuple(params[f"pairwise_{name}"][key] for key in ("last_kernel", "last_bias")) for name in names}
    fn = parallel.pmap_eval(make_step(config, model))

    def mean(values: Values, some: list[Batch]) -> tuple[float, Values]:
        """(NLL, its gradient) of some batches."""
        sums = [jax.tree.map(_double, fn((values, layers), batch)) for batch in bar(some, "NLL")]
        nll, count, gradient = (jax.tree.map(lambda *x: sum(x), *of_batches) for of_batches in zip(*sums, strict=True))
        return float(nll / count), jax.tree.map(lambda x: x / count, gradient)

    start = configured(config, model.num_classes, labels=labels)
    before, _ = mean(start, batches)
    log.info("NLL %.4f, of the unary alone %.4f", before, unary)
    found = _flat(start)
    largest = _flat(Values(*(np.full(np.shape(x), limit) for x, limit in zip(start, LARGEST, strict=True))))
    for some in [batches[::SUBSET]] * (len(batches) >= 2 * SUBSET) + [batches]:
        found, after = minimise(_Objective(mean, start, some, names), found, largest)
    values = _shaped(found, start)
    after -= _penalty(values)
    if not after <= before:  # a part of the batches led astray
        values, after = start, before
    return Calibration(as_config(values), unary, before, after)


def make_step(config, model) -> Callable:
    """Builds step((`Values`, {relation: (kernel, bias)}), `Batch` of a device) -> (NLL, cells, its gradient), sums."""
    size, settings = tuple(config.data.eval_size), configs.crf_settings(config)
    names, boxes = configs.crf_relations(config), dict(model.relations)

    def total(values, layers, batch):
        weights = dict(zip(names, values.weights, strict=True))
        if len(values.log_labels):
            of_pairs = jnp.exp(values.log_labels[:, 0, :, None] + values.log_labels[:, 1, None, :])
            weights = {name: w * pairs for (name, w), pairs in zip(weights.items(), of_pairs, strict=True)}
        else:
            weights = configs.message_weights(config, weights)
        temperature = jnp.exp(values.log_temperature)
        now = dataclasses.replace(settings, weights=weights, unary_temperature=temperature)
        parts = {name: [x.astype(model.dtype) for x in batch["parts"][name]] for name in names}
        pairwise = {name: factored_pairwise(*parts[name], *layers[name], boxes[name]) for name in names}
        decoded = decode.decode(Potentials(batch["unary"], pairwise), batch["valid_box"], size, now)
        labels = jnp.where(decoded.mask, batch["labels"], VOID)
        likelihood, count = piecewise.unary_log_likelihood(decoded.log_marginals, labels)
        return -likelihood, count

    def step(state, batch):
        (nll, count), gradient = jax.value_and_grad(total, has_aux=True)(*state, batch)
        return jax.lax.psum((nll, count, gradient), parallel.AXIS)

    return step


def _outputs(config, model, params, dataset, split) -> tuple[list[Batch], float]:
    """What the nets say of a split, and the NLL of the unary alone."""
    names, grid = configs.crf_relations(config), configs.grid(config, config.data.eval_size)
    dtype = _kept_dtype(config, model, len(dataset.source(split)), split)

    def step(params, batch):
        potentials = potentials_of(model, params, batch)
        labels = piecewise.grid_labels(batch["label"], *grid)
        pairs = {name: potentials.pairwise[name] for name in names}
        parts = {name: (x.hidden_p.astype(dtype), x.hidden_q.astype(dtype)) for name, x in pairs.items()}
        sums = jax.lax.psum(piecewise.unary_log_likelihood(potentials.unary, labels), parallel.AXIS)
        return sums, dict(unary=potentials.unary, parts=parts, labels=labels, valid_box=batch["valid_box"])

    fn, kept, total, count = parallel.pmap_eval(step, per_image=True), [], 0.0, 0.0
    for batch in bar(evaluate.batches_of(config, dataset, split), "nets"):
        sums, outputs = fn(params, evaluate.inputs_of(batch))
        total, count = total - float(sums[0]), count + float(sums[1])
        kept.append(jax.tree.map(np.asarray, outputs))
    if not count:
        raise configs.ConfigError(evaluate.nothing_scored(split, config))
    return kept, total / count


def _kept_dtype(config, model, num_images: int, split: str) -> Any:
    """The dtype that hidden units are kept in: that of the nets, or where they are too many float16."""
    height, width = configs.grid(config, config.data.eval_size)
    cells = -(-num_images // config.eval.batch_size) * config.eval.batch_size * height * width
    hidden = 2 * model.hidden * len(configs.crf_relations(config))
    size = lambda dtype: cells * (4 * model.num_classes + hidden * jnp.dtype(dtype).itemsize)
    for dtype in (model.dtype, jnp.float16):
        if size(dtype) <= CACHE_BYTES:
            log.info("keeping what the nets say of %d images: %.2f GB", num_images, size(dtype) / 1e9)
            return dtype
    fit = max(1, num_images * CACHE_BYTES // size(jnp.float16))
    raise configs.ConfigError(
        f"--split={split}: to keep what the nets say of {num_images} images takes {size(jnp.float16) / 1e9:.1f} GB, "
        f"and {CACHE_BYTES / 1e9:.1f} may be used; name fewer, such as {split.partition('[')[0]}[:{fit}]"
    )


def configured(config, num_classes: int, *, labels: bool) -> Values:
    """`Values` of a config, to begin at; labels: whether weights of labels are among them."""
    weights = np.array([*configs.relation_weights(config).values()], np.float32)
    given = np.array(config.crf.label_weights or np.ones((len(weights), 2, num_classes)), np.float32)
    log_labels = np.log(np.maximum(given, 1e-3))  # none is found that begins at minus infinity
    none = np.zeros((0, 2, num_classes), np.float32)
    return Values(np.log(np.float32(config.crf.unary_temperature)), weights, log_labels if labels else none)


def as_config(values: Values) -> dict[str, Any]:
    """{dotted key: value} of `Values`, rounded to five digits."""
    rounded = lambda x: np.vectorize(lambda number: float(f"{number:.5g}"), otypes=[float])(x).tolist()
    out = {"crf.unary_temperature": rounded(np.exp(values.log_temperature))}
    out |= {"crf.weights": rounded(values.weights)} if len(values.weights) else {}
    return out | ({"crf.label_weights": rounded(np.exp(values.log_labels))} if len(values.log_labels) else {})


def _double(x: Any) -> np.ndarray:
    return np.asarray(x, np.float64)


def _flat(values: Values) -> np.ndarray:
    return np.concatenate([_double(x).ravel() for x in values])


def _shaped(x: np.ndarray, like: Values) -> Values:
    ends = np.cumsum([np.size(part) for part in like])[:-1]
    parts = zip(np.split(x.astype(np.float32), ends), like, strict=True)
    return Values(*(part.reshape(np.shape(of)) for part, of in parts))


def _penalty(values: Values) -> float:
    return RIDGE * float(np.sum(np.square(_double(values.log_labels))))


@dataclasses.dataclass(frozen=True)
class _Objective:
    """x -> (NLL and penalty, gradient), float64, of `Values` laid out in one array; says what it was asked."""

    mean: Callable[[Values, list[Batch]], tuple[float, Values]]
    like: Values
    batches: list[Batch]
    names: tuple[str, ...]

    def __call__(self, x: np.ndarray) -> tuple[float, np.ndarray]:
        values = _shaped(x, self.like)
        nll, gradient = self.mean(values, self.batches)
        weights = "".join(f", {name} {w:.4g}" for name, w in zip(self.names, values.weights, strict=True))
        log.info("%d batches: NLL %.5f at temperature %.4g%s", len(self.batches), nll, np.exp(values.log_temperature),
                 weights)  # fmt: skip
        gradient = gradient._replace(log_labels=gradient.log_labels + 2 * RIDGE * _double(values.log_labels))
        return nll + _penalty(values), _flat(gradient)


def minimise(
    function: Callable[[np.ndarray], tuple[float, np.ndarray]], x: np.ndarray, largest: np.ndarray
) -> tuple[np.ndarray, float]:
    """A local minimum by L-BFGS-B (Byrd, Lu, Nocedal and Zhu, 1995), of SciPy.

    Args:
      function: x -> (value, gradient), float64 [n]; called about `PASSES` times at most.
      x: float64 [n], to begin at.
      largest: float64 [n], of the sizes of x that are tried.

    Returns:
      (x, value): no value lies above that of the first x.
    """
    options = {"maxfun": PASSES, "ftol": TOLERANCE, "gtol": 0.0}
    found = scipy.optimize.minimize(
        function, x, jac=True, method="L-BFGS-B", bounds=[*zip(-largest, largest, strict=True)], options=options
    )
    return found.x, float(found.fun)
