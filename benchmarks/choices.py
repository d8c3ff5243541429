"""What makes relations work on real images: choices one by one, on training images that were held out.

    python benchmarks/choices.py --set animals --source_dir PATH/voc2012_animals --init_from FILE --runs runs/ladder
    python benchmarks/choices.py --summary

One model of ladder.py's pilot, trained on a part of the training images: a unary, and relations on its features while
they stand still, with the ladder's settings ("as in the ladder"). Then one thing at a time is another: how relations
are trained (`TRAINED`: parameterisation, class balance, boxes, all neighbours in place of 24, features of their own, an
objective, twice the steps; refinement convolutions beside them), or how the ladder's model is decoded (`DECODED`:
iterations, damping, temperature, sums in place of means, also of the free parameterisation; and Potts scores in place
of those that were learned, the same neighbours and nothing but smoothing; seed 0 alone). `FROM_THE_START` trains unary
and relations together for the unary's steps, with and without the features learning from relations. Each model is
scored at several message weights, of both relations alike, and with more iterations.
Nothing here sees the images that the ladder is scored on.

Workdirs and figures are kept as ladder.py keeps them, in files named choices_SET_NAME_SEED.json, and what is finished
is not done again: of a decoding that came later, that one alone. Gains are over the same model's unary, with 95 %
intervals from a paired bootstrap over images; the last column compares with the ladder's relations at the same weight,
and what is sharpened with what is not. Ends with one line of JSON.
"""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ladder
import ladder_table
import numpy as np
from tqdm import tqdm

from pwcrf_jax import config as configs
from pwcrf_jax import metrics
from pwcrf_jax.data import eval_batches
from pwcrf_jax.model import decode
from pwcrf_jax.prediction import restore
from pwcrf_jax.runtime import logs, parallel
from pwcrf_jax.training import loop


class Decoding(NamedTuple):
    """temperature: that all scores are divided by, those of unary and relations. potts: scores of relations are 1 where
    both labels are the same and 0 elsewhere, in place of the learned ones. Others as in config.crf."""

    weight: float = 1.0
    num_iterations: int = 3
    damping: float = 0.0
    temperature: float = 1.0
    average_messages: bool = True
    potts: bool = False

    def __str__(self):
        numbers = ("weight", "num_iterations", "damping", "temperature")
        said = [f"{k} {getattr(self, k):g}" for k in numbers if getattr(self, k) != self._field_defaults[k]]
        said += ["sums"] * (not self.average_messages) + ["Potts"] * self.potts
        return ", ".join(said) or "weight 1"


LADDER = "as in the ladder"
EACH = (*map(Decoding, (0.1, 0.5, 1.0, 2.0, 4.0)), Decoding(num_iterations=10))
SUMS = tuple(Decoding(weight, n, average_messages=False) for weight in (0.02, 0.1) for n in (3, 10))
DECODED = (
    *(Decoding(num_iterations=n) for n in (1, 2, 5, 20)),
    Decoding(0.5, 10), Decoding(2.0, 10), Decoding(0.5, 20),
    *(Decoding(num_iterations=n, damping=0.5) for n in (3, 10, 20)),
    Decoding(temperature=0.5), Decoding(temperature=2.0),
    *SUMS,
    *(Decoding(weight, 10, potts=True) for weight in (1.0, 2.0, 4.0, 8.0)),
)  # fmt: skip
TRAINED = {
    LADDER: {},
    "free": {"model.parameterisation": "free"},
    "balance 0": {"loss.pairwise_balance_power": 0.0},
    "balance 0.6": {"loss.pairwise_balance_power": 0.6},
    "other boxes": "boxes",
    "all neighbours": {"grid": 0, "loss.sampled_offsets": 24},  # of them as many in a step as the grid has
    "own features": {"model.pairwise_features": "own"},
    "through mean field": {"loss.objective": "unrolled_mean_field_staged", "loss.pairwise_balance_power": -1.0},
    "twice the steps": {"train.steps": 2},  # times as many
    "refinement convolutions": {"model.refinement_convs.layers": "middle"},  # those of the set
    "refinement convolutions, four times the steps": {"model.refinement_convs.layers": "middle", "train.steps": 4},
}
FROM_THE_START = {
    "joint": {},
    "joint, relations train features": {"model.pairwise_trains_features": True},
    "the same, a tenth as much": {"model.pairwise_trains_features": True, "loss.pairwise_weight": 0.1},
}
NAMES = (*TRAINED, *FROM_THE_START)


def config_of(args, name, seed, split):
    if name in FROM_THE_START:
        config, changes = ladder.config_of(args, "joint", seed, split), FROM_THE_START[name]
    else:
        config, changes = ladder.config_of(args, "contextual", seed, split), TRAINED[name]
        config.model.refinement_convs.layers = ()
    if changes == "boxes":
        now = args.boxes or ladder.SETS[args.set].boxes
        (other,) = (boxes for key, boxes in ladder.BOXES.items() if key != now)
        changes = {f"relations.{r}.{axis}": tuple(x) for r, box in other.items()
                   for axis, x in zip(("rows", "cols"), box, strict=True)}  # fmt: skip
    changes = dict(changes)
    if "train.steps" in changes:
        changes["train.steps"] *= config.train.steps
    if "model.refinement_convs.layers" in changes:
        changes["model.refinement_convs.layers"] = ladder.SETS[args.set].middle
    if "grid" in changes:
        changes |= dict.fromkeys((f"relations.{r}.grid" for r in config.model.relations), changes.pop("grid"))
    with config.unlocked():
        config.update_from_flattened_dict(changes)
    return config


def counts_of_images(config, workdir, split, decodings):
    """As ladder.counts_of_images, of the unary and each decoding, without bands: ({row: counts}, names of classes)."""
    model, params, _, dataset = restore.load(config, str(workdir), "latest", split)
    crf = configs.crf_settings(config)

    def step(params, batch):
        potentials = model.apply({"params": params}, batch["image"])
        size = batch["label"].shape[1:3]
        box, logits = batch["valid_box"], potentials.refinement_logits
        potentials = potentials._replace(refinement_logits=None)

        def confusion(decoded):
            return metrics.confusion_matrix(decode.frame_labels(decoded, size), batch["label"], model.num_classes)

        out = {"unary": confusion(decode.decode(potentials, box, size, dataclasses.replace(crf, weights={})))}
        for d in decodings:
            pairwise = potentials.pairwise
            if d.potts:
                same = dict(bias=jnp.eye(model.num_classes), unary_log_probs=None)
                pairwise = {k: dataclasses.replace(p, kernel=0 * p.kernel, **same) for k, p in pairwise.items()}
            scaled = potentials._replace(unary=potentials.unary / d.temperature, pairwise=pairwise)
            settings = dataclasses.replace(
                crf,
                weights=dict.fromkeys(crf.weights, d.weight / d.temperature),
                num_iterations=d.num_iterations,
                damping=d.damping,
                average_messages=d.average_messages,
            )
            decoded = decode.decode(scaled, box, size, settings)
            out[str(d)] = confusion(decoded)
            if logits is not None:
                out[f"{d}, sharpened"] = confusion(decode.with_refinement_convs(decoded, logits, box, size))
        return jax.lax.psum(out, parallel.AXIS)

    fn, counts = parallel.pmap_eval(step, devices=jax.devices()[:1]), {}
    batches = eval_batches(dataset, split, batch_size=1, size=config.data.eval_size)
    for batch in tqdm(batches, desc=str(workdir), disable=None, leave=False):
        matrices = fn(params, parallel.split({k: batch[k] for k in ("image", "label", "valid_box")}, 1))
        for row, matrix in matrices.items():
            counts.setdefault(row, []).append(ladder.of_classes(np.asarray(matrix, np.int64)[None]))
    rows = sorted(counts, key=["unary", *(f"{d}{end}" for d in decodings for end in ("", ", sharpened"))].index)
    return {row: np.stack(counts[row]) for row in rows}, dataset.class_names


def run(args):
    trains, tunes = ladder.held_out(args.set)
    for seed in args.seeds:
        for name in args.choices:
            path = args.results / f"choices_{args.set}_{slug(name)}_{seed}.json"
            more = {LADDER: DECODED, "free": SUMS}.get(name, ()) if seed == 0 else ()
            kept = ladder_table.unpack((ladder.kept(args, path) or {"counts": {}})["counts"])
            missing = tuple(d for d in EACH + more if str(d) not in kept)
            if not missing:
                continue
            config = config_of(args, name, seed, trains)
            if name in TRAINED:
                config.init_from = str(ladder.trained(args, "multiscale", seed, trains, "pilot"))
                config.data.train_split = ladder.parts(trains, args.unseen)[1]
            workdir = Path(args.runs) / args.set / f"choices-{slug(name)}-{seed}"
            loop.train_and_evaluate(config, str(workdir))
            found = configs.load(workdir / "config.json")  # a finished run is taken as it is
            config.model.input_scaling = found.model.input_scaling  # that of the start weights
            configs.keep_offsets(config)
            different = [k for k in ("train", "loss", "model", "relations") if found[k] != config[k]]
            if different := different + ["data.train_split"] * (found.data.train_split != config.data.train_split):
                raise SystemExit(f"{workdir} has another config.{different[0]} than asked for: name another --runs")
            counts, names = counts_of_images(found, workdir, tunes, missing)
            if kept and not np.array_equal(kept["unary"], counts["unary"]):
                raise SystemExit(f"{path} holds figures of another model than {workdir}: name another --results")
            counts = kept | counts
            about = dict(rung=name, seed=seed, split=tunes)
            ladder.write(path, ladder.result_of(args, found, names, counts["unary"], counts, **about))


def slug(name):
    return name.replace(",", "").replace(".", "").replace(" ", "-")


def summary(args):
    out = {}
    for which in ladder.SETS:
        found = {}
        for name in NAMES:
            for path in sorted(args.results.glob(f"choices_{which}_{slug(name)}_[0-9]*.json")):
                result = json.loads(path.read_text())
                found.setdefault(name, {})[result["seed"]] = result
        if not found:
            continue
        results = [r for runs in found.values() for r in runs.values()]
        kinds = (*ladder_table.SIZES, "split")
        if mixed := [k for k in kinds if len({json.dumps(r.get(k) or 0) for r in results}) > 1]:
            raise SystemExit(f"{args.results}: choices of {which} with different {', '.join(mixed)}: not one ladder")
        counts = {name: {s: ladder_table.unpack(r["counts"]) for s, r in runs.items()} for name, runs in found.items()}
        classes = next(iter(next(iter(found.values())).values()))["class_indices"]

        def compare(first, other, second, row, counts=counts, classes=classes):
            """second's row over first's other one, over the seeds that have both: text and mean."""
            have = lambda which, key: {seed for seed, rows in counts.get(which, {}).items() if key in rows}
            seeds = sorted(have(first, other) & have(second, row))
            if not seeds:
                return "", None
            one, two = ([counts[which][s][key] for s in seeds] for which, key in ((first, other), (second, row)))
            gain, low, high = ladder_table.bootstrap(one, two, classes, np.random.default_rng(0))
            return f"{gain:+.2f} [{low:+.2f}, {high:+.2f}]", round(float(gain), 2)

        print(
            f"\n{which}, held-out training images: mean IoU of the unary, gain over it, gain over the ladder's, seeds"
        )
        for name, runs in found.items():
            unary = np.mean([r["rows"]["unary"]["miou"] for r in runs.values()])
            print(f"  {name}: unary {unary:.2f} ({len(runs)} seeds)")
            for row in next(iter(runs.values()))["rows"]:
                if row == "unary":
                    continue
                said, gain = compare(name, "unary", name, row)
                plain = row.removesuffix(", sharpened")
                if plain != row:
                    beside, _ = compare(name, plain, name, row)
                else:
                    beside, _ = compare(LADDER, row if name != LADDER else "weight 1", name, row)
                print(f"    {row:42s} {said:24s} {beside:24s} {sum(row in r['rows'] for r in runs.values())}")
                out.setdefault(which, {}).setdefault(name, {})[row] = gain
    print(json.dumps(out))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--summary", action="store_true", help="print the table of what was run")
    ladder.add_arguments(parser)
    parser.add_argument("--choices", nargs="+", choices=NAMES, default=list(NAMES))
    args = parser.parse_args()
    if args.summary:
        summary(args)
        return
    if args.unseen and (together := [name for name in args.choices if name in FROM_THE_START]):
        parser.error(f"--unseen {args.unseen}: {', '.join(together)} train unary and relations on the same images")
    ladder.check_arguments(parser, args)
    logs.setup()
    run(args)
    summary(args)


if __name__ == "__main__":
    main()
