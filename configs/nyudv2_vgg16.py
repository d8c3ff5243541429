"""NYU Depth v2, 40 classes from RGB alone, as in the paper (40.6 mean IoU), see configs/paper.py.

    pwcrf train --config nyudv2_vgg16 --workdir runs/nyudv2 \\
        --config.data.source_dir=PATH \\
        --config.init_from=PATH/vgg16_weights_tf_dim_ordering_tf_kernels.h5

There is no validation split and results are reported on test, so nothing may be chosen by it. To choose (steps, message
weights, dense CRF), train on train[:90% by id] and evaluate on train[90%: by id]; then train on all of train.
"""

from pwcrf_jax.configs import paper


def get_config():
    config = paper.get_config()
    config.data.name = "nyudv2"
    config.data.num_classes = 40
    config.data.eval_split = "test"
    # All images are 425 x 560. Times 1.2: 33 x 42 cells of the stride, which cover the image evenly.
    config.data.crop_size = (440, 560)  # [choice]
    config.data.eval_size = (440, 560)
    config.train.eval_every = 0  # test is scored once, at the end
    return config
