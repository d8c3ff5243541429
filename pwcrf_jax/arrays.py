"""How the core meets JAX: programs compiled once, batches laid over meshes, products in full precision."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")
Fields = TypeVar("Fields", bound=tuple)


@overload
def as_array(x: None) -> None: ...


@overload
def as_array(x: Any) -> jax.Array: ...


def as_array(x: Any) -> jax.Array | None:
    """x where it is an array, of JAX, of NumPy or traced; numbers, lists and tuples become one. None stays None.

    Arrays of NumPy stay what they are, and are annotated as JAX's for what both can do.
    """
    if x is None or isinstance(x, (jax.Array, np.ndarray)):
        return cast(jax.Array, x)
    of_jax = any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(x))
    return jnp.asarray(x) if of_jax else cast(jax.Array, np.asarray(x))


def as_mask(node_mask: ArrayLike | None) -> jax.Array | None:
    """node_mask as an array of bool, or None."""
    return None if node_mask is None else as_array(node_mask).astype(bool)


def of_arrays(x: Fields) -> Fields:
    """A NamedTuple with `as_array` of each of its fields."""
    return type(x)(*[as_array(field) for field in x])


def seen(x: Any) -> bool:
    """Whether x has values to look at: it is not traced, and all of it lies on devices of this process."""
    return not isinstance(x, jax.core.Tracer) and getattr(x, "is_fully_addressable", True)


@overload
def level(x: jax.Array, y: jax.Array, /) -> tuple[jax.Array, jax.Array]: ...


@overload
def level(x: jax.Array, y: jax.Array, z: jax.Array, /) -> tuple[jax.Array, jax.Array, jax.Array]: ...


def level(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """The arrays with axes of size 1 in front, all of one rank: JAX can be told to refuse others."""
    rank = max(x.ndim for x in arrays)
    return tuple(x.reshape((1,) * (rank - x.ndim) + x.shape) for x in arrays)


def precision(*operands: jax.Array) -> jax.lax.Precision | None:
    """Precision of products: float32 is multiplied in float32, which TPUs and recent GPUs do not do unasked.

    They would round it to bfloat16 or TF32. On a TPU it takes some 6 passes of bfloat16 for one. Operands of half
    precision have nothing to lose and are multiplied at full speed.
    """
    return jax.lax.Precision.HIGHEST if any(x.dtype.itemsize >= 4 for x in operands) else None


def matmul(x: jax.Array, y: jax.Array) -> jax.Array:
    """Matrix product of two arrays of one dtype, summed and returned in float32, in the `precision` of its operands."""
    return jnp.matmul(x, y, precision=precision(x, y), preferred_element_type=jnp.float32)


def einsum(subscripts: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """`jax.numpy.einsum` of two arrays, as `matmul`."""
    return jnp.einsum(subscripts, x, y, precision=precision(x, y), preferred_element_type=jnp.float32)


def vary_together(*trees: Any) -> tuple[Any, ...]:
    """The trees, each leaf varying over all axes of a `jax.shard_map` over which any of them does.

    A loop wants the carry that it begins with to vary as what it adds to it.
    """
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return trees
    zeros = [jnp.zeros_like(x, shape=(), dtype=jnp.float32) for x in jax.tree.leaves(trees)]
    varying = functools.reduce(jnp.add, zeros) == 0
    return jax.tree.map(lambda x: jnp.where(varying, x, x), trees)


def compiled(
    out: Callable[..., Any] | None = None,
) -> Callable[[Callable[Parameters, Result]], Callable[Parameters, Result]]:
    """Decorator: a function of arrays that is compiled once for each combination of shapes and settings.

    Positional arguments are pytrees of arrays, keyword-only ones are static. It is not inlined: the gradient of an
    eager call would then be traced, and compiled, anew each time.

    Arguments may lie on a mesh whose axes are Explicit, the default of `jax.make_mesh`, where JAX wants the layout of
    every gather and scatter spelt out. The function is then compiled as for Auto axes, where XLA finds them, and only
    the layout of the results is declared.

    Args:
      out: (*args, **settings) -> pytree of `jax.P`, a prefix of the results. None: numbers, the same on all devices.
    """

    def decorate(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
        @functools.wraps(function)
        def laid_out(*args: Any, **settings: Any) -> Any:
            args = vary_together(*args)
            mesh, axes = _explicit(args)
            if not axes:
                return function(*args, **settings)
            specs = jax.P() if out is None else out(*args, **settings)
            is_spec = lambda x: isinstance(x, jax.P)
            layout = jax.tree.map(lambda spec: jax.NamedSharding(mesh, spec), specs, is_leaf=is_spec)
            bound = functools.partial(function, **settings)
            return jax.sharding.auto_axes(bound, axes=axes, out_sharding=layout)(*args)

        static = [p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
        return jax.jit(laid_out, static_argnames=static)

    return decorate


def batch_spec(x: jax.Array, own_axes: int) -> tuple[Any, ...]:
    """How the leading axes of x are laid out on a mesh of Explicit axes; own_axes: the others, of one image."""
    return tuple(jax.typeof(x).sharding.spec)[: x.ndim - own_axes]


def _explicit(args: tuple[Any, ...]) -> tuple[Any, tuple[str, ...]]:
    """(mesh, names of its Explicit axes) of the first argument that lies on any; (None, ())."""
    for leaf in jax.tree.leaves(args):
        mesh = jax.typeof(leaf).sharding.mesh
        kinds = () if mesh.empty else zip(mesh.axis_names, mesh.axis_types, strict=True)
        axes = tuple(name for name, kind in kinds if kind == jax.sharding.AxisType.Explicit)
        if axes:
            return mesh, axes
    return None, ()
