"""The kernel of benchmarks/fused_messages.py, without a GPU: what it computes, and that it lowers for one."""

import functools
import importlib.util
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from pwcrf_jax import relations
from pwcrf_jax.messages import _send

pytest.importorskip("jax.experimental.pallas.triton", reason="Pallas has no Triton backend here")

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "fused_messages.py"
SQUARE = [(r, c) for r in (-1, 0, 1) for c in (-1, 0, 1) if r or c]
BEYOND = [(r, c) for r in range(-4, 1) for c in range(-3, 6) if r or c]  # 44 offsets, many leave the map; not symmetric


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("benchmarks_fused_messages", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.mark.parametrize(
    "height, width, k, hidden, box, images, tile, dtype",
    [
        (3, 4, 3, 64, SQUARE, 2, (64, 64), jnp.float32),  # 8 offsets in a tile of 16
        (3, 5, 21, 24, BEYOND, 1, (16, 16), jnp.float32),  # three tiles of offsets, M and K between multiples
        (3, 3, 60, 64, BEYOND, 1, (32, 32), jnp.float32),
        (2, 3, 21, 512, [(0, 1), (2, -1)], 1, (16, 128), jnp.float32),
        (3, 4, 37, 48, SQUARE, 2, (16, 16), jnp.bfloat16),  # columns 32 + 16
    ],
)
def test_agrees_with_xla(script, height, width, k, hidden, box, images, tile, dtype):
    *maps, box, kernel, bias = script.problem(height, width, k, hidden, dtype, box, images, seed=k)
    got = script.fused_send(*maps, box, kernel, bias, interpret=True, tile=script.Tile(*tile))
    expected = _send(*maps, box, kernel, bias, chunk_edges=64)
    assert got.shape == expected.shape and got.dtype == expected.dtype == jnp.float32
    # Hidden units and G are rounded alike, but a last bit of bfloat16 may fall differently.
    assert script.error(got, expected) < (1e-5 if dtype == jnp.float32 else 1e-3)


def test_blocks_of_nodes_do_not_change_the_messages(script):
    *maps, box, kernel, bias = script.problem(3, 5, 3, 16, jnp.float32, BEYOND)
    send = lambda g_bytes: script.fused_send(*maps, box, kernel, bias, True, script.Tile(16, 16), g_bytes)
    whole = send(2**20)
    for nodes in (1, 4, 7):  # of 15: even blocks, and ones with a node too many
        np.testing.assert_allclose(send(nodes * 16 * 16 * 4), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "k, dtype, precision", [(21, "bfloat16", None), (150, "float32", None), (3, "float32", "highest")]
)
def test_lowers_for_a_gpu(script, k, dtype, precision):
    size, hidden = (29, 38), 512
    box = relations.offsets(relations.SURROUNDING, *size)
    shape = lambda *shape, dtype="float32": jax.ShapeDtypeStruct(shape, dtype)
    maps = (shape(1, *size, hidden, dtype=dtype), shape(1, *size, hidden, dtype=dtype), shape(1, *size, k))
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA A100", num_cores=None, platform="gpu")
    mesh = jax.sharding.AbstractMesh((1,), ("one",), abstract_device=device)
    target = "__gpu$xla.gpu.triton"
    for tile in script.TILES:
        send = jax.jit(
            lambda a, b, sent, kernel, bias, tile=tile: script.fused_send(a, b, sent, box, kernel, bias, tile=tile)
        )
        lower = export.export(
            send, platforms=["cuda"], disabled_checks=[export.DisabledSafetyCheck.custom_call(target)]
        )
        with jax.sharding.use_abstract_mesh(mesh), jax.default_matmul_precision(precision):
            module = lower(*maps, shape(k, hidden, k), shape(k, k)).mlir_module()
        assert target in module and f"num_warps = {tile.warps}" in module


def test_a_candidate_that_fails_is_reported(script, monkeypatch, capsys):
    """The run on a GPU, with the kernel interpreted."""
    monkeypatch.setattr(script, "fused_send", functools.partial(script.fused_send, interpret=True))
    tiles = (script.Tile(16, 16), script.Tile(16, 0))
    rows = script.measure((5, 6, 16), 3, jnp.float32, tiles, chunks=(64,), repeats=1, iterations=2)
    assert [row["method"] for row in rows] == ["xla", "xla", "exact", "kernel", "kernel"]
    *good, bad = rows
    assert all(row["error"] < 1e-5 and row["failed"] is None for row in good)
    assert all((row["seconds"] is None) == (row["method"] == "exact") for row in good)
    assert bad["seconds"] is None and bad["failed"]
    assert script.best_ratio(rows) > 0 and script.best_ratio(good[:2]) is None
    assert "failed: " in capsys.readouterr().out.splitlines()[-1]
