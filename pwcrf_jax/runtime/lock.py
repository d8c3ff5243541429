"""One run trains in a workdir at a time."""

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator

import jax

from pwcrf_jax.runtime import distributed, files, leases, wire
from pwcrf_jax.runtime.errors import ConfigError
from pwcrf_jax.runtime.logs import log

FILE = "train.lock"  # in a workdir; the lock is the kernel's, so the file alone locks nothing


@contextlib.contextmanager
def held(workdir: str) -> Iterator[None]:
    """Keeps other runs out of a workdir; the kernel lets go when this process ends, however it does.

    Of the processes of one run, the first holds it for all. Where the file system knows no locks, the log says so and
    the run goes on without. In a bucket it is a lease, see `leases`: one that was lost ends this process.

    Raises:
      ConfigError: another run trains in it.
      FileError: the file of the lock cannot be opened, or is a link.
    """
    if jax.process_index():
        yield
        return
    path = os.path.join(workdir, FILE)
    if files.is_url(path):
        with _leased(path, workdir):
            yield
        return
    with files.naming(path, "cannot be opened"):
        number = _open(path)
    with open(number, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(number, 200, 0).decode(errors="replace")
            raise _busy(holder if holder.isprintable() and holder else "unknown", workdir) from None
        except OSError as error:
            log.info("no lock on %s (%s): see to it that no other run trains there", workdir, error.strerror)
        with contextlib.suppress(OSError):  # a file of another user, a full disk: the lock holds without a name in it
            os.ftruncate(number, 0)
            os.pwrite(number, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        yield


def _busy(holder: str, workdir: str) -> ConfigError:
    return ConfigError(
        f"another training run ({holder}) is training in --workdir {workdir}; let it end, or name another"
    )


@contextlib.contextmanager
def _leased(path: str, workdir: str) -> Iterator[None]:
    def end(holder: str) -> None:
        line = f"{path} was taken over by {holder}, as this run was stopped or cut off for a minute; that one goes on"
        distributed.end(wire.REFUSED, line)
        os.write(2, f"error: {line}\n".encode())
        os._exit(wire.REFUSED)

    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(leases.held(path, end, say=lambda line: log.info("%s", line)))
        except leases.Held as holder:
            raise _busy(str(holder), workdir) from None
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
