"""Preemption: SIGTERM asks a run to save and to leave; the exit code then says that the same command goes on.

One process notices the signal itself. Several must stop at the same step: there JAX's own service has the signal, and
all of them learn from it at which poll to stop.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

import jax
from jax.experimental import multihost_utils

# What a shell, Kubernetes and systemd say of a process that SIGTERM ended, so that "stopped from outside" is one code
# whether the signal came before our handler was there or after. No refusal (2) and no failure (1) has it.
EXIT_CODE = 128 + signal.SIGTERM

_asked, _unsaved = threading.Event(), threading.Event()
_polls = 0


class Preempted(Exception):
    """The run was asked to stop and is saved; the same command goes on with it."""


def install() -> None:
    """From here on SIGTERM ends the process with EXIT_CODE: at once before `begin`, later where `requested` is asked.

    To be called from the main thread, and before `jax.distributed.initialize`, whose handler then replaces this one.
    """
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    signal.signal(signal.SIGTERM, lambda *_: None)
    os.register_at_fork(after_in_child=_forget)
    threading.Thread(target=_watch, args=(read,), daemon=True).start()


def begin() -> None:
    """From here on there is something to save, so SIGTERM waits for the next `requested`."""
    _unsaved.set()


@contextlib.contextmanager
def nothing_to_save() -> Iterator[None]:
    """In here everything is saved, so SIGTERM ends the process at once again."""
    before = _unsaved.is_set()
    _unsaved.clear()
    try:
        yield
    finally:
        if before:
            _unsaved.set()


def requested() -> bool:
    """Whether to save and leave now. All processes must ask equally often, and get the same answer at the same time."""
    global _polls
    _polls += 1
    if jax.distributed.is_initialized() and multihost_utils.reached_preemption_sync_point(_polls):
        _asked.set()
    return _asked.is_set()


def _watch(read: int) -> None:
    # In a thread: Python's own handlers wait for the main thread, which may be compiling for minutes.
    while os.read(read, 1) != bytes([signal.SIGTERM]):
        pass
    _asked.set()
    if not _unsaved.is_set():
        os.write(2, b"stopped by SIGTERM with nothing to save; start the same command again\n")
        os._exit(EXIT_CODE)


def _forget() -> None:
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
