"""What there is for relations to mend in a trained model, what they have learnt, and what they mend.

    python benchmarks/diagnose.py --workdir RUN [--split val] [--checkpoint latest]

* cells: mean IoU of true labels of grid cells, upsampled bilinearly to the image, for grids of several scales: what any
  labelling of cells can reach.
* errors: a wrong pixel of the unary is *misplaced* if the class it was given is there within --width pixels (a square)
  in the true labels: a boundary runs elsewhere, or something small was run over. All others are *misnamed*: that class
  is nowhere near. Printed is the share of both, and the mean IoU that the same predictions would have if either kind
  were all right. Relations between cells are for the second kind; they may move boundaries as well, so this is no
  bound. A cell of the grid is 16 pixels of the largest scale, 10 of an image with a scale of 1.6.
* edges: the pairwise NLL of each relation beside that of two unaries alone: what the nets have learnt at all.
* weights: mean IoU against the weight of the mean-field messages, for each set of relations. Two folds: the images of
  the split are dealt alternately into halves; each weight chosen on one half is reported on the other, so that the
  reported gain is not the choice's own.

Ends with one line of JSON.
"""

import argparse
import dataclasses
import json
import os

import jax
import jax.numpy as jnp
import numpy as np

from pwcrf_jax import config as configs
from pwcrf_jax import likelihood, metrics, nets, piecewise
from pwcrf_jax.data import eval_batches
from pwcrf_jax.model import decode
from pwcrf_jax.prediction import restore
from pwcrf_jax.runtime import files, logs

SCALES = (1.0, 1.2, 1.6, 2.0)  # of the image, whose grids' cells are labelled


def misplaced(found, labels, width, num_classes):
    """bool [B, H, W]: wrong pixels whose class is there in the labels within width pixels."""
    there = nets.max_pool_same(jax.nn.one_hot(labels, num_classes), 2 * width + 1)  # void is no class
    near = jnp.take_along_axis(there, found[..., None], axis=-1)[..., 0] > 0
    return near & (found != labels) & (labels != piecewise.VOID)


def relation_sets(config):
    """{name: relations}, of each parameterisation's relations together, and of each relation alone."""
    names = list(config.model.relations)
    kind = {n: config.relations[n].parameterisation or config.model.parameterisation for n in names}
    sets = {f"all {k}": tuple(n for n in names if kind[n] == k) for k in ("residual", "free")}
    return {k: v for k, v in sets.items() if v} | {n: (n,) for n in names}


def edge_terms(potentials, labels):
    """{relation: (sum, count) of its log-likelihood}, and of residual ones also that of two independent unaries."""
    labels = piecewise.grid_labels(labels, *potentials.unary.shape[1:3])
    out = {}
    for name, p in potentials.pairwise.items():
        out[name] = likelihood.pairwise_log_likelihood(p, labels)
        if p.unary_log_probs is not None:  # the same with a net that says nothing
            silent = dataclasses.replace(p, kernel=jnp.zeros_like(p.kernel), bias=jnp.zeros_like(p.bias))
            out[f"{name}, unaries alone"] = likelihood.pairwise_log_likelihood(silent, labels)
    return out


def step_of(config, model, rows, width):
    """(params, batch) -> ({row: confusion matrix}, `edge_terms`, int [2] of misplaced and of all wrong pixels).

    rows: {row: `mean_field.Settings`}; "unary" is one of them.
    """

    def step(params, batch):
        potentials = model.apply({"params": params}, batch["image"])._replace(refinement_logits=None)
        labels, size = batch["label"].astype(jnp.int32), batch["label"].shape[1:3]
        found = {}
        for row, settings in rows.items():
            decoded = decode.decode(potentials, batch["valid_box"], size, settings)
            found[row] = decode.frame_labels(decoded, size).astype(jnp.int32)
        wrong = (found["unary"] != labels) & (labels != piecewise.VOID)
        placed = misplaced(found["unary"], labels, width, model.num_classes)
        for kind, which in {"misnamed": wrong & ~placed, "misplaced": placed}.items():
            found[kind] = jnp.where(which, labels, found["unary"])
        for scale in SCALES:
            grid = nets.grid_size(size, (scale,), configs.featmap_net(config).stride)
            # Void cells are all zeros: they vote for no class.
            cells = jax.nn.one_hot(piecewise.grid_labels(batch["label"], *grid), model.num_classes)
            found[f"cells of scale {scale:g}"] = decode.upsample(cells, size).argmax(-1)
        matrices = {row: metrics.confusion_matrix(x, labels, model.num_classes) for row, x in found.items()}
        return matrices, edge_terms(potentials, batch["label"]), jnp.stack([placed.sum(), wrong.sum()])

    return jax.jit(step)


def counts_of(step, params, batches):
    """({row: confusion matrices of both halves, int64 [2, K, K]}, {term: NLL of an edge}, share of misplaced pixels)"""
    halves, terms, pixels = {}, {}, np.zeros(2, np.int64)
    for index, batch in enumerate(batches):
        matrices, found, wrong = step(params, {k: batch[k] for k in ("image", "label", "valid_box")})
        for row, matrix in matrices.items():
            halves.setdefault(row, np.zeros((2, *matrix.shape), np.int64))[index % 2] += np.asarray(matrix)
        for name, term in found.items():
            terms[name] = terms.get(name, 0) + np.array(term, np.float64)
        pixels += np.asarray(wrong)
    nll = {name: round(float(-total / count), 4) for name, (total, count) in sorted(terms.items())}
    return halves, nll, float(pixels[0] / max(pixels[1], 1))


def held_out(halves, sets, score):
    """{set of relations: mean IoU with the weight that the other half chose, and both weights}."""
    out = {}
    for label in sets:
        mine = [row for row in halves if row.startswith(f"{label} x ")]
        chosen = [max(mine, key=lambda row: score(halves[row][half])) for half in (0, 1)]
        # Each half decoded with the weight that the other half chose, scored as one set.
        both = halves[chosen[1]][0] + halves[chosen[0]][1]
        out[label] = dict(miou=round(score(both), 2), chosen=[float(row.rsplit(" ", 1)[1]) for row in chosen])
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--split", default="", help="default: config.data.eval_split of the run")
    parser.add_argument("--checkpoint", default="best", choices=["best", "latest"])
    parser.add_argument("--width", type=int, default=10, help="pixels around a wrong one to look for its class in")
    parser.add_argument("--weights", default="0.25,0.5,1,2,4,8", help="of messages, comma-separated")
    parser.add_argument("--sums", action="store_true", help="weights of plain sums instead of means of messages")
    parser.add_argument("--output", help="JSON file of all figures")
    args = parser.parse_args()
    logs.setup()
    config = configs.load(os.path.join(args.workdir, "config.json"))
    split = args.split or config.data.eval_split
    model, params, trained_steps, dataset = restore.load(config, args.workdir, args.checkpoint, split)
    crf = dataclasses.replace(configs.crf_settings(config), average_messages=not args.sums)
    sets, rows = relation_sets(config), {"unary": dataclasses.replace(crf, weights={})}
    for label, names in sets.items():
        for weight in map(float, args.weights.split(",")):
            rows[f"{label} x {weight:g}"] = dataclasses.replace(crf, weights=dict.fromkeys(names, weight))
    batches = eval_batches(dataset, split, batch_size=1, size=config.data.eval_size)
    halves, nll, share = counts_of(step_of(config, model, rows, args.width), params, batches)
    scored = configs.scored_classes(config, dataset.class_names)
    score = lambda matrix: 100 * float(metrics.scores(matrix, scored).mean_iou)
    miou = {row: [score(n) for n in (*half, half.sum(0))] for row, half in halves.items()}
    whole = {row: round(values[2], 2) for row, values in miou.items()}

    print(f"{args.workdir}, {split}, mean IoU\n{'':32s}{'even half':>10s}{'odd half':>10s}{'whole':>10s}")
    for row, values in miou.items():
        print(f"{row:32s}" + "".join(f"{v:10.2f}" for v in values))
    for kind, part in {"misnamed": 1 - share, "misplaced": share}.items():
        print(f"{part:6.1%} of the wrong pixels of the unary are {kind}; all of these right: {whole[kind]:.2f} "
              f"({whole[kind] - whole['unary']:+.2f})")  # fmt: skip
    if nll:
        print("NLL of an edge: " + ", ".join(f"{name} {value:.4f}" for name, value in nll.items()))
    summary = dict(split=split, step=trained_steps, width=args.width, misplaced=round(share, 3), miou=whole, nll=nll)
    summary["held_out"] = held_out(halves, sets, score)
    if args.output:
        files.write(args.output, json.dumps(summary | {"miou": miou}, indent=1))
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
