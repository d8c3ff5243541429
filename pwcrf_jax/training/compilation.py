"""JAX's persistent compilation cache: a run that is started again does not compile again.

JAX writes an entry in place and never writes it twice, so a killed process may leave half of one for good; and where
zstandard is installed, entries have no checksum: a flipped bit may be another program. So whole entries are hashed into
an index, and what does not agree with it is deleted before JAX reads it.
"""

import atexit
import hashlib
import json
import os

import jax
from jax.experimental.compilation_cache import compilation_cache

from pwcrf_jax.training.logs import log

FOLDER = "compile_cache"  # in a workdir; it may be deleted at any time
_INDEX = "index.json"

_folder = None


def use(folder: str) -> None:
    """From here on this process keeps what it compiles in a folder and takes it from there. Call it before any of that.

    Where that cannot be it says so and goes on without. A cache that JAX was given otherwise, such as by
    JAX_COMPILATION_CACHE_DIR, stays as it is. The folder is not made before there is something to keep.
    """
    global _folder
    if jax.config.jax_compilation_cache_dir:
        return
    folder = os.path.abspath(folder)
    try:
        if os.path.lexists(folder):
            _delete_damaged(folder)
        elif not os.access(_nearest(folder), os.W_OK):
            raise PermissionError(13, "Permission denied")
    except OSError as error:
        log.info("no compilation cache: %s (%s)", folder, error.strerror or error)
        return
    compilation_cache.set_cache_dir(folder)
    compilation_cache.reset_cache()  # else a folder that was in use before would stay
    _folder = folder
    atexit.register(seal)


def seal() -> None:
    """Writes down what the cache holds now; what a process that was killed did not seal is compiled again."""
    if _folder is None:
        return
    try:
        names, known = _entries(_folder), _read_index(_folder)
        if set(names) != set(known):
            _write_index(_folder, {name: known.get(name) or _hash(_folder, name) for name in names})
    except OSError:  # a full disk, a folder deleted meanwhile: the entries are not trusted then
        pass


def _delete_damaged(folder):
    known = _read_index(folder)
    whole = {name: known[name] for name in _entries(folder) if known.get(name) == _hash(folder, name)}
    for name in _entries(folder):
        if name not in whole:
            os.remove(os.path.join(folder, name))
    _write_index(folder, whole)


def _entries(folder):
    """Files of JAX's own; folders hold caches of XLA, which has checks of its own."""
    paths = os.scandir(folder) if os.path.lexists(folder) else ()
    return sorted(x.name for x in paths if x.is_file() and not x.name.startswith(_INDEX))


def _hash(folder, name):
    with open(os.path.join(folder, name), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_index(folder):
    try:
        with open(os.path.join(folder, _INDEX)) as file:
            index = json.load(file)
    except (FileNotFoundError, ValueError):
        index = {}
    return index if isinstance(index, dict) else {}


def _write_index(folder, index):
    partial = os.path.join(folder, f"{_INDEX}.partial")
    with open(partial, "w") as file:
        json.dump(index, file, indent=1)
    os.replace(partial, os.path.join(folder, _INDEX))


def _nearest(path):
    while not os.path.lexists(path):
        path = os.path.dirname(path)
    return path
