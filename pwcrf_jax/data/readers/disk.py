"""A lock, and one sentence for a disk that takes nothing more, for preparing a set and unpacking an archive."""

import contextlib
import errno
import fcntl
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from pwcrf_jax.data.readers.files import DataError

_REFUSED = ("ENOSPC", "EDQUOT", "EROFS", "EACCES", "EPERM", "EIO", "EFBIG", "ESTALE", "EMFILE", "ENFILE", "ELOOP")
_REASONS = tuple(os.strerror(getattr(errno, name)) for name in _REFUSED)

log = logging.getLogger(__name__)


def refusal(error: BaseException | None) -> str | None:
    """The system's words of a disk that is full, read-only, broken or not ours; None for an error of another kind.

    error: an OSError, or what a library made of one: array_record raises a RuntimeError that only tells the system's
      words, and TFDS may wrap either.
    """
    while error is not None:
        if reason := next((words for words in _REASONS if words in str(error)), None):
            return reason
        error = error.__cause__ or error.__context__
    return None


def unwritable(folder: Path, error: BaseException) -> DataError:
    """The error for a folder that cannot be written, in one line."""
    reason = refusal(error) or getattr(error, "strerror", None) or error
    return DataError(f"{folder}: cannot be written ({reason}); make room or set data.data_dir to another folder")


@contextlib.contextmanager
def locked(path: Path, busy: str) -> Iterator[bool]:
    """One process at a time; others wait, and say so with the line `busy`.

    The lock is the kernel's: it ends with its process, however that ends, and the file that is left locks nothing. On
    network file systems it holds between machines only where the server passes locks on (NFS since version 4 does;
    mounted with nolock or local_lock it does not).

    Yields:
      Whether the lock is held; False where the file system knows no locks.

    Raises:
      OSError: the file can neither be made nor read.
    """
    # Neither a link nor a FIFO in its place may lead elsewhere or hold the process up.
    flags = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        file = os.open(path, flags | os.O_RDWR | os.O_CREAT, 0o666)
    except OSError:  # another user's, or a read-only disk; a lock needs no more than reading, but for NFS
        file = os.open(path, flags | os.O_RDONLY)
    try:
        yield _lock(file, path, busy)
    finally:
        os.close(file)


def _lock(file: int, path: Path, busy: str) -> bool:
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.warning("%s", busy)
            fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as e:
        log.warning("no lock on %s (%s): see to it that no other process prepares the same data", path, e.strerror)
        return False
    return True
