"""The paper's ladder on real images: does each part help, and by how much, with seeds and confidence intervals.

    python benchmarks/ladder.py --set camvid --source_dir PATH/camvid --init_from FILE --runs runs/ladder
    python benchmarks/ladder.py --set animals --source_dir PATH/voc2012_animals --init_from FILE --runs runs/ladder
    python benchmarks/ladder.py --set camvid ... --curve    (what relations gain over unaries of several strengths)
    python benchmarks/ladder.py --summary

Rungs: baseline (one scale) -> pyramid (+ sliding pyramid pooling) -> multiscale (+ two more scales) -> refined (+ the
dense CRF on that model's unary) -> contextual (+ relations, trained on the multiscale model's features while they
stand still, with the dense CRF on top) -> convs (+ refinement convolutions on skip layers, trained beside those
relations, ahead of the dense CRF). Beside the ladder: joint (unary and relations together from the start, as the
config has it: the relations do not train the features), joint_features (they do), and two that are trained through
mean field, with message weights of 1 and the class balance of the unary, so that no weight is chosen: unrolled in
place of the contextual rung's relations, unrolled_joint in place of joint. unrolled_tuned is unrolled, decoded with
weights and a number of iterations that are chosen as those of the contextual rung are.

Nothing is chosen on the images that are scored. Message weights, the number of iterations and the dense CRF's
parameters come from a pilot: the multiscale and the contextual model trained on a part of the training images, tuned on
the rest (pwcrf tune), each rung's dense CRF on the marginals that it refines, once a set; every run then
takes its last checkpoint.

Steps, crops and batches are sized for two CPU cores (`SETS`): three seeds take some hours a set. --steps, --crop,
--batch, --pair_steps, --pair_balance, --boxes and --unseen make it another ladder, and --results names a folder for it:
figures of different ladders are never mixed. With --unseen relations are trained on images that their unary has not
seen: on those it was trained on, its features and its log-probabilities, which relations start from, are better than
they will ever be again.

--curve: relations on the features of unaries that trained for an eighth, a quarter, a half and the whole of the steps,
and on those of the baseline, with fixed message weights: nothing is chosen, every weight is reported.

Each run lies in its own workdir below --runs and goes on where it was stopped; what is finished is not done again. What
was chosen for its last rung lies in its tuned.json: `pwcrf eval --workdir RUN --checkpoint latest --refine full` scores
it, with --split test as well. Figures go to benchmarks/results, one JSON a set, rung and seed, with the counts of each
image, from which --summary makes its table: means over seeds, 95 % intervals from a paired bootstrap over images. Ends
with one line of JSON.
"""

import argparse
import datetime
import json
import os
import platform
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ladder_table import BESIDE, EVAL_SPLIT, RESULTS, RUN_OF, RUNGS, SIZES, pack, scores, sizes_in, summary
from tqdm import tqdm

from pwcrf_jax import config as configs
from pwcrf_jax.configs import camvid_mobilenet_v2, voc_mobilenet_v2
from pwcrf_jax.data import eval_batches
from pwcrf_jax.evaluation import evaluate, tuning
from pwcrf_jax.prediction import refinement, restore
from pwcrf_jax.runtime import files, logs
from pwcrf_jax.training import loop

ON_UNARY = {"contextual": "piecewise_staged", "unrolled": "unrolled_mean_field_staged"}  # objectives of these rungs
MIDDLE = ("block_3_expand", "block_6_expand")
# Whose held-out images chose what a rung is decoded and refined with.
PILOT_OF = {"refined": "multiscale", "contextual": "contextual", "convs": "convs", "unrolled_tuned": "unrolled"}
ANIMALS = ("background", "cat", "cow", "dog", "horse", "sheep", "person")


class Setting(NamedTuple):
    """How a set is trained here.

    steps: of a unary. pair_steps: of relations on features that stand still. pair_balance: their
      loss.pairwise_balance_power.
    boxes: of `BOXES`, in cells.
    """

    module: Any
    split: str
    steps: int
    pair_steps: int
    pair_balance: float
    batch_size: int
    crop_size: tuple[int, int]
    boxes: str


BOXES = {
    "near": {"surrounding": [[-4, 4], [-4, 4]], "above_below": [[-8, -1], [-4, 4]]},
    "far": {"surrounding": [[-8, 8], [-8, 8]], "above_below": [[-12, -1], [-6, 6]]},
}
SETS = {
    "camvid": Setting(camvid_mobilenet_v2, "train", 450, 225, 0.6, 4, (240, 320), "near"),
    "animals": Setting(voc_mobilenet_v2, "train_aug", 350, 175, 0.3, 4, (320, 320), "far"),
}
HELD_OUT = 20  # percent of the training images that the pilot is tuned on
CURVE = (("baseline", 1.0), ("multiscale", 0.125), ("multiscale", 0.25), ("multiscale", 0.5), ("multiscale", 1.0))
CURVE_WEIGHTS = (0.5, 1.0, 2.0, 4.0)


def config_of(args, rung, seed, split, unary="multiscale", share=1.0):
    """The training run behind a rung.

    unary: the rung whose features the contextual one stands on; share: of the steps, that this unary is trained for.
    """
    setting = SETS[args.set]
    config = setting.module.get_config()
    config.seed = seed
    config.data.source_dir, config.data.data_dir, config.data.train_split = args.source_dir, args.data_dir, split
    config.data.partial = True
    config.init_from = args.init_from
    config.eval.classes = ANIMALS if args.set == "animals" else ()
    # Nothing is chosen by validation: a run ends with a look at a few images, the figures are made by `run`.
    config.train.eval_every, config.eval.panel, config.data.eval_split = 0, 0, f"{EVAL_SPLIT}[:4]"
    sizes = sizes_of(args)
    config.train.steps = max(1, round(sizes["steps"] * share))
    config.train.batch_size, config.data.crop_size = sizes["batch_size"], tuple(sizes["crop_size"])
    for name, (rows, cols) in sizes["boxes"].items():
        config.relations[name].unit = "cells"
        config.relations[name].rows, config.relations[name].cols = tuple(rows), tuple(cols)
    config.optimizer.warmup_steps = min(config.optimizer.warmup_steps, config.train.steps // 4)
    features = unary if rung in ON_UNARY else rung
    if features in ("baseline", "pyramid"):
        config.model.scales = config.model.scales[:1]
    if features == "baseline":
        config.model.pyramid_windows = ()
    if rung in ("baseline", "pyramid", "multiscale"):
        config.model.relations = ()
    if rung in ON_UNARY:
        config.loss.objective, config.loss.unary_share = ON_UNARY[rung], 0.0
        config.train.steps = sizes["pair_steps"]
    config.loss.pairwise_balance_power = -1.0
    if rung == "contextual":
        if sizes["pair_balance"] != config.loss.balance_power:
            config.loss.pairwise_balance_power = sizes["pair_balance"]
        config.model.refinement_convs.layers = MIDDLE
    config.model.pairwise_trains_features = rung == "joint_features"
    # The paper's number, and weights of 1: the pilot chooses for the contextual rungs.
    config.crf.num_iterations, config.crf.weights = 3, (1.0,)
    if rung == "unrolled_joint":
        config.loss.objective = "unrolled_mean_field"
    return config


def sizes_of(args):
    """`SIZES` of this ladder."""
    setting = SETS[args.set]
    unary = args.steps or setting.steps, args.batch or setting.batch_size, list(args.crop or setting.crop_size)
    balance = setting.pair_balance if args.pair_balance is None else args.pair_balance
    pairs = args.pair_steps or setting.pair_steps, balance, BOXES[args.boxes or setting.boxes], args.unseen
    return dict(zip(SIZES, (*unary, *pairs), strict=True))


def kept(args, path):
    """A result of before, or None.

    Raises:
      SystemExit: it is of other sizes.
    """
    if not path.exists():
        return None
    result, sizes = json.loads(path.read_text()), sizes_of(args)
    if found := {k: v for k, v in sizes_in(result).items() if v != sizes[k]}:
        raise SystemExit(
            f"{path} holds figures of {found}, this ladder has {sizes}: name another folder with --results, or make "
            "them the same"
        )
    return result


def parts(split, unseen):
    """Of training images: those that the unary is trained on, and those of relations on its features."""
    if not unseen:
        return split, split
    name, _, end = split.removesuffix("%]").partition("[:")
    border = int(end or 100) - unseen
    return f"{name}[:{border}%]", f"{name}[{border}%:{end and end + '%'}]"


def trained(args, rung, seed, split, name, unary="multiscale", share=1.0):
    """The workdir of a finished run; arguments as in `config_of`."""
    config = config_of(args, rung, seed, parts(split, args.unseen)[rung in ON_UNARY], unary, share)
    shorter = f"{share:g}x" if share != 1 else ""
    if rung in ON_UNARY:
        config.init_from = str(trained(args, unary, seed, split, name, share=share))
        rung += f"-on-{unary}" if (unary, share) != ("multiscale", 1.0) else ""
    workdir = Path(args.runs) / args.set / f"{name}-{rung}{shorter}-{seed}"
    loop.train_and_evaluate(config, str(workdir))
    found = configs.load(workdir / "config.json")  # a finished run is taken as it is
    balances = "loss.balance_power", "loss.pairwise_balance_power"
    for key in ("train.steps", "train.batch_size", "data.crop_size", *balances, "data.train_split"):
        section, name = key.split(".")
        if found[section][name] != config[section][name]:
            raise SystemExit(
                f"{workdir} was trained with config.{key} = {found[section][name]}, this ladder has "
                f"{config[section][name]}: name another folder with --runs"
            )
    return workdir


def held_out(which):
    """Splits of a set: of the training images, those that a pilot trains on and those that it is tuned on."""
    split, border = SETS[which].split, f"{100 - HELD_OUT}%"
    return f"{split}[:{border}]", f"{split}[{border}:]"


def pilot(args, rungs):
    """{pilot: tuned values of crf and refine}, from held-out training images, of those that the rungs need.

    The dense CRF is tuned on the marginals that it refines; that of the unrolled model is not searched.
    """
    trains, tunes = held_out(args.set)
    path = args.results / f"ladder_{args.set}_pilot.json"
    found = kept(args, path) or sizes_of(args)
    needed = list(dict.fromkeys(PILOT_OF[rung] for rung in rungs if rung in PILOT_OF))
    for name in needed:
        if name not in found:
            workdir = trained(args, RUN_OF.get(name, name), 0, trains, "pilot")
            config = configs.load(workdir / "config.json")
            trials, row = args.trials if name != "unrolled" else 1, "convs" if name == "convs" else "all"
            chosen = tuning.tune(config, str(workdir), "latest", tunes, "full", trials, row)
            keys = "split", "config", "miou_before", "miou_messages", "miou_after"
            found[name] = {key: chosen[key] for key in keys}
            write(path, found)
    return {name: found[name]["config"] for name in needed}


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write(path, json.dumps(content, indent=1) + "\n")


def of_classes(matrices):
    """Hits, pixels of the truth and pixels predicted of each class, [..., 3, K], of confusion matrices [..., K, K]."""
    return np.stack([np.diagonal(matrices, axis1=-2, axis2=-1), matrices.sum(-1), matrices.sum(-2)], axis=-2)


def counts_of_images(config, workdir, refined=""):
    """{row: int64 [images, 1 + bands, 3, K]}: hits, pixels of the truth, pixels predicted; and the images' ids.

    refined: a row, "all" or "convs"; the dense CRF on it is one more row, "refined".
    """
    model, params, _, dataset = restore.load(config, str(workdir), "latest", EVAL_SPLIT)
    step = evaluate.make_eval_fn(config, model, keep=[refined or "all"], devices=jax.devices()[:1])
    counts, ids = {}, []
    batches = eval_batches(dataset, EVAL_SPLIT, batch_size=1, size=config.data.eval_size)
    for batch in tqdm(batches, desc=str(workdir), disable=None, leave=False):
        sums, per_image = step(params, evaluate.inputs_of(batch, 1))
        matrices = {row: np.asarray(matrix, np.int64) for row, matrix in sums.confusion.items()}
        if refined:
            marginals = np.asarray(per_image.rows[refined].log_marginals)[0]
            matrices["refined"] = refinement.refine_batch(marginals, batch, configs.refine_settings(config, "full"))[0]
        for row, n in matrices.items():
            counts.setdefault(row, []).append(of_classes(n))
        ids += batch["id"]
    return {row: np.stack(values) for row, values in counts.items()}, ids, dataset.class_names


def run(args):
    split = SETS[args.set].split
    path_of = lambda rung, seed: args.results / f"ladder_{args.set}_{rung}_{seed}.json"
    missing = [rung for rung in args.rungs if not all(kept(args, path_of(rung, seed)) for seed in args.seeds)]
    chosen = pilot(args, missing)
    for seed in args.seeds:
        for rung in args.rungs:
            if kept(args, path_of(rung, seed)):
                continue
            workdir = trained(args, RUN_OF.get(rung, rung), seed, split, "run")
            config = configs.load(workdir / "config.json")
            refined = {"refined": "all", "contextual": "all", "convs": "convs"}.get(rung, "")
            if rung == "multiscale" and "refined" in args.rungs:
                refined = "all"  # one pass for both rungs, which have the same marginals
            named = "refined" if refined and rung == "multiscale" else rung
            tuned = chosen[PILOT_OF[named]] if named in PILOT_OF else {}
            tuned = {k: v for k, v in tuned.items() if refined or k.startswith("crf.")}
            for key, value in tuned.items():
                section, name = key.split(".")
                config[section][name] = tuple(value) if isinstance(value, list) else value
            counts, ids, names = counts_of_images(config, workdir, refined)
            if refined == configs.final_row(config):  # so that pwcrf eval --refine full has this rung's figures
                conditions = configs.tuning_conditions(config)
                configs.write_tuned(dict(config=tuned, conditions=conditions, split=held_out(args.set)[1]), workdir)
            about = dict(seed=seed, tuned=tuned or None)
            for same in (rung, "refined") if rung == "multiscale" and refined else (rung,):
                write(path_of(same, seed), result_of(args, config, names, ids, counts, rung=same, **about))


def result_of(args, config, names, ids, counts, **about):
    """What is kept of a run, and a line of it on the terminal."""
    index = configs.scored_classes(config, names) or list(range(len(names)))
    figures = {row: scores(x.sum(0), index) for row, x in counts.items()}
    said = ", ".join(f"{row} {f['miou']:.2f}" for row, f in figures.items())
    print(f"{args.set} {about['rung']} seed {about['seed']}: {said}", flush=True)
    return dict(
        set=args.set, **(dict(split=EVAL_SPLIT) | about), images=len(ids), **sizes_of(args),
        date=datetime.date.today().isoformat(), jax=jax.__version__,
        python=platform.python_version(), device=jax.devices()[0].device_kind, cores=os.cpu_count(),
        classes=[names[i] for i in index], class_indices=index,
        rows={row: {k: round(float(v), 3) for k, v in f.items()} for row, f in figures.items()}, counts=pack(counts),
    )  # fmt: skip


def run_curve(args):
    """What relations gain over unaries of several strengths, at each message weight."""
    split = SETS[args.set].split
    for seed in args.seeds:
        for unary, share in CURVE:
            path = args.results / f"curve_{args.set}_{unary}_{share:g}_{seed}.json"
            if kept(args, path):
                continue
            workdir = trained(args, "contextual", seed, split, "run", unary, share)
            config, counts = configs.load(workdir / "config.json"), {}
            for weight in CURVE_WEIGHTS:
                config.crf.weights = (weight,)
                found, ids, names = counts_of_images(config, workdir)
                counts |= {"unary": found["unary"], f"weight {weight:g}": found["all"]}
            write(path, result_of(args, config, names, ids, counts, seed=seed, rung=f"contextual on {unary}",
                                  unary=unary, share=share))  # fmt: skip


def add_arguments(parser):
    """Those that say which models there are and where they lie."""
    parser.add_argument("--set", choices=list(SETS))
    parser.add_argument("--source_dir", default="")
    parser.add_argument("--data_dir", default="")
    parser.add_argument("--init_from", default="", help="ImageNet weights of MobileNetV2")
    parser.add_argument("--runs", default="runs/ladder", help="folder for the workdirs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the figures")
    parser.add_argument("--steps", type=int, default=0, help="of each training; 0: as in SETS")
    parser.add_argument("--crop", type=int, nargs=2, help="height and width of training crops")
    parser.add_argument("--batch", type=int, default=0, help="images of a training step")
    parser.add_argument("--pair_steps", type=int, default=0, help="of the relations; 0: as in SETS")
    parser.add_argument("--pair_balance", type=float, help="class balance of the relations; as in SETS if left out")
    parser.add_argument("--boxes", choices=list(BOXES), help="of the relations; as in SETS if left out")
    parser.add_argument(
        "--unseen", type=int, default=0, help="percent of the training images that only relations on a unary see"
    )


def check_arguments(parser, args):
    if not args.set:
        parser.error("--set is needed, or --summary")
    if not 0 <= args.unseen < 100 - HELD_OUT:
        parser.error(f"--unseen {args.unseen}: 0 to {99 - HELD_OUT}, the pilot holds {HELD_OUT} % out for itself")
    for name in ("source_dir", "init_from"):
        if not os.path.exists(getattr(args, name) or "-"):
            parser.error(f"--{name} {getattr(args, name)!r} does not exist")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--summary", action="store_true", help="print the table of what was run")
    parser.add_argument(
        "--against", type=Path, help="with --summary: folder of another ladder, whose objectives and unary are compared"
    )
    parser.add_argument("--picture", help="with --summary: file of a picture, one for each set (.png, .svg)")
    add_arguments(parser)
    parser.add_argument("--rungs", nargs="+", choices=RUNGS + BESIDE, default=list(RUNGS))
    parser.add_argument(
        "--curve", action="store_true", help="instead of the rungs: gain over unaries of several strengths"
    )
    parser.add_argument("--trials", type=int, default=16, help="settings of the dense CRF that the pilot tries at most")
    args = parser.parse_args()
    if args.unseen and (together := [rung for rung in args.rungs if rung.startswith(("joint", "unrolled_joint"))]):
        parser.error(f"--unseen {args.unseen}: {', '.join(together)} train unary and relations on the same images")
    if args.against and not args.against.is_dir():
        parser.error(f"--against {args.against} does not exist")
    if args.summary:
        summary(args)
        return
    check_arguments(parser, args)
    logs.setup()
    (run_curve if args.curve else run)(args)
    summary(args)


if __name__ == "__main__":
    main()
