"""COCO 2017, 80 classes of things and background, see configs/paper.py; the paper has 46.8 mean IoU on COCO.

    pwcrf train --config coco_vgg16 --workdir runs/coco \\
        --config.data.source_dir=PATH \\
        --config.init_from=PATH/vgg16_weights_tf_dim_ordering_tf_kernels.h5
"""

from pwcrf_jax.configs import paper


def get_config():
    config = paper.get_config()
    config.data.name = "coco"
    config.data.num_classes = 81
    config.data.crop_size = (400, 400)  # [choice] times 1.2: 30 x 30 cells of the stride
    config.data.eval_size = (640, 640)  # times 1.2: 48 x 48 cells; a run refuses larger images before it trains
    config.train.steps = 120_000  # [choice] 8 epochs
    config.train.eval_every = 20_000
    config.train.checkpoint_every = 2000
    return config
