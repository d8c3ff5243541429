"""Checkpoints with Orbax; the rest of the package does not see its API.

Layout of a workdir: `config.json`; `checkpoints/STEP`, the newest whole training states; `best/STEP`, parameters of the
best evaluation so far. Orbax writes to a temporary folder and renames it, so what is visible was whole once. Whether it
still is, is asked on reading: Orbax loads arrays with flipped bits without a word, so a hash of each leaf lies beside
them. A checkpoint that is damaged is passed over for the one before.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

import pwcrf_jax
from pwcrf_jax.runtime import buckets, files, saves, step_folders
from pwcrf_jax.runtime.logs import log

_NOTE = "note.json"  # in STEP
_META_OF_0_1 = {"samples_seen", "score", "unary_steps", "miou_all", "step", "model", "leaves"}

Tree = Any
"""A tree of arrays, or of what has their shape and dtype."""
T = TypeVar("T")


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, belongs to another model or cannot be written."""


class _Damaged(Exception):
    """Why one checkpoint cannot be used."""


@functools.cache
def versions() -> dict[str, str]:
    """Versions of the packages that decide what a run computes."""
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    return {"pwcrf_jax": pwcrf_jax.__version__} | {name: importlib.metadata.version(name) for name in packages}


def _named(tree: Tree) -> dict[str, Any]:
    """{"params/unary/last/bias": leaf, ...}"""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat}


def leaves(tree: Tree) -> dict[str, list]:
    """{"params/unary/last/bias": ["float32", [11]], ...}: what a checkpoint holds, in a form JSON keeps."""
    return {name: [jnp.dtype(x.dtype).name, list(x.shape)] for name, x in _named(tree).items()}


def hashes(tree: Tree) -> dict[str, str]:
    """{"params/unary/last/bias": SHA-256 of the bytes of that NumPy array, ...}"""
    digest = lambda x: hashlib.sha256(np.ascontiguousarray(x).reshape(-1).view(np.uint8).data).hexdigest()
    named = _named(tree)
    with ThreadPoolExecutor() as pool:  # hashing releases the interpreter
        return dict(zip(named, pool.map(digest, named.values()), strict=True))


def _sealed(values: Mapping[str, Any]) -> dict[str, str]:
    """JSON values as text, with its hash."""
    text = json.dumps(values)
    return {"json": text, "sha256": hashlib.sha256(text.encode()).hexdigest()}


def _unsealed(sealed: Mapping[str, str]) -> dict[str, Any]:
    """The JSON values of `_sealed`; {} where the hash is of another text."""
    whole = hashlib.sha256(sealed["json"].encode()).hexdigest() == sealed["sha256"]
    return dict(json.loads(sealed["json"])) if whole else {}


def _check_same(saved: Mapping[str, Any], wanted: Mapping[str, Any], where: str) -> None:
    for name in [*wanted, *saved]:
        if saved.get(name) != wanted.get(name):
            say = lambda value: "absent" if value is None else repr(value)
            raise CheckpointError(
                f"{where} belongs to another model: {name} is {say(saved.get(name))} in the checkpoint and "
                f"{say(wanted.get(name))} in the model of this config. Use another --workdir, or the config it was "
                f"trained with (config.json there)"
            )


def exists(folder: str) -> bool:
    """Whether a folder holds a checkpoint."""
    return bool(step_folders.steps(folder))


def config_of(workdir: str) -> tuple[dict, str] | None:
    """The configuration that the newest whole checkpoint of a workdir carries, and its folder; None: none does."""
    for kind in ("checkpoints", "best"):
        folder = os.path.join(files.absolute(workdir), kind)
        for step in reversed(step_folders.steps(folder)):
            with contextlib.suppress(_Damaged, KeyError):
                path = os.path.join(folder, str(step))
                return dict(_read_meta(path, step)["config"]), path
    return None


def _read_meta(path: str, step: int) -> dict[str, Any]:
    stored = _load(path, {"meta": None})["meta"]
    try:
        if "json" in stored:
            meta = _unsealed(stored)
        else:
            meta = stored if stored.keys() <= _META_OF_0_1 else {}
        same_step = meta["step"] == step
        _ = dict(meta["model"]), dict(meta["leaves"]), list(meta.get("class_names") or ())
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError):
        raise _Damaged("its meta is not what was saved") from None
    if not same_step:
        raise _Damaged(f"it holds step {meta['step']}")
    return meta


def _load(path: str, abstract: Tree) -> dict[str, Any]:
    until = time.monotonic() + buckets.PATIENCE
    while True:
        try:
            return ocp.load_checkpointables(path, abstract)
        except Exception as error:  # Orbax raises many kinds for damaged files
            if not files.is_url(path) or not buckets.passes(error) or time.monotonic() > until:
                raise _unread(path, error) from error
        time.sleep(1)


def _unread(path: str, error: Exception) -> Exception:
    if files.is_url(path) and buckets.undecided(error):
        return CheckpointError(
            f"{path} cannot be read ({saves.reason(error)}); see to the network and your permissions, then start the "
            "same command again"
        )
    return _Damaged(saves.reason(error))


class Store:
    """One folder of checkpoints. Each holds named trees of arrays and a `meta` dict of plain JSON values."""

    def __init__(
        self,
        folder: str,
        model: dict[str, Any],
        keep: int | None = None,
        class_names: Sequence[str] = (),
        score: str = "",
    ):
        """model: `config.identity` of the model whose checkpoints these are.

        keep: how many of the newest checkpoints stay; None to read only, which changes nothing in the folder.
        class_names: of the data set; (): not compared.
        score: a number of `meta`; the checkpoint with the highest comes first, not the newest. There is one but for
          what a kill leaves between a save and the deletion of what it replaces.
        """
        self.folder, self._model, self._class_names = files.absolute(folder), model, list(class_names)
        self._keep = keep
        self._saving: tuple[int, Any] | None = None  # (step, Orbax' response) of a save on its way
        self._score = score
        if keep is None and not files.is_folder(folder):
            raise CheckpointError(f"no checkpoint in {folder}: train first, or name another --workdir")
        if self._is_writer():
            files.make_folder(self.folder, inside=os.path.dirname(self.folder))
            step_folders.clear(self.folder)
        step_folders.steps(self.folder)  # refuses links before there is anything to save

    @property
    def latest(self) -> int | None:
        """Step of the newest checkpoint, which may be damaged."""
        steps = step_folders.steps(self.folder)
        return steps[-1] if steps else None

    @property
    def damaged(self) -> list[str]:
        """Folders of checkpoints that were set aside."""
        return step_folders.damaged(self.folder)

    def save(self, step: int, trees: dict[str, Tree], meta: dict[str, Any]) -> None:
        """Starts a save in the background; `wait` for it before leaving. There must be none of this step.

        Raises CheckpointError: it, or the save before it, cannot be written.
        """
        self.wait()
        # A copy: on CPU a plain view would share the buffers that the next training step donates.
        trees = jax.tree.map(lambda x: np.array(x, copy=True), trees)
        about = {"step": step, "model": self._model, "class_names": self._class_names, "versions": versions()}
        whole = {**trees, "meta": _sealed({**meta, **about, "leaves": leaves(trees), "hashes": hashes(trees)})}
        try:
            begin = saves.Insistent if files.is_url(self.folder) else ocp.save_checkpointables_async
            self._saving = step, begin(self._path(step), whole)
        except Exception as error:  # Orbax raises many kinds
            raise self._unwritten(step, error) from error

    def note(self, step: int, values: dict[str, Any]) -> None:
        """Adds plain JSON values to the meta of a checkpoint that is written already; a later note replaces them.

        Raises CheckpointError: they cannot be written.
        """
        if not self._is_writer():
            return
        sealed = _sealed(values)
        try:
            files.write_json(os.path.join(self._path(step), _NOTE), sealed)
        except OSError as error:
            raise self._unwritten(step, error) from error

    def check(self) -> None:
        """`wait`, if the save is through already: tells early of one that failed. Cheap enough for every step."""
        self._finish(timeout=0)

    def wait(self) -> None:
        """Waits for the save in the background, and deletes what is older than the newest `keep`.

        Raises CheckpointError: it could not be written; those before it are as they were.
        """
        self._finish(timeout=None)

    def _finish(self, timeout: float | None) -> None:
        if self._saving is None:
            return
        step, response = self._saving
        try:
            response.result(timeout)
            if self._is_writer():
                files.sync_tree(self._path(step))  # Orbax does not; those before it are deleted next
        except Exception as error:  # Orbax raises many kinds
            if timeout is not None and isinstance(error, TimeoutError):
                return
            self._saving = None
            raise self._unwritten(step, error) from error
        self._saving = None
        others = [x for x in step_folders.steps(self.folder) if x != step]
        if self._keep is not None and self._is_writer():
            self._delete(others[: max(len(others) - self._keep + 1, 0)])

    def keep_only(self, step: int) -> None:
        """Deletes all checkpoints but that of a step; sets aside those that cannot be read."""
        for other in [x for x in step_folders.steps(self.folder) if x != step] if self._is_writer() else ():
            if self._rank(other)[0] > -np.inf:
                self._delete([other])
            else:
                step_folders.set_aside(self.folder, other)

    def _delete(self, steps: Iterable[int]) -> None:
        for step in steps:
            step_folders.delete(self.folder, step)
        step_folders.clear(self.folder)

    def _unwritten(self, step: int, error: Exception) -> CheckpointError:
        newest = f"the newest checkpoint, step {self.latest}, is as it was" if exists(self.folder) else "there is none"
        return CheckpointError(
            f"{self._path(step)} could not be written ({saves.reason(error)}); {newest}. Make room or correct the "
            "permissions, then start the same command again"
        )

    def meta(self) -> dict[str, Any]:
        """The meta of the checkpoint that `restore` tries first; CheckpointError as there."""
        return self._newest_whole(self._meta, quiet=True)

    def restore(
        self, abstract: dict[str, Tree] | Callable[[dict[str, Any]], dict[str, Tree]]
    ) -> tuple[dict[str, Tree], dict[str, Any]]:
        """The named trees of the newest checkpoint that is whole, on one device, and its meta.

        Damaged ones are named in the log; a Store that writes moves them to STEP.damaged, once another is found whole.

        abstract: {name: tree of ShapeDtypeStruct or arrays}, or a function of a checkpoint's meta that returns it;
          trees that are not named are not read.
        Raises CheckpointError: none there, none whole, or another model's, naming the first key or leaf that differs.
        """

        def read(step: int) -> tuple[dict[str, Tree], dict[str, Any]]:
            meta = self._meta(step)
            wanted = abstract(meta) if callable(abstract) else abstract
            saved = {k: v for k, v in meta["leaves"].items() if k.split("/")[0] in wanted}
            _check_same(saved, leaves(wanted), self._path(step))
            trees = _load(self._path(step), jax.tree.map(lambda x: np.empty(x.shape, x.dtype), wanted))
            found = hashes(trees)
            for name in found if "hashes" in meta else ():
                if found[name] != meta["hashes"].get(name):
                    raise _Damaged(f"{name} is not what was saved")
            return trees, meta

        trees, meta = self._newest_whole(read)
        if "hashes" not in meta:
            log.info("%s is of version 0.1, without hashes: taken as it is", self._path(meta["step"]))
        return jax.device_put(trees, jax.local_devices()[0]), meta

    def _newest_whole(self, read: Callable[[int], T], quiet: bool = False) -> T:
        """Returns read(step) of the newest step, or that of the highest score, where it raises no _Damaged."""
        damaged: dict[int, _Damaged] = {}
        steps = step_folders.steps(self.folder)
        for step in reversed(sorted(steps, key=self._rank)):
            try:
                found = read(step)
            except _Damaged as error:
                damaged[step] = error
                continue
            for other, why in () if quiet else damaged.items():
                aside = f"; now {step_folders.set_aside(self.folder, other)}" if self._is_writer() else ""
                log.warning("%s cannot be read (%s), step %d is taken%s", self._path(other), why, step, aside)
            return found
        if step_folders.steps(self.folder) != steps:  # a run that goes on beside this has deleted what was to be read
            return self._newest_whole(read, quiet)
        if not damaged:
            raise CheckpointError(f"no checkpoint in {self.folder}: train first, or name another --workdir")
        said = ", ".join(f"{self._path(step)} cannot be read ({why})" for step, why in damaged.items())
        raise CheckpointError(
            f"{said} and no other is there: put a copy in its place, or move it away; what is left of the run is in "
            f"{os.path.dirname(self.folder)} (--checkpoint chooses between best and latest)"
        )

    def _rank(self, step: int) -> tuple[float, int]:
        if not self._score:
            return step, 0
        try:
            return self._meta(step)[self._score], step
        except (_Damaged, KeyError):
            return -np.inf, step

    def _meta(self, step: int) -> dict[str, Any]:
        meta = _read_meta(self._path(step), step)
        classes = meta.get("class_names") or self._class_names
        _check_same(dict(meta["model"]), self._model, self._path(step))
        if self._class_names:
            number = lambda names: {f"class {i}": name for i, name in enumerate(names)}
            _check_same(number(classes), number(self._class_names), self._path(step))
        return meta | self._noted(step)

    def _noted(self, step: int) -> dict[str, Any]:
        try:
            return files.read_json(os.path.join(self._path(step), _NOTE), "it is not used", _unsealed)
        except OSError:
            return {}  # damaged is as good as not there

    def _path(self, step: int) -> str:
        return os.path.join(self.folder, str(step))

    def _is_writer(self) -> bool:
        return self._keep is not None and jax.process_index() == 0

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *_: object) -> None:
        self.wait()
