"""How steps are mapped over devices. Nothing else in the package knows.

A step is written once, per device, with the named axis `AXIS`: `fn(state, batch)` sees its device's share of the batch
and reduces with `lax.psum`. State is replicated and has no leading device axis.
"""

import collections
import functools
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any

import jax
import numpy as np

from pwcrf_jax.runtime.errors import ConfigError

AXIS = "data"
_AHEAD = 2  # batches: one is transferred and one is made while a step runs


def pmap_train(fn: Callable, devices: Sequence[jax.Device] | None = None) -> Callable:
    """fn(state, batch) -> (state, metrics), both equal on all devices.

    state has no device axis and is donated; the batch has a leading axis of local devices. devices: all by default.
    """
    return jax.pmap(fn, axis_name=AXIS, in_axes=(None, 0), out_axes=None, donate_argnums=0, devices=devices)


def replicated(state: Any, devices: Sequence[jax.Device] | None = None) -> Any:
    """A state for `pmap_train`, of arrays that each process made for itself. devices: those of the step."""
    if jax.process_count() == 1:
        # As the step returns it: on another layout its second call would compile the step anew.
        mesh = jax.sharding.Mesh(np.array(devices or jax.local_devices()), (AXIS,))
        return jax.device_put(state, jax.sharding.NamedSharding(mesh, jax.P()))
    # Of several processes, only arrays that lie on all local devices already can be donated.
    copy = jax.pmap(lambda state, _: state, axis_name=AXIS, in_axes=(None, 0), out_axes=None)
    return copy(state, np.zeros(jax.local_device_count()))


def pmap_eval(fn: Callable, devices: Sequence[jax.Device] | None = None, per_image: bool = False) -> Callable:
    """fn(params, batch) -> results, equal on all devices; params are not donated.

    per_image: fn returns (results, one more tree) whose leaves have a leading axis of the device's images.
    """
    out_axes = (None, 0) if per_image else None
    return jax.pmap(fn, axis_name=AXIS, in_axes=(None, 0), out_axes=out_axes, devices=devices)


def sum_over_hosts(tree: Any) -> Any:
    """Sums of each host's own arrays, NumPy int32 or float32; every host must call it."""
    if jax.process_count() == 1:
        return tree
    rest = jax.local_device_count() - 1  # the first device brings the figures, the others zeros
    rows = jax.tree.map(lambda x: np.concatenate([x[None], np.zeros((rest, *x.shape), x.dtype)]), tree)
    return jax.tree.map(np.asarray, _sum_over_devices()(rows))


@functools.cache
def _sum_over_devices() -> Callable:
    return jax.pmap(lambda x: jax.lax.psum(x, AXIS), axis_name=AXIS, out_axes=None)


def split(batch: Mapping[str, np.ndarray], num_devices: int | None = None) -> dict[str, np.ndarray]:
    """[local batch, ...] arrays -> [local devices, batch a device, ...]."""
    n = num_devices or jax.local_device_count()
    return {k: v.reshape(n, v.shape[0] // n, *v.shape[1:]) for k, v in batch.items()}


def ahead(
    batches: Iterator[Mapping[str, Any]], devices: Sequence[jax.Device] | None = None
) -> Generator[tuple[dict[str, jax.Array], Any], None, None]:
    """(arrays on this process' devices, "id") of each batch, made and transferred in a thread while a step runs.

    batches: as of `data.train_batches`, whose order and errors these are; at most two are taken that were not asked for
    yet. close() waits for the batch that is being made, and leaves `batches` open. devices: this process', of the step.
    """
    devices = devices or jax.local_devices()
    mesh = jax.sharding.Mesh(np.array(devices), (AXIS,))
    sharding = jax.sharding.NamedSharding(mesh, jax.P(AXIS))  # as `jax.pmap` would put them

    def make() -> tuple[dict[str, jax.Array], Any]:
        batch = next(batches)
        return jax.device_put(split({k: v for k, v in batch.items() if k != "id"}, len(devices)), sharding), batch["id"]

    with futures.ThreadPoolExecutor(1, "input") as thread:
        made = collections.deque(thread.submit(make) for _ in range(_AHEAD))
        try:
            while True:
                one = made.popleft().result()
                made.append(thread.submit(make))
                yield one
        finally:
            for future in made:
                future.cancel()


def device_count() -> int:
    """The number of devices of all processes; ConfigError where JAX has none of the platform it is told to use."""
    try:
        return jax.device_count()
    except (RuntimeError, AssertionError) as error:  # JAX 0.10 asserts where CUDA finds no device
        said = " ".join(str(error).partition("(set JAX_PLATFORMS")[0].split()) or "it finds no device of that kind"
        platforms = jax.config.jax_platforms  # type: ignore[attr-defined]  # made at run time by jax.config
        given = f"JAX_PLATFORMS={platforms}" if platforms else "devices"
        raise ConfigError(
            f"{given}: JAX cannot start ({said}); set JAX_PLATFORMS to what is there, such as cpu"
        ) from None
