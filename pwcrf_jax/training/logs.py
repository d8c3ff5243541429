"""What a run tells: lines on standard error, metrics.jsonl, TensorBoard scalars."""

import json
import logging
import math
import os
import sys
import time

import absl.logging
from tensorboardX import SummaryWriter
from tqdm import tqdm

log = logging.getLogger("pwcrf_jax")


def setup() -> None:
    """Our own lines at level INFO on standard error; the libraries' chatter off."""
    absl.logging.set_verbosity("error")
    if not log.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(handler)
        log.propagate = False
    log.setLevel(logging.INFO)


class Writer:
    """Scalars to metrics.jsonl (one JSON object a line, flushed) and to TensorBoard."""

    def __init__(self, workdir: str):
        self._jsonl = open(os.path.join(workdir, "metrics.jsonl"), "a")
        self._board = SummaryWriter(os.path.join(workdir, "tensorboard"))

    def write(self, step: int, scalars: dict, prefix: str) -> None:
        self._jsonl.write(json.dumps({"step": step, **{f"{prefix}/{k}": v for k, v in scalars.items()}}) + "\n")
        self._jsonl.flush()
        for name, value in scalars.items():
            self._board.add_scalar(f"{prefix}/{name}", value, step)
        self._board.flush()

    def close(self) -> None:
        self._jsonl.close()
        self._board.close()


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


class Progress:
    """Loss, images per second and time left: a bar on a terminal, a line each time elsewhere."""

    def __init__(self, first_step: int, num_steps: int, batch_size: int):
        self._num_steps, self._batch_size = num_steps, batch_size
        self._last = (first_step, time.monotonic())
        self._bar = tqdm(total=num_steps, initial=first_step, unit="step") if sys.stderr.isatty() else None

    def restart(self, step: int) -> None:
        """Starts a new interval: what was done since the last report (evaluation) does not count."""
        self._last = (step, time.monotonic())

    def report(self, step: int, metrics: dict) -> float | None:
        """Prints one report and returns images per second since the last; None if no step was timed since."""
        before, since = self._last
        rate, speed = None, ""
        if step > before:
            seconds = max(time.monotonic() - since, 1e-9)
            rate = (step - before) * self._batch_size / seconds
            left = _duration((self._num_steps - step) * seconds / (step - before))
            speed = f"{rate:.1f} img/s  {left} left"
        # Before any inference: a relation whose NLL stays above twice the unary's has learned no interaction.
        unary = metrics.get("nll_unary", math.nan)  # a batch may be void all over
        others = ", ".join(f"{k[4:]} {v:.3f}" for k, v in metrics.items() if k.startswith("nll_") and k != "nll_unary")
        text = f"loss {metrics['loss']:.4f}  nll unary {unary:.3f}"
        if others:
            text += f"  {others} (2 x unary {2 * unary:.3f})"
        if self._bar is not None:
            self._bar.set_postfix_str(f"{text}  {speed}")
            self._bar.update(step - self._bar.n)
        else:
            log.info("step %d/%d  %s  %s", step, self._num_steps, text, speed)
        self._last = (step, time.monotonic())
        return rate

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
