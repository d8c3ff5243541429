"""Files and folders: one way to write a file, to append to one, to read JSON, and to take a path from a user.

A workdir or an output folder may come from somebody else, with links to files that are not theirs: what is written here
never goes through a link. What cannot be done is a `FileError` that names the file and the remedy.

A path may be a URL gs://BUCKET/NAME, whose objects `buckets` reads and writes: so other rooms join paths with
`os.path.join`, ask `exists`, `is_folder`, `names` and `absolute` here, and take what must lie on a disk from `mirror`.
"""

import contextlib
import errno
import fcntl
import io
import json
import os
import re
import secrets
import stat
import tempfile
from collections.abc import Callable, Iterator
from typing import IO, Any

from pwcrf_jax.runtime import buckets
from pwcrf_jax.runtime.buckets import StrPath, is_url
from pwcrf_jax.runtime.errors import FileError

_REMEDIES = {
    errno.ENOSPC: "make room on its disk",
    errno.EDQUOT: "make room, your quota is used up",
    errno.EFBIG: "raise the limit of file sizes, or name another disk",
    errno.EROFS: "its disk is read-only, name another place",
    errno.EACCES: "change the permissions, or name another place",
    errno.EPERM: "change the permissions, or name another place",
    errno.ENAMETOOLONG: "take a shorter name",
    errno.EIO: "look at its disk",
    errno.ELOOP: "it is a link: delete the link, or name another place",
}
_URL = re.compile(r"\s*[A-Za-z][A-Za-z0-9+.-]+:/")  # one slash is what is left of two where paths were normalised
_LOCAL = ("config", "scores", "masks", "classes", "parameters", "config.data.scores.dir")  # flags that take no URL
_LARGEST_JSON = 2**26  # bytes; no file of ours comes near
_UNFINISHED = re.compile(r"\.[0-9a-f]{16}\.partial")


def refused(path: StrPath, what: str, error: OSError) -> FileError:
    """The `FileError` of what the system refused; what: such as "cannot be written"."""
    remedy = _REMEDIES.get(error.errno or 0, "name another place")
    made = FileError(f"{os.fspath(path)} {what} ({error.strerror or error}); {remedy}")
    made.errno = error.errno
    return made


@contextlib.contextmanager
def naming(path: StrPath, what: str) -> Iterator[None]:
    """In here an OSError becomes the `FileError` of `refused`."""
    try:
        yield
    except FileError:
        raise
    except OSError as error:
        raise refused(path, what, error) from None


def expand_path(text: StrPath, name: str) -> str:
    """A path as a user gives it, with "~" and "~user" expanded, or the URL of a bucket.

    name: of the flag or key, for the message.

    Raises:
      FileError: a URL that cannot be read or written, or a home that is not known.
    """
    text = os.fspath(text)
    if is_url(text) and name.lstrip("-") not in _LOCAL:
        return buckets.check(text, name)
    if _URL.match(text):
        others = "" if name.lstrip("-") in _LOCAL else " and gs://BUCKET/NAME"
        raise FileError(
            f"{name}={text}: only local paths{others} can be used; mount it or copy it, and name that folder"
        )
    if "\0" in text:
        raise FileError(f"{name}={text!r}: a path has no NUL; leave it out")
    if not text.startswith("~"):
        return text
    first = text.partition("/")[0]
    home = "" if first == "~" and os.environ.get("HOME") == "" else os.path.expanduser(first)
    if not os.path.isabs(home):
        who = "you have" if first == "~" else f"{first[1:]!r} has"
        raise FileError(
            f"{name}={text}: {who} no home folder here; write the path in full (./~ is a folder of that name)"
        )
    return os.path.expanduser(text)


def check_local(path: str, name: str) -> None:
    """Refuses a URL where only a local path can be used; name: of the flag. FileError."""
    if is_url(path):
        raise FileError(f"{name}={path}: only local paths can be used here; mount it or copy it, and name that folder")


def absolute(path: StrPath) -> str:
    """The path from the root; of a URL itself."""
    return os.fspath(path) if is_url(path) else os.path.abspath(path)


def exists(path: StrPath) -> bool:
    """Whether something is there, a link to nothing too."""
    return buckets.is_object(path) or buckets.is_folder(path) if is_url(path) else os.path.lexists(path)


def is_folder(path: StrPath) -> bool:
    """Whether a folder, or a link to one, is there; one of a bucket is there when something is in it."""
    return buckets.is_folder(path) if is_url(path) else os.path.isdir(path)


def names(folder: StrPath) -> list[str]:
    """Names of what is in a folder, in any order; []: also where there is none."""
    if is_url(folder):
        return buckets.names(folder)
    return os.listdir(folder) if os.path.isdir(folder) else []


def cache_folder(name: str) -> str:
    """$XDG_CACHE_HOME/pwcrf_jax/NAME, by default ~/.cache/pwcrf_jax/NAME. It need not be there.

    Raises:
      FileError: the user has no home.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):  # the rules of XDG: it is to be ignored then
        base = expand_path("~/.cache", "no $XDG_CACHE_HOME; its default")
    return os.path.join(base, "pwcrf_jax", name)


def make_folder(path: StrPath, inside: StrPath = "") -> None:
    """Makes a folder that can be written, and those above it, where they are not there.

    inside: of the folders below this one none may be a link; "": `path` may be what the user likes, a link too.

    Raises:
      FileError: it cannot be made or written, or a folder is a link.
    """
    if is_url(path):
        if not inside:  # else that was tried
            probe = _partial(os.fspath(path))
            buckets.write(probe, b"")
            buckets.delete(probe)
        return
    if inside:
        check_folder(path, inside)
    with naming(path, "cannot be written"):
        os.makedirs(path, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()


def check_folder(path: StrPath, inside: StrPath) -> None:
    """Refuses a folder that is a link, or lies below `inside` by way of one. It need not be there.

    Raises:
      FileError: naming the link.
    """
    if is_url(path):
        return  # buckets have no links
    place, end = os.path.abspath(path), os.path.abspath(inside)
    while len(place) > len(end):
        if os.path.islink(place):
            raise FileError(
                f"{place} is a link, which is not followed; delete it, or put the folder itself in its place"
            )
        place = os.path.dirname(place)


def check_replaceable(path: StrPath) -> None:
    """Refuses what `replacing` cannot replace: a folder, or what is no file, such as /dev/null; FileError."""
    if is_url(path):
        return  # any name may be that of an object
    with naming(path, "cannot be written"):
        folder, name = os.path.split(os.path.abspath(path))
        # Of /dev/stdout, too, which root would replace for the whole machine: where it leads may be a file.
        if f"{os.path.realpath(folder)}/".startswith(("/proc/", "/sys/")) or os.path.realpath(folder) == "/dev":
            raise OSError(errno.EINVAL, "it is no file")
        if len(os.fsencode(name)) > os.pathconf(folder, "PC_NAME_MAX"):
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        if os.path.exists(path) and not os.path.isfile(path):
            raise OSError(errno.EINVAL, "it is a folder" if os.path.isdir(path) else "it is no file")


class _WithoutNumber(io.FileIO):
    """Does not tell its descriptor: with it Pillow and NumPy write past us, and do not say that a disk was full."""

    def fileno(self) -> int:
        raise io.UnsupportedOperation("fileno")


@contextlib.contextmanager
def replacing(path: StrPath) -> Iterator[IO[bytes]]:
    """A binary file to write, which takes the place of `path` when it is whole, and is on the disk then.

    Until then it has a name of its own in the same folder; a link at `path` is replaced, not followed. If the body
    raises, `path` is as it was.

    Raises:
      FileError: it cannot be written, or `path` is a folder or a device.
    """
    if is_url(path):
        with io.BytesIO() as whole:
            yield whole
            buckets.write(path, whole.getvalue())
        return
    path = os.path.abspath(path)
    folder = os.path.dirname(path)
    partial = _partial(folder)
    check_replaceable(path)
    with naming(path, "cannot be written"):
        # Mode as the umask says: other users of a group's folder read what is written there.
        number = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            with io.BufferedWriter(_WithoutNumber(number, "wb")) as file:
                with contextlib.suppress(OSError):  # tells `delete_unfinished` that it is being written
                    fcntl.flock(number, fcntl.LOCK_SH | fcntl.LOCK_NB)
                yield file
                file.flush()
                os.fsync(number)
                os.replace(partial, path)
            sync_folder(folder)
        finally:
            with contextlib.suppress(OSError):
                os.unlink(partial)


def _partial(folder: str) -> str:
    """A name in a folder that nobody else has."""
    return os.path.join(folder, f".{secrets.token_hex(8)}.partial")


def write(path: StrPath, content: bytes | str) -> None:
    """Writes a file, whole or not at all, see `replacing`; text as UTF-8."""
    with replacing(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def write_json(path: StrPath, content: Any) -> None:
    """Writes plain JSON values, whole or not at all, see `replacing`."""
    write(path, json.dumps(content, indent=2) + "\n")


def sync_folder(folder: StrPath) -> None:
    """Returns when the names in a folder are on the disk; nothing where the file system does not know of that."""
    with contextlib.suppress(PermissionError):  # it may be written, not read
        number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(number)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise
        finally:
            os.close(number)


def sync_tree(folder: StrPath) -> None:
    """Returns when a folder with all files below it is on the disk, its own name too. Raises OSError."""
    if is_url(folder):
        return  # what was written there is kept
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(PermissionError):
                number = os.open(os.path.join(place, name), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
                try:
                    os.fsync(number)
                finally:
                    os.close(number)
        sync_folder(place)
    sync_folder(os.path.dirname(os.path.abspath(folder)))


def delete_unfinished(folder: StrPath) -> None:
    """Deletes what writers that were killed have left in a folder; not what another process is writing."""
    if is_url(folder):
        for name in filter(_UNFINISHED.fullmatch, buckets.names(folder)):
            buckets.delete(os.path.join(folder, name))
        return
    for name in filter(_UNFINISHED.fullmatch, os.listdir(folder)):
        path = os.path.join(folder, name)
        with contextlib.suppress(OSError):
            with open(open_regular(path, os.O_RDWR | os.O_NOFOLLOW), "rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(path)


def append(path: StrPath) -> IO[bytes] | buckets.Growing:
    """Opens a file to append bytes; it is made where it is not there. In a bucket it is a `buckets.Growing`.

    Raises:
      FileError: it cannot be written, or is a link or no file.
    """
    if is_url(path):
        return buckets.Growing(path)
    with naming(path, "cannot be written"):
        return open(open_regular(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW), "ab")


def sync(file: IO[bytes] | buckets.Growing) -> None:
    """Returns when what was written to a file of `append` is on the disk, or in the bucket. Raises OSError."""
    if isinstance(file, buckets.Growing):
        file.sync()
    else:
        os.fsync(file.fileno())


def read_lines(path: StrPath) -> list[str]:
    """The lines of a text file with their ends, as `append` wrote them; [] where there is none.

    Raises:
      FileError: it cannot be read, or is a link or no file.
    """
    if is_url(path):
        try:
            return io.StringIO(buckets.read(path).decode(errors="replace"), newline=None).readlines()
        except FileNotFoundError:
            return []
    if not os.path.lexists(path):
        return []
    with naming(path, "cannot be read"):
        with open(open_regular(path, os.O_RDONLY | os.O_NOFOLLOW), errors="replace") as file:
            return file.readlines()


def open_regular(path: StrPath, flags: int) -> int:
    """A descriptor of a regular file, which for a FIFO does not wait for its other end. Raises OSError."""
    number = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise OSError(errno.EINVAL, "it is no file")
    return number


def read_json(path: StrPath, remedy: str, check: Callable[[Any], Any] = lambda content: content) -> Any:
    """Reads a JSON file: returns what check(content) makes of it. FileNotFoundError where there is none.

    remedy: what to do with one that cannot be used.
    check: raises ValueError, TypeError, KeyError, IndexError or AttributeError for content of another shape.

    Raises:
      FileError: it cannot be read, is not JSON or has another shape.
    """
    try:
        if is_url(path):
            return check(json.loads(buckets.read(path)))
        with open(open_regular(path, os.O_RDONLY), "rb") as file:
            if not 0 < (size := os.fstat(file.fileno()).st_size) < _LARGEST_JSON:
                raise ValueError(f"it has {size} bytes")
            text = file.read().decode()
        return check(json.loads(text))
    except (FileNotFoundError, FileError):
        raise
    except OSError as error:
        raise refused(path, "cannot be read", error) from None
    except RecursionError:
        reason = "it is nested too deep"
    except KeyError as error:
        reason = f"there is no {error}"
    except (ValueError, TypeError, IndexError, AttributeError, OverflowError) as error:
        reason = " ".join(str(error).split())[:200]
    raise FileError(f"{os.fspath(path)} cannot be used ({reason}); {remedy}")
