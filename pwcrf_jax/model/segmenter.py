"""The assembly: image -> nets -> potentials -> mean field -> labels of the full image."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from pwcrf_jax import mean_field
from pwcrf_jax.arrays import level
from pwcrf_jax.nets import FeatMapNet, PairwiseNet, RefinementConvs, UnaryNet, grid_size, scale_input
from pwcrf_jax.potentials import FactoredPairwise, factored_pairwise

PARAMETERISATIONS = ("free", "residual")
"""What the score of a pair of labels is made of; see `Segmenter`."""

PAIRWISE_FEATURES = ("shared", "own")
"""What Pairwise-Nets stand on; see `Segmenter`."""

# Stands for minus infinity while `read` interpolates; and less than any share of a cell that is not 0, of two axes.
_LOWEST, _LEAST_SHARE = -1e30, 1e-15


class Potentials(NamedTuple):
    """What the nets say of a batch.

    Attributes:
      unary: scores, float32 [B, h, w, K].
      pairwise: one `FactoredPairwise` a relation, by name.
      correction: of models with refinement convolutions: float32 [B, h', w', K] on a finer grid, for `sharpen`.
    """

    unary: jax.Array
    pairwise: dict[str, FactoredPairwise]
    correction: jax.Array | None = None


class Segmenter(nn.Module):
    """FeatMap-Net, one Unary-Net and one Pairwise-Net a relation.

    Call: images [B, H, W, 3], RGB 0..255, uint8 or float -> `Potentials` on the grid of FeatMap-Net.
    Parameters: `featmap`, `unary`, `pairwise_NAME` for each relation, `featmap_pairwise`, `refinement_convs`.

    Attributes:
      num_classes: K.
      featmap: attributes of `pwcrf_jax.nets.FeatMapNet`, a mapping or pairs of names and values.
      relations: {name: int [num_offsets, 2], (row, column) of q - p in cells}, a mapping or pairs; may be empty. The
        net of a relation knows the distances it was trained at and no others, so they are an attribute, the same on
        maps of any size: `pwcrf_jax.offsets` of a `pwcrf_jax.Relation`, once, on the grid of the training images.
        On a map smaller than an offset that offset makes no edge.
      parameterisation: of each relation by name, or one for all: "free" (the paper's: the net's scores alone) or
        "residual" (log-unaries of both ends, gradient stopped, plus a net whose last layer starts at zero).
      hidden: units of the first layer of Unary-Net and Pairwise-Net.
      input_scaling: of `pwcrf_jax.nets.scale_input`; belongs to the pretrained weights.
      pairwise_trains_features: of shared features; false stops the gradient of the pairwise terms at them, so that
        they can neither help nor harm the unary.
      refinement_width: of `pwcrf_jax.nets.RefinementConvs`, which there are if featmap names `middle` layers.
      dtype: computed in, float32 or bfloat16. Parameters, scores and every log-sum-exp are float32.
      pairwise_features: "shared", those of the unary, or "own": the Pairwise-Nets stand on a FeatMap-Net of their own,
        `featmap_pairwise`, one for all relations; the unary's terms do not reach it.

    Raises:
      ValueError: an unknown parameterisation, not one for each relation, two relations of one name, relations that are
        not offsets, or unknown pairwise_features.
    """

    num_classes: int
    featmap: Any
    relations: Any
    parameterisation: str | tuple[str, ...] = "residual"
    hidden: int = 512
    input_scaling: str = "tf"
    pairwise_trains_features: bool = True
    refinement_width: int = 32
    dtype: Any = jnp.float32
    pairwise_features: str = "shared"

    def __post_init__(self):
        options = self.featmap.items() if isinstance(self.featmap, Mapping) else self.featmap
        object.__setattr__(self, "featmap", tuple(sorted(options)))
        object.__setattr__(self, "relations", _explicit(self.relations))
        kinds = self.parameterisation
        kinds = (kinds,) * len(self.relations) if isinstance(kinds, str) else tuple(kinds)
        if len(kinds) != len(self.relations) or any(kind not in PARAMETERISATIONS for kind in kinds):
            raise ValueError(
                f"parameterisation must be one of {PARAMETERISATIONS}, for all or one for each of "
                f"{len(self.relations)} relations; got {self.parameterisation!r}"
            )
        object.__setattr__(self, "parameterisation", kinds)
        if self.pairwise_features not in PAIRWISE_FEATURES:
            raise ValueError(f"pairwise_features must be one of {PAIRWISE_FEATURES}, got {self.pairwise_features!r}")
        names = [name for name, _ in self.relations]
        if len(set(names)) != len(names):
            raise ValueError(f"relations must have different names, got {names}")
        super().__post_init__()

    @nn.compact
    def __call__(self, images: jax.Array) -> Potentials:
        scaled = scale_input(images, self.input_scaling, self.dtype)
        features = FeatMapNet(**dict(self.featmap), dtype=self.dtype, joined=False, name="featmap")(scaled)
        features, middle = features if isinstance(features, tuple) else (features, None)
        unary = UnaryNet(self.num_classes, hidden=self.hidden, dtype=self.dtype, name="unary")(features)
        unary_log_probs = jax.lax.stop_gradient(jax.nn.log_softmax(unary, axis=-1))
        if self.pairwise_features == "own" and self.relations:
            options = dict(self.featmap) | {"middle": ()}
            features = FeatMapNet(**options, dtype=self.dtype, joined=False, name="featmap_pairwise")(scaled)
        elif not self.pairwise_trains_features:
            features = jax.lax.stop_gradient(features)
        potentials = {}
        for (name, offsets), kind in zip(self.relations, self.parameterisation, strict=True):
            residual = kind == "residual"
            parts = PairwiseNet(
                self.num_classes,
                hidden=self.hidden,
                zero_last=residual,
                dtype=self.dtype,
                name=f"pairwise_{name}",
            )(features)
            potentials[name] = factored_pairwise(*parts, offsets, unary_log_probs if residual else None)
        correction = None
        if middle:
            convs = RefinementConvs(self.num_classes, self.refinement_width, self.dtype, name="refinement_convs")
            correction = convs(unary, middle)
        return Potentials(unary, potentials, correction)

    def grids(self, image_size: tuple[int, int]) -> list[tuple[int, int]]:
        """(h, w) in cells of each scale's map, in the order of the scales; image_size: (H, W) in pixels."""
        scales = dict(self.featmap).get("scales", FeatMapNet.scales)
        return [grid_size(image_size, (scale,)) for scale in scales]


def _explicit(relations) -> tuple[tuple[str, tuple[tuple[int, int], ...]], ...]:
    """Names and offsets of `Segmenter.relations` as plain tuples, so that a model is hashable."""
    out = []
    for item in relations.items() if isinstance(relations, Mapping) else relations:
        try:
            name, offsets = item
            box = np.asarray(offsets)
        except (TypeError, ValueError):
            name, box = None, np.zeros(0)
        if not (isinstance(name, str) and box.shape[1:] == (2,) and np.issubdtype(box.dtype, np.integer)):
            raise ValueError(
                f"expected relations {{name: int offsets [num_offsets, 2]}}, got {item!r}; make them once, on the grid "
                "of the training images: {r.name: pwcrf_jax.offsets(r, height, width)}"
            )
        out.append((name, tuple((int(row), int(col)) for row, col in box)))
    return tuple(out)


def infer(
    potentials: Potentials, settings: mean_field.Settings, *, node_mask: jax.Array | None = None
) -> tuple[jax.Array, mean_field.MeanFieldInfo]:
    """Mean field over the unary and the relations that the weights of the settings name.

    Args:
      potentials: of a `Segmenter`.
      settings: `pwcrf_jax.mean_field.Settings`; weights: float, by name of the relations whose messages count, or one
        for all relations.
      node_mask: bool [B, h, w]; false nodes (padding) neither send nor receive.

    Returns:
      (log_marginals float32 [B, h, w, K], MeanFieldInfo). Without relations: the log softmax of the unary.

    Raises:
      KeyError: a relation that the potentials do not have.
      ValueError: as `pwcrf_jax.mean_field.run`.
    """
    weights, chosen = settings.weights, potentials.pairwise
    if isinstance(weights, Mapping):
        chosen = {name: chosen[name] for name in weights}
    return mean_field.run(potentials.unary, chosen, settings, node_mask=node_mask)


def sharpen(log_marginals: jax.Array, correction: jax.Array | None, node_mask: jax.Array | None = None) -> jax.Array:
    """Log marginals of the grid on the finer grid of a correction, corrected.

    Args:
      log_marginals: float32 [B, h, w, K].
      correction: float32 [B, h', w', K], of `Potentials`, or None.
      node_mask: of `upsample`.

    Returns:
      float32 [B, h', w', K], not normalised. Without a correction: log_marginals as they are.
    """
    if correction is None:
        return log_marginals
    return upsample(log_marginals, *correction.shape[1:3], node_mask) + correction


def upsample(log_marginals: jax.Array, height: int, width: int, node_mask: jax.Array | None = None) -> jax.Array:
    """Bilinear upsampling of the score map to the image: `read` at all pixels.

    Args:
      log_marginals: float32 [..., h, w, K].
      height, width: size of the image in pixels; Python integers.
      node_mask: of `read`; None: all valid.

    Returns:
      float32 [..., height, width, K].
    """
    if node_mask is None:
        node_mask = jnp.ones(log_marginals.shape[-3:-1], bool)
    axes = zip((height, width), log_marginals.shape[-3:-1], strict=True)
    return read(log_marginals, node_mask, *(taps((np.arange(n) + 0.5) * (cells / n) - 0.5, cells) for n, cells in axes))


def taps(positions: np.ndarray, num_cells: int) -> tuple[np.ndarray, np.ndarray]:
    """What `read` takes of an axis.

    Args:
      positions: float [n], in cells; the centre of cell i is i.
      num_cells: of the map along this axis.

    Returns:
      (index int32 [n], fraction float32 [n]): between which cells a position lies, and where between them.
    """
    index = np.clip(np.floor(positions), -1, num_cells - 1)
    return (index + 1).astype(np.int32), (positions - index).astype(np.float32)


def read(log_marginals: jax.Array, node_mask: jax.Array, rows, cols) -> jax.Array:
    """Log marginals of cells, bilinearly interpolated at pixels; all labels of pixels are read by it.

    Args:
      log_marginals: float32 [..., h, w, K].
      node_mask: bool [..., h, w]; masked cells (padding) lend nothing to the pixels beside them: the weights of the
        others are scaled up, as at the border of the map.
      rows, cols: of `taps`, n and m positions.

    Returns:
      float32 [..., n, m, K]. Pixels that no valid cell reaches get zeros; a label that a cell rules out (-inf) is
      ruled out at all pixels that it reaches.
    """
    border = lambda x: jnp.pad(x, ((0, 0),) * (x.ndim - 3) + ((1, 1), (1, 1), (0, 0)))  # weights are 0 there

    def mix(x):
        for axis, (index, fraction), rest in ((-3, rows, (1, 2)), (-2, cols, (0, 2))):
            near, far = jnp.take(x, index, axis), jnp.take(x, index + 1, axis)
            near, far, fraction = level(near, far, jnp.expand_dims(fraction, rest))
            x = near * (1 - fraction) + far * fraction
        return x

    log_marginals, valid = level(log_marginals, node_mask[..., None])
    # Minus infinity times a share of 0 would be NaN. A select within `mix` would make programs round differently.
    finite = jnp.maximum(log_marginals, _LOWEST)
    weight = mix(border(valid.astype(jnp.float32)))
    out = mix(border(jnp.where(valid, finite, 0.0))) / jnp.maximum(weight, 1e-6)
    return jnp.where(out < _LOWEST * _LEAST_SHARE, -jnp.inf, out)


def grid_mask(valid_size: jax.Array, grid: tuple[int, int], image_size: tuple[int, int]) -> jax.Array:
    """Which cells lie on the image and not on its padding.

    Args:
      valid_size: int [B, 2], height and width in pixels of each image inside its padded frame.
      grid: (h, w) of the map; static.
      image_size: (height, width) of the frame in pixels; static.

    Returns:
      bool [B, h, w]: true where the cell's centre lies inside, and in the first row and column of any image that is not
      empty, however thin.
    """
    axes = []
    for axis, (n, size) in enumerate(zip(grid, image_size, strict=True)):
        valid = valid_size[:, axis, None]
        axes.append(((jnp.arange(n) + 0.5) * (size / n) < valid) | ((jnp.arange(n) == 0) & (valid > 0)))
    return axes[0][:, :, None] & axes[1][:, None, :]
