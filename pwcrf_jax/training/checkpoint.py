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
            say = lambda leaf: f"{leaf[0]} {leaf[1]}" if leaf else "absent"
            raise CheckpointError(
                f"{where} belongs to another model: {name} is {say(saved.get(name))} in the checkpoint and "
                f"{say(wanted.get(name))} in the model of this config. Use another --workdir, or the config it was "
                f"trained with (config.json there)"
            )


class Store:
    """One folder of checkpoints. Each holds named trees of arrays and a `meta` dict of plain JSON values."""

    def __init__(self, folder: str, keep: int | None = None):
        """keep: how many of the newest checkpoints stay; None to read only, which leaves a running save alone."""
        self.folder = os.path.abspath(folder)
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
        """Starts a save in the background; `wait` for it before leaving. A step that is there already stays."""
        if self.latest is not None and step <= self.latest:
            return
        meta = {**meta, "step": step, "leaves": leaves(trees)}
        # A copy: on CPU a plain view would share the buffers that the next training step donates.
        trees = jax.tree.map(lambda x: np.array(x, copy=True), trees)
        self._orbax.save_checkpointables_async(step, {**trees, "meta": meta}, force=True)

    def meta(self) -> dict:
        """The meta of the newest checkpoint."""
        if self.latest is None:
            raise CheckpointError(f"no checkpoint in {self.folder}: train first, or name another --workdir")
        return self._orbax.load_checkpointables(self.latest, {"meta": None})["meta"]

    def restore(self, abstract: dict) -> tuple[dict, dict]:
        """The named trees of the newest checkpoint, and its meta.

        abstract: {name: tree of ShapeDtypeStruct or arrays}; trees that are not named are not read.
        Raises CheckpointError: none there, or another model's, naming the first leaf that differs.
        """
        meta = self.meta()
        saved = {k: v for k, v in meta["leaves"].items() if k.split("/")[0] in abstract}
        _check_same(saved, leaves(abstract), os.path.join(self.folder, str(self.latest)))
        place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), abstract)
        return self._orbax.load_checkpointables(self.latest, abstract), meta

    def wait(self) -> None:
        self._orbax.wait()

    def close(self) -> None:
        self._orbax.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()
