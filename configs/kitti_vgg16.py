"""KITTI with 11 classes as in the paper (68.5 mean IoU; 70.3 pretrained on COCO), see configs/paper.py.

    pwcrf train --config kitti_vgg16 --workdir runs/kitti \\
        --config.data.source_dir=PATH \\
        --config.init_from=PATH/vgg16_weights_tf_dim_ordering_tf_kernels.h5

Results are reported on the 46 images of val. To tune without them, train on train[:80%] and evaluate on train[80%:].
"""

from pwcrf_jax.configs import paper


def get_config():
    config = paper.get_config()
    config.data.name = "kitti"
    config.data.num_classes = 11
    # Images are at most 376 x 1241. Crops have the full height, of which the boxes are fractions.
    config.data.crop_size = (400, 800)  # [choice] times 1.2: 30 x 60 cells of the stride
    config.data.eval_size = (400, 1280)
    return config
