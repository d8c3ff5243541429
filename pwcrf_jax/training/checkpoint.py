"""Checkpoints with Orbax; the rest of the package does not see its API.

Layout of a workdir: `config.json`; `checkpoints/STEP`, the newest whole training states; `best/STEP`, parameters of the
best evaluation so far. Orbax writes to a temporary folder and renames it, so what is visible is whole.
"""

import os

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp


class CheckpointError(ValueError):
    """A checkpoint that is missing or belongs to another model."""


def leaves(tree) -> dict[str, list]:
    """{"params/unary/last/bias": ["float32", [11]], ...}: what a checkpoint holds, in a form JSON keeps."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): [jnp.dtype(x.dtype).name, list(x.shape)]
        for path, x in flat
    }


def _check_same(saved: dict, wanted: dict, where: str) -> None:
    for name in [*wanted, *saved]:
        if saved.get(name) != wanted.get(name):
            say = lambda value: "absent" if value is None else repr(value)
            raise CheckpointError(
                f"{where} belongs to another model: {name} is {say(saved.get(name))} in the checkpoint and "
                f"{say(wanted.get(name))} in the model of this config. Use another --workdir, or the config it was "
                f"trained with (config.json there)"
            )


def exists(folder: str) -> bool:
    """Whether a folder holds a whole checkpoint; those that are being written have longer names."""
    return os.path.isdir(folder) and any(name.isdigit() for name in os.listdir(folder))


class Store:
    """One folder of checkpoints. Each holds named trees of arrays and a `meta` dict of plain JSON values."""

    def __init__(self, folder: str, model: dict, keep: int | None = None):
        """model: `config.identity` of the model whose checkpoints these are.

        keep: how many of the newest checkpoints stay; None to read only, which leaves a running save alone.
        """
        self.folder, self._model = os.path.abspath(folder), model
        if keep is None and not os.path.isdir(folder):
            raise CheckpointError(f"no checkpoint in {folder}: train first, or name another --workdir")
        self._orbax = ocp.training.Checkpointer(
            self.folder,
            preservation_policy=ocp.training.preservation_policies.LatestN(keep),
            cleanup_tmp_directories=keep is not None,
        )

    @property
    def latest(self) -> int | None:
        found = self._orbax.latest
        return None if found is None else found.step

    def save(self, step: int, trees: dict, meta: dict) -> None:
        """Starts a save in the background; `wait` for it before leaving."""
        meta = {**meta, "step": step, "model": self._model, "leaves": leaves(trees)}
        # A copy: on CPU a plain view would share the buffers that the next training step donates.
        trees = jax.tree.map(lambda x: np.array(x, copy=True), trees)
        self._orbax.save_checkpointables_async(step, {**trees, "meta": meta}, force=True)

    def meta(self) -> dict:
        """The meta of the newest checkpoint; CheckpointError as in `restore`."""
        if self.latest is None:
            raise CheckpointError(f"no checkpoint in {self.folder}: train first, or name another --workdir")
        meta = self._load({"meta": None})["meta"]
        _check_same(meta["model"], self._model, self._newest())
        return meta

    def restore(self, abstract: dict) -> tuple[dict, dict]:
        """The named trees of the newest checkpoint, and its meta.

        abstract: {name: tree of ShapeDtypeStruct or arrays}; trees that are not named are not read.
        Raises CheckpointError: none there, unreadable, or another model's, naming the first key or leaf that differs.
        """
        meta = self.meta()
        saved = {k: v for k, v in meta["leaves"].items() if k.split("/")[0] in abstract}
        _check_same(saved, leaves(abstract), self._newest())
        place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), abstract)
        return self._load(abstract), meta

    def _newest(self) -> str:
        return os.path.join(self.folder, str(self.latest))

    def _load(self, abstract):
        try:
            return self._orbax.load_checkpointables(self.latest, abstract)
        except Exception as error:  # Orbax raises many kinds for damaged files
            raise CheckpointError(
                f"{self._newest()} cannot be read ({type(error).__name__}); move it away, then the one before is used"
            ) from error

    def wait(self) -> None:
        self._orbax.wait()

    def close(self) -> None:
        self._orbax.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()
