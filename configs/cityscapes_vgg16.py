"""Cityscapes as in the paper (71.6 mean IoU on test), see configs/paper.py.

    pwcrf train --config cityscapes_vgg16 --workdir runs/cityscapes \\
        --config.data.source_dir=PATH \\
        --config.init_from=PATH/vgg16_weights_tf_dim_ordering_tf_kernels.h5
"""

from pwcrf_jax.configs import paper


def get_config():
    config = paper.get_config()
    config.data.name = "cityscapes"
    config.data.num_classes = 19
    config.data.eval_size = (1040, 2080)  # all images are 1024 x 2048; times 1.2: 78 x 156 cells of the stride
    # [choice] Crops have the full height, of which the boxes are fractions.
    config.data.crop_size = (1040, 1040)
    config.eval.batch_size = 2  # [choice] whole images are large
    return config
