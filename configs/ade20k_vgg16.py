"""ADE20K scene parsing, 150 classes (not in the paper), see configs/paper.py.

    pwcrf train --config ade20k_vgg16 --workdir runs/ade20k \\
        --config.data.source_dir=PATH \\
        --config.init_from=PATH/vgg16_weights_tf_dim_ordering_tf_kernels.h5
"""

from pwcrf_jax.configs import paper


def get_config():
    config = paper.get_config()
    config.data.name = "ade20k"
    config.data.num_classes = 150
    config.data.crop_size = (400, 400)  # [choice] times 1.2: 30 x 30 cells of the stride
    # Most images have a short side of at most 512, but some are long. That 1600 holds the largest of val is not
    # confirmed; where it does not, the run says so before it trains.
    config.data.eval_size = (1600, 1600)
    config.eval.batch_size = 1  # [choice] scores of 150 classes of an image padded to 1600 x 1600 are 1.5 GB
    return config
