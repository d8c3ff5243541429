"""Preemption: SIGTERM asks a run to save and to leave; the exit code then says that the same command goes on.

One process notices the signal itself. Several must stop at the same step: there JAX's own service has the signal, and
all of them learn from it at which poll to stop.

A virtual machine of Google Cloud is told before it is taken away or maintained; `watch_notices` makes that a SIGTERM.
"""

import contextlib
import http.client
import json
import os
import signal
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.experimental import multihost_utils

# What a shell, Kubernetes and systemd say of a process that SIGTERM ended, so that "stopped from outside" is one code
# whether the signal came before our handler was there or after. No refusal (2) and no failure (1) has it.
EXIT_CODE = 128 + signal.SIGTERM

_PAUSE = 10  # seconds between two questions to a server that does not wait by itself

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


def watch_notices() -> None:
    """On a machine of Google Cloud: SIGTERM to this process when its host will be stopped, preempted or maintained.

    The machine is known by its firmware, or by GCE_METADATA_HOST, HOST or HOST:PORT of a metadata server. Elsewhere
    nothing is asked.
    https://cloud.google.com/compute/docs/metadata/getting-live-migration-notice
    """
    host, firmware = os.environ.get("GCE_METADATA_HOST"), Path("/sys/class/dmi/id/product_name")
    with contextlib.suppress(OSError):
        host = host or ("metadata.google.internal" if "Google" in firmware.read_text() else "")
    if host:
        threading.Thread(target=_wait_for_notice, args=(host,), daemon=True).start()


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


def _wait_for_notice(host: str) -> None:
    """Asks the metadata server, which answers when something has changed, or after a minute."""
    etag, opener = "0", urllib.request.build_opener(urllib.request.ProxyHandler({}))
    query = "recursive=true&wait_for_change=true&timeout_sec=60&last_etag="
    while True:
        url = f"http://{host}/computeMetadata/v1/instance/?{query}{etag}"
        try:
            request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
            with opener.open(request, timeout=90) as answer:
                etag, found = answer.headers.get("ETag", "0"), json.load(answer)
        except (OSError, ValueError, http.client.HTTPException):  # a server that is gone says nothing
            time.sleep(_PAUSE)
            continue
        if found.get("preempted") == "TRUE" or found.get("maintenanceEvent") == "TERMINATE_ON_HOST_MAINTENANCE":
            os.write(2, b"Google Cloud will stop this machine: as if by SIGTERM\n")
            os.kill(os.getpid(), signal.SIGTERM)
            return
        # A server of Kubernetes may not wait; a second is little of the 30 that a notice leaves.
        time.sleep(_PAUSE / 10 if answer.headers.get("ETag") else _PAUSE)


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
