"""State dicts of ResNet, ConvNeXt and ViT with random values, under the names of each library."""

import re

import numpy as np


def _add(state, rng, name, *shape, bias=True, around=0.0):
    state[f"{name}.weight"] = (around + 0.3 * rng.standard_normal(shape)).astype(np.float32)
    if bias:
        state[f"{name}.bias"] = rng.standard_normal(shape[0]).astype(np.float32)


def _add_norm(state, rng, name, width, running):
    _add(state, rng, name, width, around=1.0)
    if running:
        state[f"{name}.running_mean"] = rng.standard_normal(width).astype(np.float32)
        state[f"{name}.running_var"] = rng.uniform(0.5, 2, width).astype(np.float32)
        state[f"{name}.num_batches_tracked"] = np.array(7)


def torchvision_resnet(depths, width, seed=0):
    state, rng = {}, np.random.default_rng(seed)

    def conv(name, norm, out, channels, kernel):
        _add(state, rng, name, out, channels, kernel, kernel, bias=False)
        _add_norm(state, rng, norm, out, running=True)

    conv("conv1", "bn1", width, 3, 7)
    channels = width
    for stage, depth in enumerate(depths):
        inner = width * 2**stage
        for i in range(depth):
            at = f"layer{stage + 1}.{i}"
            conv(f"{at}.conv1", f"{at}.bn1", inner, channels, 1)
            conv(f"{at}.conv2", f"{at}.bn2", inner, inner, 3)
            conv(f"{at}.conv3", f"{at}.bn3", 4 * inner, inner, 1)
            if i == 0:
                conv(f"{at}.downsample.0", f"{at}.downsample.1", 4 * inner, channels, 1)
            channels = 4 * inner
    _add(state, rng, "fc", 5, channels)
    return state


def timm_convnext(depths, width, seed=0):
    state, rng = {}, np.random.default_rng(seed)
    _add(state, rng, "stem.0", width, 3, 4, 4)
    _add_norm(state, rng, "stem.1", width, running=False)
    for stage, depth in enumerate(depths):
        own = width * 2**stage
        if stage:
            _add_norm(state, rng, f"stages.{stage}.downsample.0", own // 2, running=False)
            _add(state, rng, f"stages.{stage}.downsample.1", own, own // 2, 2, 2)
        for i in range(depth):
            at = f"stages.{stage}.blocks.{i}"
            state[f"{at}.gamma"] = rng.standard_normal(own).astype(np.float32)
            _add(state, rng, f"{at}.conv_dw", own, 1, 7, 7)
            _add_norm(state, rng, f"{at}.norm", own, running=False)
            _add(state, rng, f"{at}.mlp.fc1", 4 * own, own)
            _add(state, rng, f"{at}.mlp.fc2", own, 4 * own)
    _add_norm(state, rng, "head.norm", own, running=False)
    _add(state, rng, "head.fc", 5, own)
    return state


def timm_vit(depth, width, patch, grid, registers=0, scales=False, own_position=True, seed=0):
    state, rng = {}, np.random.default_rng(seed)
    array = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    state["cls_token"], state["pos_embed"] = array(1, 1, width), array(1, grid * grid + own_position, width)
    if registers:
        state["reg_token"] = array(1, registers, width)
    _add(state, rng, "patch_embed.proj", width, 3, patch, patch)
    for i in range(depth):
        at = f"blocks.{i}"
        _add_norm(state, rng, f"{at}.norm1", width, running=False)
        _add_norm(state, rng, f"{at}.norm2", width, running=False)
        _add(state, rng, f"{at}.attn.qkv", 3 * width, width)
        _add(state, rng, f"{at}.attn.proj", width, width)
        _add(state, rng, f"{at}.mlp.fc1", 4 * width, width)
        _add(state, rng, f"{at}.mlp.fc2", width, 4 * width)
        if scales:
            state[f"{at}.ls1.gamma"], state[f"{at}.ls2.gamma"] = array(width), array(width)
    _add_norm(state, rng, "norm", width, running=False)
    _add(state, rng, "head", 5, width)
    return state


_TRANSFORMERS = {
    "resnet": (
        (r"^conv1\.", "embedder.embedder.convolution."),
        (r"^bn1\.", "embedder.embedder.normalization."),
        (r"^layer(\d)\.(\d+)\.", lambda m: f"encoder.stages.{int(m[1]) - 1}.layers.{m[2]}."),
        (r"downsample\.0", "shortcut.convolution"),
        (r"downsample\.1", "shortcut.normalization"),
        (r"\.conv(\d)\.", lambda m: f".layer.{int(m[1]) - 1}.convolution."),
        (r"\.bn(\d)\.", lambda m: f".layer.{int(m[1]) - 1}.normalization."),
        (r"^fc", "classifier.1"),
    ),
    "convnext": (
        (r"^stem\.0", "embeddings.patch_embeddings"),
        (r"^stem\.1", "embeddings.layernorm"),
        (r"^stages\.(\d)\.blocks", r"encoder.stages.\1.layers"),
        (r"^stages\.(\d)\.downsample", r"encoder.stages.\1.downsampling_layer"),
        (r"conv_dw", "dwconv"),
        (r"(layers\.\d+)\.norm", r"\1.layernorm"),
        (r"mlp\.fc(\d)", r"pwconv\1"),
        (r"gamma", "layer_scale_parameter"),
        (r"^head\.norm", "layernorm"),
        (r"^head\.fc", "classifier"),
    ),
    "dinov2": (
        (r"^cls_token", "embeddings.cls_token"),
        (r"^reg_token", "embeddings.register_tokens"),
        (r"^pos_embed", "embeddings.position_embeddings"),
        (r"^patch_embed\.proj", "embeddings.patch_embeddings.projection"),
        (r"^blocks\.", "encoder.layer."),
        (r"attn\.proj", "attention.output.dense"),
        (r"ls(\d)\.gamma", r"layer_scale\1.lambda1"),
        (r"^norm", "layernorm"),
        (r"^head", "classifier"),
    ),
}
_TRANSFORMERS["vit"] = (
    *_TRANSFORMERS["dinov2"],
    (r"\.norm1", ".layernorm_before"),
    (r"\.norm2", ".layernorm_after"),
    (r"mlp\.fc1", "intermediate.dense"),
    (r"mlp\.fc2", "output.dense"),
)


def as_transformers(state, kind, prefix=""):
    """The same values under the names of transformers; prefix: of models with a head."""
    new = {}
    for name, value in state.items():
        for pattern, replacement in _TRANSFORMERS[kind]:
            name = re.sub(pattern, replacement, name)
        name = name if name.startswith("classifier") else f"{prefix}{name}"
        if ".attn.qkv." in name:
            for part, own in zip(("query", "key", "value"), np.split(value, 3), strict=True):
                new[name.replace("attn.qkv", f"attention.attention.{part}")] = own
        else:
            new[name] = value
    return new
