"""An exponential moving average of the parameters (Polyak & Juditsky, 1992), which evaluation uses in their place."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Averaging:
    """How parameters are averaged over the steps of a stage.

        a_t = d_t a_(t-1) + (1 - d_t) p_t,   d_t = min(decay, (1 + t) / (10 + t)),   t = 0, 1, ... the stage's steps

    The first steps count less than `decay` alone would have it: what a run begins with is soon forgotten.

    Attributes:
      decay: 0 <= decay < 1; 0: nothing is averaged.
      begins: the step that the stage begins with. There the averaged parameters become the trained ones: what a later
        stage trains stands on the features that evaluation will use.
    """

    decay: float = 0.0
    begins: int = 0

    def start(self, params: Any, averaged: Any, step: jax.Array) -> Any:
        """The parameters that a step is taken from."""
        if averaged is None or not self.begins:
            return params
        return jax.tree.map(lambda a, p: jnp.where(step == self.begins, a, p), averaged, params)

    def update(self, params: Any, averaged: Any, step: jax.Array) -> Any:
        """The average after a step that led to params; averaged None stays None."""
        taken = (step - self.begins).astype(jnp.float32)
        new = 1.0 - jnp.minimum(self.decay, (1.0 + taken) / (10.0 + taken))
        # In this form what stands still stays, to the bit.
        return None if averaged is None else jax.tree.map(lambda a, p: a + new * (p - a), averaged, params)


OFF = Averaging()
