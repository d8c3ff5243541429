"""Processes that read samples, where the threads of one process do not suffice.

Each worker hangs on one socket: it computes what it is asked for there, and ends when the socket does. So it ends with
its parent, however that ends, and one that is gone is noticed at once. Nothing lies in shared memory. (Grain's own
processes keep samples and semaphores there, some of which stay behind where a run is killed.)
"""

import contextlib
import io
import os
import pickle
import queue
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Iterator
from typing import Any

from pwcrf_jax.data.readers.image_io import DataError

_START = "import sys; sys.path[:] = {path!r}; from pwcrf_jax.data import workers; workers.serve({fd})"
_OF_THE_RUN = {signal.SIGINT, signal.SIGTERM}  # may go to all processes; what they mean is the parent's to decide
_GONE = (EOFError, OSError, pickle.UnpicklingError)  # what reading and writing raise where the other end is gone


class Workers:
    """A view whose samples are computed by other processes; `view[i]` may be asked for by several threads."""

    def __init__(self, view: Any, number: int):
        """view: with `__len__` and `__getitem__`, to be pickled; what it returns is pickled too."""
        self._length, self._processes = len(view), []
        self._free: queue.SimpleQueue[tuple[subprocess.Popen, io.BufferedRWPair]] = queue.SimpleQueue()
        path, sent = [str(folder) for folder in sys.path], pickle.dumps(view)
        for _ in range(number):
            ours, theirs = socket.socketpair()
            with ours, theirs, _held():
                process = subprocess.Popen(
                    [sys.executable, "-c", _START.format(path=path, fd=theirs.fileno())],
                    stdin=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                    env=os.environ | {"JAX_PLATFORMS": "cpu"},  # a worker must not take hold of an accelerator
                )
                channel = ours.makefile("rwb")
            self._processes.append(process)
            self._free.put((process, channel))
            with contextlib.suppress(*_GONE):  # the first sample tells
                channel.write(sent)
                channel.flush()

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, position: int) -> Any:
        process, channel = self._free.get()
        try:
            pickle.dump(position, channel)
            channel.flush()
            reply = pickle.load(channel)
        except _GONE:
            code = process.wait()
            how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}, see above"
            raise DataError(
                f"process {process.pid}, one of data.num_workers = {len(self._processes)}, was ended {how}; start "
                "again, with fewer of them, or 0 for threads, if memory ran out"
            ) from None
        finally:
            self._free.put((process, channel))  # also of one that is gone: whoever comes next is told so too
        if isinstance(reply, Exception):
            raise reply
        return reply

    def close(self) -> None:
        """Ends the processes; whoever waits for a sample gets an error."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()


@contextlib.contextmanager
def _held() -> Iterator[None]:
    """Blocks signals, also for good in the processes that are started in here."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _OF_THE_RUN)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def serve(fd: int) -> None:
    """Runs a worker: reads a view from a socket, then positions, and answers each with `view[position]`."""
    with contextlib.suppress(*_GONE), socket.socket(fileno=fd) as end, end.makefile("rwb") as channel:
        view = pickle.load(channel)
        while True:
            position = pickle.load(channel)
            try:
                reply = view[position]
            except DataError as error:
                reply = error
            except Exception:
                reply = RuntimeError(f"in a process of data.num_workers:\n{traceback.format_exc()}")
            pickle.dump(reply, channel, protocol=5)
            channel.flush()
    os._exit(0)  # nothing is left to do, and libraries take their time to leave
