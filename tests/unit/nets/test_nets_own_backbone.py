"""Backbones of one's own: linen and NNX modules below FeatMap-Net, and what breaks the contract."""

import jax
import jax.numpy as jnp
import numpy as np
import own_nets
import pytest
import small
from flax import nnx

from pwcrf_jax import config as configs
from pwcrf_jax.nets import FeatMapNet

IMAGES = np.random.default_rng(0).standard_normal((2, 33, 47, 3)).astype(np.float32)


def net(factory, **settings):
    plain = {"scales": (1.0,), "block6": (), "pyramid_windows": ()}
    return FeatMapNet(backbone=f"own_nets:{factory}", **plain | settings)


@pytest.mark.parametrize("factory", ["linen_net", "nnx_net", "nnx_of_one_seed"])
def test_a_module_is_a_backbone(factory):
    model = net(factory, backbone_options={"width": 6})
    params = model.init(jax.random.key(0), IMAGES)["params"]
    assert model.stride == 8 and set(params) == {"backbone"}
    out = model.apply({"params": params}, IMAGES)
    assert out.shape == (2, 5, 6, 6)
    if factory == "linen_net":
        expected = own_nets.linen_net(jnp.float32, 6).apply({"params": params["backbone"]["Linen_0"]}, IMAGES)
    else:
        theirs = own_nets.Nnx(6, jnp.float32, nnx.Rngs(1))
        for index, conv in enumerate(theirs.convs):
            conv.kernel[...] = params["backbone"]["net"]["convs"][str(index)]["kernel"]
            conv.bias[...] = params["backbone"]["net"]["convs"][str(index)]["bias"]
        expected = theirs(IMAGES)
    np.testing.assert_allclose(out, expected, atol=1e-6)
    grads = jax.grad(lambda p: (model.apply({"params": p}, IMAGES) ** 2).sum())(params)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads) if leaf.ndim == 4)


def test_parameters_are_drawn_from_the_seed_where_the_factory_lets():
    kernels = [net("nnx_net").init(jax.random.key(seed), IMAGES)["params"]["backbone"]["net"]["convs"]["0"]["kernel"]
               for seed in (0, 0, 1)]  # fmt: skip
    assert (kernels[0] == kernels[1]).all() and (kernels[0] != kernels[2]).any()


def test_bfloat16_comes_out_where_it_is_asked_for():
    model = net("linen_net", dtype=jnp.bfloat16)
    out, variables = jax.eval_shape(lambda: model.init_with_output(jax.random.key(0), IMAGES))
    assert out.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    "backbone, told",
    [
        ("own_nets:another_stride", r"at stride 16, images \(2, 49, 33, 3\) must give features \(2, 4, 3, 'C'\), got"),
        ("own_nets:no_stride", "has the stride None, expected an attribute `stride`"),
        ("own_nets:flat", r"must give features .*, got \(2, 3\)"),
        ("own_nets:running", "keeps batch_stats, expected parameters alone"),
        ("own_nets:running_nnx", "keeps BatchStat, expected parameters alone"),
        ("own_nets:no_module", "made a function, expected a module of flax.linen or flax.nnx"),
        ("own_nets:fails", r"factory\(dtype=...\) raised RuntimeError: two lines"),
        ("own_nets:NUMBER", "is no function but int"),
        ("own_nets:absent", "own_nets has no absent"),
        ("no_such_nets:net", "no_such_nets cannot be imported: .*start in the folder that it lies in"),
    ],
)  # fmt: skip
def test_what_breaks_the_contract_is_one_line(backbone, told, tmp_path):
    config = small.config(tmp_path, **{"model.backbone": backbone})
    with pytest.raises(configs.ConfigError, match=f"config.model.backbone = '{backbone}'.* ?{told}") as error:
        configs.build_model(config)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"model.factory_options": ("width=6",), "model.backbone": "tiny"}, "factory_options = .* set them to ()"),
        ({"model.factory_options": ("wdth=6",)}, r"factory\(dtype=..., wdth=6\) raised TypeError"),
        ({"model.factory_options": ("width",)}, "'width' must be NAME=VALUE"),
        ({"model.factory_options": ("width=[1]",)}, "must have a value that does not change"),
        ({"model.refinement_convs.layers": ("conv1",)}, "refinement_convs.layers: .*no layer 'conv1'"),
        ({"model.backbone": "tinny"}, "is not one of .*did you mean 'tiny'"),
        ({"model.backbone": "a.b:"}, "or your own as 'package.module:factory'"),
    ],
)
def test_options_that_cannot_be(changes, told, tmp_path):
    config = small.config(tmp_path, **{"model.backbone": "own_nets:linen_net"} | changes)
    with pytest.raises(configs.ConfigError, match=told):
        configs.validate(config, num_devices=1)


def test_a_checkpoint_knows_its_factory_and_the_grid_its_stride(tmp_path):
    config = small.config(tmp_path, **{"model.backbone": "own_nets:linen_net", "model.factory_options": ("width=6",)})
    configs.validate(config, num_devices=1)
    known = configs.identity(config)
    assert known["model.backbone"] == "own_nets:linen_net" and known["model.factory_options"] == ["width=6"]
    assert configs.grid(config, (96, 128)) == tuple(round(max(config.model.scales) * n) // 8 for n in (96, 128))
    model = configs.build_model(config)
    assert max(model.grids((96, 128))) == configs.grid(config, (96, 128))
