"""SIFT Flow, 33 classes, as in the paper (44.9 mean IoU, images enlarged 2x), see configs/paper.py.

    pwcrf train --config siftflow_vgg16 --workdir runs/siftflow \\
        --config.data.source_dir=PATH \\
        --config.init_from=PATH/vgg16_weights_tf_dim_ordering_tf_kernels.h5

There is no validation split and results are reported on test, so nothing may be chosen by it. To choose (steps, message
weights, dense CRF), train on train[:90%] and evaluate on train[90%:]; then train on all of train.
"""

from pwcrf_jax.configs import paper


def get_config():
    config = paper.get_config()
    config.data.name = "siftflow"
    config.data.num_classes = 33
    config.data.eval_split = "test"
    # The paper enlarges the 256 x 256 images twice. Networks take scales relative to the image, so doubled scales are
    # the same, and labels and scores keep the size of the original.
    config.model.scales = (2.4, 1.6, 0.8)
    config.data.crop_size = (260, 260)  # [choice] times 2.4: 39 x 39 cells of the stride, which cover the image evenly
    config.data.eval_size = (260, 260)
    config.train.eval_every = 0  # test is scored once, at the end
    # No image of test shows a cow, a desert or the moon; a pixel given to one would count as a class of IoU 0. [choice]
    config.eval.classes = (
        "awning", "balcony", "bird", "boat", "bridge", "building", "bus", "car", "crosswalk", "door", "fence", "field",
        "grass", "mountain", "person", "plant", "pole", "river", "road", "rock", "sand", "sea", "sidewalk", "sign",
        "sky", "staircase", "streetlight", "sun", "tree", "window",
    )  # fmt: skip
    return config
