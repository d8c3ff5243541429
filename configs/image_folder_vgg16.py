"""Your own images and masks with the paper's model, see configs/paper.py; for a large accelerator.

    pwcrf check image_folder --source_dir PATH
    pwcrf train --config image_folder_vgg16 --workdir runs/mine \\
        --config.data.source_dir=PATH --config.data.num_classes=K --config.data.eval_size="(H, W)" \\
        --config.init_from=PATH/vgg16_weights_tf_dim_ordering_tf_kernels.h5

The folder is described in docs/datasets.md. K is the number of classes in classes.txt; H and W are at least the largest
height and width of your images, which the first command prints, and times 1.2 multiples of 16: 400, 520, 640, 800.
"""

from pwcrf_jax.configs import paper


def get_config():
    config = paper.get_config()
    config.data.name = "image_folder"
    config.data.num_classes = 2
    config.data.crop_size = (400, 400)
    config.data.eval_size = (520, 520)  # times 1.2 a multiple of the stride, as 400 is: cells cover the image evenly
    return config
