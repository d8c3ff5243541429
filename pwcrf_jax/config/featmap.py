"""The FeatMap-Net of a config, and what follows from its backbone."""

import ast
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from pwcrf_jax.nets import BACKBONES, FeatMapNet, grid_size
from pwcrf_jax.runtime import functions
from pwcrf_jax.runtime.errors import ConfigError


def settings(config: ConfigDict) -> dict[str, Any]:
    """Keyword arguments of `FeatMapNet`, but dtype.

    Raises:
      ConfigError: a backbone of your own that is not found; options that are no NAME=VALUE, or that nothing reads.
    """
    m = config.model
    if m.backbone not in BACKBONES:
        functions.load(m.backbone, "model.backbone")  # which finds it in the current folder too
    options = m[m.backbone].to_dict() if m.backbone in m else _factory_options(config)
    if m.backbone in BACKBONES and m.factory_options:
        raise ConfigError(
            f"config.model.factory_options = {m.factory_options} are of a backbone of your own, "
            f"config.model.backbone = {m.backbone!r} is none; set them to ()"
        )
    return dict(
        backbone=m.backbone,
        backbone_options=tuple(sorted(options.items())),
        scales=m.scales,
        block6=m.block6,
        pyramid_windows=m.pyramid_windows,
        skip_layers=m.refinement_convs.layers,
    )


def featmap_net(config: ConfigDict) -> FeatMapNet:
    """The FeatMap-Net. Raises ConfigError for what it refuses, naming the key."""
    try:
        return FeatMapNet(**settings(config))
    except (ValueError, TypeError) as error:
        raise refused(config, error) from None


def refused(config: ConfigDict, error: Exception) -> ConfigError:
    """What a network says of its settings, with the key that it means."""
    backbone = config.model.backbone
    own = f"{backbone}: "  # what the backbone says of its options begins so
    text, rest = str(error), str(error).removeprefix(own)
    place = f"model.{backbone}." if text != rest else "model: "
    if backbone not in BACKBONES and text != rest:
        place = f"model.backbone = {backbone!r}: "
    if text.startswith(f"{own}no layer"):  # of its skip layers
        place = "model.refinement_convs.layers: "
    return ConfigError(f"config.{place}{rest}")


def _factory_options(config: ConfigDict) -> dict[str, Any]:
    options = {}
    for text in config.model.factory_options:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise ConfigError(f"config.model.factory_options: {text!r} must be NAME=VALUE, such as 'width=64'")
        try:
            options[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[name] = value
        try:
            hash(options[name])
        except TypeError:
            raise ConfigError(
                f"config.model.factory_options: {text!r} must have a value that does not change: a number, text or a "
                "tuple of such"
            ) from None
    return options


def grid(config: ConfigDict, size: Sequence[int]) -> tuple[int, int]:
    """(h, w) in cells of a frame of (H, W) pixels."""
    height, width = size
    net = featmap_net(config)
    return grid_size((height, width), net.scales, net.stride)
