"""A backbone small enough for tests and the demo."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from pwcrf_jax.nets.convs import Features, check_skip_layers, conv, with_skip_layers


class Tiny(nn.Module):
    """Four 2x2 convolutions of stride 2, so that each cell of the output sees exactly its own 16x16 pixels.

    Call: images [B, H, W, 3], already scaled -> features [B, ceil(H/16), ceil(W/16), features[-1]] in
    `dtype`. Parameters are float32, named `conv1` ... `conv4` and `mix1` ... `mix4`.

    Attributes:
      features: channels of the four stages.
      mix: whether a 1x1 convolution follows every stage.
      skip_layers: some of `conv1` (stride 2) ... `conv4`; the call then returns (features, {name: activation}).
      dtype: computed in, float32 or bfloat16.

    Raises:
      ValueError: features that are not four positive numbers, or an unknown layer in `skip_layers`.
    """

    features: tuple[int, ...] = (16, 32, 48, 64)
    mix: bool = False
    skip_layers: tuple[str, ...] = ()
    dtype: Any = jnp.float32

    stride = 16  # pixels to a cell
    frozen_layers = ()  # there is no freeze_until

    def __post_init__(self) -> None:
        object.__setattr__(self, "features", tuple(self.features))
        if len(self.features) != 4 or any(width < 1 for width in self.features):
            raise ValueError(f"tiny: features must be four positive numbers, got {self.features}")
        check_skip_layers("tiny", self.skip_layers, [f"conv{i}" for i in range(1, 5)])
        super().__post_init__()

    @nn.compact
    def __call__(self, images: jax.Array) -> Features:
        x = images.astype(self.dtype)
        kept: dict[str, jax.Array] = {}
        for stage, width in enumerate(self.features, start=1):
            x = kept[f"conv{stage}"] = nn.relu(conv(width, 2, stride=2, name=f"conv{stage}", dtype=self.dtype)(x))
            if self.mix:
                x = nn.relu(conv(width, 1, name=f"mix{stage}", dtype=self.dtype)(x))
        return with_skip_layers(x, kept, self.skip_layers)
