"""SUN RGB-D, 37 classes from RGB alone, as in the paper (42.3 mean IoU), see configs/paper.py.

    pwcrf train --config sunrgbd_vgg16 --workdir runs/sunrgbd \\
        --config.data.source_dir=PATH \\
        --config.init_from=PATH/vgg16_weights_tf_dim_ordering_tf_kernels.h5

There is no validation split and results are reported on test, so nothing may be chosen by it. To choose (steps, message
weights, dense CRF), train on train[:90%] and evaluate on train[90%:]; then train on all of train.
"""

from pwcrf_jax.configs import paper


def get_config():
    config = paper.get_config()
    config.data.name = "sunrgbd"
    config.data.num_classes = 37
    config.data.eval_split = "test"
    # The largest images are 531 rows high (RealSense) and 730 columns wide (Kinect v2). Crops are as high as what is
    # evaluated, as the boxes are fractions of their short side.
    config.data.crop_size = (560, 560)  # [choice] times 1.2: 42 x 42 cells of the stride
    config.data.eval_size = (560, 760)
    config.train.eval_every = 0  # test is scored once, at the end
    return config
