"""Draws the picture of the README: validation images of a run with their labels, stage by stage.

    python scripts/readme_picture.py runs/demo-seed0 docs/demo.png --split "val[50%:]"

A row is an image: image, truth, unary alone, all relations, refined by the dense CRF with the values of tuned.json, if
the workdir has it. Void is white.
"""

import argparse
import os
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, os.path.join(os.path.dirname(__file__), ".."))

from pwcrf_jax import config as configs
from pwcrf_jax.prediction import predictor, refinement, restore
from pwcrf_jax.report import pictures

TITLES = ("image", "truth", "unary", "with relations", "refined")
HEADING = 24  # pixels above the pictures
COLOURS = 64  # of the file, which noise would make large


def rows(workdir, split, count):
    """`count` rows of five pictures, uint8 [H, W, 3]: the first images of a split; "": config.data.eval_split."""
    config = configs.load_checked(workdir)
    configs.apply_tuned(config, workdir)
    split = split or config.data.eval_split
    model, params, _, dataset = restore.load(config, workdir, "best", split)
    source = dataset.source(split)
    records = [source[i] for i in range(min(count, len(source)))]
    images = list(enumerate(record["image"] for record in records))
    with_relations = predictor.Predictor(config, model, params)
    silent = config.copy_and_resolve_references()
    silent.crf.weights = (0.0,)  # messages of weight 0 leave the unary
    unary = predictor.Predictor(silent, model, params)
    for record, (_, image, marginals), (_, _, alone) in zip(
        records, with_relations(images), unary(images), strict=True
    ):
        refined, _ = refinement.refine_image(marginals.log_probs(), image, configs.refine_settings(config, "full"))
        labels = (record["label"], alone.labels(), marginals.labels(), refined.argmax(-1))
        yield [image, *(pictures.coloured(x, dataset.palette) for x in labels)]


def titled(picture):
    """The picture with a heading above each of its columns: a `PIL.Image.Image`."""
    height, width = picture.shape[:2]
    out = Image.fromarray(np.pad(picture, [(HEADING, 0), (0, 0), (0, 0)], constant_values=255))
    font = ImageFont.load_default(size=HEADING // 2 + 2)
    for i, title in enumerate(TITLES):
        centre = (2 * i + 1) * width / (2 * len(TITLES))
        ImageDraw.Draw(out).text((centre, HEADING / 2), title, fill=(0, 0, 0), font=font, anchor="mm")
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdir", help="of a trained run")
    parser.add_argument("output", type=Path, help="the picture's file")
    parser.add_argument("--split", default="", help="of the images; none: config.data.eval_split of the run")
    parser.add_argument("--images", type=int, default=3, help="rows of the picture")
    args = parser.parse_args()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    picture = titled(pictures.mosaic(list(rows(args.workdir, args.split, args.images))))
    picture.quantize(COLOURS, dither=Image.Dither.NONE).save(args.output, optimize=True)


if __name__ == "__main__":
    main()
