"""Batches laid over a mesh with explicit axes, the default of `jax.make_mesh`."""

import functools
from collections.abc import Callable

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def auto_axes(function: Callable) -> Callable:
    """Lets the compiler lay out what a function computes, whatever mesh its arrays lie on.

    Explicit axes make the layout part of an array's type, and each gather, reshape and loop then wants to be told that
    of its result. Inside a batched function that is the compiler's business. It goes directly below `jax.jit`.

    Args:
      function: takes arrays in any pytrees, and other values.

    Returns:
      The same function. An array that it returns lies like the first argument that is split over devices, where the two
      agree in all axes but the last (scores and marginals of pixels); any other is whole on each device.
    """

    @functools.wraps(function)
    def over_mesh(*args, **kwargs):
        leaves, tree = jax.tree.flatten((args, kwargs))
        types = [jax.typeof(x) for x in leaves if isinstance(x, jax.Array)]
        types = [t for t in types if AxisType.Explicit in t.sharding.mesh.axis_types]
        if not types:
            return function(*args, **kwargs)
        mesh = types[0].sharding.mesh
        explicit = [n for n, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Explicit]
        inside = mesh.update_axis_types(dict.fromkeys(explicit, AxisType.Auto))
        with jax.sharding.use_abstract_mesh(inside):
            leaves = [jax.sharding.reshard(x, PartitionSpec()) if isinstance(x, jax.Array) else x for x in leaves]
            args, kwargs = jax.tree.unflatten(tree, leaves)
            out = function(*args, **kwargs)
        split = next((t for t in types if any(t.sharding.spec)), types[0])
        return jax.tree.map(lambda x: jax.sharding.reshard(x, NamedSharding(mesh, _layout(x.shape, split))), out)

    return over_mesh


def _layout(shape, like):
    """The axes of `like`, which it keeps where all of its sizes but the last are those of `shape`."""
    alike = len(shape) == len(like.shape) > 2 and shape[:-1] == like.shape[:-1]
    spec = [*like.sharding.spec, *[None] * (len(shape) - len(like.sharding.spec))] if alike else []
    return PartitionSpec(*(spec if shape == like.shape else spec[:-1]))
