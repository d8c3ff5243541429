"""PASCAL VOC 2012 as in the paper, see configs/paper.py; add SBD's masks with data.train_split=train_aug.

    python train.py --config configs/voc_vgg16.py --workdir runs/voc \\
        --config.data.source_dir=PATH \\
        --config.init_from=PATH/vgg16_weights_tf_dim_ordering_tf_kernels.h5
"""

from configs import paper


def get_config():
    config = paper.get_config()
    config.data.name = "voc"
    config.data.num_classes = 21
    config.data.crop_size = (400, 400)
    config.data.eval_size = (520, 520)  # times 1.2 a multiple of the stride, as 400 is: cells cover the image evenly
    return config
