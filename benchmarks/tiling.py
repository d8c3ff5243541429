"""Do tiles change the labels of large images? Against the same image in one tile, by the model of a workdir.

    python benchmarks/tiling.py --workdir runs/camvid --images PATH/camvid/val --count 3

Images are enlarged to `--factor` times the training crop in each direction; one more is a mosaic of unscaled images.
Prints the share of pixels with the same label for the default tiles, for less overlap and for tiles of one evaluation
frame. Ends with one line of JSON: the worst image with default tiles, in percent.
"""

import argparse
import json
import os
from pathlib import Path

import numpy as np
from PIL import Image

from pwcrf_jax import config as configs
from pwcrf_jax.prediction import predictor, restore

SUFFIXES = {".jpg", ".jpeg", ".png"}


def read(path, size=None):
    image = Image.open(path).convert("RGB")
    return np.asarray(image.resize(size[::-1], Image.Resampling.BICUBIC) if size else image)


def mosaic(paths, size):
    """Unscaled images side by side, row by row, cut to a size."""
    canvas = np.zeros((*size, 3), np.uint8)
    top, index = 0, 0
    while top < size[0]:
        left, height = 0, None
        while left < size[1]:
            piece = read(paths[index % len(paths)])[: size[0] - top, : size[1] - left]
            height = height or piece.shape[0]
            piece = piece[:height]
            canvas[top : top + piece.shape[0], left : left + piece.shape[1]] = piece
            left, index = left + piece.shape[1], index + 1
        top += height
    return canvas


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--images", required=True, help="folder of images")
    parser.add_argument("--count", type=int, default=3, help="enlarged images")
    parser.add_argument("--factor", type=float, default=4.0)
    args = parser.parse_args()
    config = configs.load(os.path.join(args.workdir, "config.json"))
    model, params, _ = restore.restore_params(config, args.workdir)
    paths = sorted(p for p in Path(args.images).rglob("*") if p.suffix.lower() in SUFFIXES)
    if not paths:
        parser.error(f"--images {args.images}: no image ({', '.join(sorted(SUFFIXES))})")
    size = tuple(round(args.factor * n) for n in config.data.crop_size)
    chosen = [paths[i] for i in np.linspace(0, len(paths) - 1, args.count).round().astype(int)]
    images = [(p.name, read(p, size)) for p in chosen] + [("mosaic", mosaic(paths, size))]

    def labels(**changes):
        changed = config.copy_and_resolve_references()
        changed.tiles.update(changes)
        return [m.labels() for _, _, m in predictor.Predictor(changed, model, params)(images)]

    whole = labels(size=size)
    print(f"{args.workdir}, images of {size[0]} x {size[1]}, % of pixels with the label of the untiled run")
    worst = None
    for said, changes in {
        "default": {},
        "overlap 0.25": {"overlap": 0.25},
        "tiles of one frame": {"size": tuple(config.data.eval_size)},
    }.items():
        same = [100 * float(np.mean(a == b)) for a, b in zip(labels(**changes), whole, strict=True)]
        worst = min(same) if worst is None else worst
        print(f"  {said:20s} " + "  ".join(f"{n} {x:.3f}" for (n, _), x in zip(images, same, strict=True)), flush=True)
    print(json.dumps(dict(default_worst=round(worst, 3))))


if __name__ == "__main__":
    main()
