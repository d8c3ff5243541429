"""The assembly: image -> nets -> potentials, which `pwcrf_jax.model.decode` turns into labels."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from pwcrf_jax.nets import FeatMapNet, PairwiseNet, RefinementConvs, UnaryNet, drop_channels, grid_size, scale_input
from pwcrf_jax.potentials import FactoredPairwise, factored_pairwise

PARAMETERISATIONS = ("free", "residual")
"""Forms of the score of a pair of labels; see `Segmenter`."""

PAIRWISE_FEATURES = ("shared", "own")
"""Features of Pairwise-Nets; see `Segmenter`."""

UNARIES = ("net", "scores")
"""Where the unary's scores come from; see `Segmenter`."""


class Potentials(NamedTuple):
    """The scores that the nets give a batch.

    Attributes:
      unary: scores, float32 [B, h, w, K].
      pairwise: one `FactoredPairwise` a relation, by name.
      refinement_logits: of models with refinement convolutions, float32 [B, h', w', K] on their finer grid: added to
        log marginals by `pwcrf_jax.model.decode.apply_refinement`.
      fine_unary: of scores that were given on a finer grid, these, float32 [B, n h, n w, K]; see
        `pwcrf_jax.model.decode.with_fine_unary`.
    """

    unary: jax.Array
    pairwise: dict[str, FactoredPairwise]
    refinement_logits: jax.Array | None = None
    fine_unary: jax.Array | None = None


def potentials_of(model: Any, params: Any, batch: Mapping[str, jax.Array], **options: Any) -> Potentials:
    """The potentials of a batch: of its images and, where they are given, its scores.

    Args:
      model: a `Segmenter`.
      params: its parameters, a tree of float32 arrays.
      batch: image [B, H, W, 3] and, for a model with unary "scores", scores float32 [B, n h, n w, K].
      options: of the model's call.

    Returns:
      `Potentials`.
    """
    given = (batch["scores"],) if "scores" in batch else ()
    return model.apply({"params": params}, batch["image"], *given, **options)


class Segmenter(nn.Module):
    """FeatMap-Net, one Unary-Net and one Pairwise-Net a relation.

    Call: images [B, H, W, 3], RGB 0..255, uint8 or float -> `Potentials` on the grid of FeatMap-Net. In training with
    dropout_keys, a JAX random key for each image, [B], and dropped, the kinds of heads whose features are dropped.
    With unary "scores" also scores, log-probabilities float32 [B, n h, n w, K] on n times the grid's cells a side;
    None: uniform ones, for the sake of shapes. Parameters: `featmap`, `unary`, `pairwise_NAME` for each relation,
    `featmap_pairwise`, `refinement_convs`.

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
      refinement_width: of `pwcrf_jax.nets.RefinementConvs`, which there are if featmap names `skip_layers`.
      dtype: computed in, float32 or bfloat16. Parameters, scores and every log-sum-exp are float32.
      pairwise_features: "shared", those of the unary, or "own": the Pairwise-Nets stand on a FeatMap-Net of their own,
        `featmap_pairwise`, one for all relations; the unary's terms do not reach it.
      dropout: share of the features that heads do without in training (`pwcrf_jax.nets.drop_channels`), 0 <= x < 1.
      unary: "net", or "scores": there is no Unary-Net, the unary is the scores given with the images, averaged over
        each cell, and the Pairwise-Nets see these averages, as probabilities, beside the features.

    Raises:
      ValueError: an unknown parameterisation, not one for each relation, two relations of one name, relations that are
        not offsets, unknown pairwise_features or unary, a dropout out of its range, or scores of another shape.
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
    dropout: float = 0.0
    unary: str = "net"

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
        if self.unary not in UNARIES:
            raise ValueError(f"unary must be one of {UNARIES}, got {self.unary!r}")
        names = [name for name, _ in self.relations]
        if len(set(names)) != len(names):
            raise ValueError(f"relations must have different names, got {names}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"expected a dropout of at least 0 and below 1, got {self.dropout}")
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        images: jax.Array,
        scores: jax.Array | None = None,
        *,
        dropout_keys: jax.Array | None = None,
        dropped: Sequence[str] = ("unary", "pairwise"),
    ) -> Potentials:
        drop = lambda kind, maps: drop_channels(maps, dropout_keys, self.dropout if kind in dropped else 0.0)
        scaled = scale_input(images, self.input_scaling, self.dtype)
        features = FeatMapNet(**dict(self.featmap), dtype=self.dtype, joined=False, name="featmap")(scaled)
        features, skipped = features if isinstance(features, tuple) else (features, None)
        fine_unary = None
        if self.unary == "scores":
            unary, fine_unary = self._given(scores, images)
        else:
            head = UnaryNet(self.num_classes, hidden=self.hidden, dtype=self.dtype, name="unary")
            unary = head(drop("unary", features))
        unary_log_probs = jax.lax.stop_gradient(jax.nn.log_softmax(unary, axis=-1))
        if self.pairwise_features == "own" and self.relations:
            options = dict(self.featmap) | {"skip_layers": ()}
            features = FeatMapNet(**options, dtype=self.dtype, joined=False, name="featmap_pairwise")(scaled)
        elif not self.pairwise_trains_features:
            features = jax.lax.stop_gradient(features)
        features, potentials = drop("pairwise", features), {}
        if self.unary == "scores":
            features = [*features, jnp.exp(unary_log_probs).astype(self.dtype)]
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
        refinement_logits = None
        if skipped:
            convs = RefinementConvs(self.num_classes, self.refinement_width, self.dtype, name="refinement_convs")
            refinement_logits = convs(unary, skipped)
        return Potentials(unary, potentials, refinement_logits, fine_unary)

    def _given(self, scores: jax.Array | None, images: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """(log of the mean probabilities of each cell; the scores themselves where their grid is finer)."""
        height, width = max(self.grids((images.shape[1], images.shape[2])))
        if scores is None:
            scores = jnp.zeros((images.shape[0], height, width, self.num_classes), jnp.float32)
        n = scores.shape[1] // height
        if n < 1 or scores.shape[1:] != (n * height, n * width, self.num_classes):
            raise ValueError(
                f"expected scores [B, n * {height}, n * {width}, {self.num_classes}] with one n, got {scores.shape}"
            )
        scores = jax.nn.log_softmax(scores, axis=-1)
        if n == 1:
            return scores, None
        blocks = scores.reshape(-1, height, n, width, n, self.num_classes)
        return jax.nn.logsumexp(blocks, axis=(2, 4)) - 2 * math.log(n), scores

    def grids(self, image_size: tuple[int, int]) -> list[tuple[int, int]]:
        """(h, w) in cells of each scale's map, in the order of the scales; image_size: (H, W) in pixels."""
        net = FeatMapNet(**dict(self.featmap), parent=None)
        return [grid_size(image_size, (scale,), net.stride) for scale in net.scales]


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
