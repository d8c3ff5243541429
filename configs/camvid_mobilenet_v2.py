"""CamVid with MobileNetV2 start weights, sized for two CPU cores.

    pwcrf train --config camvid_mobilenet_v2 --workdir runs/camvid \\
        --config.data.source_dir=PATH/camvid \\
        --config.init_from=PATH/mobilenet_v2_weights_tf_dim_ordering_tf_kernels_1.0_224_no_top.h5

`--config camvid_mobilenet_v2:both` trains a second pair of Pairwise-Nets in the paper's free
parameterisation beside the residual ones, on the same features, so that one run compares them.
"""

from pwcrf_jax.configs import default


def get_config(variant="residual"):
    config = default.get_config()
    config.data.name = "camvid"
    config.data.num_classes = 11
    config.data.crop_size = (360, 480)
    config.data.eval_size = (360, 480)
    config.model.backbone = "mobilenet_v2"
    config.model.mobilenet_v2.freeze_until = "block_6"
    # A grid of 36 x 48 cells: at the paper's 1.2 (27 x 36) even perfect cells would score 74 mean IoU, here 78.
    config.model.scales = (1.6, 0.8, 0.4)
    config.model.block6 = ((3, 192),)
    config.model.hidden = 192
    # The pair terms cannot lower the unary when they do not train the features.
    config.model.pairwise_trains_features = False
    # Balance and weights of the relations: chosen on held-out training images (docs/experiments/ladder.md).
    config.loss.balance_power = 0.3
    config.loss.pairwise_balance_power = 0.6
    config.crf.weights = (0.25, 0.5)
    config.optimizer.learning_rate = 1e-3
    config.train.batch_size = 4
    config.train.steps = 900
    config.train.eval_every = 225
    config.train.checkpoint_every = 50
    config.eval.batch_size = 4
    if variant == "both":
        for name in ("surrounding", "above_below"):
            free = config.relations[name].copy_and_resolve_references()
            free.parameterisation = "free"
            config.relations[f"{name}_free"] = free
        config.model.relations += ("surrounding_free", "above_below_free")
        config.crf.relations = ("surrounding", "above_below")
    elif variant == "free":
        config.model.parameterisation = "free"
    elif variant != "residual":
        raise ValueError(f"configs/camvid_mobilenet_v2.py:{variant}: known are residual, free, both")
    return config
