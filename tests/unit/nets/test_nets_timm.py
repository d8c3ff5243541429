"""Backbones against timm, transformers and torchvision: models of theirs with random weights, saved and loaded here.

Of few blocks, and each once as it is published.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from pwcrf_jax import nets
from pwcrf_jax.nets.featmap_net import BACKBONES

pytestmark = pytest.mark.slow
torch = pytest.importorskip("torch", reason="needs torch, timm, transformers and torchvision (pip install)")

DEPTHS = (1, 2, 2, 2)
DINO = {"patch": 14, "layer_scale": True}


def randomised(model):
    """In evaluation mode, with statistics and scales at which a mistake shows."""
    random = torch.Generator().manual_seed(0)
    fill = lambda values, low, high: values.data.copy_(torch.rand(values.shape, generator=random) * (high - low) + low)
    for name, values in model.named_parameters():
        if values.ndim == 1:
            fill(values, *((-0.2, 0.2) if name.endswith("bias") else (0.5, 1.5)))
        elif any(part in name for part in ("token", "position", "pos_embed")):
            fill(values, -1, 1)
    for name, values in model.named_buffers():
        if name.endswith("running_mean"):
            fill(values, -0.3, 0.3)
        elif name.endswith("running_var"):
            fill(values, 0.5, 2)
    return model.eval()


def saved(model, path):
    save_file({name: value.detach().numpy().copy() for name, value in model.state_dict().items()}, path)
    return path


def compare(net, path, theirs, sizes, pad=1):
    """theirs: of images [B, 3, H, W], padded up to multiples of `pad`, features [B, C, h, w]."""
    shapes = jax.eval_shape(net.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32))
    params, report = nets.load_pretrained(path, {"backbone": shapes["params"]})
    assert not report.left_random
    apply = jax.jit(net.apply)
    for height, width in sizes:
        images = np.random.default_rng(height).standard_normal((2, height, width, 3)).astype(np.float32)
        padded = np.pad(images, ((0, 0), (0, -height % pad), (0, -width % pad), (0, 0)))
        with torch.no_grad():
            expected = theirs(torch.from_numpy(padded).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).numpy()
        ours = apply({"params": params["backbone"]}, images)
        assert (
            ours.shape == expected.shape == (2, -(-height // net.stride), -(-width // net.stride), expected.shape[-1])
        )
        assert np.abs(ours - expected).max() < 1e-4 * np.abs(expected).max(), (height, width)
    return report


def timm_model(name, **options):
    timm = pytest.importorskip("timm", reason="needs timm (pip install timm)")
    return randomised(timm.create_model(name, pretrained=False, **options))


def patches(model):
    """The features of a ViT of timm as a map."""

    def run(images):
        size = model.patch_embed.patch_size[0]
        tokens = model.forward_features(images)[:, model.num_prefix_tokens :]
        grid = images.shape[2] // size, images.shape[3] // size
        return tokens.permute(0, 2, 1).reshape(len(images), -1, *grid)

    return run


SIZES = [(64, 64), (65, 97), (33, 30)]


@pytest.mark.parametrize("stride", [16, 8])
def test_resnet_of_timm(tmp_path, stride):
    model = timm_model("resnet50", layers=DEPTHS, output_stride=stride)
    net = BACKBONES["resnet50"](depths=DEPTHS, stride=stride)
    report = compare(net, saved(model, tmp_path / "net.safetensors"), model.forward_features, SIZES)
    assert (report.source, report.scaling, report.unused) == ("torch_resnet", "torch", ("fc",))
    third = torch.nn.Sequential(*list(model.children())[:7])  # up to layer3
    net = BACKBONES["resnet50"](depths=DEPTHS, stride=stride, output="layer3")
    compare(net, tmp_path / "net.safetensors", third, SIZES[1:2])


@pytest.mark.parametrize("name, stride", [("resnet50", 16), ("resnet101", 8)])
def test_resnet_of_torchvision(tmp_path, name, stride):
    torchvision = pytest.importorskip("torchvision", reason="needs torchvision (pip install torchvision)")
    dilated = [stride < 8, stride < 16, stride < 32]
    model = randomised(getattr(torchvision.models, name)(weights=None, replace_stride_with_dilation=dilated))
    torch.save(model.state_dict(), tmp_path / "net.pth")
    features = torch.nn.Sequential(*list(model.children())[:-2])
    compare(BACKBONES[name](stride=stride), tmp_path / "net.pth", features, [(65, 97)])


@pytest.mark.parametrize("stride", [16, 8])
def test_convnext_of_timm(tmp_path, stride):
    model = timm_model("convnext_tiny", depths=DEPTHS, output_stride=stride)
    features = lambda images: model.stages(model.stem(images))
    path = saved(model, tmp_path / "net.safetensors")
    for method in ("shifted", "grouped"):
        net = BACKBONES["convnext_tiny"](depths=DEPTHS, stride=stride, depthwise=method)
        report = compare(net, path, features, SIZES, pad=stride)
        assert (report.source, report.scaling) == ("timm_convnext", "torch")


@pytest.mark.parametrize(
    "name, theirs, options, source",
    [
        ("vit_small", "vit_small_patch16_224", {}, "timm_vit"),
        ("vit_small", "vit_small_patch8_224", {"patch": 8}, "timm_vit"),
        ("vit_small", "vit_small_patch14_dinov2", DINO, "timm_dinov2"),
        ("vit_small", "vit_small_patch14_reg4_dinov2", DINO | {"registers": 4}, "timm_dinov2"),
        ("vit_base", "vit_base_patch16_224", {}, "timm_vit"),
        ("vit_base", "vit_base_patch14_reg4_dinov2", DINO | {"registers": 4}, "timm_dinov2"),
    ],
)
def test_vit_of_timm(tmp_path, name, theirs, options, source):
    """Grids of other sizes and shapes than the position embeddings', and theirs."""
    model = timm_model(theirs, depth=2, dynamic_img_size=True)
    net = BACKBONES[name](depth=2, **options)
    path = saved(model, tmp_path / "net.safetensors")
    own = (14 * 16, 14 * 16) if "224" in theirs else (518, 518)
    report = compare(net, path, patches(model), [*SIZES, own], pad=net.patch)
    assert report.source == source and report.scaling == ("torch" if "dino" in source else "tf")


@pytest.mark.parametrize(
    "name, theirs", [("convnext_tiny", "convnext_tiny"), ("vit_small", "vit_small_patch14_reg4_dinov2")]
)
def test_whole_networks_of_timm(tmp_path, name, theirs):
    vit = name == "vit_small"
    model = timm_model(theirs, **({"dynamic_img_size": True} if vit else {"output_stride": 16}))
    net = BACKBONES[name](**(DINO | {"registers": 4} if vit else {}))
    features = patches(model) if vit else lambda images: model.stages(model.stem(images))
    compare(net, saved(model, tmp_path / "net.safetensors"), features, [(65, 97)], pad=net.stride)


def transformers_model(name, **options):
    transformers = pytest.importorskip("transformers", reason="needs transformers (pip install transformers)")
    config = getattr(transformers, f"{name}Config")(**options)
    return randomised(getattr(transformers, f"{name}Model")(config))


def test_resnet_of_transformers(tmp_path):
    """Its stride is 32; the last stage's is left out here."""
    model = transformers_model("ResNet", depths=DEPTHS)
    model.save_pretrained(tmp_path)
    first, second = model.encoder.stages[3].layers
    first.shortcut.convolution.stride = first.layer[1].convolution.stride = (1, 1)
    second.layer[1].convolution.dilation = second.layer[1].convolution.padding = (2, 2)
    net = BACKBONES["resnet50"](depths=DEPTHS)
    features = lambda images: model(images).last_hidden_state
    report = compare(net, tmp_path / "model.safetensors", features, SIZES)
    assert (report.source, report.scaling) == ("transformers_resnet", "torch")


def test_convnext_of_transformers(tmp_path):
    model = transformers_model("ConvNext", depths=DEPTHS)
    model.save_pretrained(tmp_path)
    third = lambda images: model(images, output_hidden_states=True).hidden_states[3]
    net = BACKBONES["convnext_tiny"](depths=DEPTHS, output="stages_2")
    report = compare(net, tmp_path / "model.safetensors", third, SIZES, pad=16)
    assert (report.source, report.scaling) == ("transformers_convnext", "torch")


@pytest.mark.parametrize(
    "name, options, ours, source",
    [
        ("ViT", {"intermediate_size": 1536}, {"grid": 6}, "transformers_vit"),
        ("Dinov2", {"patch_size": 14}, DINO | {"grid": 6}, "transformers_dinov2"),
        ("Dinov2WithRegisters", {"patch_size": 14}, DINO | {"grid": 6, "registers": 4}, "transformers_dinov2"),
    ],
)
def test_vit_of_transformers(tmp_path, name, options, ours, source):
    """At the size of its position embeddings: transformers resizes them in other ways than timm."""
    net = BACKBONES["vit_small"](depth=2, **ours)
    size = 6 * net.patch
    shape = {"hidden_size": 384, "num_attention_heads": 6, "num_hidden_layers": 2, "image_size": size}
    model = transformers_model(name, **shape, **options)
    model.save_pretrained(tmp_path)

    def features(images):
        tokens = model(images).last_hidden_state[:, 1 + net.registers :]
        return tokens.permute(0, 2, 1).reshape(len(images), -1, 6, 6)

    report = compare(net, tmp_path / "model.safetensors", features, [(size, size), (size - 3, size - 8)], pad=net.patch)
    assert report.source == source
