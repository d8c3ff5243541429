"""What programs read from a disk alone, fetched from a bucket once a machine: `$XDG_CACHE_HOME/pwcrf_jax/buckets`.

A copy has the names below its bucket and the times of the objects, so the fingerprint of a data set is the same on each
machine. What has changed in the bucket is fetched again, what was deleted there is deleted.
"""

import contextlib
import datetime
import fcntl
import glob
import hashlib
import logging
import os
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

from pwcrf_jax.runtime import buckets, files
from pwcrf_jax.runtime.buckets import Entry
from pwcrf_jax.runtime.errors import FileError

_THREADS = 16
_STATE = ".state"  # beside a copy: {name: its `Entry`}
_TOLD = 2**26  # bytes from which on a line says what is fetched

log = logging.getLogger("pwcrf_jax")


def local(path: str) -> str:
    """A path on the disk: a local one as it is, of a URL a copy that is as the bucket is now; a file or a folder.

    Raises:
      FileError: there is nothing, it cannot be read, or the disk takes no more.
    """
    if not files.is_url(path):
        return path
    if entries := buckets.tree(path):
        return _copied(path, place(path), entries)
    try:
        entry = buckets.entry(path)
    except FileNotFoundError:
        raise FileError(f"{path} does not exist; correct the name, or ask for access to its bucket") from None
    folder, name = os.path.split(path)
    # A folder for each file, so that a copy of one is not taken for a copy of all.
    return os.path.join(_copied(folder, place(f"{folder}/.{_digest(name)}"), {name: entry}), name)


def place(url: str) -> str:
    """The folder on the disk that a copy of a URL has."""
    return os.path.join(files.cache_folder("buckets"), url.removeprefix("gs://"))


def origin(text: str) -> str:
    """A text with the URLs of what lies in copies of `local`, in place of the paths there; other paths as they are."""
    with contextlib.suppress(FileError):  # no home, no copies
        home = re.escape(files.cache_folder("buckets"))
        text = re.sub(rf"{home}/([^\s:,;']*/)?\.[0-9a-f]{{16}}/", r"gs://\1", text)
        text = re.sub(f"{home}/", "gs://", text)
    return text


def pattern(path: str) -> str:
    """`local` of a path whose parts may be patterns, such as "gs://BUCKET/*/*.jpg": of what lies above the first."""
    parts = path.split("/")
    first = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts))
    return os.path.join(local("/".join(parts[:first])), *parts[first:]) if files.is_url(path) else path


def _copied(url: str, folder: str, entries: Mapping[str, Entry]) -> str:
    for name in entries:
        if not {"", ".", ".."}.isdisjoint(name.split("/")) or "\0" in name:
            raise FileError(f"{url}/{name!r} is no name of a file; rename that object")
    with files.naming(folder, "cannot be written"), locked(folder):
        known = _known(folder)
        here = {name for name in entries if os.path.isfile(os.path.join(folder, name))}
        wanted = {name: entry for name, entry in entries.items() if name not in here or known.get(name) != entry}
        size = sum(entry.size for entry in wanted.values())
        if size > _TOLD:
            log.info("fetching %d objects, %.2f GB, from %s to %s", len(wanted), size / 1e9, url, folder)
        for name in known.keys() - entries.keys():
            with contextlib.suppress(OSError):
                os.unlink(os.path.join(folder, name))
        with ThreadPoolExecutor(_THREADS) as pool:
            list(pool.map(lambda item: _fetch(url, folder, *item), wanted.items()))
        if wanted or known.keys() != entries.keys():
            files.write_json(folder + _STATE, entries)
    return folder


def _known(folder: str) -> dict[str, Entry]:
    try:
        return files.read_json(
            folder + _STATE, "it is written again", lambda found: {name: Entry(*entry) for name, entry in found.items()}
        )
    except OSError:
        return {}


def _fetch(url: str, folder: str, name: str, entry: Entry) -> None:
    path = os.path.join(folder, name)
    partial = f"{folder}{_STATE}-{_digest(name)}"
    os.makedirs(os.path.dirname(path), exist_ok=True)
    _fetch_one(f"{url}/{name}", partial)
    if (size := os.path.getsize(partial)) != entry.size:
        raise FileError(f"{url}/{name} has {size} bytes instead of {entry.size}; start the same command again")
    written = datetime.datetime.fromisoformat(entry.updated)
    os.utime(partial, ns=(time := int(written.timestamp()) * 10**9 + written.microsecond * 1000, time))
    os.replace(partial, path)


def _digest(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()[:16]


@contextlib.contextmanager
def locked(folder: str) -> Iterator[None]:
    """Keeps other processes of this machine from fetching into a folder, which is made; they wait. Raises OSError."""
    os.makedirs(folder, exist_ok=True)
    number = os.open(f"{folder}.lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        with contextlib.suppress(OSError):  # no locks on that disk
            fcntl.flock(number, fcntl.LOCK_EX)
        yield
    finally:
        os.close(number)


def fetch(url: str, folder: str, names: list[str]) -> None:
    """Reads objects into files of a folder, whose own folders are there. FileError; OSError of the disk."""
    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(lambda name: _fetch_one(f"{url}/{name}", os.path.join(folder, name)), names))


def _fetch_one(url: str, file: str) -> None:
    try:
        buckets.fetch(url, file)
    except FileNotFoundError:
        raise FileError(f"{url} was deleted meanwhile; start the same command again") from None


def send(folder: str, url: str, names: list[str]) -> None:
    """Writes files of a folder into a bucket, each whole or not at all. FileError."""
    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(lambda name: buckets.send(os.path.join(folder, name), f"{url}/{name}"), names))
