"""The predictor as one file that JAX runs without this package: `pwcrf export`.

The labels are those of `pwcrf predict`, CRF included, as StableHLO for CPU, CUDA and TPU, parameters baked in. Beside
it FILE.json says what goes in and comes out. The dense CRF (`--refine`) and test-time augmentation are not in it.
`pwcrf_jax.prediction.onnx_export` writes the same for ONNX.
"""

import json
import re
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

import pwcrf_jax
from pwcrf_jax import config as configs
from pwcrf_jax.data.readers.image_io import MEAN_COLOUR, VOID, DataError
from pwcrf_jax.model import decode
from pwcrf_jax.prediction import predict, restore
from pwcrf_jax.runtime import files
from pwcrf_jax.runtime.logs import log

PLATFORMS = ("cpu", "cuda", "tpu")
LARGEST = 16384  # pixels of a side
LOAD = (
    "from jax import export; import jax, numpy as np, PIL.Image  # and flatbuffers is installed",
    "predictor = jax.jit(export.deserialize(open({file!r}, 'rb').read()).call)",
    "image = np.asarray(PIL.Image.open('photo.png').convert('RGB')); h, w = image.shape[:2]",
    "frame = np.zeros((1, {height}, {width}, 3), np.uint8); frame[0, :h, :w] = image; "
    "labels = np.asarray(predictor(frame, np.array([[h, w]], np.int32)))[0, :h, :w]",
)


def make_decoder(config, model, params, size):
    """Builds decoded(images, valid_size) -> (`decode.Decoded`, valid bool [b, H, W]: what lies on an image).

    All of `make_predictor` but the labels, and of all images at once.
    """
    settings, names = configs.crf_settings(config), configs.crf_relations(config)
    # Relations that inference does not use would only make the file larger.
    each = zip(model.relations, model.parameterisation, strict=True)
    used = [(relation, kind) for relation, kind in each if relation[0] in names]
    model = model.clone(relations=tuple(r for r, _ in used), parameterisation=tuple(kind for _, kind in used))
    params = {k: v for k, v in params.items() if not k.startswith("pairwise_") or k.removeprefix("pairwise_") in names}

    def decoded(images, valid_size):
        valid_box = jnp.concatenate([jnp.zeros_like(valid_size), valid_size], axis=-1)
        valid = decode.grid_mask(valid_box, size, size)
        images = jnp.where(valid[..., None], images, jnp.array(MEAN_COLOUR, jnp.uint8))
        return decode.decode(model.apply({"params": params}, images), valid_box, size, settings), valid

    return decoded


def make_predictor(config, model, params, size):
    """Builds predict(images, valid_size) -> labels, of frames of one size.

    images: uint8 [b, H, W, 3], RGB, each image in the upper left corner of its frame; what lies beside it is not read.
    valid_size: int32 [b, 2], height and width of each image, at least 1. labels: uint8 [b, H, W], 255 beside the image.

    config, model, params: of `restore.load`, or `restore.restore_params`. size: (H, W).
    """
    decoded = make_decoder(config, model, params, size)

    def one(image, valid_size):
        found, valid = decoded(image[None], valid_size[None])
        return frame_labels(found, valid, size)[0]

    return jax.vmap(one)


def frame_labels(decoded, valid, size):
    """Labels at the pixels of frames, uint8 [b, H, W], 255 beside the images; decoded, valid: of `make_decoder`."""
    return jnp.where(valid, decode.frame_labels(decoded, size), jnp.uint8(VOID))


def lower(predictor, size):
    """`make_predictor`'s function, of frames (H, W) = size, as a `jax.export.Exported`.

    For all of `PLATFORMS`, and any number of images.
    """
    (batch,) = export.symbolic_shape("b")
    arguments = [
        jax.ShapeDtypeStruct((batch, *shape), dtype) for shape, dtype in (((*size, 3), np.uint8), ((2,), np.int32))
    ]
    return export.export(jax.jit(predictor), platforms=PLATFORMS)(*arguments)


def parse_size(text: str, config) -> tuple[int, int]:
    """(height, width) of --size; "": config.data.eval_size.

    Raises:
      ConfigError: not HxW.
    """
    if not text:
        height, width = config.data.eval_size
        return height, width
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text)
    height, width = map(int, match.groups()) if match else (0, 0)
    if not all(1 <= n <= LARGEST for n in (height, width)):
        raise configs.ConfigError(f"--size={text} must be HEIGHTxWIDTH in pixels, each 1 to {LARGEST}, such as 480x640")
    return height, width


class Request(NamedTuple):
    """What is to be written: size (height, width) of frames, path of the program, and about, that of what it is."""

    size: tuple[int, int]
    path: Path
    about: Path


def check_request(config, file: str, size: str, overwrite: bool) -> Request:
    """Refuses what no exported predictor can be, and places that cannot be written, before anything is computed.

    Raises:
      ConfigError, DataError, FileError: each in one line.
    """
    configs.validate(config, batches=())
    if jax.process_count() > 1:
        raise configs.ConfigError("export is done by one process; start it on one host alone")
    if configs.augments(config):
        raise configs.ConfigError("config.tta is not part of an exported predictor; leave it at its default")
    if config.model.unary == "scores":
        raise configs.ConfigError(
            "config.model.unary = 'scores': an exported predictor takes images alone; label images with pwcrf predict, "
            "which takes scores too"
        )
    files.check_local(file, "--output")
    frame, path = parse_size(size, config), Path(file)
    about = path.with_name(f"{path.name}.json")
    for place in (path, about):
        if place.exists() and not place.is_dir() and not overwrite:
            raise DataError(f"--output={file}: {place} is there already; name another file, or add --overwrite")
    if not path.parent.is_dir():
        raise DataError(f"--output={file}: there is no folder {path.parent}; make it, or name another file")
    files.make_folder(path.parent)
    for place in (path, about):
        files.check_replaceable(place)
    return Request(frame, path, about)


def describe(config, workdir: str, which: str, step: int) -> dict:
    """What a predictor does, whatever the format: classes, settings of inference, and where it comes from."""
    class_names, palette = predict.class_info(config, workdir)
    return dict(
        classes=[{"name": name, "colour": list(map(int, c))} for name, c in zip(class_names, palette, strict=True)],
        message_weights=configs.relation_weights(config),
        label_weights=config.crf.label_weights,
        unary_temperature=config.crf.unary_temperature,
        num_iterations=config.crf.num_iterations,
        checkpoint=which,
        step=step,
    )


def write_both(request: Request, info: dict, data: bytes) -> None:
    """Writes the program, and what it is; both or none.

    Raises:
      FileError: a file cannot be written.
    """
    with files.replacing(request.about) as beside, files.replacing(request.path) as program:
        beside.write(json.dumps(info, indent=2).encode() + b"\n")
        beside.flush()
        program.write(data)


def export_predictor(config, workdir: str, file: str, which: str = "best", size: str = "", overwrite=False) -> dict:
    """Writes the predictor of a trained workdir to `file`, and what it is to `file`.json; returns the latter.

    which: "best" or "latest". size: of `parse_size`. overwrite: replace files of before.

    Raises:
      ConfigError, DataError, CheckpointError: before anything is computed.
      FileError: a file cannot be written.
    """
    try:
        import flatbuffers  # noqa: F401  jax.export writes with it
    except ImportError:
        raise configs.ConfigError('export needs the package flatbuffers: pip install "pwcrf_jax[export]"') from None
    request = check_request(config, file, size, overwrite)
    height, width = request.size
    predict.class_info(config, workdir)  # refuses what it cannot read
    model, params, step = restore.restore_params(config, workdir, which)
    log.info("%s checkpoint of step %d, images up to %d x %d", which, step, height, width)
    exported = lower(make_predictor(config, model, jax.device_get(params), request.size), request.size)
    data = exported.serialize()
    info = dict(
        format="jax.export",
        input=[f"images uint8 [b, {height}, {width}, 3], RGB", "valid_size int32 [b, 2], height and width of each"],
        output=f"labels uint8 [b, {height}, {width}], indices of classes; {VOID} beside the image",
        size=[height, width],
        batch="any",
        load=[line.format(file=request.path.name, height=height, width=width) for line in LOAD],
        **describe(config, workdir, which, step),
        platforms=list(exported.platforms),
        needs=f"JAX {jax.__version__} or later, and flatbuffers",
        versions={"jax": jax.__version__, "pwcrf_jax": pwcrf_jax.__version__},
        calling_convention_version=exported.calling_convention_version,
        bytes=len(data),
    )
    write_both(request, info, data)
    return info
