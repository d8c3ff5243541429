"""Where the wrong pixels of a trained unary lie, and so what context could mend.

    python benchmarks/error_bands.py --workdir RUN --split val

Wrong pixels are counted within --width pixels of a boundary of the true labels and farther off. Then the mean IoU that
the same predictions would have if those off the boundaries were all right, and if those along them were: the first is
a ceiling for what corrects regions, as relations between cells do, the second for what sharpens. A cell of the grid is
16 pixels of the largest scale, 10 of an image with a scale of 1.6. Ends with one line of JSON.
"""

import argparse
import json
import os
import sys

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, os.path.join(os.path.dirname(__file__), ".."))

from pwcrf_jax import metrics, piecewise, segmenter
from pwcrf_jax.data import eval_batches
from pwcrf_jax.training import config as configs
from pwcrf_jax.training import evaluate


def step_of(model, width):
    """(params, batch) -> confusion matrices {as it is, off mended, along mended}, wrong pixels and all (along, all)."""

    def step(params, batch):
        unary = model.apply({"params": params}, batch["image"]).unary
        labels, size = batch["label"].astype(jnp.int32), batch["label"].shape[1:3]
        mask, valid = (segmenter.grid_mask(batch["valid_size"], x, size) for x in (unary.shape[1:3], size))
        found = jnp.argmax(segmenter.upsample(jax.nn.log_softmax(unary), *size, mask), axis=-1)
        band = metrics.boundary_band(labels, width, valid)
        known = labels != piecewise.VOID
        right = jnp.where(known, labels, 0)  # void counts nowhere
        predictions = dict(unary=found, off=jnp.where(band, found, right), along=jnp.where(band, right, found))
        matrices = {k: metrics.confusion_matrix(x, labels, model.num_classes) for k, x in predictions.items()}
        counts = [jnp.stack([(x & band).sum(), x.sum()]) for x in (known & (found != labels), known)]
        return matrices, counts

    return jax.jit(step)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--split", default="", help="default: config.data.eval_split of the run")
    parser.add_argument("--width", type=int, default=10, help="of the band on either side of a boundary, pixels")
    args = parser.parse_args()
    config = configs.load(os.path.join(args.workdir, "config.json"))
    split = args.split or config.data.eval_split
    model, params, _, dataset = evaluate.load(config, args.workdir, "latest", split)
    step, total = step_of(model, args.width), None
    for batch in eval_batches(dataset, split, batch_size=1, size=config.data.eval_size):
        out = step(params, {k: batch[k] for k in ("image", "label", "valid_size")})
        out = jax.tree.map(lambda x: np.asarray(x, np.int64), out)
        total = out if total is None else jax.tree.map(np.add, total, out)
    matrices, ((wrong_along, wrong), (along, pixels)) = total
    scored = configs.scored_classes(config, dataset.class_names)
    miou = {k: round(100 * float(metrics.scores(x, scored).mean_iou), 2) for k, x in matrices.items()}
    print(f"{args.workdir}, {split}, bands of {args.width} pixels on either side of boundaries")
    print(f"  {wrong_along / wrong:.1%} of the wrong pixels lie in the bands, which hold {along / pixels:.1%} of all")
    print(f"  mean IoU {miou['unary']:.2f}; {miou['off']:.2f} if all off the bands were right "
          f"({miou['off'] - miou['unary']:+.2f}); {miou['along']:.2f} if all in the bands were")  # fmt: skip
    print(json.dumps(dict(split=split, width=args.width, wrong_in_bands=round(float(wrong_along / wrong), 3),
                          pixels_in_bands=round(float(along / pixels), 3), miou=miou["unary"],
                          miou_off_bands_mended=miou["off"], miou_in_bands_mended=miou["along"])))  # fmt: skip


if __name__ == "__main__":
    main()
