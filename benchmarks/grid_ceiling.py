"""The best mean IoU that labels of grid cells can reach: true labels of the cells, upsampled bilinearly to the image.

python benchmarks/grid_ceiling.py --source_dir PATH/camvid [--data camvid] [--split val]
"""

import argparse
import json
import os
import sys

import jax
import numpy as np

sys.path.insert(0, os.path.join(os.path.dirname(__file__), ".."))

from pwcrf_jax import metrics, piecewise
from pwcrf_jax.data import VOID, eval_batches, load_dataset
from pwcrf_jax.model import decode
from pwcrf_jax.nets import grid_size


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="camvid")
    parser.add_argument("--source_dir", default="")
    parser.add_argument("--data_dir", default="")
    parser.add_argument("--split", default="val")
    parser.add_argument("--size", default="360,480", help="height,width of the largest image")
    args = parser.parse_args()
    size = tuple(int(n) for n in args.size.split(","))
    dataset = load_dataset(args.data, source_dir=args.source_dir, data_dir=args.data_dir, partial=True)
    classes, out = dataset.num_classes, {}
    for scale in (1.0, 1.2, 1.6, 2.0):
        grid = grid_size(size, (scale,))

        @jax.jit
        def count(labels, grid=grid):
            cells = piecewise.grid_labels(labels, *grid)
            # void cells are all zeros: they vote for no class
            scores = decode.upsample(jax.nn.one_hot(cells, classes), size)
            return metrics.confusion_matrix(scores.argmax(-1), labels, classes, void=VOID)

        confusion = 0
        for batch in eval_batches(dataset, args.split, batch_size=8, size=size):
            confusion = confusion + np.asarray(count(batch["label"]), np.int64)
        scores = metrics.scores(confusion)
        out[f"{grid[0]}x{grid[1]}"] = round(100 * scores.mean_iou, 2)
        per_class = zip(dataset.class_names, scores.iou_per_class, strict=True)
        print(f"scale {scale}: {grid} cells, mean IoU {100 * scores.mean_iou:.1f}; "
              + ", ".join(f"{name} {100 * iou:.0f}" for name, iou in per_class))  # fmt: skip
    print(json.dumps(out))


if __name__ == "__main__":
    main()
