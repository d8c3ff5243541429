"""Each backbone: a training step for accelerators in bfloat16, the plan, the dry run's table, and export."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from jax import export as jax_export
from rows import full_but

from pwcrf_jax import config as configs
from pwcrf_jax.model.plan import plan
from pwcrf_jax.nets import BACKBONES
from pwcrf_jax.prediction import export, restore
from pwcrf_jax.runtime import parallel
from pwcrf_jax.training import dry_run, optimizer, steps
from pwcrf_jax.training.optimizer import frozen_layers, make_optimizer

SIZE = (48, 64)
NARROW = {
    "data.crop_size": SIZE,
    "data.eval_size": SIZE,
    "model.scales": (1.0,),
    "model.block6": (),
    "model.hidden": 4,
    "model.pyramid_windows": (3,),
    "model.relations": ("surrounding",),
    "crf.weights": (1.0,),
}
OWN = {"model.backbone": "own_nets:nnx_net"}


def narrow(tmp_path, backbone, **changes):
    own = OWN if backbone == "own" else {"model.backbone": backbone}
    return small.config(tmp_path, **NARROW | own | changes)


def shapes(config, model):
    """(training state, batch of one image) as shapes."""
    tx = make_optimizer(config.optimizer, config.model, config.train.steps)
    params = restore.abstract_params(model)
    state = jax.eval_shape(lambda p: steps.TrainState(jnp.int32(0), p, tx.init(p)), params)
    image, label = (jax.ShapeDtypeStruct((1, 1, *SIZE, *rest), jnp.uint8) for rest in ((3,), ()))
    return tx, state, {"image": image, "label": label}


# Deeper or wider ones of a class that another row has.
SLOW = ("resnet101", "vit_base")
ROWS = [
    pytest.param(name, marks=pytest.mark.slow if name in SLOW else pytest.mark.full) for name in [*BACKBONES, "own"]
]


@pytest.mark.parametrize("backbone", ROWS)
def test_a_backbone_trains_is_planned_and_exported_everywhere(backbone, tmp_path):
    config = narrow(tmp_path, backbone, **{"model.dtype": "bfloat16"})
    configs.validate(config, num_devices=1)
    model = configs.build_model(config)
    tx, state, batch = shapes(config, model)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
    step = parallel.pmap_train(steps.from_config(config, model, tx), devices=jax.devices()[:1])
    assert jax_export.export(jax.jit(step), platforms=("tpu", "cuda"))(state, batch).platforms == ("tpu", "cuda")

    images = jax.ShapeDtypeStruct((1, *SIZE, 3), np.uint8)
    table = dry_run.summary(model, images)
    assert "featmap/backbone/" in table and "bfloat16" in table
    planned = plan(model, SIZE)
    assert planned.grid == configs.grid(config, SIZE) == model.grids(SIZE)[0]

    params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), state.params)
    assert export.lower(export.make_predictor(config, model, params, SIZE), SIZE).platforms == ("cpu", "cuda", "tpu")


@pytest.mark.parametrize("stride", full_but([16, 8], 8))
def test_every_grid_follows_the_stride(stride, tmp_path):
    own = {"model.efficientnet_lite.stride": stride, "model.efficientnet_lite.output": "stage3_0_depthwise"}
    config = narrow(tmp_path, "efficientnet_lite", **own, **{"data.crop_size": (49, 66), "model.scales": (1.0, 0.5)})
    model = configs.build_model(config)
    grid = (-(-49 // stride), -(-66 // stride))
    assert configs.grid(config, (49, 66)) == plan(model, (49, 66)).grid == grid
    assert model.grids((49, 66)) == [grid, (-(-24 // stride), -(-33 // stride))]
    params = restore.abstract_params(model)
    potentials = jax.eval_shape(
        lambda p, x: model.apply({"params": p}, x), params, jax.ShapeDtypeStruct((1, 49, 66, 3), np.uint8)
    )
    assert potentials.unary.shape[1:3] == grid
    box = configs.relations(config)["surrounding"]  # 0.2 of the short side, in cells
    assert np.abs(box).max() == round(0.2 * min(grid))


def test_frozen_layers_are_those_of_the_backbone(tmp_path):
    config = narrow(tmp_path, "efficientnet_lite", **{"model.efficientnet_lite.freeze_until": "stage1_0"})
    assert frozen_layers(config.model) == {"conv_stem", "stage0_0_depthwise", "stage0_0_project"}
    config.model.backbone = "tiny"
    assert frozen_layers(config.model) == frozenset()
    identities = []
    for until in ("", "stage1_0"):
        config = narrow(tmp_path, "efficientnet_lite", **{"model.efficientnet_lite.freeze_until": until})
        identities.append(configs.identity(config))
    assert identities[0] == identities[1] and "model.efficientnet_lite.variant" in identities[0]


@pytest.mark.parametrize("backbone, until, count", [("resnet50", "layer2", 4), ("vit_small", "blocks.6", 7)])
def test_stages_and_blocks_are_frozen_and_kernels_alone_decay(backbone, until, count, tmp_path):
    config = narrow(tmp_path, backbone, **{f"model.{backbone}.freeze_until": until})
    names = configs.featmap_net(config).bare_backbone().layer_names()
    assert frozen_layers(config.model) == set(names[:count])
    assert configs.identity(config) == configs.identity(narrow(tmp_path, backbone))
    params = restore.abstract_params(configs.build_model(config))
    decayed = jax.tree_util.tree_leaves_with_path(optimizer._decayed(params))
    assert {path[-1].key for path, is_decayed in decayed if is_decayed} == {"kernel", "last_kernel"}
