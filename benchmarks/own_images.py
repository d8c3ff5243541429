"""The choices behind configs/image_folder.py: its recipe, and its backbone.

    python benchmarks/own_images.py recipe --set camvid --source_dir PATH/camvid --runs runs/own
    python benchmarks/own_images.py backbones --set animals --source_dir PATH/voc2012_animals --init_from FILE \\
        --runs runs/own
    python benchmarks/own_images.py summary

* recipe: the unary of configs/image_folder.py with jitter, dropout before the heads and Dice each on in two of four
  runs (`DESIGN`), trained on four fifths of the training images and scored on the rest; each run with and without
  averaged parameters. An effect is the mean of the runs with it minus that of those without. --alone: parts that have
  a run of their own beside these.
* backbones: the same unary on EfficientNet-Lite0 and on MobileNetV2 (--init_from: its weights), three seeds, trained on
  all training images for an equal time, scored on val after the last step. Seconds of a step are measured first, in
  turns, on the cores at hand; --steps are EfficientNet-Lite0's.

Both classes' sizes, steps and batches are for two CPU cores (`SETS`). Each run lies in a workdir of its own below
--runs and goes on where it was stopped; what is finished is not done again. Figures go to benchmarks/results, one JSON
a run. summary prints tables with 95 % intervals from a paired bootstrap over images, of backbones over images and
seeds, and one line of JSON.
"""

import argparse
import json
import os
import statistics
from pathlib import Path
from typing import NamedTuple

import jax
import ladder
import ladder_table
import numpy as np
import timing

from pwcrf_jax import config as configs
from pwcrf_jax.configs import image_folder
from pwcrf_jax.data import eval_batches
from pwcrf_jax.evaluation import evaluate
from pwcrf_jax.prediction import restore
from pwcrf_jax.runtime import checkpoint, compilation, logs, parallel
from pwcrf_jax.training import loop, steps
from pwcrf_jax.training.averaging import Averaging
from pwcrf_jax.training.optimizer import make_optimizer


class Setting(NamedTuple):
    reader: str
    split: str
    num_classes: int
    crop_size: tuple[int, int]
    eval_size: tuple[int, int]
    steps: int
    classes: tuple[str, ...] = ()


SETS = {
    "camvid": Setting("camvid", "train", 11, (240, 320), (360, 480), 480),
    "animals": Setting("voc", "train", 21, (320, 320), (520, 520), 360, ladder.ANIMALS),
}
BATCH = 4
PARTS = {
    "jitter": {"data.jitter": (0.3, 0.3, 0.3, 0.05)},
    "dropout": {"model.dropout": 0.1},
    "dice": {"loss.dice_weight": 0.5},
}
DESIGN = ((), ("jitter", "dice"), ("dropout", "dice"), ("jitter", "dropout"))
"""Each part is on in half of the runs, and there each other part in half."""
DECAY = 0.99
BACKBONES = ("efficientnet_lite", "mobilenet_v2")


def config_of(args, split):
    """The unary of configs/image_folder.py for a set."""
    setting, config = SETS[args.set], image_folder.get_config()
    config.data.name, config.data.partial = setting.reader, True
    config.data.source_dir, config.data.data_dir, config.data.train_split = args.source_dir, args.data_dir, split
    config.data.num_classes, config.data.crop_size = setting.num_classes, setting.crop_size
    config.data.eval_size = setting.eval_size
    config.eval.classes = setting.classes
    config.model.relations, config.crf.weights = (), (1.0,)
    config.train.batch_size, config.train.steps = BATCH, args.steps or setting.steps
    # Nothing is chosen by validation: a run ends with a look at a few images.
    config.train.eval_every, config.eval.panel, config.data.eval_split = 0, 0, "val[:4]"
    return config


def on(config, backbone, init_from=""):
    """The configuration with another backbone."""
    config.model.backbone = backbone
    if backbone == "mobilenet_v2":
        config.model.mobilenet_v2.freeze_until, config.init_from = "block_6", init_from
    return config


def counts_of_images(config, model, params, dataset, split):
    """int64 [images, 1 + bands, 3, K], as ladder.of_classes."""
    step = evaluate.make_eval_fn(config, model, devices=jax.devices()[:1])
    batches = eval_batches(dataset, split, batch_size=1, size=config.data.eval_size)
    sums = (step(params, evaluate.inputs_of(batch, 1))[0] for batch in batches)
    return np.stack([ladder.of_classes(np.asarray(each.confusion["all"], np.int64)) for each in sums])


def write(args, name, config, dataset, counts, **about):
    """A run's figures, and a line of them."""
    index = configs.scored_classes(config, dataset.class_names) or list(range(len(dataset.class_names)))
    figures = {row: ladder_table.scores(x.sum(0), index)["miou"] for row, x in counts.items()}
    print(f"{args.set} {name}: " + ", ".join(f"{row} {value:.2f}" for row, value in figures.items()), flush=True)
    figures = {row: round(float(value), 3) for row, value in figures.items()}
    about |= dict(set=args.set, steps=config.train.steps, jax=jax.__version__, cores=len(os.sched_getaffinity(0)))
    packed = ladder_table.pack(counts)
    ladder.write(path_of(args, name), about | dict(miou=figures, class_indices=index, counts=packed))


def path_of(args, name):
    return args.results / f"own_{args.set}_{name}.json"


def last_params(config, model, workdir):
    """The trained parameters of a run that evaluation takes averaged ones of."""
    tx, averaging = make_optimizer(config.optimizer, config.model, config.train.steps), Averaging(DECAY)
    start = lambda: steps.TrainState.create(restore.init_params(model, 0), tx, averaging)
    with checkpoint.Store(str(workdir / "checkpoints"), configs.identity(config)) as store:
        return steps.TrainState.from_trees(store.restore(jax.eval_shape(start).trees())[0]).params


def recipe(args):
    trains, scored = (f"{SETS[args.set].split}[{part}]" for part in (":80%", "80%:"))
    for parts in (*DESIGN, *((part,) for part in args.alone)):
        name = "recipe_" + ("-".join(parts) or "none")
        if path_of(args, name).exists():
            continue
        config = config_of(args, trains)
        config.optimizer.ema_decay, config.loss.dice_weight = DECAY, 0.0  # what is on in the configuration
        with config.unlocked():
            for part in parts:
                config.update_from_flattened_dict(PARTS[part])
        workdir = Path(args.runs, f"{args.set}-{name}")
        loop.train_and_evaluate(config, str(workdir))
        config = configs.load(workdir / "config.json")
        model, averaged, _, dataset = restore.load(config, str(workdir), "latest", scored)
        both = {"last": last_params(config, model, workdir), "averaged": averaged}
        counts = {row: counts_of_images(config, model, p, dataset, scored) for row, p in both.items()}
        write(args, name, config, dataset, counts, kind="recipe", parts=parts)


class Step:
    """The training step of a configuration on noise."""

    def __init__(self, config):
        model, tx = configs.build_model(config), make_optimizer(config.optimizer, config.model, config.train.steps)
        params = jax.jit(lambda: restore.init_params(model, config.seed))()
        devices = jax.devices()[:1]
        self._state = parallel.replicated(steps.TrainState.create(params, tx), devices)
        self._step = parallel.pmap_train(steps.from_config(config, model, tx), devices=devices)
        rng, size = np.random.default_rng(0), (config.train.batch_size, *config.data.crop_size)
        batch = {
            "image": rng.integers(0, 256, (*size, 3)).astype(np.uint8),
            "label": rng.integers(0, config.data.num_classes, size).astype(np.uint8),
            "valid_box": np.tile(np.int32([0, 0, *size[1:]]), (size[0], 1)),
        }
        self._batch = parallel.split(batch, 1)

    def __call__(self):
        self._state, metrics = self._step(self._state, self._batch)
        return metrics["loss"]


def seconds(args):
    """{backbone: seconds of a training step}, medians of turns; kept, so that all seeds have equal steps."""
    path = path_of(args, "seconds")
    if not path.exists():
        steps_of = {b: Step(on(config_of(args, SETS[args.set].split), b, args.init_from)) for b in BACKBONES}
        turns = {b: (lambda run=run: timing.timed(run)) for b, run in steps_of.items()}
        taken = timing.interleaved(turns, 10, warm=2)
        ladder.write(path, {b: round(statistics.median(x), 4) for b, x in taken.items()})
    return json.loads(path.read_text())


def backbones(args):
    taken = seconds(args)
    for seed in args.seeds:
        for backbone in BACKBONES:
            name = f"backbone_{backbone}_{seed}"
            if backbone not in args.only or path_of(args, name).exists():
                continue
            config = on(config_of(args, SETS[args.set].split), backbone, args.init_from)
            config.seed = seed
            config.train.steps = round(config.train.steps * taken[BACKBONES[0]] / taken[backbone])
            workdir = Path(args.runs, f"{args.set}-{name}")
            loop.train_and_evaluate(config, str(workdir))
            config = configs.load(workdir / "config.json")
            model, params, _, dataset = restore.load(config, str(workdir), "latest", "val")
            counts = {"unary": counts_of_images(config, model, params, dataset, "val")}
            write(args, name, config, dataset, counts, kind="backbone", backbone=backbone, seed=seed, seconds=taken)


def effect(runs, has, first="averaged", second="averaged"):
    """Difference of mean IoU of two groups of runs and its interval over images."""
    of = lambda side, row: [ladder_table.unpack(r["counts"])[row] for r in runs if has(r) == side]
    found = ladder_table.bootstrap(
        of(False, first), of(True, second), runs[0]["class_indices"], np.random.default_rng(0)
    )
    return [round(float(x), 2) for x in found]


def summary(args):
    out = {}
    results = [json.loads(p.read_text()) for p in sorted(args.results.glob("own_*.json"))]
    for name in SETS:
        of_set = [r for r in results if r.get("set") == name]
        by_parts = {tuple(r["parts"]): r for r in of_set if r["kind"] == "recipe"}
        runs = [by_parts[parts] for parts in DESIGN if parts in by_parts]
        if len(runs) == len(DESIGN):
            print(f"\n{name}, recipe: " + ", ".join(f"{'+'.join(r['parts']) or 'none'} {r['miou']}" for r in runs))
            for part in PARTS:
                out[f"{name} {part}"] = gain = effect(runs, lambda r, part=part: part in r["parts"])
                print(f"  {part:10s} {gain[0]:+.2f} [{gain[1]:+.2f}, {gain[2]:+.2f}]")
            for (part,) in (parts for parts in by_parts if len(parts) == 1):
                pair = [by_parts[()], by_parts[(part,)]]
                out[f"{name} {part} alone"] = gain = effect(pair, lambda r, part=part: part in r["parts"])
                print(f"  {part + ' alone':10s} {gain[0]:+.2f} [{gain[1]:+.2f}, {gain[2]:+.2f}]")
            packed = [ladder_table.unpack(r["counts"]) for r in runs]
            gain = ladder_table.bootstrap(
                [p["last"] for p in packed], [p["averaged"] for p in packed], runs[0]["class_indices"],
                np.random.default_rng(0),
            )  # fmt: skip
            out[f"{name} averaged"] = gain = [round(float(x), 2) for x in gain]
            print(f"  {'averaged':10s} {gain[0]:+.2f} [{gain[1]:+.2f}, {gain[2]:+.2f}]")
        pairs = {b: {r["seed"]: r for r in of_set if r.get("backbone") == b} for b in BACKBONES}
        seeds = sorted(set.intersection(*map(set, pairs.values())))
        if seeds:
            lite, mobile = ([pairs[b][s] for s in seeds] for b in BACKBONES)
            counts = [[ladder_table.unpack(r["counts"])["unary"] for r in side] for side in (mobile, lite)]
            gain = ladder_table.bootstrap(*counts, lite[0]["class_indices"], np.random.default_rng(0), over_seeds=True)
            out[f"{name} backbones"] = gain = [round(float(x), 2) for x in gain]
            said = {b: [pairs[b][s]["miou"]["unary"] for s in seeds] for b in BACKBONES}
            steps_of = {b: pairs[b][seeds[0]]["steps"] for b in BACKBONES}
            print(f"\n{name}, unary at equal time, seeds {seeds}: {said}, steps {steps_of}")
            print(f"  EfficientNet-Lite0 over MobileNetV2: {gain[0]:+.2f} [{gain[1]:+.2f}, {gain[2]:+.2f}]")
    print(json.dumps(out))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=("recipe", "backbones", "summary"))
    parser.add_argument("--set", choices=list(SETS))
    parser.add_argument("--source_dir", default="")
    parser.add_argument("--data_dir", default="")
    parser.add_argument("--init_from", default="", help="ImageNet weights of MobileNetV2")
    parser.add_argument("--alone", nargs="+", choices=list(PARTS), default=[], help="of the recipe, a run for each")
    parser.add_argument("--runs", default="runs/own", help="folder for the workdirs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=BACKBONES, default=list(BACKBONES), help="of the backbones")
    parser.add_argument("--steps", type=int, default=0, help="of EfficientNet-Lite0; 0: as in SETS")
    parser.add_argument("--results", type=Path, default=ladder_table.RESULTS, help="folder of the figures")
    args = parser.parse_args()
    if args.task == "summary":
        summary(args)
        return
    needed = ("source_dir", "init_from") if args.task == "backbones" else ("source_dir",)
    for name in needed:
        if not os.path.exists(getattr(args, name) or "-"):
            parser.error(f"--{name} {getattr(args, name)!r} does not exist")
    if not args.set:
        parser.error("--set is needed")
    logs.setup()
    compilation.use()
    {"recipe": recipe, "backbones": backbones}[args.task](args)


if __name__ == "__main__":
    main()
