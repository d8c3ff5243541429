"""The choices behind configs/image_folder.py: its recipe, and its backbone.

    python benchmarks/own_images.py recipe --set camvid --source_dir PATH/camvid --runs runs/own
    python benchmarks/own_images.py backbones --set animals --source_dir PATH/voc2012_animals --init_from FILE \\
        --runs runs/own
    python benchmarks/own_images.py summary

* recipe: the unary of configs/image_folder.py with jitter, dropout before the heads and Dice each on in two of four
  runs (`DESIGN`), trained on four fifths of the training images and scored on the rest; each run with and without
  averaged parameters. An effect is the mean of the runs with it minus that of those without. --alone: parts that have
  a run of their own beside these.
* backbones: the same unary on EfficientNet-Lite0 at several depths and on MobileNetV2 (--init_from: its weights), three
  seeds, trained on all training images for an equal time, scored on val after the last step; with --held_out trained
  and scored as the recipe. Seconds of a step are measured first, in turns, on the cores at hand; --steps are
  EfficientNet-Lite0's, up to the layers that its own strides leave at stride 16.

Both classes' sizes, steps and batches are for two CPU cores (`SETS`). Each run lies in a workdir of its own below
--runs and goes on where it was stopped; what is finished is not done again. Figures go to benchmarks/results, one JSON
a run. summary prints tables with 95 % intervals from a paired bootstrap over images, of backbones over images and
seeds, and one line of JSON.
"""

import argparse
import json
import os
from pathlib import Path
from typing import NamedTuple

import jax
import ladder
import ladder_counts
import ladder_models
import ladder_table
import numpy as np
import timing

from pwcrf_jax import config as configs
from pwcrf_jax.configs import image_folder
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
    "animals": Setting("voc", "train", 21, (320, 320), (520, 520), 360, ladder_models.ANIMALS),
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
CUT = {"model.efficientnet_lite.deep": "", "model.block6": ((3, 192),)}
MOBILENET = {
    "model.backbone": "mobilenet_v2",
    "model.mobilenet_v2.freeze_until": "block_6",
    "model.block6": ((3, 192),),
}
BACKBONES = {
    "efficientnet_lite": CUT,
    "efficientnet_lite_whole": CUT | {"model.efficientnet_lite.output": "stage6_0"},
    "efficientnet_lite_deep": {},
    "mobilenet_v2": MOBILENET,
    "mobilenet_v2_whole": MOBILENET | {"model.mobilenet_v2.output": "block_16"},
}
"""The backbones that are compared: up to the layers of stride 16 that the published strides leave, or as a whole; deep:
as configs/image_folder.py has it, both, the second at its own stride."""
FIRST = "efficientnet_lite"
"""Its steps are those of `SETS`; others have as many as take its time."""
DEFAULT = "efficientnet_lite_deep"
"""That of configs/image_folder.py, over which summary gives what others gain."""


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
    with config.unlocked():
        config.update_from_flattened_dict(BACKBONES[backbone])
    if config.model.backbone == "mobilenet_v2":
        config.init_from = init_from
    return config


def write(args, name, config, classes, counts, **about):
    """A run's figures, and a line of them."""
    index = configs.scored_classes(config, classes) or list(range(len(classes)))
    figures = {row: ladder_table.scores(x.sum(0), index)["miou"] for row, x in counts.items()}
    print(f"{args.set} {name}: " + ", ".join(f"{row} {value:.2f}" for row, value in figures.items()), flush=True)
    figures = {row: round(float(value), 3) for row, value in figures.items()}
    about |= dict(set=args.set, steps=config.train.steps, jax=jax.__version__, cores=len(os.sched_getaffinity(0)))
    packed = ladder_table.pack(counts)
    ladder.write(path_of(args, name), about | dict(miou=figures, class_indices=index, counts=packed))


def path_of(args, name):
    return args.results / f"own_{args.set}_{name}.json"


def last_params(config, workdir):
    """The trained parameters of a run that evaluation takes averaged ones of."""
    tx, averaging = make_optimizer(config.optimizer, config.model, config.train.steps), Averaging(DECAY)
    model = configs.build_model(config)
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
        both, counts = {"last": last_params(config, workdir), "averaged": None}, {}
        for row, params in both.items():
            found, _, classes = ladder_counts.counts_of_images(config, workdir, split=scored, params=params)
            counts[row] = found["all"]
        write(args, name, config, classes, counts, kind="recipe", parts=parts)


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
    """{backbone: seconds of a training step}, medians of turns beside `FIRST`; kept, so that seeds have equal steps."""
    path = path_of(args, "seconds")
    known = json.loads(path.read_text()) if path.exists() else {}
    if new := [b for b in args.only if b not in known]:
        steps_of = {b: Step(on(config_of(args, SETS[args.set].split), b, args.init_from)) for b in {FIRST, *new}}
        turns = {b: (lambda run=run: timing.timed(run)) for b, run in steps_of.items()}
        taken = timing.medians(turns, 10, warm=2)
        drift = known.get(FIRST, taken[FIRST]) / taken[FIRST]  # of the machine since the first were measured
        known |= {b: round(value * drift, 4) for b, value in taken.items()}
        ladder.write(path, known)
    return known


def backbones(args):
    taken = seconds(args)
    trains, scored = SETS[args.set].split, "val"
    if args.held_out:
        trains, scored = (f"{trains}[{part}]" for part in (":80%", "80%:"))
    for seed in args.seeds:
        for backbone in args.only:
            name = f"{'held_out' if args.held_out else 'backbone'}_{backbone}_{seed}"
            if path_of(args, name).exists():
                continue
            config = on(config_of(args, trains), backbone, args.init_from)
            config.seed = seed
            config.train.steps = round(config.train.steps * taken[FIRST] / taken[backbone])
            workdir = Path(args.runs, f"{args.set}-{name}")
            loop.train_and_evaluate(config, str(workdir))
            config = configs.load(workdir / "config.json")
            counts, _, classes = ladder_counts.counts_of_images(config, workdir, split=scored)
            about = dict(kind="held out" if args.held_out else "backbone", backbone=backbone, seed=seed, seconds=taken)
            write(args, name, config, classes, {"unary": counts["all"]}, **about)


def gain(first, second, row, out, key, **options):
    """Prints and keeps the difference of mean IoU of two groups of runs, or of two rows (first, second) of a group."""
    rows = row if isinstance(row, tuple) else (row, row)
    counts = [
        [ladder_table.unpack(r["counts"])[row] for r in runs] for row, runs in zip(rows, (first, second), strict=True)
    ]
    found = ladder_table.bootstrap(*counts, first[0]["class_indices"], np.random.default_rng(0), **options)
    out[key] = value, low, high = [round(float(x), 2) for x in found]
    print(f"  {key}: {value:+.2f} [{low:+.2f}, {high:+.2f}]")


def summary(args):
    out = {}
    results = [json.loads(p.read_text()) for p in sorted(args.results.glob("own_*.json"))]
    for name in SETS:
        of_set = [r for r in results if r.get("set") == name]
        by_parts = {tuple(r["parts"]): r for r in of_set if r["kind"] == "recipe"}
        if runs := [by_parts[parts] for parts in DESIGN if parts in by_parts]:
            print(
                f"\n{name}, recipe: "
                + ", ".join(f"{'+'.join(parts) or 'none'} {r['miou']}" for parts, r in by_parts.items())
            )
        if len(runs) == len(DESIGN):
            for part in PARTS:
                groups = ([r for r in runs if (part in r["parts"]) == there] for there in (False, True))
                gain(*groups, "averaged", out, f"{name} {part}")
            for (part,) in (parts for parts in by_parts if len(parts) == 1):
                gain([by_parts[()]], [by_parts[(part,)]], "averaged", out, f"{name} {part} alone")
            gain(runs, runs, ("last", "averaged"), out, f"{name} averaged")
        for kind in ("held out", "backbone"):
            by_seed = {b: {r["seed"]: r for r in of_set if r["kind"] == kind and r["backbone"] == b} for b in BACKBONES}
            for other in (b for b in BACKBONES if b != DEFAULT):
                if seeds := sorted(by_seed[DEFAULT].keys() & by_seed[other].keys()):
                    first, second = ([by_seed[b][s] for s in seeds] for b in (DEFAULT, other))
                    values = [[r["miou"]["unary"] for r in side] for side in (first, second)]
                    print(f"\n{name}, {kind}, seeds {seeds}: {DEFAULT} {values[0]}, {other} {values[1]}")
                    gain(first, second, "unary", out, f"{name} {kind} {other}", over_seeds=True)
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
    parser.add_argument("--only", nargs="+", choices=list(BACKBONES), default=list(BACKBONES), help="of the backbones")
    parser.add_argument("--held_out", action="store_true", help="backbones on held-out training images in place of val")
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
