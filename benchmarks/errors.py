"""Are the wrong pixels of a trained unary misplaced or misnamed, and so what context could mend.

    python benchmarks/errors.py --workdir RUN --split val

A wrong pixel is *misplaced* if the class it was given is there within --width pixels (a square) in the true labels: a
boundary runs elsewhere, or something small was run over. All others are *misnamed*: that class is nowhere near.
Printed is the share of both, and the mean IoU that the same predictions would have if either kind were all right.
Relations between cells are for the second kind; they may move boundaries as well, so this is no bound, but it says what
is there to mend. A cell of the grid is 16 pixels of the largest scale, 10 of an image with a scale of 1.6. Ends with
one line of JSON.
"""

import argparse
import json
import os
import sys

import jax
import jax.numpy as jnp
import numpy as np

from pwcrf_jax.prediction import restore

sys.path.insert(0, os.path.join(os.path.dirname(__file__), ".."))

from pwcrf_jax import config as configs
from pwcrf_jax import mean_field, metrics, nets, piecewise
from pwcrf_jax.data import eval_batches
from pwcrf_jax.model import decode


def misplaced(found, labels, width, num_classes):
    """bool [B, H, W]: wrong pixels whose class is there in the labels within width pixels."""
    there = nets.max_pool_same(jax.nn.one_hot(labels, num_classes), 2 * width + 1)  # void is no class
    near = jnp.take_along_axis(there, found[..., None], axis=-1)[..., 0] > 0
    return near & (found != labels) & (labels != piecewise.VOID)


def step_of(config, model, width):
    """(params, batch) -> confusion matrices as they are and with either kind mended, counts of wrong pixels."""

    unary_alone = mean_field.Settings(weights={})

    def step(params, batch):
        potentials = model.apply({"params": params}, batch["image"])
        labels, size = batch["label"].astype(jnp.int32), batch["label"].shape[1:3]
        decoded = decode.decode(potentials._replace(refinement_logits=None), batch["valid_box"], size, unary_alone)
        found = decode.frame_labels(decoded, size).astype(jnp.int32)
        wrong = (found != labels) & (labels != piecewise.VOID)
        placed = misplaced(found, labels, width, model.num_classes)
        mended = lambda which: jnp.where(which, labels, found)
        predictions = dict(unary=found, misnamed=mended(wrong & ~placed), misplaced=mended(placed))
        matrices = {k: metrics.confusion_matrix(x, labels, model.num_classes) for k, x in predictions.items()}
        return matrices, jnp.stack([placed.sum(), wrong.sum()])

    return jax.jit(step)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--split", default="", help="default: config.data.eval_split of the run")
    parser.add_argument("--width", type=int, default=10, help="pixels around a wrong one to look for its class in")
    args = parser.parse_args()
    config = configs.load(os.path.join(args.workdir, "config.json"))
    split = args.split or config.data.eval_split
    model, params, _, dataset = restore.load(config, args.workdir, "latest", split)
    step, total = step_of(config, model, args.width), None
    for batch in eval_batches(dataset, split, batch_size=1, size=config.data.eval_size):
        out = step(params, {k: batch[k] for k in ("image", "label", "valid_box")})
        out = jax.tree.map(lambda x: np.asarray(x, np.int64), out)
        total = out if total is None else jax.tree.map(np.add, total, out)
    matrices, (placed, wrong) = total
    scored = configs.scored_classes(config, dataset.class_names)
    miou = {k: round(100 * float(metrics.scores(x, scored).mean_iou), 2) for k, x in matrices.items()}
    share = float(placed / max(wrong, 1))
    print(f"{args.workdir}, {split}: mean IoU of the unary {miou['unary']:.2f}")
    for name, part in {"misnamed": 1 - share, "misplaced": share}.items():
        print(f"  {part:6.1%} of the wrong pixels are {name}; all of these right: {miou[name]:.2f} "
              f"({miou[name] - miou['unary']:+.2f})")  # fmt: skip
    print(json.dumps(dict(split=split, width=args.width, misplaced=round(share, 3), miou=miou["unary"],
                          miou_misnamed_mended=miou["misnamed"], miou_misplaced_mended=miou["misplaced"])))  # fmt: skip


if __name__ == "__main__":
    main()
