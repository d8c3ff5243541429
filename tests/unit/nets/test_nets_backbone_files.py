"""Files of ResNet, ConvNeXt and ViT: each library's names give the same parameters, and other networks are refused."""

import backbone_files as files
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rows import full_but
from safetensors.numpy import save_file

from pwcrf_jax import nets
from pwcrf_jax.nets.convnext import ConvNeXtTiny
from pwcrf_jax.nets.resnet import ResNet50, ResNet101
from pwcrf_jax.nets.vit import ViTSmall

DEPTHS, WIDTH = (1, 2, 1, 1), 4
VIT = {"depth": 2, "width": 12, "heads": 3, "grid": 3, "patch": 8}
RESNET, CONVNEXT = ResNet50(depths=DEPTHS, width=WIDTH), ConvNeXtTiny(depths=DEPTHS, width=WIDTH)


def zeros(net):
    shapes = jax.eval_shape(net.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32))
    return {"backbone": jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), shapes["params"])}


def load(folder, state, net):
    path = folder / "net.safetensors"
    save_file({name: np.ascontiguousarray(value) for name, value in state.items()}, path)
    params, report = nets.load_pretrained(path, zeros(net))
    assert set(report.loaded) == {f"backbone/{name}" for name in params["backbone"]} and not report.left_random
    return params["backbone"], report


def refused(folder, state, net, *parts):
    with pytest.raises(nets.WeightsError) as told:
        load(folder, state, net)
    text = str(told.value)
    assert all(part in text for part in (str(folder / "net.safetensors"), *parts)) and "\n" not in text, text


def test_resnet(tmp_path):
    state = files.torchvision_resnet(DEPTHS, WIDTH)
    params, report = load(tmp_path, state, RESNET)
    assert (report.source, report.scaling, report.unused) == ("torch_resnet", "torch", ("fc",))
    name, norm = "layer2.0.downsample.0", "layer2.0.downsample.1"
    factor = state[f"{norm}.weight"] / np.sqrt(state[f"{norm}.running_var"] + 1e-5)
    layer = params["layer2_0"]["downsample"]
    np.testing.assert_allclose(layer["kernel"][0, 0], (state[f"{name}.weight"][:, :, 0, 0].T) * factor, rtol=1e-5)
    bias = state[f"{norm}.bias"] - state[f"{norm}.running_mean"] * factor
    np.testing.assert_allclose(layer["bias"], bias, rtol=1e-5, atol=1e-6)
    for prefix in ("", "resnet."):
        same, report = load(tmp_path, files.as_transformers(state, "resnet", prefix), RESNET)
        assert (report.source, report.scaling, report.unused) == ("transformers_resnet", "torch", ("classifier.1",))
        jax.tree.map(np.testing.assert_array_equal, params, same)


def test_convnext(tmp_path):
    state = files.timm_convnext(DEPTHS, WIDTH)
    params, report = load(tmp_path, state, CONVNEXT)
    assert (report.source, report.scaling, report.unused) == ("timm_convnext", "torch", ("head.fc", "head.norm"))
    block = params["stages_1_1"]
    np.testing.assert_array_equal(
        block["depthwise"]["kernel"][2, 5, 0], state["stages.1.blocks.1.conv_dw.weight"][:, 0, 2, 5]
    )
    np.testing.assert_array_equal(block["expand"]["kernel"], state["stages.1.blocks.1.mlp.fc1.weight"].T)
    np.testing.assert_array_equal(block["layer_scale"], state["stages.1.blocks.1.gamma"])
    np.testing.assert_array_equal(params["stages_1_downsample"]["norm"]["scale"], state["stages.1.downsample.0.weight"])
    for prefix in ("", "convnext."):
        same, report = load(tmp_path, files.as_transformers(state, "convnext", prefix), CONVNEXT)
        assert (report.source, report.scaling) == ("transformers_convnext", "torch")
        jax.tree.map(np.testing.assert_array_equal, params, same)


@pytest.mark.parametrize("own_position", [True, False])
@pytest.mark.parametrize("kind", ["vit", "dinov2"])
def test_vit(tmp_path, kind, own_position):
    dino = kind == "dinov2"
    net = ViTSmall(**VIT, registers=4 * dino, layer_scale=dino)
    state = files.timm_vit(2, 12, 8, 3, registers=4 * dino, scales=dino, own_position=own_position)
    params, report = load(tmp_path, state, net)
    assert (report.source, report.scaling) == (f"timm_{kind}", "torch" if dino else "tf")
    embed, block = params["embed"], params["blocks_1"]
    token, positions = state["cls_token"][0, 0], state["pos_embed"][0]
    np.testing.assert_array_equal(embed["class_token"], token + positions[0] if own_position else token)
    np.testing.assert_array_equal(embed["positions"][1, 2], positions[own_position + 5])
    np.testing.assert_array_equal(block["qkv"]["kernel"], state["blocks.1.attn.qkv.weight"].T)
    assert embed["epsilon"] == np.float32(1e-6)
    if dino:
        np.testing.assert_array_equal(embed["register_tokens"], state["reg_token"][0])
        np.testing.assert_array_equal(block["scale2"], state["blocks.1.ls2.gamma"])
    for prefix in ("", f"{kind}."):
        renamed = files.as_transformers(state, kind, prefix)
        renamed |= {f"{prefix}embeddings.mask_token": np.ones((1, 12), np.float32)} if dino else {}
        same, report = load(tmp_path, renamed, net)
        assert report.source == f"transformers_{kind}"
        assert same["embed"].pop("epsilon") == np.float32(1e-6 if dino else 1e-12)
        jax.tree.map(
            np.testing.assert_array_equal,
            {**params, "embed": {**embed, "epsilon": None}},
            same | {"embed": {**same["embed"], "epsilon": None}},
        )


def test_a_backbone_that_ends_early_takes_what_it_needs(tmp_path):
    _, report = load(tmp_path, files.timm_vit(2, 12, 8, 3), ViTSmall(**VIT, output="blocks_0"))
    assert {"norm", "blocks.1.norm1"} <= set(report.unused)
    resnet = ResNet50(depths=DEPTHS, width=WIDTH, output="layer2_0", stride=8)
    _, report = load(tmp_path, files.torchvision_resnet(DEPTHS, WIDTH), resnet)
    assert {"layer2.1.conv1", "layer3.0.conv1"} <= set(report.unused)
    convnext = ConvNeXtTiny(depths=DEPTHS, width=WIDTH, output="stages_2")
    _, report = load(tmp_path, files.timm_convnext(DEPTHS, WIDTH), convnext)
    assert "stages.3.downsample.1" in report.unused


@pytest.mark.parametrize("net, depths", [(ResNet50, (3, 4, 23, 3)), (ResNet101, (3, 4, 6, 3))])
def test_another_resnet_is_refused(tmp_path, net, depths):
    for output in ("layer4", "layer3"):
        text = f"holds a ResNet with stages of {', '.join(map(str, depths))} blocks, but the backbone has 3, 4, "
        refused(
            tmp_path, files.torchvision_resnet(depths, 1), net(width=1, output=output), text, "resnet101 is 3, 4, 23"
        )


@pytest.mark.parametrize("output", full_but(["stages_3", "stages_2", "stages_2_4"], "stages_2_4"))
def test_another_convnext_is_refused(tmp_path, output):
    text = "holds a ConvNeXt with stages of 3, 3, 27, 3 blocks, but the backbone has 3, 3, 9"
    refused(tmp_path, files.timm_convnext((3, 3, 27, 3), 1), ConvNeXtTiny(width=1, output=output), text)


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"patch": 14}, "holds a ViT of patch 8, but the backbone has patch 14"),
        ({"registers": 2}, "holds a ViT of registers 0, but the backbone has registers 2"),
        ({"layer_scale": True}, "holds a ViT of layer_scale False, but the backbone has layer_scale True"),
        ({"grid": 0}, "holds a ViT of grid 3, but the backbone has grid 28"),
        ({"depth": 1}, "holds a ViT of blocks 2, but the backbone has blocks 1"),
        ({"depth": 3}, "holds a ViT of blocks 2, but the backbone has blocks 3"),
        ({"depth": 3, "output": "blocks_2"}, "holds a ViT of blocks 2, but the backbone has blocks 3"),
        ({"width": 6}, "holds a ViT of width 12, but the backbone has width 6"),
    ],
)
def test_another_vit_is_refused(tmp_path, changes, text):
    refused(tmp_path, files.timm_vit(2, 12, 8, 3), ViTSmall(**VIT | changes), text, "config.model.vit_small")


def spoil(state, **changes):
    for name, value in changes.items():
        name = name.replace("__", ".")
        if value is None:
            del state[name]
        else:
            state[name] = np.asarray(value, np.float32)
    return state


@pytest.mark.parametrize(
    "state, net, text",
    [
        (
            spoil(files.torchvision_resnet(DEPTHS, WIDTH), layer2__1__bn2__running_var=None),
            RESNET,
            "has no tensor layer2.1.bn2.running_var",
        ),
        (files.torchvision_resnet(DEPTHS, 8), RESNET, "conv1 has a kernel of shape (7, 7, 3, 8), the network needs"),
        (
            spoil(files.torchvision_resnet(DEPTHS, WIDTH), layer1__0__bn1__bias=[np.nan] * WIDTH),
            RESNET,
            "layer layer1_0/conv1 has values that are not finite",
        ),
        (
            spoil(files.torchvision_resnet(DEPTHS, WIDTH), layer1__0__se__fc1__weight=np.ones((1, 16, 1, 1))),
            RESNET,
            "has a tensor layer1.0.se.fc1.weight, for which the backbone has no place: another kind of this network",
        ),
        (
            files.torchvision_resnet(DEPTHS, WIDTH),
            CONVNEXT,
            "holds resnet (torch_resnet), but the backbone is convnext",
        ),
        (spoil(files.timm_convnext(DEPTHS, WIDTH), stages__1__blocks__0__gamma=None), CONVNEXT, "blocks.0.gamma"),
        (
            spoil(files.timm_convnext(DEPTHS, WIDTH), stages__1__blocks__0__mlp__grn__weight=[1.0]),
            CONVNEXT,
            "has a tensor stages.1.blocks.0.mlp.grn.weight",
        ),
        (
            spoil(files.timm_convnext(DEPTHS, WIDTH), stages__1__blocks__0__gamma=[np.inf] * 8),
            CONVNEXT,
            "stages.1.blocks.0.gamma has values that are not finite",
        ),
        (
            spoil(files.timm_vit(2, 12, 8, 3), norm_pre__weight=np.ones(12)),
            ViTSmall(**VIT),
            "has a tensor norm_pre.weight, for which the backbone has no place",
        ),
        (spoil(files.timm_vit(2, 12, 8, 3), pos_embed=np.ones((1, 12, 12))), ViTSmall(**VIT), "12 position embeddings"),
        (spoil(files.timm_vit(2, 12, 8, 3), cls_token=None), ViTSmall(**VIT), "not a ViT known here"),
        (
            spoil(files.timm_vit(2, 12, 8, 3), blocks__1__mlp__fc1__weight=np.ones((5, 12))),
            ViTSmall(**VIT),
            "blocks.1.mlp.fc1.weight has the shape (5, 12), the network needs (48, 12)",
        ),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_damaged_and_other_files_are_refused(tmp_path, state, net, text):
    refused(tmp_path, state, net, text)
