"""Reading pretrained weights, from synthetic files of every layout and from the real MobileNetV2."""

import os
from pathlib import Path

import h5py
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from pwcrf_jax import nets
from pwcrf_jax.nets import mobilenet_v2, vgg16
from pwcrf_jax.nets.stored import fold_batch_norm
from pwcrf_jax.nets.vgg16 import TORCH_CONVS, fc1_from_torch
from pwcrf_jax.nets.weight_files import fc1_from_keras

MOBILENET_FILE = "mobilenet_v2_imagenet_keras_no_top.h5"


def weights_folder():
    return Path(os.environ.get("PWCRF_WEIGHTS") or Path(__file__).parents[3].parent / "shared" / "weights")


def make_params(**settings):
    """Parameters of a FeatMapNet, all zero: what is loaded shows."""
    net = nets.FeatMapNet(**{"scales": (1.0, 0.5), "block6": ((3, 4),), **settings})
    x = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    shapes = jax.eval_shape(lambda x: net.init(jax.random.key(0), x), x)["params"]
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)


def random(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


def vgg_layers(seed=0):
    rng = np.random.default_rng(seed)
    layers, before = {}, 3
    widths = [width for block in vgg16.BLOCKS for width in block]
    for name, width in zip(vgg16.layer_names(), widths, strict=True):
        layers[name] = (random(rng, 3, 3, before, width), random(rng, width))
        before = width
    return layers


def write_keras(path, layers, style="new", prefix=""):
    paths = {
        "new": ("{0}/{0}/kernel:0", "{0}/{0}/bias:0"),
        "keras3": ("{0}/{0}/kernel", "{0}/{0}/bias"),
        "old": ("{0}/{0}_W_1:0", "{0}/{0}_b_1:0"),
        "nested": ("vgg16/{0}/kernel:0", "vgg16/{0}/bias:0"),
    }[style]
    with h5py.File(path, "w") as file:
        file.attrs["layer_names"] = [name.encode() for name in layers]
        for name, values in layers.items():
            for where, value in zip(paths, values, strict=True):
                file[prefix + where.format(name)] = value
        file["optimizer_weights/training/Adam/block1_conv1/kernel:0"] = np.zeros((1,), np.float32)


def torch_tensors(layers):
    tensors = {}
    for index, (kernel, bias) in zip(TORCH_CONVS, layers.values(), strict=True):
        tensors[f"features.{index}.weight"] = np.ascontiguousarray(kernel.transpose(3, 2, 0, 1))
        tensors[f"features.{index}.bias"] = bias
    return tensors


def check_backbone(new, layers):
    assert set(new["backbone"]) == set(layers)
    for name, (kernel, bias) in layers.items():
        np.testing.assert_array_equal(new["backbone"][name]["kernel"], kernel)
        np.testing.assert_array_equal(new["backbone"][name]["bias"], bias)


@pytest.fixture(scope="module")
def vgg_params():
    return make_params(backbone="vgg16")


@pytest.mark.parametrize("style, prefix", [("new", ""), ("keras3", "model_weights/"), ("old", ""), ("nested", "")])
def test_keras_vgg16_layouts(tmp_path, vgg_params, style, prefix):
    layers = vgg_layers()
    write_keras(tmp_path / "vgg.h5", layers, style, prefix)
    new, report = nets.load_pretrained(tmp_path / "vgg.h5", vgg_params)
    check_backbone(new, layers)
    assert (report.source, report.scaling) == ("keras_vgg16", "caffe")
    assert report.loaded == tuple(f"backbone/{name}" for name in layers)
    assert report.left_random == ("block6_0/conv1", "block6_1/conv1")
    assert report.unused == ()


def test_torch_vgg16(tmp_path, vgg_params):
    layers = vgg_layers(1)
    tensors = torch_tensors(layers)
    tensors["classifier.6.weight"] = np.zeros((10, 4), np.float32)
    save_file(tensors, tmp_path / "vgg.safetensors")
    new, report = nets.load_pretrained(str(tmp_path / "vgg.safetensors"), vgg_params)
    check_backbone(new, layers)
    assert (report.source, report.scaling) == ("torch_vgg16", "torch")
    assert report.unused == ("classifier.6",)
    assert "input scaling: torch" in str(report) and "classifier.6" in report.summary()


def test_inputs_are_not_changed_and_other_parameters_are_kept(tmp_path, vgg_params):
    write_keras(tmp_path / "vgg.h5", vgg_layers())
    head = {"first": {"kernel": jnp.ones((2, 2))}}
    tree = {"params": {"features": vgg_params, "unary": head}}
    new, _ = nets.load_pretrained(tmp_path / "vgg.h5", tree)
    assert tree["params"]["features"] is vgg_params
    assert all(not leaf.any() for leaf in jax.tree.leaves(vgg_params["backbone"]))
    assert new["params"]["unary"] is head
    assert jax.tree.structure(new) == jax.tree.structure(tree)
    assert new["params"]["features"]["backbone"]["block1_conv1"]["kernel"].any()


@pytest.mark.parametrize("source", ["keras", "torch"])
def test_fc1_as_a_convolution_equals_flatten_and_dense(source):
    rng = np.random.default_rng(0)
    activation = random(rng, 7, 7, 3)
    if source == "keras":
        weight = random(rng, 7 * 7 * 3, 5)
        expected, kernel = activation.reshape(-1) @ weight, fc1_from_keras(weight)
    else:
        weight = random(rng, 5, 3 * 7 * 7)
        expected = weight @ activation.transpose(2, 0, 1).reshape(-1)
        kernel = fc1_from_torch(weight)
    assert kernel.shape == (7, 7, 3, 5)
    np.testing.assert_allclose(np.tensordot(activation, kernel, 3), expected, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["keras", "torchvision", "timm"])
def test_fc1_goes_to_block6(tmp_path, layout):
    params = make_params(backbone="vgg16", scales=(1.0, 0.5), block6=((7, 4096), (3, 4)))
    layers = vgg_layers()
    bias = np.arange(4096, dtype=np.float32)
    kernel = np.zeros((7, 7, 512, 4096), np.float32)
    kernel[1, 2, 3, 4], kernel[6, 0, 511, 4095] = 1.0, 2.0
    if layout == "keras":
        path, name = tmp_path / "vgg.h5", "fc1"
        write_keras(path, {**layers, "fc1": (kernel.reshape(25088, 4096), bias)})
    else:
        path = tmp_path / "vgg.safetensors"
        name = {"torchvision": "classifier.0", "timm": "pre_logits.fc1"}[layout]
        weight = np.ascontiguousarray(kernel.transpose(3, 2, 0, 1))
        if layout == "torchvision":
            weight = weight.reshape(4096, 25088)
        save_file({**torch_tensors(layers), f"{name}.weight": weight, f"{name}.bias": bias}, path)
    new, report = nets.load_pretrained(path, params)
    np.testing.assert_array_equal(new["block6_0"]["conv1"]["kernel"], kernel)
    np.testing.assert_array_equal(new["block6_0"]["conv1"]["bias"], bias)
    assert report.left_random == ("block6_0/conv2", "block6_1/conv2") and report.unused == ()
    # A training step gives its buffers away: each may be there once.
    jax.block_until_ready(jax.jit(lambda x: jax.tree.map(lambda a: a + 1, x), donate_argnums=0)(new))
    assert "block6_0/conv1" in report.loaded and name not in report.unused


def test_fc1_without_a_fitting_block6_is_reported_unused(tmp_path, vgg_params):
    layers = {**vgg_layers(), "fc1": (np.zeros((25088, 2), np.float32), np.zeros(2, np.float32))}
    write_keras(tmp_path / "vgg.h5", layers)
    _, report = nets.load_pretrained(tmp_path / "vgg.h5", vgg_params)
    assert report.unused == ("fc1",)
    assert report.left_random == ("block6_0/conv1", "block6_1/conv1")


def test_fc1_of_another_size_is_refused(tmp_path):
    params = make_params(backbone="vgg16", scales=(1.0,), block6=((7, 4096),))
    layers = {**vgg_layers(), "fc1": (np.zeros((25088, 2), np.float32), np.zeros(2, np.float32))}
    write_keras(tmp_path / "vgg.h5", layers)
    message = r"layer fc1 has a kernel of shape \(7, 7, 512, 2\), the network needs \(7, 7, 512, 4096\)"
    with pytest.raises(nets.WeightsError, match=message):
        nets.load_pretrained(tmp_path / "vgg.h5", params)


def norm_name(layer):
    return {"Conv1": "bn_Conv1", "Conv_1": "Conv_1_bn"}.get(layer, f"{layer}_BN")


def mobilenet_values(params, extra=()):
    """Random kernel and BatchNorm values of each layer, in Keras' shapes."""
    rng = np.random.default_rng(0)
    values = {}
    for name, layer in params["backbone"].items():
        shape = layer["kernel"].shape
        kernel = random(rng, *(shape[:2] + shape[:1:-1] if name.endswith("_depthwise") else shape))
        channels = shape[-1]
        positive = rng.uniform(0.5, 2, channels).astype(np.float32)
        values[name] = (kernel, random(rng, channels), random(rng, channels), random(rng, channels), positive)
    return values


def write_mobilenet(path, values, depthwise_name="depthwise_kernel:0"):
    with h5py.File(path, "w") as file:
        for name, (kernel, *norm) in values.items():
            weight = depthwise_name if name.endswith("_depthwise") else "kernel:0"
            file[f"{name}/{name}/{weight}"] = kernel
            for part, value in zip(("gamma", "beta", "moving_mean", "moving_variance"), norm, strict=True):
                file[f"{norm_name(name)}/{norm_name(name)}/{part}:0"] = value


@pytest.fixture(scope="module")
def mobilenet_params():
    return make_params(backbone="mobilenet_v2")


@pytest.mark.parametrize("depthwise_name", ["depthwise_kernel:0", "kernel"])
def test_keras_mobilenet(tmp_path, mobilenet_params, depthwise_name):
    values = mobilenet_values(mobilenet_params)
    write_mobilenet(tmp_path / "net.h5", values, depthwise_name)
    with h5py.File(tmp_path / "net.h5", "a") as file:
        file["Logits/Logits/kernel:0"] = np.zeros((4, 2), np.float32)
    new, report = nets.load_pretrained(tmp_path / "net.h5", mobilenet_params)
    assert (report.source, report.scaling) == ("keras_mobilenet_v2", "tf")
    assert report.unused == ("Logits",)
    assert len(report.loaded) == len(mobilenet_params["backbone"]) == 40
    rng = np.random.default_rng(1)
    for name in ("block_1_expand", "block_1_depthwise"):
        kernel, gamma, beta, mean, variance = values[name]
        layer = new["backbone"][name]
        x = random(rng, 3, 3, kernel.shape[2])
        if name.endswith("_depthwise"):  # one window of the unfolded convolution
            before, after = (x * kernel[..., 0]).sum((0, 1)), (x * layer["kernel"][:, :, 0]).sum((0, 1))
        else:
            before, after = x[0, 0] @ kernel[0, 0], x[0, 0] @ layer["kernel"][0, 0]
        expected = gamma * (before - mean) / np.sqrt(variance + 1e-3) + beta
        np.testing.assert_allclose(after + layer["bias"], expected, atol=1e-3)


def test_folding_batch_norm_equals_convolution_then_batch_norm():
    rng = np.random.default_rng(0)
    x, kernel = random(rng, 2, 5, 6, 3), random(rng, 3, 3, 3, 4)
    gamma, beta, mean = random(rng, 4), random(rng, 4), random(rng, 4)
    variance = rng.uniform(0.1, 2, 4).astype(np.float32)

    def convolve(kernel):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=numbers)

    folded = fold_batch_norm(kernel, gamma, beta, mean, variance)
    expected = gamma * (convolve(kernel) - mean) / np.sqrt(variance + 1e-3) + beta
    np.testing.assert_allclose(convolve(folded.kernel) + folded.bias, expected, atol=1e-4)


def test_real_mobilenet():
    path = weights_folder() / MOBILENET_FILE
    if not path.is_file():
        pytest.skip(f"{MOBILENET_FILE} is not in the weights folder (PWCRF_WEIGHTS)")
    net = nets.FeatMapNet(backbone="mobilenet_v2", block6=(), scales=(1.0,), pyramid_windows=())
    pixels = np.random.default_rng(0).integers(0, 256, (1, 64, 80, 3), np.uint8)
    params = make_params(backbone="mobilenet_v2", block6=(), scales=(1.0,), pyramid_windows=())
    params, report = nets.load_pretrained(path, params)
    assert report.left_random == () and len(report.loaded) == 40
    features = jax.jit(net.apply)({"params": params}, nets.scale_input(pixels, report.scaling))
    assert features.shape == (1, 4, 5, 576)
    assert np.isfinite(features).all()
    assert features.std() > 0.05 and features.std((1, 2)).max() > 0.05


def refused(path, params, message):
    with pytest.raises(nets.WeightsError, match=message):
        nets.load_pretrained(path, params)


def test_refuses_files_that_are_not_weights(tmp_path, vgg_params):
    refused(tmp_path / "none.h5", vgg_params, "none.h5: no such file")
    for name, message in {
        "net.h5": "not an HDF5 file",
        "net.safetensors": "not a safetensors file",
        "net.npz": "unknown kind of file '.npz'",
    }.items():
        (tmp_path / name).write_bytes(b"not weights at all")
        refused(tmp_path / name, vgg_params, message)


def test_refuses_unknown_networks(tmp_path, vgg_params):
    write_keras(tmp_path / "net.h5", {"conv1_conv": (np.zeros((7, 7, 3, 4)), np.zeros(4))})
    refused(tmp_path / "net.h5", vgg_params, "not a network known here .*; its layers: conv1_conv")
    save_file({"conv1.weight": np.zeros(3, np.float32)}, tmp_path / "net.safetensors")
    refused(tmp_path / "net.safetensors", vgg_params, "not a network known here .*; its keys: conv1.weight")
    layers = {**vgg_layers(), "block3_conv4": (np.zeros((3, 3, 256, 256)), np.zeros(256))}
    write_keras(tmp_path / "vgg19.h5", layers)
    refused(tmp_path / "vgg19.h5", vgg_params, "not a VGG-16, it has a layer block3_conv4")
    tensors = torch_tensors(vgg_layers())
    tensors["features.16.weight"] = np.zeros(3, np.float32)
    save_file(tensors, tmp_path / "vgg19.safetensors")
    refused(tmp_path / "vgg19.safetensors", vgg_params, "not a VGG-16, its convolutions are features")


def test_refuses_another_architecture_than_the_backbone(tmp_path, mobilenet_params):
    write_keras(tmp_path / "vgg.h5", vgg_layers())
    refused(
        tmp_path / "vgg.h5",
        mobilenet_params,
        r"holds vgg16 \(keras_vgg16\), but the backbone is mobilenet_v2",
    )


def test_refuses_missing_layers_and_parts(tmp_path, vgg_params, mobilenet_params):
    layers = vgg_layers()
    del layers["block4_conv2"]
    write_keras(tmp_path / "vgg.h5", layers)
    refused(tmp_path / "vgg.h5", vgg_params, r"has no layer block4_conv2 \(1 missing in all\)")
    tensors = torch_tensors(vgg_layers())
    del tensors["features.5.bias"]
    save_file(tensors, tmp_path / "vgg.safetensors")
    refused(tmp_path / "vgg.safetensors", vgg_params, "has no tensor features.5.bias")
    write_mobilenet(tmp_path / "net.h5", mobilenet_values(mobilenet_params))
    with h5py.File(tmp_path / "net.h5", "a") as file:
        del file["block_3_project_BN/block_3_project_BN/beta:0"]
    refused(tmp_path / "net.h5", mobilenet_params, "layer block_3_project_BN has no beta")


def test_refuses_another_shape_naming_both(tmp_path, vgg_params, mobilenet_params):
    layers = vgg_layers()
    layers["block2_conv1"] = (np.zeros((3, 3, 64, 96), np.float32), np.zeros(96, np.float32))
    message = r"layer block2_conv1 has a kernel of shape \(3, 3, 64, 96\), the network needs \(3, 3, 64, 128\)"
    write_keras(tmp_path / "vgg.h5", layers)
    refused(tmp_path / "vgg.h5", vgg_params, message)
    save_file(torch_tensors(layers), tmp_path / "vgg.safetensors")
    refused(tmp_path / "vgg.safetensors", vgg_params, message)
    values = mobilenet_values(mobilenet_params)
    values["Conv1"] = (values["Conv1"][0][..., :16], *(part[:16] for part in values["Conv1"][1:]))
    write_mobilenet(tmp_path / "net.h5", values)
    refused(tmp_path / "net.h5", mobilenet_params, r"layer Conv1 has a kernel of shape \(3, 3, 3, 16\)")
    values["Conv1"] = (np.zeros((3, 3, 3, 32)), *values["Conv1"][1:])
    write_mobilenet(tmp_path / "net.h5", values)
    refused(tmp_path / "net.h5", mobilenet_params, r"the gamma of layer bn_Conv1 has shape \(16,\), not \(32,\)")


def test_refuses_parameters_it_cannot_fill(tmp_path, vgg_params):
    write_keras(tmp_path / "vgg.h5", vgg_layers())
    tiny = make_params(backbone="tiny")
    refused(tmp_path / "vgg.h5", tiny, "no pretrained weights exist for a backbone with the layers conv1")
    refused(tmp_path / "vgg.h5", {"unary": {}}, "must hold one 'backbone', found 0")
    refused(tmp_path / "vgg.h5", {"a": vgg_params, "b": vgg_params}, "must hold one 'backbone', found 2")


def test_layer_names_are_those_of_keras():
    names = mobilenet_v2.layer_names()
    assert len(names) == 52 and names[:3] == ("Conv1", "expanded_conv_depthwise", "expanded_conv_project")
    assert vgg16.layer_names()[-1] == "block5_conv3"
