"""JAX's persistent compilation cache: a run that is started again does not compile again.

An entry is machine code that this process will run, so it lies in a folder of the user's own, never in a workdir, which
may come from somebody else. JAX writes an entry in place and never writes it twice, so a killed process may leave half
of one for good; and where zstandard is installed, entries have no checksum: a flipped bit may be another program. So
whole entries are hashed into an index, and what does not agree with it is deleted before JAX reads it. Of processes
that run at once, one may delete what another has not sealed yet, which is then compiled again.
"""

import atexit
import contextlib
import hashlib
import os
import stat

import jax
from jax.experimental.compilation_cache import compilation_cache

from pwcrf_jax.runtime import files
from pwcrf_jax.runtime.logs import log

LIMIT = 2**29
"""Bytes that a start leaves in the folder, at most; the newest entries stay."""
_INDEX = "index.json"

_folder: str | None = None


def user_folder() -> str:
    """$XDG_CACHE_HOME/pwcrf_jax/programs, by default ~/.cache/pwcrf_jax/programs.

    Raises:
      FileError: the user has no home.
    """
    return files.cache_folder("programs")


def use() -> None:
    """From here on this process keeps what it compiles for its user's next start. Call it before any of that.

    Where that cannot be it says so and goes on without. A cache that JAX was given otherwise, such as by
    JAX_COMPILATION_CACHE_DIR, stays as it is.
    """
    global _folder
    if jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]  # made at run time by jax.config
        return
    try:
        folder = user_folder()
        _claim(folder)
        _delete_damaged(folder)
    except OSError as error:
        log.info("no compilation cache: %s", error)
        return
    compilation_cache.set_cache_dir(folder)
    compilation_cache.reset_cache()  # else a folder that was in use before would stay
    if _folder is None:
        atexit.register(seal)
    _folder = folder


def seal() -> None:
    """Writes down what the cache holds now; what a process that was killed did not seal is compiled again."""
    if _folder is None:
        return
    with contextlib.suppress(OSError):  # a full disk, a folder deleted meanwhile: the entries are not trusted then
        names, known = [entry.name for entry in _entries(_folder)], _read_index(_folder)
        if set(names) != set(known):
            _write_index(_folder, {name: known.get(name) or _hash(_folder, name) for name in names})


def _claim(folder: str) -> None:
    """Makes the folder; refuses one into which somebody else could put a program."""
    os.makedirs(os.path.dirname(os.path.dirname(folder)), exist_ok=True)
    for place in (os.path.dirname(folder), folder):
        with contextlib.suppress(FileExistsError):
            os.mkdir(place, 0o700)
        about = os.lstat(place)
        if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.geteuid() or about.st_mode & 0o022:
            raise files.FileError(
                f"{place} must be a folder of your own, into which nobody else can write (chmod 700); move it away"
            )
    files.make_folder(folder)


def _delete_damaged(folder: str) -> None:
    known, room = _read_index(folder), LIMIT
    whole: dict[str, str] = {}
    for entry in sorted(_entries(folder), key=lambda entry: -entry.stat().st_mtime_ns):
        room -= entry.stat().st_size
        if room >= 0 and known.get(entry.name) == _hash(folder, entry.name):
            whole[entry.name] = known[entry.name]
        else:
            os.remove(entry.path)
    _write_index(folder, whole)


def _entries(folder: str) -> list[os.DirEntry[str]]:
    """JAX's own files; folders hold caches of XLA, which has checks of its own."""
    with os.scandir(folder) as found:
        return [entry for entry in found if entry.name.endswith("-cache") and entry.is_file(follow_symlinks=False)]


def _hash(folder: str, name: str) -> str:
    with open(os.path.join(folder, name), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_index(folder: str) -> dict[str, str]:
    try:
        return files.read_json(os.path.join(folder, _INDEX), "it is written again", dict)
    except OSError:
        return {}


def _write_index(folder: str, index: dict[str, str]) -> None:
    files.write_json(os.path.join(folder, _INDEX), index)
