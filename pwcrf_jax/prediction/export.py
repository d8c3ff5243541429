"""The predictor as one file that JAX runs without this package: `pwcrf export`.

The labels are those of `pwcrf predict`, CRF included, as StableHLO for CPU, CUDA and TPU, parameters baked in. Beside
it FILE.json says what goes in and comes out. The dense CRF (`--refine`) and test-time augmentation are not in it.
"""

import json
import os
import re

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


def make_predictor(config, model, params, size):
    """Builds predict(images, valid_size) -> labels, of frames of one size.

    images: uint8 [b, H, W, 3], RGB, each image in the upper left corner of its frame; what lies beside it is not read.
    valid_size: int32 [b, 2], height and width of each image, at least 1. labels: uint8 [b, H, W], 255 beside the image.

    config, model, params: of `restore.load`, or `restore.restore_params`. size: (H, W).
    """
    settings, names = configs.crf_settings(config), configs.crf_relations(config)
    # Relations that inference does not use would only make the file larger.
    each = zip(model.relations, model.parameterisation, strict=True)
    used = [(relation, kind) for relation, kind in each if relation[0] in names]
    model = model.clone(relations=tuple(r for r, _ in used), parameterisation=tuple(kind for _, kind in used))
    params = {k: v for k, v in params.items() if not k.startswith("pairwise_") or k.removeprefix("pairwise_") in names}

    def one(image, valid_size):
        valid_box = jnp.concatenate([jnp.zeros_like(valid_size), valid_size])[None]
        valid = decode.grid_mask(valid_box, size, size)
        image = jnp.where(valid[..., None], image[None], jnp.array(MEAN_COLOUR, jnp.uint8))
        decoded = decode.decode(model.apply({"params": params}, image), valid_box, size, settings)
        return jnp.where(valid, decode.frame_labels(decoded, size), jnp.uint8(VOID))[0]

    return jax.vmap(one)


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


def export_predictor(config, workdir: str, file: str, which: str = "best", size: str = "", overwrite=False) -> dict:
    """Writes the predictor of a trained workdir to `file`, and what it is to `file`.json; returns the latter.

    which: "best" or "latest". size: of `parse_size`. overwrite: replace files of before.

    Raises:
      ConfigError, DataError, CheckpointError: before anything is computed.
      FileError: a file cannot be written.
    """
    configs.validate(config, batches=())
    if jax.process_count() > 1:
        raise configs.ConfigError("export is done by one process; start it on one host alone")
    if configs.augments(config):
        raise configs.ConfigError("config.tta is not part of an exported predictor; leave it at its default")
    try:
        import flatbuffers  # noqa: F401  jax.export writes with it
    except ImportError:
        raise configs.ConfigError('export needs the package flatbuffers: pip install "pwcrf_jax[export]"') from None
    height, width = parse_size(size, config)
    about, folder = f"{file}.json", os.path.dirname(file) or "."
    for place in (file, about):
        there = files.exists(place) if files.is_url(place) else os.path.exists(place)
        if there and not files.is_folder(place) and not overwrite:
            raise DataError(f"--output={file}: {place} is there already; name another file, or add --overwrite")
    if not (files.is_url(folder) or os.path.isdir(folder)):
        raise DataError(f"--output={file}: there is no folder {folder}; make it, or name another file")
    files.make_folder(folder)
    for place in (file, about):
        files.check_replaceable(place)
    class_names, palette = predict.class_info(config, workdir)
    model, params, step = restore.restore_params(config, workdir, which)
    log.info("%s checkpoint of step %d, images up to %d x %d", which, step, height, width)
    exported = lower(make_predictor(config, model, jax.device_get(params), (height, width)), (height, width))
    data = exported.serialize()
    info = dict(
        format="jax.export",
        input=[f"images uint8 [b, {height}, {width}, 3], RGB", "valid_size int32 [b, 2], height and width of each"],
        output=f"labels uint8 [b, {height}, {width}], indices of classes; {VOID} beside the image",
        size=[height, width],
        batch="any",
        load=[line.format(file=os.path.basename(file), height=height, width=width) for line in LOAD],
        classes=[{"name": name, "colour": list(map(int, c))} for name, c in zip(class_names, palette, strict=True)],
        message_weights=configs.relation_weights(config),
        label_weights=config.crf.label_weights,
        unary_temperature=config.crf.unary_temperature,
        num_iterations=config.crf.num_iterations,
        checkpoint=which,
        step=step,
        platforms=list(exported.platforms),
        needs=f"JAX {jax.__version__} or later, and flatbuffers",
        versions={"jax": jax.__version__, "pwcrf_jax": pwcrf_jax.__version__},
        calling_convention_version=exported.calling_convention_version,
        bytes=len(data),
    )
    with files.replacing(about) as beside, files.replacing(file) as program:  # both or none
        beside.write(json.dumps(info, indent=2).encode() + b"\n")
        beside.flush()
        program.write(data)
    return info
