"""PASCAL-Context, 60 classes with background, as in the paper, see configs/paper.py and docs/datasets.md.

    pwcrf train --config pascal_context_vgg16 --workdir runs/pascal_context \\
        --config.data.source_dir=PATH \\
        --config.init_from=PATH/vgg16_weights_tf_dim_ordering_tf_kernels.h5
"""

from pwcrf_jax.configs import paper


def get_config():
    config = paper.get_config()
    config.data.name = "pascal_context"
    config.data.num_classes = 60
    config.data.crop_size = (400, 400)  # [choice]
    # The largest image is 500 x 500. Times 1.2 a multiple of the stride, as 400 is: cells cover the image evenly.
    config.data.eval_size = (520, 520)
    return config
