"""FeatMap-Net: a multi-scale feature map with sliding pyramid pooling."""

import difflib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from pwcrf_jax import user_functions
from pwcrf_jax.nets.convnext import ConvNeXtTiny
from pwcrf_jax.nets.convs import conv
from pwcrf_jax.nets.efficientnet_lite import EfficientNetLite
from pwcrf_jax.nets.mobilenet_v2 import MobileNetV2
from pwcrf_jax.nets.own_backbone import OwnBackbone
from pwcrf_jax.nets.pooling import sliding_pyramid
from pwcrf_jax.nets.resnet import ResNet50, ResNet101
from pwcrf_jax.nets.tiny import Tiny
from pwcrf_jax.nets.vgg16 import VGG16
from pwcrf_jax.nets.vit import ViTBase, ViTSmall

BACKBONES: dict[str, type[nn.Module]] = {
    "convnext_tiny": ConvNeXtTiny,
    "efficientnet_lite": EfficientNetLite,
    "mobilenet_v2": MobileNetV2,
    "resnet50": ResNet50,
    "resnet101": ResNet101,
    "tiny": Tiny,
    "vgg16": VGG16,
    "vit_base": ViTBase,
    "vit_small": ViTSmall,
}
"""The backbones by the name that `FeatMapNet.backbone` takes."""


def _scaled_size(image_size: tuple[int, int], scale: float) -> tuple[int, int]:
    height, width = image_size
    return max(1, round(scale * height)), max(1, round(scale * width))


def grid_size(image_size: tuple[int, int], scales: Sequence[float], stride: int = 16) -> tuple[int, int]:
    """Size of `FeatMapNet`'s output grid: that of the largest scale.

    Args:
      image_size: (H, W) in pixels.
      scales: factors of it.
      stride: pixels of a scaled image to a cell.

    Returns:
      (h, w) in cells.
    """
    height, width = _scaled_size(image_size, max(scales))
    return -(-height // stride), -(-width // stride)


def resize(x: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Bilinear resize of [B, H, W, C] in float32; antialiased where it shrinks, an identity at equal size."""
    if x.shape[1:3] == size:
        return x
    shape = (x.shape[0], *size, x.shape[3])
    return jax.image.resize(x.astype(jnp.float32), shape, "bilinear", antialias=True).astype(x.dtype)


class FeatMapNet(nn.Module):
    """Features of the image at several scales on the grid of the largest.

    Each scale: bilinear resize, the backbone (shared by the scales), a block 6 of its own, sliding pyramid
    pooling; then bilinear upsampling to the largest scale's grid and concatenation over channels.

    Call: images [B, H, W, 3], already scaled by `scale_input` -> features [B, h, w, D] in `dtype`, with
    (h, w) = `grid_size((H, W), scales, stride)` and D = len(scales) * (1 + len(pyramid_windows)) * channels.
    Parameters are float32: `backbone`, then `block6_0`, `block6_1`, ... in the order of `scales`, each with
    `conv1`, `conv2`, ...

    Attributes:
      backbone: a name in `BACKBONES`, or "package.module:factory" of your own (docs/training.md).
      backbone_options: attributes of the backbone other than dtype, or arguments of the factory: a mapping or pairs.
      scales: factors of the image size, each positive.
      block6: (kernel size, features) of each convolution of block 6, odd sizes; () for none.
      pyramid_windows: odd windows of the sliding pyramid pooling; () for none.
      skip_layers: layers of the backbone; the call then returns (features, [their activations at the largest scale]).
      dtype: float32 or bfloat16, the type computed in.
      joined: false returns the maps as they are ahead of upsampling, a list in the order of `scales`, which `UnaryNet`
        and `PairwiseNet` take as well.

    Raises:
      ValueError: at construction, for anything else.
    """

    backbone: str = "vgg16"
    backbone_options: Any = ()
    scales: tuple[float, ...] = (1.2, 0.8, 0.4)
    block6: tuple[tuple[int, int], ...] = ((7, 4096), (3, 512), (3, 512))
    pyramid_windows: tuple[int, ...] = (5, 9)
    skip_layers: tuple[str, ...] = ()
    dtype: Any = jnp.float32
    joined: bool = True

    def __post_init__(self) -> None:
        # Plain tuples, so that a net is hashable and equal to one built from lists or a mapping.
        options = self.backbone_options
        pairs = options.items() if isinstance(options, Mapping) else options
        frozen = ((key, tuple(value) if isinstance(value, list) else value) for key, value in pairs)
        object.__setattr__(self, "backbone_options", tuple(sorted(frozen)))
        object.__setattr__(self, "scales", tuple(self.scales))
        object.__setattr__(self, "block6", tuple(tuple(pair) for pair in self.block6))
        object.__setattr__(self, "pyramid_windows", tuple(self.pyramid_windows))
        object.__setattr__(self, "skip_layers", tuple(self.skip_layers))
        self._check()
        super().__post_init__()

    def _check(self) -> None:
        if self.backbone not in BACKBONES and not user_functions.is_name(self.backbone):
            nearest = difflib.get_close_matches(self.backbone, BACKBONES, n=1, cutoff=0.3)
            hint = f"did you mean {nearest[0]!r}? " if nearest else ""
            raise ValueError(
                f"unknown backbone {self.backbone!r}; {hint}known: {', '.join(BACKBONES)}, "
                "and your own as package.module:factory"
            )
        if jnp.dtype(self.dtype) not in (jnp.float32, jnp.bfloat16):
            raise ValueError(f"dtype must be float32 or bfloat16, got {jnp.dtype(self.dtype)}")
        if not self.scales:
            raise ValueError("scales must not be empty")
        for scale in self.scales:
            if not (math.isfinite(scale) and scale > 0):
                raise ValueError(f"scales must be positive numbers, got {scale}")
        for pair in self.block6:
            if len(pair) != 2:
                raise ValueError(f"block6 must hold pairs (kernel size, features), got {pair}")
            kernel, features = pair
            if kernel < 1 or kernel % 2 == 0:
                raise ValueError(f"block6 kernel sizes must be odd and positive, got {kernel}")
            if features < 1:
                raise ValueError(f"block6 features must be positive, got {features}")
        for window in self.pyramid_windows:
            if window < 1 or window % 2 == 0:
                raise ValueError(f"pyramid windows must be odd and positive, got {window}")
        if self.backbone in BACKBONES:
            fields = BACKBONES[self.backbone].__dataclass_fields__
            known = [name for name in fields if name not in ("parent", "name", "dtype", "skip_layers")]
            for option, _ in self.backbone_options:
                if option not in known:
                    raise ValueError(
                        f"backbone {self.backbone!r} has no option {option!r}; known: {', '.join(known) or '-'}"
                    )
        self.bare_backbone()  # whose own checks are made so

    def bare_backbone(self) -> Any:
        """The backbone, as no part of this module: to ask for its `stride` and `frozen_layers`."""
        return self._make_backbone(parent=None)

    @property
    def stride(self) -> int:
        """Pixels of a scaled image to a cell."""
        return self.bare_backbone().stride

    def _make_backbone(self, **place: Any) -> Any:
        given = dict(skip_layers=self.skip_layers, dtype=self.dtype, **place)
        if self.backbone in BACKBONES:
            return BACKBONES[self.backbone](**dict(self.backbone_options), **given)
        return OwnBackbone(self.backbone, self.backbone_options, **given)

    @nn.compact
    def __call__(self, images: jax.Array) -> Any:
        image_size = (images.shape[1], images.shape[2])
        grid = grid_size(image_size, self.scales, self.stride)
        backbone = self._make_backbone(name="backbone")
        maps, skipped = [], {}
        for index, scale in enumerate(self.scales):
            x = backbone(resize(images, _scaled_size(image_size, scale)))
            if self.skip_layers:
                x, skipped[scale] = x
            if self.block6:
                x = _Block6(self.block6, dtype=self.dtype, name=f"block6_{index}")(x)
            if self.pyramid_windows:
                x = sliding_pyramid(x, self.pyramid_windows)
            maps.append(x)
        features = jnp.concatenate([resize(x, grid) for x in maps], axis=-1) if self.joined else maps
        return (features, list(skipped[max(self.scales)].values())) if self.skip_layers else features


class _Block6(nn.Module):
    """Convolutions with ReLU: [B, h, w, C] -> [B, h, w, features of the last]."""

    convs: tuple[tuple[int, int], ...]
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for index, (kernel, features) in enumerate(self.convs, start=1):
            x = nn.relu(conv(features, kernel, name=f"conv{index}", dtype=self.dtype)(x))
        return x
