"""Everything a run tells: lines on standard error, metrics.jsonl, TensorBoard scalars and pictures."""

import contextlib
import importlib.util
import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import absl.logging
import jax
import numpy as np
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import RecordWriter, register_writer_factory
from tensorboardX.summary import image, scalar
from tqdm import tqdm

from pwcrf_jax.runtime import buckets, files, functions, streams

log = logging.getLogger("pwcrf_jax")
METRICS = "metrics.jsonl"  # in a workdir
OTHER_SHAPE = (ValueError, KeyError, TypeError, OverflowError, RecursionError)  # of a line that is not ours


def setup() -> None:
    """Our own lines at level INFO on standard error; the libraries' chatter off."""
    absl.logging.set_verbosity("fatal")  # Orbax logs tracebacks of what it raises anyway
    # Where the first of several arrays fails, Orbax drops the tasks of the others, which then complain one by one.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    sys.unraisablehook = _without_closed_loops
    if not log.handlers:
        handler = _AboveBars(sys.stderr) if sys.stderr else logging.NullHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(handler)
        log.propagate = False
    log.setLevel(logging.INFO)


class _AboveBars(logging.StreamHandler):
    """Lines and tables go above a progress bar that is on the terminal, not into it."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=self.stream)
        except Exception:
            if not getattr(self.stream, "closed", False):  # else there is nowhere to say it
                self.handleError(record)


def bar(items: Iterable, what: str, total: int | None = None, unit: str = "batch") -> tqdm:
    """The items, with a bar on standard error while somebody watches it."""
    hidden = not streams.is_terminal(sys.stderr)
    return tqdm(items, what, total, unit=unit, disable=hidden, leave=False)


def how_to_see_curves(workdir: str) -> str:
    """The line that says how to look at a run's curves in TensorBoard, and how to get that where it is missing."""
    missing = importlib.util.find_spec("tensorboard") is None
    return f"curves: {'pip install tensorboard, then ' * missing}tensorboard --logdir {workdir}"


def only_process(index: int) -> None:
    """Silences the other processes but for what goes wrong. To be called once they are connected."""
    if jax.process_index() != index:
        log.setLevel(logging.WARNING)


def _without_closed_loops(unraisable: Any) -> None:
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


class _Events(RecordWriter):
    """A file of TensorBoard's events; in a bucket `buckets.Parts`."""

    def sync(self) -> None:
        if isinstance(self._writer, buckets.Parts):
            self._writer.sync()


class _InBucket:
    """In place of tensorboardX' own, which has other credentials and uploads all of a file at every flush."""

    def open(self, path: str) -> buckets.Parts:
        return buckets.Parts(path)

    def directory_check(self, path: str) -> None:
        pass


register_writer_factory("gs", _InBucket())

Hook = Callable[[int, dict[str, float]], Any]
"""A function of the user's own: (step, {name as in metrics.jsonl: value})."""


class Writer:
    """Scalars to metrics.jsonl (one JSON object a line, flushed), to TensorBoard and to a hook.

    Raises:
      FileError: something cannot be written.
    """

    def __init__(self, workdir: str, step: int = 0, evaluated: bool = True, hook: Hook | None = None):
        """step: that the run goes on from. What was written of later ones is taken back, as they are done again.

        evaluated: whether the evaluation of that step is done, too; False takes its lines back as well.
        hook: given what `write` is given. What it raises is said in a line, once, and ends nothing.
        """
        self._hook, self._said = hook, ""
        path = os.path.join(workdir, METRICS)
        keep = lambda line: line["step"] <= step and (evaluated or line["step"] < step or not _is_val(line))
        if number := _take_back(path, keep):
            log.info("%d lines of %s are of steps that are done again, and were taken out", number, path)
        self._path, self._jsonl = path, files.append(path)
        # Written here and now: tensorboardX's own SummaryWriter has a thread, which dies of a full disk unseen.
        self._folder = os.path.join(files.absolute(workdir), "tensorboard")
        files.make_folder(self._folder, inside=workdir)
        with files.naming(self._folder, "cannot be written"):
            name = f"events.out.tfevents.{time.time_ns()}.{os.getpid()}"
            self._board = _Events(os.path.join(self._folder, name))
            self._event(file_version="brain.Event:2")
            self._event(step=step + 1, session_log=SessionLog(status=SessionLog.START))  # hides what was taken back
            self._board.flush()

    def write(self, step: int, scalars: Mapping[str, float], prefix: str) -> None:
        named = {f"{prefix}/{k}": v for k, v in scalars.items()}
        line = json.dumps({"step": step, **named})
        with files.naming(self._path, "cannot be written"):
            self._jsonl.write(f"{line}\n".encode())
            self._jsonl.flush()
        with files.naming(self._folder, "cannot be written"):
            for name, value in named.items():
                self._event(step=step, summary=scalar(name, value))
            self._board.flush()
        self._call_hook(step, named)

    def _call_hook(self, step: int, named: dict[str, float]) -> None:
        try:
            if self._hook:
                self._hook(step, named)
        except Exception as error:  # whatever the user's code raises: a run does not end for its log
            said = functions.described(error)
            if said != self._said:
                log.warning("step %d: config.train.hook raised %s; the run goes on", step, said)
            self._said = said

    def picture(self, step: int, name: str, pixels: np.ndarray) -> None:
        """A picture uint8 [H, W, 3] for TensorBoard."""
        with files.naming(self._folder, "cannot be written"):
            self._event(step=step, summary=image(name, pixels, dataformats="HWC"))
            self._board.flush()

    def sync(self) -> None:
        """Returns when metrics.jsonl is on the disk, or in the bucket: a checkpoint must not outlast what led to it."""
        with files.naming(self._path, "cannot be written"):
            files.sync(self._jsonl)
        with files.naming(self._folder, "cannot be written"):
            self._board.sync()

    def _event(self, **content: Any) -> None:
        self._board.write(Event(wall_time=time.time(), **content).SerializeToString())

    def close(self) -> None:
        for file in (self._jsonl, self._board):
            with contextlib.suppress(OSError):  # what could not be flushed has been told by `write`
                file.close()


def _is_val(line: Mapping[str, Any]) -> bool:
    return any(key.startswith("val/") for key in line)


def _take_back(path: str, keep: Callable[[dict[str, Any]], bool]) -> int:
    """Drops the lines of a file of JSON objects for which keep(object) is false, and those cut off; says how many."""
    lines, kept = files.read_lines(path), []
    for line in lines:
        with contextlib.suppress(*OTHER_SHAPE):
            if keep(json.loads(line)) and line.endswith("\n"):
                kept.append(line)
    if len(kept) < len(lines):
        files.write(path, "".join(kept))
    return len(lines) - len(kept)


def last_step(workdir: str) -> int | None:
    """The last step that metrics.jsonl in a workdir tells of; None: of none."""
    steps = []
    for line in files.read_lines(os.path.join(workdir, METRICS)):
        with contextlib.suppress(*OTHER_SHAPE):
            steps.append(int(json.loads(line)["step"]))
    return max(steps, default=None)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


class Progress:
    """Loss, images per second and time left: a bar on a terminal, a line each time elsewhere."""

    def __init__(self, first_step: int, num_steps: int, batch_size: int, relations: Sequence[str] = ()):
        """relations: names of those that may have a term of their own in the loss."""
        self._relations = relations
        self._num_steps, self._batch_size = num_steps, batch_size
        self._last = (first_step, time.monotonic())
        # What a narrow terminal cuts off stands last: the NLL of each kind of factor.
        form = "{percentage:3.0f}% |{bar:10}| {n_fmt}/{total_fmt}{postfix}"
        options: dict[str, Any] = dict(total=num_steps, initial=first_step, bar_format=form, dynamic_ncols=True)
        self._bar = tqdm(**options) if streams.is_terminal(sys.stderr) else None

    def restart(self, step: int) -> None:
        """Starts a new interval: what was done since the last report (evaluation) does not count."""
        self._last = (step, time.monotonic())

    def report(self, step: int, metrics: Mapping[str, float]) -> float | None:
        """Prints one report and returns images per second since the last; None if no step was timed since."""
        before, since = self._last
        rate, speed = None, ""
        if step > before:
            seconds = max(time.monotonic() - since, 1e-9)
            rate = (step - before) * self._batch_size / seconds
            left = _duration((self._num_steps - step) * seconds / (step - before))
            speed = f"{rate:.1f} img/s  {left} left"
        # Before any inference: a relation whose NLL stays above twice the unary's has learned no interaction.
        unary = metrics.get("nll_unary")  # a batch may be void all over
        number = lambda x, digits: "-" if x is None else f"{x:.{digits}f}"
        others = ", ".join(f"{k[4:]} {v:.3f}" for k, v in metrics.items() if k.startswith("nll_") and k != "nll_unary")
        loss, terms = f"loss {number(metrics.get('loss'), 4)}", f"nll unary {number(unary, 3)}"
        if others:
            edges = any(f"nll_{name}" in metrics for name in self._relations)
            terms += f"  {others}" + (f" (2 x unary {2 * unary:.3f})" if edges and unary is not None else "")
        if self._bar is not None:
            self._bar.set_postfix_str("  ".join(filter(None, (loss, speed, terms))), refresh=False)
            self._bar.n = step
            self._bar.refresh()
        else:
            log.info("step %d/%d  %s  %s  %s", step, self._num_steps, loss, terms, speed)
        self._last = (step, time.monotonic())
        return rate

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
