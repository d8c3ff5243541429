"""A folder in VOC layout with MobileNetV2 start weights, sized for two CPU cores.

    pwcrf train --config voc_mobilenet_v2 --workdir runs/voc \\
        --config.data.source_dir=PATH/VOCdevkit/VOC2012 --config.data.train_split=train \\
        --config.init_from=PATH/mobilenet_v2_weights_tf_dim_ordering_tf_kernels_1.0_224_no_top.h5
"""

from pwcrf_jax.configs import image_folder_mobilenet_v2


def get_config():
    config = image_folder_mobilenet_v2.get_config()
    config.loss.dice_weight = 0.0  # as in the ladder's figures
    config.data.name = "voc"
    config.data.num_classes = 21
    config.data.partial = True  # any folder in this layout
    config.data.train_split = "train_aug"
    return config
