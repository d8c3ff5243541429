"""A backbone of your own, named "package.module:factory".

The contract: `factory(dtype=..., **options)` returns a module of Flax, linen or NNX;
called with images [B, H, W, 3], already scaled, it gives features [B, ceil(H / s), ceil(W / s), C];
its attribute `stride` is s.

A factory with an argument `rngs` is given an `nnx.Rngs` from the seed of the run.
"""

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from pwcrf_jax import user_functions

Options = tuple[tuple[str, Any], ...]


class OwnBackbone(nn.Module):
    """The module of a factory as a backbone.

    Call: images [B, H, W, 3], already scaled -> features [B, ceil(H/stride), ceil(W/stride), C] in `dtype`. Parameters
    are the module's: of NNX, what `nnx.Param` holds, by attribute; drawn from the seed of the run where the factory
    takes `rngs`.

    Attributes:
      factory: "package.module:factory".
      options: further arguments of the factory, pairs of names and values.
      skip_layers: must be (), there are none.
      dtype: handed to the factory, and that of the output.

    Raises:
      ValueError: one line, for a factory that is not there, cannot be called, or whose module breaks the contract.
    """

    factory: str
    options: Options = ()
    skip_layers: tuple[str, ...] = ()
    dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        if self.skip_layers:
            raise ValueError(f"{self.factory}: no layer {self.skip_layers[0]!r}, as backbones of your own have none")
        self._kind  # noqa: B018  # checked here, before anything is built on it
        super().__post_init__()

    @property
    def stride(self) -> int:
        """Pixels to a cell."""
        return self._kind[1]

    @property
    def frozen_layers(self) -> tuple[str, ...]:
        """None: there is no freeze_until."""
        return ()

    @property
    def _kind(self) -> tuple[bool, int]:
        return _checked(self.factory, self.options, jnp.dtype(self.dtype).name)

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        is_linen, stride = self._kind
        make = _maker(self.factory, self.options, self.dtype)
        if is_linen:
            out = make()(images)
        else:
            drawn = self.param("net", lambda key: _pure(_split(make(key))[1]))
            graph, state = _split(nnx.eval_shape(make))
            nnx.replace_by_pure_dict(state, dict(drawn))
            out = nnx.merge(graph, state)(images)
        _check_output(self.factory, images.shape, out, stride)
        return out.astype(self.dtype)


def _maker(name: str, options: Options, dtype: Any) -> Callable[..., Any]:
    """Makes the module, of a key for a factory that takes `rngs`; None: any key."""
    try:
        factory = user_functions.find(name)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    random = "rngs" in inspect.signature(factory).parameters

    def make(key: jax.Array | None = None) -> Any:
        rngs = {"rngs": nnx.Rngs(jax.random.key(0) if key is None else key)} if random else {}
        return factory(dtype=dtype, **dict(options), **rngs)

    return make


def _split(module: Any) -> tuple[Any, Any]:
    parts: Any = nnx.split(module, nnx.Param, ...)
    graph, params, rest = parts
    if jax.tree.leaves(rest):
        kinds = {type(leaf).__name__ for leaf in jax.tree.leaves(rest, is_leaf=lambda x: isinstance(x, nnx.Variable))}
        raise ValueError(f"keeps {', '.join(sorted(kinds))}, expected parameters alone (nnx.Param)")
    return graph, params


def _pure(state: Any) -> dict[str, Any]:
    """Plain dictionaries by text: what checkpoints keep."""

    def named(tree: Any) -> Any:
        return {str(k): named(v) for k, v in tree.items()} if isinstance(tree, Mapping) else tree

    return named(nnx.to_pure_dict(state))


@functools.lru_cache(maxsize=64)
def _checked(name: str, options: Options, dtype: str) -> tuple[bool, int]:
    """Whether the module is linen's, and its stride; ValueError where it breaks the contract. Computes nothing."""
    # In a thread of its own: within another module's call, linen would take what the factory makes for its own.
    with ThreadPoolExecutor(1) as aside:
        return aside.submit(_look, name, options, dtype).result()


def _look(name: str, options: Options, dtype: str) -> tuple[bool, int]:
    make = _maker(name, options, jnp.dtype(dtype).type)
    made: list[Any] = []
    said = lambda error: f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    try:
        jax.eval_shape(lambda: made.append(make()))
    except Exception as error:
        arguments = ", ".join(["dtype=...", *(f"{key}={value!r}" for key, value in options)])
        raise ValueError(f"{name}: factory({arguments}) raised {said(error)}") from None
    (module,) = made
    if not isinstance(module, nn.Module | nnx.Module):
        raise ValueError(f"{name}: made a {type(module).__name__}, expected a module of flax.linen or flax.nnx")
    stride = getattr(module, "stride", None)
    if type(stride) is not int or stride < 1:
        raise ValueError(f"{name}: its module has the stride {stride!r}, expected an attribute `stride`, 1 or more")
    is_linen = isinstance(module, nn.Module)
    images = jax.ShapeDtypeStruct((2, 3 * stride + 1, 2 * stride + 1, 3), jnp.dtype(dtype))

    def run(images: jax.Array) -> Any:
        if not is_linen:
            net = make()
            _split(net)
            return net(images), {}
        return make().init_with_output(jax.random.key(0), images)

    try:
        out, variables = jax.eval_shape(run, images)
    except Exception as error:
        raise ValueError(f"{name}: its module, called with images {images.shape}, raised {said(error)}") from None
    if more := sorted(set(variables) - {"params"}):
        raise ValueError(f"{name}: its module keeps {', '.join(more)}, expected parameters alone")
    _check_output(name, images.shape, out, stride)
    return is_linen, stride


def _check_output(name: str, images: tuple[int, ...], out: Any, stride: int) -> None:
    expected = (images[0], math.ceil(images[1] / stride), math.ceil(images[2] / stride))
    shape = getattr(out, "shape", None)
    if shape is None or len(shape) != 4 or shape[:3] != expected:
        got = type(out).__name__ if shape is None else tuple(shape)
        raise ValueError(
            f"{name}: at stride {stride}, images {images} must give features {(*expected, 'C')}, got {got}"
        )
