"""COCO-Stuff, 171 classes (not in the paper), as configs/coco_vgg16.py.

    pwcrf train --config coco_stuff_vgg16 --workdir runs/coco_stuff \\
        --config.data.source_dir=PATH \\
        --config.init_from=PATH/vgg16_weights_tf_dim_ordering_tf_kernels.h5
"""

from pwcrf_jax.configs import coco_vgg16


def get_config():
    config = coco_vgg16.get_config()
    config.data.name = "coco_stuff"
    config.data.num_classes = 171
    config.eval.batch_size = 4  # [choice] scores of 171 classes of four images of 640 x 640 are 1.1 GB
    return config
