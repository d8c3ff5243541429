"""NYU Depth v2, 40 classes from RGB alone, with EfficientNet-Lite2, sized for two CPU cores.

    pip install -e ".[train,weights]"
    pwcrf train --config nyudv2 --workdir runs/nyudv2 --config.data.source_dir=PATH
    pwcrf eval --workdir runs/nyudv2 --checkpoint latest --refine full --split test --config.data.source_dir=PATH

PATH is a folder of the layout of docs/your-data.md with train.txt, or test.txt, and whole images of 480 x 640 pixels;
masks are void outside of the official crop. One run trains the unary and then, on its features, the relations: some 90
minutes on two idle cores. Nothing is chosen by images of test, all of it on held-out blocks of train
(docs/experiments/nyudv2.md; benchmarks/ladder.py).
"""

from pwcrf_jax.configs import image_folder


def get_config():
    config = image_folder.get_config()
    config.init_from = "pip:efficientnet_lite2"
    config.data.num_classes = 40
    # There is no validation split: a run ends with a look at images that it has seen.
    config.data.eval_split = "train[:2%]"
    config.data.crop_size = (320, 400)
    config.data.eval_size = (480, 640)
    config.model.efficientnet_lite.variant = 2
    config.relations.surrounding.unit = config.relations.above_below.unit = "cells"
    config.relations.surrounding.rows = config.relations.surrounding.cols = (-8, 8)
    config.relations.above_below.rows, config.relations.above_below.cols = (-12, -1), (-6, 6)
    config.loss.objective = "piecewise_staged"
    config.loss.unary_share = 0.82
    # As the unary's Dice does, more balance keeps relations from frequent classes.
    config.loss.pairwise_balance_power = 1.0
    config.loss.evidence_temperature = (1.0, 3.0)
    config.loss.sampled_offsets = 6
    config.crf.weights = (0.5,)
    config.refine.smoothness_compat, config.refine.appearance_compat, config.refine.appearance_srgb = 1.5, 2.5, 6.5
    config.train.batch_size = 8
    config.train.steps = 2800
    config.train.eval_every = 0
    config.eval.each_relation = False
    return config
