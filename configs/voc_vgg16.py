"""PASCAL VOC 2012 with SBD's extra masks, 10,582 training images, as in the paper, see configs/paper.py.

    pwcrf train --config voc_vgg16 --workdir runs/voc \\
        --config.data.source_dir=PATH \\
        --config.init_from=PATH/vgg16_weights_tf_dim_ordering_tf_kernels.h5

PATH of the data holds VOCtrainval_11-May-2012.tar and SBD's benchmark.tgz, packed or not, see docs/datasets.md; without
SBD: --config.data.train_split=train, 1,464 images.
"""

from pwcrf_jax.configs import paper


def get_config():
    config = paper.get_config()
    config.data.name = "voc"
    config.data.num_classes = 21
    config.data.train_split = "train_aug"
    config.data.crop_size = (400, 400)
    config.data.eval_size = (520, 520)  # times 1.2 a multiple of the stride, as 400 is: cells cover the image evenly
    return config
