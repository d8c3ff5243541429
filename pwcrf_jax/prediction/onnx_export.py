"""The predictor as an ONNX file: `pwcrf export --format onnx`.

Network, relations, mean field and decoding, image to labels and probabilities, for a fixed number of images. The graph
is made from the jaxpr of the functions that evaluation and `pwcrf predict` call. What it gives is compared with what
these give on random images, where onnxruntime is installed, before anything is written.
"""

import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import pwcrf_jax
from pwcrf_jax import config as configs
from pwcrf_jax.data.readers.image_io import VOID
from pwcrf_jax.model import decode
from pwcrf_jax.prediction import export, onnx_convert, predict, restore
from pwcrf_jax.prediction.onnx_graph import OPSET
from pwcrf_jax.prediction.onnx_rules import NoRule
from pwcrf_jax.runtime.logs import log

LARGEST_BATCH = 1024
TOLERANCE = 1e-3
"""The mean difference of probabilities that rounding may make, and the share of labels: 1 in 100."""
LOAD = (
    "import numpy as np, onnxruntime, PIL.Image",
    "session = onnxruntime.InferenceSession({file!r}, providers=onnxruntime.get_available_providers())",
    "image = np.asarray(PIL.Image.open('photo.png').convert('RGB')); h, w = image.shape[:2]",
    "frames = np.zeros(({batch}, {height}, {width}, 3), np.uint8); frames[0, :h, :w] = image; "
    "sizes = np.array([[h, w]] * {batch}, np.int32)",
    "labels, probabilities = session.run(None, {{'images': frames, 'valid_size': sizes}}); labels = labels[0, :h, :w]",
)


def make_predictor(config, model, params, size: tuple[int, int]) -> Callable[..., dict[str, jax.Array]]:
    """Builds predict(images, valid_size) -> {"labels": ..., "probabilities": ...}, of frames of one size.

    images, valid_size, labels: as in `pwcrf_jax.prediction.export.make_predictor`. probabilities: float32
    [b, H, W, K], 0 beside the image.
    """
    decoded = export.make_decoder(config, model, params, size)

    def predictor(images, valid_size):
        found, valid = decoded(images, valid_size)
        taps = decode.frame_taps(found.log_marginals.shape[-3:-1], size)
        probabilities = jnp.where(valid[..., None], jnp.exp(decode.log_probs(found, *taps)), 0.0)
        return {"labels": export.frame_labels(found, valid, size), "probabilities": probabilities}

    return predictor


def convert(predictor: Callable[..., dict[str, jax.Array]], size: tuple[int, int], batch: int = 1) -> Any:
    """`make_predictor`'s function as an onnx.ModelProto, of `batch` frames (H, W) = size.

    Its input `valid_size` may be left out: the frames are then all image.

    Raises:
      ConfigError: an operation of a network that has no form in ONNX here.
    """
    arguments = {
        "images": jax.ShapeDtypeStruct((batch, *size, 3), np.uint8),
        "valid_size": jax.ShapeDtypeStruct((batch, 2), np.int32),
    }
    try:
        return onnx_convert.convert(predictor, arguments, {"valid_size": np.array([size] * batch, np.int32)})
    except NoRule as error:
        raise configs.ConfigError(
            f"--format onnx: the network has an operation without a form in ONNX here, {error}; use --format stablehlo"
        ) from None


def compare(
    data: bytes, predictor: Callable[..., dict[str, jax.Array]], size: tuple[int, int], batch: int
) -> dict | None:
    """What a model gives beside the function that it was made from, on random images.

    Returns:
      {"onnxruntime": version, "labels_differ": share, "mean_difference", "largest_difference": of probabilities};
      None where onnxruntime is not installed.

    Raises:
      ConfigError: more than rounding differs.
    """
    try:
        import onnxruntime
    except ImportError:
        return None
    rng, (height, width) = np.random.default_rng(0), size
    coarse = rng.integers(0, 256, (batch, -(-height // 16), -(-width // 16), 3)).astype(np.uint8)
    images = coarse.repeat(16, axis=1).repeat(16, axis=2)[:, :height, :width]
    sizes = np.array([size] * batch, np.int32)
    sizes[0] = (height - height // 4, width - width // 8)
    wanted = jax.device_get(jax.jit(predictor)(images, sizes))
    session = onnxruntime.InferenceSession(data, _quiet(onnxruntime), providers=["CPUExecutionProvider"])
    labels, probabilities = session.run(["labels", "probabilities"], {"images": images, "valid_size": sizes})
    off = np.abs(probabilities - wanted["probabilities"])
    found = {
        "onnxruntime": onnxruntime.__version__,
        "labels_differ": float(np.mean(labels != wanted["labels"])),
        "mean_difference": float(off.mean()),
        "largest_difference": float(off.max()),
    }
    if not (found["mean_difference"] <= TOLERANCE and found["labels_differ"] <= 10 * TOLERANCE):
        raise configs.ConfigError(
            f"--format onnx: onnxruntime {onnxruntime.__version__} computes something else from the file than JAX: "
            f"{found['labels_differ']:.1%} of labels differ, probabilities by {found['mean_difference']:.2g}; nothing "
            "was written, use --format stablehlo"
        )
    return found


def _quiet(onnxruntime: Any) -> Any:
    """Options of a session that says what is wrong, and not that an input has a default."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return options


def export_onnx(
    config, workdir: str, file: str, which: str = "best", size: str = "", overwrite: bool = False, batch: int = 1
) -> dict:
    """Writes the predictor of a trained workdir to `file` as ONNX, and what it is to `file`.json; returns the latter.

    which, size, overwrite: of `pwcrf_jax.prediction.export.export_predictor`. batch: images at a time.

    Raises:
      ConfigError, DataError, CheckpointError: before anything is computed; ConfigError too if the file would not
        compute what JAX computes.
      FileError: a file cannot be written.
    """
    if not 1 <= batch <= LARGEST_BATCH:
        raise configs.ConfigError(f"--batch={batch} must be 1 to {LARGEST_BATCH}, images at a time")
    if config.model.dtype != "float32":
        raise configs.ConfigError(
            f"config.model.dtype={config.model.dtype}: --format onnx is of float32, as runtimes on CPUs know no other; "
            "add --config.model.dtype=float32"
        )
    try:
        import onnx  # noqa: F401
    except ImportError:
        raise configs.ConfigError('--format onnx needs the package onnx: pip install "pwcrf_jax[onnx]"') from None
    request = export.check_request(config, file, size, overwrite)
    config = configs.portable(config)
    predict.class_info(config, workdir)  # refuses what it cannot read
    model, params, step = restore.restore_params(config, workdir, which)
    log.info("%s checkpoint of step %d, images up to %d x %d", which, step, *request.size)
    predictor = make_predictor(config, model, jax.device_get(params), request.size)
    proto, info = convert(predictor, request.size, batch), describe(config, workdir, which, step, request, batch)
    for key, value in info.items():
        proto.metadata_props.add(key=key, value=value if isinstance(value, str) else json.dumps(value))
    proto.producer_name, proto.producer_version = "pwcrf_jax", pwcrf_jax.__version__
    data = proto.SerializeToString()
    checked = compare(data, predictor, request.size, batch)
    if checked is None:
        log.info('the file was not compared with JAX, as onnxruntime is not there: pip install "pwcrf_jax[onnx]"')
    else:
        log.info("onnxruntime %(onnxruntime)s gives what JAX gives: probabilities to %(largest_difference).1g", checked)
    info |= dict(load=_load(request, batch), checked=checked, bytes=len(data))
    export.write_both(request, info, data)
    return info


def describe(config, workdir: str, which: str, step: int, request: export.Request, batch: int) -> dict:
    """What the model says of itself in its metadata, as JSON where it is no text."""
    height, width = request.size
    return dict(
        format="onnx",
        input=[
            f"images uint8 [{batch}, {height}, {width}, 3], RGB",
            f"valid_size int32 [{batch}, 2], height and width of each; left out: {height}, {width}",
        ],
        output=[
            f"labels uint8 [{batch}, {height}, {width}], indices of classes; {VOID} beside the image",
            f"probabilities float32 [{batch}, {height}, {width}, {config.data.num_classes}]; 0 beside the image",
        ],
        size=[height, width],
        batch=batch,
        **export.describe(config, workdir, which, step),
        needs=f"a runtime of ONNX with operator set {OPSET}",
        versions={"jax": jax.__version__, "pwcrf_jax": pwcrf_jax.__version__},
    )


def _load(request: export.Request, batch: int) -> list[str]:
    height, width = request.size
    return [line.format(file=request.path.name, height=height, width=width, batch=batch) for line in LOAD]
