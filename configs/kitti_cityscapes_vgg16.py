"""KITTI's semantic segmentation benchmark with Cityscapes' 19 classes (not in the paper), see configs/paper.py.

    pwcrf train --config kitti_cityscapes_vgg16 --workdir runs/kitti_cityscapes \\
        --config.data.source_dir=PATH \\
        --config.init_from=PATH/vgg16_weights_tf_dim_ordering_tf_kernels.h5

There is no official validation split: a fifth of the training images is held out. For test, train on all of them with
--config.data.train_split=train.
"""

from pwcrf_jax.configs import kitti_vgg16


def get_config():
    config = kitti_vgg16.get_config()  # images are at most 376 x 1242
    config.data.name = "kitti_cityscapes"
    config.data.num_classes = 19
    config.data.train_split = "train[:80%]"
    config.data.eval_split = "train[80%:]"
    return config
