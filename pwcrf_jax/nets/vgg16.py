"""VGG-16's convolutional blocks 1-5."""

import re
from collections.abc import Collection, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from pwcrf_jax.nets.convs import Features, check_skip_layers, conv, with_skip_layers
from pwcrf_jax.nets.pooling import max_pool_2x2
from pwcrf_jax.nets.state_dicts import Architecture, StateDict
from pwcrf_jax.nets.stored import StoredLayer, WeightsError, check_flat, check_rank

BLOCKS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
# Positions of the convolutions in torchvision's `features`, ReLU and pooling being entries of their own.
TORCH_CONVS = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)


def layer_names() -> tuple[str, ...]:
    """Names of the convolutions in order, as Keras Applications names them."""
    return tuple(
        f"block{block}_conv{index}"
        for block, widths in enumerate(BLOCKS, start=1)
        for index in range(1, len(widths) + 1)
    )


class VGG16(nn.Module):
    """Blocks 1-5 of VGG-16 at a total stride of 16 (the last max pool has stride 1).

    Call: images [B, H, W, 3], already scaled -> features [B, ceil(H/16), ceil(W/16), 512] in `dtype`.
    Parameters are float32, named `block1_conv1` ... `block5_conv3`.

    Attributes:
      skip_layers: some of those names; the call then returns (features, {name: activation}).
      dtype: computed in, float32 or bfloat16.

    Raises:
      ValueError: an unknown layer in `skip_layers`.
    """

    skip_layers: tuple[str, ...] = ()
    dtype: Any = jnp.float32

    stride = 16  # pixels to a cell
    frozen_layers = ()  # there is no freeze_until

    def __post_init__(self) -> None:
        check_skip_layers("vgg16", self.skip_layers, layer_names())
        super().__post_init__()

    @nn.compact
    def __call__(self, images: jax.Array) -> Features:
        x = images.astype(self.dtype)
        kept: dict[str, jax.Array] = {}
        for block, widths in enumerate(BLOCKS, start=1):
            for index, features in enumerate(widths, start=1):
                name = f"block{block}_conv{index}"
                x = kept[name] = nn.relu(conv(features, 3, name=name, dtype=self.dtype)(x))
            x = max_pool_2x2(x, stride=2 if block < len(BLOCKS) else 1)
        return with_skip_layers(x, kept, self.skip_layers)


def fc1_from_torch(weight: np.ndarray) -> np.ndarray:
    """Linear weight [F, C*7*7] as a convolution [7, 7, C, F]: PyTorch flattens channels, rows, columns."""
    return weight.reshape(weight.shape[0], -1, 7, 7).transpose(2, 3, 1, 0)


def _torch_convs(names: Collection[str]) -> list[int]:
    return sorted(int(m[1]) for name in names if (m := re.fullmatch(r"features\.(\d{1,9})\.weight", name)))


def _from_torch(state: StateDict, backbone: Mapping[str, Any]) -> dict[str, Any]:
    convs = _torch_convs(state)
    if tuple(convs) != TORCH_CONVS:
        raise WeightsError(
            f"{state.path}: not a VGG-16, its convolutions are features {convs[:32]}, "
            f"not {list(TORCH_CONVS)} (another VGG, or one with BatchNorm?)"
        )
    places = dict(zip(layer_names(), TORCH_CONVS, strict=True))
    return {
        name: state.conv(f"features.{places[name]}", layer["kernel"].shape, label=name)
        for name, layer in backbone.items()
    }


def _torch_fc1(state: StateDict) -> StoredLayer | None:
    for name, check, layout in (
        ("classifier.0", check_flat(1), fc1_from_torch),
        ("pre_logits.fc1", check_rank, lambda weight: weight.transpose(2, 3, 1, 0)),
    ):
        if f"{name}.weight" in state:
            arrays = lambda name=name: (
                state.stored(f"{name}.weight"),
                {f"bias of {name}": state.stored(f"{name}.bias")},
            )
            return StoredLayer(state.path, name, arrays, check, layout)
    return None


ARCHITECTURES = (
    Architecture(
        source="torch_vgg16",
        backbone="vgg16",
        mark="block1_conv1",
        scaling="torch",
        recognise=lambda names: bool(_torch_convs(names)),
        convert=_from_torch,
        fc1=_torch_fc1,
    ),
)
"""VGG-16 of torchvision and timm, without BatchNorm."""
