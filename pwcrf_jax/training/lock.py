"""One run trains in a workdir at a time."""

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator

import jax

from pwcrf_jax.training.config import ConfigError
from pwcrf_jax.training.logs import log

FILE = "train.lock"  # in a workdir; the lock is the kernel's, so the file alone locks nothing


@contextlib.contextmanager
def held(workdir: str) -> Iterator[None]:
    """Keeps other runs out of a workdir; the kernel lets go when this process ends, however it does.

    Of the processes of one run, the first holds it for all. Where the file system knows no locks, the log says so and
    the run goes on without.

    Raises:
      ConfigError: another run trains in it.
    """
    if jax.process_index():
        yield
        return
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(open(os.path.join(workdir, FILE), "a+"))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ConfigError(
                f"another train.py ({file.read() or 'unknown'}) is training in --workdir {workdir}; let it end, or "
                "name another"
            ) from None
        except OSError as error:
            log.info("no lock on %s (%s): see to it that no other run trains there", workdir, error.strerror)
        else:
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
        yield
