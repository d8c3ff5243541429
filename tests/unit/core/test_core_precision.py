"""Products of float32 operands stay float32 on devices that would round them to bfloat16 or TF32 unasked."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_core_embedding import BATCHED, batch, gradient

PRODUCT = re.compile(r"stablehlo\.dot_general.*")
PLATFORMS = ("tpu", "cuda")


def products(function, *args, platform):
    """(precision, dtypes of both operands) of each product of the lowered program."""
    text = jax.jit(function).trace(*args).lower(lowering_platforms=(platform,)).as_text()
    found = []
    for line in PRODUCT.findall(text):
        dtypes = re.search(r": \(tensor<(?:\d+x)*(\w+)>, tensor<(?:\d+x)*(\w+)>\)", line).groups()
        precision = re.search(r"precision = \[(\w+), (\w+)\]", line)
        found.append((precision.groups() if precision else ("DEFAULT", "DEFAULT"), dtypes))
    return found


WITH_PRODUCTS = [n for n in BATCHED if n not in ("unary", "pairs-graph", "init")]


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("name", WITH_PRODUCTS)
def test_products_of_float32_are_float32(name, platform):
    for function in (BATCHED[name], gradient(BATCHED[name])):
        found = products(function, batch(121), platform=platform)
        assert found and all(dtypes == ("f32", "f32") for _, dtypes in found)
        assert {precision for precision, _ in found} == {("HIGHEST", "HIGHEST")}


@pytest.mark.parametrize("name", ["pairs", "messages", "run-factored", "run-table"])
def test_products_of_bfloat16_run_at_full_speed(name):
    found = products(BATCHED[name], batch(122, jnp.bfloat16), platform="tpu")
    half = {precision for precision, dtypes in found if "bf16" in dtypes}
    assert half == {("DEFAULT", "DEFAULT")}
    assert all(precision == ("HIGHEST", "HIGHEST") for precision, dtypes in found if dtypes == ("f32", "f32"))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("net", ["UnaryNet", "PairwiseNet"])
def test_last_layers_of_the_nets(net, dtype):
    nets = pytest.importorskip("pwcrf_jax.nets", reason="networks need more than jax and numpy")
    maps = [np.ones((1, 4, 6, 5), np.float32), np.ones((1, 2, 3, 5), np.float32)]
    head = getattr(nets, net)(num_classes=3, hidden=4, dtype=dtype)
    params = head.init(jax.random.key(0), maps)
    found = products(lambda p, x: head.apply(p, x), params, maps, platform="tpu")
    wide = [precision for precision, dtypes in found if dtypes == ("f32", "f32")]
    assert wide and set(wide) == {("HIGHEST", "HIGHEST")}
    assert any("bf16" in dtypes for _, dtypes in found) == (dtype == jnp.bfloat16)
