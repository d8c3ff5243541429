"""How steps are mapped over devices. Nothing else in the package knows.

A step is written once, per device, with the named axis `AXIS`: `fn(state, batch)` sees its device's share of the batch
and reduces with `lax.psum`. State is replicated and has no leading device axis.
"""

import jax

AXIS = "data"


def pmap_train(fn, devices=None):
    """fn(state, batch) -> (state, metrics), both equal on all devices.

    state has no device axis and is donated; the batch has a leading axis of local devices. devices: all by default.
    """
    return jax.pmap(fn, axis_name=AXIS, in_axes=(None, 0), out_axes=None, donate_argnums=0, devices=devices)


def pmap_eval(fn, devices=None):
    """fn(params, batch) -> results, equal on all devices; params are not donated."""
    return jax.pmap(fn, axis_name=AXIS, in_axes=(None, 0), out_axes=None, devices=devices)


def split(batch, num_devices=None):
    """[local batch, ...] arrays -> [local devices, batch a device, ...]."""
    n = num_devices or jax.local_device_count()
    return {k: v.reshape(n, v.shape[0] // n, *v.shape[1:]) for k, v in batch.items()}
