"""One run trains in a workdir, or writes into an output folder, at a time."""

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from typing import NamedTuple

import jax

from pwcrf_jax.runtime import distributed, files, leases, wire
from pwcrf_jax.runtime.errors import ConfigError
from pwcrf_jax.runtime.logs import log

FILE = "train.lock"  # in a workdir; the lock is the kernel's, so the file alone locks nothing


class Purpose(NamedTuple):
    """What a folder is locked for: the file of the lock, and words for messages on who has it and what that does."""

    file: str
    who: str
    does: str
    others: str


TRAINING = Purpose(FILE, "training run", "training in --workdir", "trains")
WRITING = Purpose("crf.lock", "pwcrf crf", "writing into --output", "writes")


@contextlib.contextmanager
def held(folder: str, purpose: Purpose = TRAINING) -> Iterator[None]:
    """Keeps other runs out of a folder; the kernel lets go when this process ends, however it does.

    Of the processes of one run, the first holds it for all. Where the file system knows no locks, the log says so and
    the run goes on without. In a bucket it is a lease, see `leases`: one that was lost ends this process.

    Raises:
      ConfigError: another run has it.
      FileError: the file of the lock cannot be opened, or is a link.
    """
    if jax.process_index():
        yield
        return
    path = os.path.join(folder, purpose.file)
    if files.is_url(path):
        with _leased(path, folder, purpose):
            yield
        return
    with files.naming(path, "cannot be opened"):
        number = _open(path)
    with open(number, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(number, 200, 0).decode(errors="replace")
            holder = holder if holder.isprintable() and holder else "unknown"
            raise _busy(holder, folder, purpose) from None
        except OSError as error:
            log.info("no lock on %s (%s): see to it that no other run %s there", folder, error.strerror,
                     purpose.others)  # fmt: skip
        with contextlib.suppress(OSError):  # a file of another user, a full disk: the lock holds without a name in it
            os.ftruncate(number, 0)
            os.pwrite(number, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        yield


def _busy(holder: str, folder: str, purpose: Purpose) -> ConfigError:
    return ConfigError(f"another {purpose.who} ({holder}) is {purpose.does} {folder}; let it end, or name another")


@contextlib.contextmanager
def _leased(path: str, folder: str, purpose: Purpose) -> Iterator[None]:
    def end(holder: str) -> None:
        line = f"{path} was taken over by {holder}, as this run was stopped or cut off for a minute; that one goes on"
        distributed.end(wire.REFUSED, line)
        os.write(2, f"error: {line}\n".encode())
        os._exit(wire.REFUSED)

    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(leases.held(path, end, say=lambda line: log.info("%s", line)))
        except leases.Held as holder:
            raise _busy(str(holder), folder, purpose) from None
        yield


def _open(path: str) -> int:
    """For everybody who can write to the workdir: whoever made the file, the others of a group lock it too."""
    try:
        number = files.open_regular(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW)
    except PermissionError:
        return files.open_regular(path, os.O_RDONLY | os.O_NOFOLLOW)  # enough for a lock, but on NFS
    with contextlib.suppress(OSError):  # it is another user's
        os.fchmod(number, 0o666)
    return number
