"""A save of Orbax' that goes on in the background, into a bucket; and errors of Orbax in one line."""

import errno
import os
import time
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from pwcrf_jax.runtime import buckets
from pwcrf_jax.runtime.logs import log

_INSISTS = 600.0  # seconds in which a save is begun again


class Insistent:
    """A save into a bucket, which begins again where the service could not be reached: it waits, but is not lost."""

    def __init__(self, path: str, whole: Any):
        self._path, self._whole, self._until = path, whole, time.monotonic() + _INSISTS
        self._begin()

    def _begin(self) -> None:
        while True:
            try:
                self._response = ocp.save_checkpointables_async(self._path, self._whole)
                return
            except Exception as error:  # Orbax raises many kinds
                self._clear(error)

    def _clear(self, error: Exception) -> None:
        # Of several processes each would have to know.
        if jax.process_count() > 1 or time.monotonic() > self._until or not buckets.passes(error):
            raise error
        log.warning("%s could not be written (%s), saving it again", self._path, reason(error))
        buckets.delete_tree(self._path)

    def result(self, timeout: float | None) -> None:
        """Returns when it is written. TimeoutError: it is not yet; other errors: it cannot be."""
        while True:
            try:
                return self._response.result(timeout)
            except Exception as error:  # Orbax raises many kinds
                if timeout is not None and isinstance(error, TimeoutError):
                    raise
                self._clear(error)
            self._begin()


def reason(error: BaseException) -> str:
    """A library's error in one short line."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split())
    for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO):
        if os.strerror(code) in text:
            return os.strerror(code)
    text = text[max(text.find("CURL error"), 0) :]  # tensorstore names all that it was doing first
    return f"{type(error).__name__}: {text[:150]}".rstrip(": ")
