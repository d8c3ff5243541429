"""Mean IoU of a trained workdir against the weight of the mean-field messages, for each set of its relations.

    python benchmarks/message_weights.py --workdir runs/camvid

Also prints the pairwise NLL of each relation beside that of two unaries alone: what the nets have learnt at all.
Two folds: the images of the split are dealt alternately into halves; each weight chosen on one half is reported on the
other, so that the reported gain is not the choice's own. Ends with one line of JSON.
"""

import argparse
import dataclasses
import json
import os
import sys

import jax
import jax.numpy as jnp
import numpy as np

from pwcrf_jax.prediction import restore

sys.path.insert(0, os.path.join(os.path.dirname(__file__), ".."))

from pwcrf_jax import config as configs
from pwcrf_jax import metrics, piecewise
from pwcrf_jax.data import eval_batches, load_dataset
from pwcrf_jax.model import decode
from pwcrf_jax.runtime import files, logs


def relation_sets(config):
    """Each parameterisation's relations together, and each relation alone."""
    names = list(config.model.relations)
    kind = {n: config.relations[n].parameterisation or config.model.parameterisation for n in names}
    sets = {f"all {k}": tuple(n for n in names if kind[n] == k) for k in ("residual", "free")}
    return {k: v for k, v in sets.items() if v} | {n: (n,) for n in names}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--split", default="")
    parser.add_argument("--checkpoint", default="best", choices=["best", "latest"])
    parser.add_argument("--weights", default="0.25,0.5,1,2,4,8")
    parser.add_argument("--sums", action="store_true", help="weights of plain sums instead of means of messages")
    parser.add_argument("--output", help="JSON file of all figures")
    args = parser.parse_args()
    logs.setup()
    config = configs.load(os.path.join(args.workdir, "config.json"))
    model, params, trained_steps = restore.restore_params(config, args.workdir, args.checkpoint)
    dataset = load_dataset(**configs.dataset_options(config))
    weights = [float(w) for w in args.weights.split(",")]
    rows = {"unary": ((), 0.0)}
    for label, names in relation_sets(config).items():
        rows |= {f"{label} x {w:g}": (names, w) for w in weights}

    @jax.jit
    def step(params, batch):
        potentials = model.apply({"params": params}, batch["image"])
        size = batch["label"].shape[1:3]
        labels = piecewise.grid_labels(batch["label"], *potentials.unary.shape[1:3])
        terms = {}
        for name, p in potentials.pairwise.items():
            terms[name] = piecewise.pairwise_log_likelihood(p, labels)
            if p.unary_log_probs is not None:  # the same with a net that says nothing: two independent unaries
                silent = dataclasses.replace(p, kernel=jnp.zeros_like(p.kernel), bias=jnp.zeros_like(p.bias))
                terms[f"{name}, unaries alone"] = piecewise.pairwise_log_likelihood(silent, labels)
        out = {}
        for row, (names, weight) in rows.items():
            settings = dataclasses.replace(
                configs.crf_settings(config), weights=dict.fromkeys(names, weight), average_messages=not args.sums
            )
            decoded = decode.decode(potentials._replace(refinement_logits=None), batch["valid_box"], size, settings)
            labels = decode.frame_labels(decoded, size)
            count = jax.vmap(lambda p, y: metrics.confusion_matrix(p, y, model.num_classes))
            out[row] = count(labels, batch["label"])
        return out, terms

    halves = {row: np.zeros((2, model.num_classes, model.num_classes), np.int64) for row in rows}
    index, nll = 0, {}
    split = args.split or config.data.eval_split
    for batch in eval_batches(dataset, split, batch_size=4, size=config.data.eval_size):
        out, terms = step(params, {k: batch[k] for k in ("image", "label", "valid_box")})
        for name, term in terms.items():
            nll[name] = nll.get(name, 0) + np.array(term, np.float64)
        for row, counts in out.items():
            for i, image in enumerate(np.asarray(counts)):
                halves[row][(index + i) % 2] += image
        index += 4

    miou = {row: [100 * metrics.scores(n).mean_iou for n in (*half, half.sum(0))] for row, half in halves.items()}
    print(f"{'':32s}{'even half':>10s}{'odd half':>10s}{'whole':>10s}")
    for row, values in miou.items():
        print(f"{row:32s}" + "".join(f"{v:10.2f}" for v in values))
    nll = {name: round(float(-total / count), 4) for name, (total, count) in sorted(nll.items())}
    print("\nNLL of an edge: " + ", ".join(f"{name} {value:.4f}" for name, value in nll.items()))
    held_out = {}
    for label in relation_sets(config):
        mine = [row for row in miou if row.startswith(f"{label} x ")]
        chosen = [max(mine, key=lambda r: miou[r][half]) for half in (0, 1)]
        # Each half decoded with the weight that the other half chose, scored as one set.
        confusion = halves[chosen[1]][0] + halves[chosen[0]][1]
        held_out[label] = dict(
            miou=round(100 * metrics.scores(confusion).mean_iou, 2),
            chosen=[float(row.rsplit(" ", 1)[1]) for row in chosen],
        )
    summary = dict(split=split, step=trained_steps, miou_unary=round(miou["unary"][2], 2), held_out=held_out, nll=nll)
    if args.output:
        files.write(args.output, json.dumps(summary | {"miou": miou}, indent=1))
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
