"""`pwcrf train --dry-run`: the model, what it costs, and one training batch as a picture; nothing is trained."""

import math
import os

import jax
import numpy as np

from pwcrf_jax import config as configs
from pwcrf_jax.prediction import restore
from pwcrf_jax.report import pictures
from pwcrf_jax.runtime import files
from pwcrf_jax.runtime.logs import log
from pwcrf_jax.training import checks, initial, loop
from pwcrf_jax.training.optimizer import make_optimizer

PICTURE = "dry_run.png"  # in the workdir
_SHOWN = 32  # images of a batch, at most


def summary(model, images) -> str:
    """A line for each module that has parameters, sorted by path: its output and parameters; then the sum.

    images: an array or its shape and dtype, uint8 [B, H, W, 3]. A module that is called several times (the backbone,
    for each scale) is shown with its first output.
    """
    params = restore.abstract_params(model)
    outputs = lambda params, images: model.apply(
        {"params": params}, images, capture_intermediates=True, mutable="intermediates"
    )[1]["intermediates"]
    captured = jax.eval_shape(outputs, params, images)
    shape = lambda x: " x ".join(map(str, x.shape))
    modules: dict[tuple, dict] = {}
    for (*path, name), leaf in jax.tree_util.tree_leaves_with_path(params):
        modules.setdefault(tuple(key.key for key in path), {})[name.key] = leaf
    lines = [("module", "output", "parameters", "number")]
    for module, leaves in modules.items():
        found = captured
        for name in module:
            if name not in found:  # within a backbone that is no module of linen: the backbone's output
                break
            found = found[name]
        out = jax.tree.leaves(found["__call__"][0])[0]
        described = ", ".join(f"{name} {shape(leaf)}" for name, leaf in leaves.items())
        number = sum(leaf.size for leaf in leaves.values())
        lines.append(("/".join(module), f"{shape(out)} {out.dtype}", described, f"{number:,}"))
    total = sum(x.size for x in jax.tree.leaves(params))
    lines.append(("all", "", "", f"{total:,}"))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([*(x.ljust(w) for x, w in zip(line[:3], widths, strict=False)), line[3].rjust(widths[3])])
        for line in lines
    )


def batch_picture(batch, palette) -> np.ndarray:
    """Images of a training batch, each beside its labels: uint8 [H, W, 3]."""
    pairs = [
        [image, pictures.coloured(label, palette)]
        for image, label in zip(batch["image"][:_SHOWN], batch["label"][:_SHOWN], strict=True)
    ]
    across = math.ceil(math.sqrt(len(pairs) / 2))
    return pictures.mosaic([sum(pairs[i : i + across], []) for i in range(0, len(pairs), across)])


def run(config, workdir: str = "", picture: str = "") -> str:
    """Prints summary, plan and the chips that it fits, writes the first batch of the run as a PNG, returns its path.

    workdir: read if there is a run in it, and not written to but for the picture. picture: the PNG; "":
    WORKDIR/dry_run.png.

    Raises:
      ConfigError, DataError, WeightsError: what training would refuse.
      FileError: the picture cannot be written.
    """
    from PIL import Image

    config = checks.settle_data(config, workdir)
    configs.validate(config)
    if jax.process_count() > 1:
        raise configs.ConfigError("--dry-run is of one process; start it on one host alone")
    if not workdir and not picture:
        raise configs.ConfigError("--dry-run: name --workdir, or where to write the batch with --picture=FILE.png")
    picture = picture or os.path.join(workdir, PICTURE)
    if not picture.lower().endswith(".png"):
        raise configs.ConfigError(f"--picture={picture} must end in .png")
    dataset = checks.load_and_validate(config, workdir)
    files.make_folder(os.path.dirname(picture) or ".")
    files.check_replaceable(picture)
    config, params = initial.resolve_init(config, workdir)
    model, c = configs.build_model(config), config.train
    tx = make_optimizer(config.optimizer, config.model, c.steps, configs.unary_steps(config))
    size = tuple(config.data.crop_size)
    print(summary(model, jax.ShapeDtypeStruct((c.batch_size // jax.device_count(), *size, 3), np.uint8)))
    plan = loop.estimate_cost(config, model, tx)
    print(f"\n{plan}\n\n{plan.chips()}", flush=True)
    batches = loop.batches_from(config, dataset, 0)
    try:
        pixels = batch_picture(next(batches), dataset.palette)
    finally:
        batches.close()
    with files.replacing(picture) as file:
        Image.fromarray(pixels).save(file, "PNG")
    start = "would start from random or pretrained parameters" if params else "would go on with the run there"
    log.info("%s: the first batch, images beside their labels (void is white)", picture)
    log.info("nothing was trained; without --dry-run this command %s and train to step %d", start, c.steps)
    return picture
