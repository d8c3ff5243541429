"""What programs read from a disk alone, fetched from a bucket once a machine, into `$XDG_CACHE_HOME/pwcrf_jax`.

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
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

from pwcrf_jax.runtime import buckets, files
from pwcrf_jax.runtime.buckets import Entry
from pwcrf_jax.runtime.errors import FileError

_THREADS = 16
_TREES, _FILES, _STATES = "buckets", "bucket_files", "bucket_states"  # in the cache: copies of folders, of single files
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
        return _copied(path, place(path), entries, path)
    try:
        entry = buckets.entry(path)
    except FileNotFoundError:
        raise FileError(f"{path} does not exist; correct the name, or ask for access to its bucket") from None
    folder, name = os.path.split(path)
    home = os.path.join(files.cache_folder(_FILES), folder.removeprefix("gs://"))
    return os.path.join(_copied(folder, home, {name: entry}, path), name)


def place(url: str) -> str:
    """The folder on the disk that a copy of a URL has."""
    return os.path.join(files.cache_folder(_TREES), url.removeprefix("gs://"))


def origin(text: str) -> str:
    """A text with the URLs of what lies in copies of `local`, in place of the paths there; other paths as they are."""
    with contextlib.suppress(FileError):  # no home, no copies
        for name in (_TREES, _FILES):
            text = text.replace(f"{files.cache_folder(name)}/", "gs://")
    return text


def pattern(path: str) -> str:
    """`local` of a path whose parts may be patterns, such as "gs://BUCKET/*/*.jpg": of what lies above the first."""
    parts = path.split("/")
    first = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts))
    return os.path.join(local("/".join(parts[:first])), *parts[first:]) if files.is_url(path) else path


def _copied(url: str, folder: str, entries: Mapping[str, Entry], asked: str) -> str:
    state = os.path.join(files.cache_folder(_STATES), _digest(asked))  # {name: `Entry`} of what was fetched for this
    for name in entries:
        if not {"", ".", ".."}.isdisjoint(name.split("/")) or "\0" in name:
            raise FileError(f"{url}/{name!r} is no name of a file; rename that object")
    with files.naming(folder, "cannot be written"), _locked(state):
        known = _known(state)
        here = {name for name in entries if os.path.isfile(os.path.join(folder, name))}
        wanted = {name: entry for name, entry in entries.items() if name not in here or known.get(name) != entry}
        size = sum(entry.size for entry in wanted.values())
        if size > _TOLD:
            log.info("fetching %d objects, %.2f GB, from %s to %s", len(wanted), size / 1e9, url, folder)
        for name in known.keys() - entries.keys():
            with contextlib.suppress(OSError):
                os.unlink(os.path.join(folder, name))
        with ThreadPoolExecutor(_THREADS) as pool:
            list(pool.map(lambda item: _fetch(url, folder, state, *item), wanted.items()))
        if wanted or known.keys() != entries.keys():
            files.write_json(f"{state}.json", entries)
    return folder


def _known(state: str) -> dict[str, Entry]:
    try:
        return files.read_json(
            f"{state}.json", "it is written again", lambda found: {name: Entry(*entry) for name, entry in found.items()}
        )
    except OSError:
        return {}


def _fetch(url: str, folder: str, state: str, name: str, entry: Entry) -> None:
    path = os.path.join(folder, name)
    partial = f"{state}-{_digest(name)}"
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
def _locked(state: str) -> Iterator[None]:
    """Keeps other processes of this machine from fetching the same; they wait. Raises OSError."""
    os.makedirs(os.path.dirname(state), exist_ok=True)
    number = os.open(f"{state}.lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
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
