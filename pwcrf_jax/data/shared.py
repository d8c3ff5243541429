"""Prepared data sets in a bucket: prepared by one machine, fetched by the others, read from their own disks.

array_record and TFDS read local files. So data.data_dir = gs://BUCKET/SETS has a copy on each machine, in which a set
is prepared or into which it is fetched. In the bucket it is there when its object `whole.json` is, which comes last.
"""

import contextlib
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from pwcrf_jax.runtime import buckets, files, leases, mirror

_WHOLE = "whole.json"
_LOCK = "prepare.lock"

log = logging.getLogger(__name__)


@contextlib.contextmanager
def prepared(url: str, home: Path) -> Iterator[Callable[[], None]]:
    """In here a set is prepared in the folder `home`, unless it is there; yields what is to be called when it is.

    url: of the set in the bucket; "": it is of this disk alone, and nothing is done.

    Raises:
      FileError: the bucket, or the disk, cannot be read or written.
    """
    if not url:
        yield lambda: None
        return
    if _is_whole(url):
        _fetch(url, home)
        yield lambda: None
        return
    waits = f"another process prepares {url}; waiting for it"
    lost = lambda holder: log.warning("%s prepares %s too", holder, url)
    with leases.held(f"{url}/{_LOCK}", lost, lambda line: log.warning("%s", line), waits):
        if _is_whole(url):
            _fetch(url, home)
            yield lambda: None
        else:
            yield lambda: _send(url, home)


def _is_whole(url: str) -> bool:
    return buckets.is_object(f"{url}/{_WHOLE}")


def _is_prepared(home: Path) -> bool:
    return next(home.glob("[0-9]*"), None) is not None


def _fetch(url: str, home: Path) -> None:
    if _is_prepared(home):
        return
    names = files.read_json(f"{url}/{_WHOLE}", "delete it, the set is then prepared again", list)
    with files.naming(home, "cannot be written"):
        for leftover in home.glob("incomplete.*"):
            shutil.rmtree(leftover, ignore_errors=True)
        part = home / "incomplete.fetched"
        for name in names:
            (part / name).parent.mkdir(parents=True, exist_ok=True)
        mirror.fetch(url, str(part), names)
        for folder in part.iterdir():  # one, of the version
            os.rename(folder, home / folder.name)
        part.rmdir()
    log.info("fetched the prepared set %s to %s", url, home)


def _send(url: str, home: Path) -> None:
    paths = (path for version in home.glob("[0-9]*") for path in sorted(version.rglob("*")) if path.is_file())
    names = [str(path.relative_to(home)) for path in paths]
    mirror.send(str(home), url, names)
    files.write_json(f"{url}/{_WHOLE}", names)
    log.info("sent the prepared set to %s", url)
