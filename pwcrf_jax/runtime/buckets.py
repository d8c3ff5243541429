"""Objects in a bucket of Google Cloud Storage, gs://BUCKET/NAME, as `files` needs them.

There are no folders, links, renames and appends: a folder is what names have in common up to a slash, and an object is
written whole or not at all. What is there may be asked for when it is replaced or deleted: each version of an object
has a number, its generation. Requests go through gcsfs, which has the credentials. Where the service cannot be reached,
it is asked again for `PATIENCE` seconds.
"""

import contextlib
import functools
import importlib.util
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar
from urllib.parse import quote

from pwcrf_jax.runtime.errors import FileError

StrPath = str | os.PathLike[str]
T = TypeVar("T")

PATIENCE = 180.0
"""Seconds in which a service that cannot be reached is asked again."""
PERIOD = 30.0
"""Seconds between two uploads of a log that grows."""
_URL = re.compile(r"gs://[a-z0-9][a-z0-9._-]{1,220}(/|$)")
_NEEDED = ("fsspec", "gcsfs")
_MISSING = 'buckets are read with gcsfs: pip install "pwcrf_jax[gcs]"'
# Of tensorstore, which has one kind of error.
_PASSES = re.compile(
    r"CURL error|retry attempts failed|http_response_code='(5\d\d|408|429)'|^(UNAVAILABLE|DEADLINE_EXC)"
)
_CLOSED = re.compile(r"Forbidden|PERMISSION_DENIED|UNAUTHENTICATED|http_response_code='40[13]'")
_THREADS = 16

log = logging.getLogger("pwcrf_jax")


class Entry(NamedTuple):
    """An object: bytes, version, and the time of that as text."""

    size: int
    generation: str
    updated: str


def is_url(path: StrPath) -> bool:
    """Whether a path is gs://..."""
    return os.fspath(path).startswith("gs://")


def is_well_formed(url: str) -> bool:
    """Whether a URL names a bucket, and with one slash between names what lies there."""
    words = url[5:].split("/")
    return bool(_URL.match(url)) and {"", ".", ".."}.isdisjoint(words) and url.isprintable()


def check(text: str, name: str) -> str:
    """A URL as a user gives it, without slashes at its end.

    name: of the flag or key, for the message.

    Raises:
      FileError: it names no bucket, or what reads buckets is not installed.
    """
    url = text.rstrip("/")
    if not is_well_formed(url):
        raise FileError(f"{name}={text}: is no gs://BUCKET/NAME of one slash between names; correct it")
    if not _installed():
        raise FileError(f"{name}={text}: {_MISSING}")
    return url


def _installed() -> bool:
    return all(map(importlib.util.find_spec, _NEEDED))


@functools.cache
def _system() -> Any:
    if not _installed():
        raise FileError(_MISSING)
    import fsspec

    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs tracebacks of what it raises anyway
    # For the one of epath, which Orbax has, too: another process changes what is listed.
    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
    return fsspec.filesystem("gcs")


def _asked(url: StrPath, what: str, call: Callable[[Any], T]) -> T:
    """What call(gcsfs) returns, asked again while the service cannot be reached.

    Raises:
      FileNotFoundError: there is no such object or bucket.
      FileExistsError: the object has another generation.
      FileError: everything else.
    """
    until, pause = time.monotonic() + PATIENCE, 0.5
    while True:
        try:
            return call(_system())
        except (FileNotFoundError, FileExistsError, FileError):
            raise
        except Exception as error:  # of several libraries
            if not passes(error) or time.monotonic() > until:
                raise _refused(url, what, error) from None
            log.warning("%s: the service cannot be reached (%s), trying again", os.fspath(url), _brief(error))
        time.sleep(pause)
        pause = min(2 * pause, 10.0)


def passes(error: BaseException | None) -> bool:
    """Whether an error, or one that led to it, is of a service that may be reached later."""
    import gcsfs.retry

    while error is not None:
        if isinstance(error, TimeoutError | ConnectionError) or gcsfs.retry.is_retriable(error):
            return True
        if type(error).__name__ == "TransportError":  # of google.auth, on the way to a token
            return True
        if isinstance(error, ValueError) and _PASSES.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def undecided(error: BaseException | None) -> bool:
    """Whether an error says nothing about what lies there: the service cannot be reached, or does not let us read."""
    if passes(error):
        return True
    while error is not None:
        if _CLOSED.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def _refused(url: StrPath, what: str, error: BaseException) -> FileError:
    text, code = _brief(error), str(getattr(error, "code", ""))
    if "Forbidden" in text or code == "403":
        why, remedy = "permission denied", "ask its owner for the role Storage Object User, or name another place"
    elif code == "401":
        why, remedy = "no credentials", "run gcloud auth application-default login"
    else:
        why, remedy = text, "see to the network, then start the same command again"
    return FileError(f"{os.fspath(url)} {what} ({why}); {remedy}")


def _brief(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:150]}".rstrip(": ")


def _no_bucket(url: StrPath) -> FileError:
    why = f"there is no bucket {_split(url)[0]}"
    return FileError(f"{os.fspath(url)} cannot be written ({why}); make it, or name another place")


def _split(url: StrPath) -> tuple[str, str]:
    """(bucket, name)"""
    bucket, _, key = os.fspath(url).removeprefix("gs://").partition("/")
    return bucket, key.rstrip("/")


def tree(url: StrPath) -> dict[str, Entry]:
    """{name below a folder: object}, all that lies there at any depth; {}: nothing. FileError."""
    prefix = _prefix(url)
    of = lambda item: Entry(int(item["size"]), item["generation"], item["updated"])
    items = (item for page in _pages(url) for item in page.get("items", ()))
    found = {item["name"][len(prefix) :]: of(item) for item in items}
    return {name: entry for name, entry in found.items() if name and not name.endswith("/")}  # those stand for folders


def names(url: StrPath) -> list[str]:
    """Names of what lies in a folder, objects and folders, sorted. FileError."""
    prefix, found = _prefix(url), set()
    for page in _pages(url, delimiter="/"):
        found |= {item["name"] for item in page.get("items", ())} | set(page.get("prefixes", ()))
    return sorted({name[len(prefix) :].rstrip("/") for name in found} - {""})


def _prefix(url: StrPath) -> str:
    key = _split(url)[1]
    return f"{key}/" if key else ""


def _pages(url: StrPath, **options: Any) -> Iterator[dict[str, Any]]:
    token: dict[str, Any] = {}
    while True:
        asked = dict(options, prefix=_prefix(url), **token)
        list_ = lambda fs, asked=asked: fs.call("GET", "b/{}/o", _split(url)[0], json_out=True, **asked)
        try:
            page = _asked(url, "cannot be listed", list_)
        except FileNotFoundError:  # no such bucket
            return
        yield page
        if not page.get("nextPageToken"):
            return
        token = {"pageToken": page["nextPageToken"]}


def is_object(url: StrPath) -> bool:
    """Whether there is an object of this very name. FileError."""
    try:
        return bool(_split(url)[1]) and bool(entry(url))
    except FileNotFoundError:
        return False


def is_folder(url: StrPath) -> bool:
    """Whether an object has a name below this. FileError."""
    pages, prefix = _pages(url, maxResults=2), _prefix(url)  # an object of that name itself stands for the folder
    return any(item["name"] != prefix for page in pages for item in page.get("items", ()))


def entry(url: StrPath) -> Entry:
    """An object's size and version. FileNotFoundError, FileError."""
    found = _asked(url, "cannot be read", lambda fs: fs.call("GET", "b/{}/o/{}", *_split(url), json_out=True))
    return Entry(int(found["size"]), found["generation"], found["updated"])


def read(url: StrPath) -> bytes:
    """The bytes of an object. FileNotFoundError, FileError."""
    return _asked(url, "cannot be read", lambda fs: fs.cat_file(os.fspath(url)))


def fetch(url: StrPath, file: str) -> None:
    """Writes the bytes of an object into a local file. FileNotFoundError, FileError; OSError of the disk."""
    _asked(url, "cannot be read", lambda fs: fs.get_file(os.fspath(url), file))


def write(url: StrPath, content: bytes) -> None:
    """Writes an object, whole or not at all. FileError."""
    try:
        _asked(url, "cannot be written", lambda fs: fs.pipe_file(os.fspath(url), content))
    except FileNotFoundError:
        raise _no_bucket(url) from None


def send(file: str, url: StrPath) -> None:
    """Writes an object from a local file, whole or not at all. FileError."""
    try:
        _asked(url, "cannot be written", lambda fs: fs.put_file(file, os.fspath(url)))
    except FileNotFoundError:
        raise _no_bucket(url) from None


def write_over(url: StrPath, content: bytes, generation: str) -> str:
    """Writes an object over that of a generation, "0": where there is none; returns its own generation.

    Raises:
      FileExistsError: another generation is there. Of a request that was sent twice it may be this very content.
      FileError: it cannot be written.
    """
    bucket, key = _split(url)

    def upload(fs: Any) -> dict[str, Any]:
        path = f"{fs.base.replace('/storage/', '/upload/storage/')}b/{quote(bucket)}/o"
        options = dict(uploadType="media", name=key, ifGenerationMatch=generation)
        return fs.call("POST", path, data=content, json_out=True, **options)

    try:
        return str(_asked(url, "cannot be written", upload)["generation"])
    except FileNotFoundError:
        raise _no_bucket(url) from None


def delete(url: StrPath, generation: str = "") -> None:
    """Deletes an object, if it is there and, where one is given, of that generation. FileError."""
    options = {"ifGenerationMatch": generation} if generation else {}
    try:
        _asked(url, "cannot be deleted", lambda fs: fs.call("DELETE", "b/{}/o/{}", *_split(url), **options))
    except (FileNotFoundError, FileExistsError):
        pass


def delete_tree(url: StrPath) -> None:
    """Deletes all that lies below a folder. FileError."""
    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(delete, [f"{os.fspath(url)}/{name}" for name in tree(url)]))


def copy_tree(url: StrPath, target: StrPath) -> None:
    """Copies all that lies below a folder, within the service. FileError."""
    copy = lambda name: _asked(
        url, "cannot be copied", lambda fs: fs.cp_file(f"{os.fspath(url)}/{name}", f"{os.fspath(target)}/{name}")
    )
    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(copy, tree(url)))


class Growing:
    """An object to append bytes to: what is written is kept here, and the whole uploaded by `sync`.

    `flush` uploads at most once in `PERIOD` seconds, so a process that is killed loses the last of them.

    Raises FileError from all of its methods: it cannot be read or written.
    """

    def __init__(self, url: StrPath):
        self._url, self._uploaded, self._changed = os.fspath(url), time.monotonic(), False
        self._whole = bytearray()
        with contextlib.suppress(FileNotFoundError):
            self._whole += read(url)

    def write(self, content: bytes) -> int:
        self._whole += content
        self._changed = True
        return len(content)

    def flush(self) -> None:
        if time.monotonic() - self._uploaded > PERIOD:
            self.sync()

    def sync(self) -> None:
        """Returns when all is uploaded."""
        if self._changed:
            self._upload()
            self._changed = False
        self._uploaded = time.monotonic()

    def _upload(self) -> None:
        write(self._url, bytes(self._whole))

    def close(self) -> None:
        self.sync()

    def __enter__(self) -> "Growing":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Parts(Growing):
    """The same as a row of objects URL, URL.00001, URL.00002, ...: each holds what came since the one before.

    For what its readers take in any number of files, and would be uploaded over and over again. The row is new.
    """

    def __init__(self, url: StrPath):
        super().__init__(url)
        self._number = 0

    def _upload(self) -> None:
        write(f"{self._url}.{self._number:05d}" if self._number else self._url, bytes(self._whole))
        self._number += 1
        self._whole.clear()
