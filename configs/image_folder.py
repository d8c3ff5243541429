"""Your own images and masks with EfficientNet-Lite0, sized for two CPU cores or a small GPU.

    pip install -e ".[train,weights]"
    pwcrf check image_folder --source_dir PATH
    pwcrf train --config image_folder --workdir runs/mine --config.data.source_dir=PATH

The folder is described in docs/your-data.md. The number of classes, the sizes of crops and frames and the steps are
those that the second command prints, unless named, such as --config.data.crop_size="(320,320)".
"""

from pwcrf_jax.configs import default


def get_config():
    config = default.get_config()
    config.init_from = "pip:efficientnet_lite0"
    config.data.name = "image_folder"
    config.data.num_classes = 0  # this, both sizes and the steps: from the folder
    config.data.crop_size = ()
    config.data.eval_size = ()
    config.model.backbone = "efficientnet_lite"
    config.model.efficientnet_lite.freeze_until = "stage3_0"
    # Chosen on held-out images, see docs/experiments/own-images.md: both depths, and no 3 x 3 convolution on them.
    config.model.efficientnet_lite.deep = "stage6_0"
    config.model.block6 = ((1, 192),)
    config.model.hidden = 192
    # The pair terms cannot lower the unary when they do not train the features.
    config.model.pairwise_trains_features = False
    config.loss.balance_power = 0.3
    config.loss.dice_weight = 0.5  # chosen in the same way
    # With averaged messages the paper's 3 are few, see configs/image_folder_mobilenet_v2.py.
    config.crf.num_iterations = 10
    config.train.steps = 0
    config.train.eval_every = 350
    config.train.checkpoint_every = 50
    config.eval.batch_size = 4
    return config
