"""Names of a backbone's layers, as its options give them."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax


class Layers(NamedTuple):
    """The layers of a backbone in order, some of them in stages: "layer3_5" is a block of the stage "layer3".

    Names may be written with dots, as in timm and torchvision: "layer3.5".

    Attributes:
      backbone: its name in messages.
      names: of the layers, the first the one that sees the image.
    """

    backbone: str
    names: tuple[str, ...]

    def last(self, option: str, name: str) -> str:
        """The layer of this name, or the last one of the stage. Raises ValueError, naming option and backbone."""
        return self._of(option, name)[-1]

    def first(self, option: str, name: str) -> str:
        """The layer of this name, or the first one of the stage. Raises ValueError, naming option and backbone."""
        return self._of(option, name)[0]

    def up_to(self, name: str) -> "Layers":
        """The layers up to this one, with it."""
        return self._replace(names=self.names[: self.names.index(name) + 1])

    def before(self, name: str) -> "Layers":
        """The layers before this one."""
        return self._replace(names=self.names[: self.names.index(name)])

    def after(self, name: str) -> "Layers":
        """The layers after this one."""
        return self._replace(names=self.names[self.names.index(name) + 1 :])

    def check(self, freeze_until: str, skip_layers: Sequence[str]) -> None:
        """Raises ValueError where these options of a backbone that has these layers name none of them."""
        self.frozen(freeze_until)
        for name in skip_layers:
            self.before(self.names[-1]).last("skip_layers", name)

    def frozen(self, freeze_until: str) -> tuple[str, ...]:
        """The layers that lie before this one or this stage; none before ""."""
        if not freeze_until:
            return ()
        return self.before(self.after(self.names[0]).first("freeze_until", freeze_until)).names

    def kept(self, activations: Mapping[str, jax.Array], skip_layers: Sequence[str]) -> dict[str, jax.Array]:
        """Activations by the names that the option has for them."""
        earlier = self.before(self.names[-1])
        return {name: activations[earlier.last("skip_layers", name)] for name in skip_layers}

    def _of(self, option: str, name: str) -> tuple[str, ...]:
        wanted = name.replace(".", "_")
        stages = {layer: _stage(layer) for layer in self.names}
        found = tuple(layer for layer, stage in stages.items() if wanted in (layer, stage))
        if not found:
            example = next((layer for layer, stage in reversed(stages.items()) if stage != layer), "")
            such = f", or one block of them, such as {example}" * bool(example)
            # Of layers for refinement convolutions a config has another key, which knows them by these words.
            subject = f"no layer {name!r}" if option == "skip_layers" else f"{option} {name!r} is not a layer"
            place = "before the output" if option == "skip_layers" else "that it may name"
            known = ", ".join(dict.fromkeys(stages.values())) or "none"
            raise ValueError(f"{self.backbone}: {subject} {place}; known: {known}{such}")
        return found


class LayeredBackbone:
    """What backbones share whose `_layers()` gives `Layers` and whose `freeze_until` is one of them."""

    freeze_until: str
    _layers: Callable[[], Layers]

    def layer_names(self) -> tuple[str, ...]:
        """Top level of the parameters, in order."""
        return self._layers().names

    @property
    def frozen_layers(self) -> tuple[str, ...]:
        """Those of `layer_names()` that no gradient reaches."""
        return self._layers().frozen(self.freeze_until)


def _stage(layer: str) -> str:
    stage, _, block = layer.rpartition("_")
    return stage if stage and (block.isdigit() or block == "downsample") else layer
