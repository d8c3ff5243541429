"""Steps that the device skipped, as their loss or gradient was not finite."""

import math
from typing import Any

from pwcrf_jax.runtime.logs import log


class NonFiniteError(RuntimeError):
    """Loss, gradient or parameters are NaN or infinite once too often; nothing of that was saved."""


class Guard:
    """Tells of steps that the device skipped. It looks at each step one step later, so that the device stays busy."""

    def __init__(self, limit: int, skipped: int):
        """limit: of skipped steps. skipped: of the run before."""
        self._limit, self.skipped = limit, skipped
        self._last: tuple[int, Any, dict[str, Any]] | None = None

    def add(self, step: int, ids: Any, metrics: dict[str, Any]) -> None:
        """A step that was started, the ids of its images and its metrics."""
        self.flush()
        self._last = step, ids, metrics

    def flush(self) -> None:
        """Waits for the last step that was added, and looks at it; raises `NonFiniteError`."""
        if self._last is None:
            return
        (step, ids, metrics), self._last = self._last, None
        if metrics["finite"] and not metrics["skipped"]:
            return
        wrong = ", ".join(f"{k} {float(metrics[k])}" for k in ("loss", "grad_norm") if not math.isfinite(metrics[k]))
        images = f"images of that step: {', '.join(map(str, ids))}"
        advice = "The newest checkpoint is of before; try a lower config.optimizer.learning_rate or dtype float32"
        if not metrics["finite"]:
            raise NonFiniteError(f"step {step} led to parameters that are not finite ({images}). {advice}")
        self.skipped += 1
        if self.skipped > self._limit:
            raise NonFiniteError(
                f"step {step}: {wrong} ({images}). It is one more than config.train.max_skipped_steps = {self._limit}. "
                f"{advice}"
            )
        log.warning("step %d is skipped: %s (%s); %d of %d", step, wrong, images, self.skipped, self._limit)
