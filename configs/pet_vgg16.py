"""Oxford-IIIT Pet as TFDS prepared it, 3 classes (not in the paper), see configs/paper.py and docs/datasets.md.

    pwcrf train --config pet_vgg16 --workdir runs/pet \\
        --config.data.source_dir=PATH \\
        --config.init_from=PATH/vgg16_weights_tf_dim_ordering_tf_kernels.h5

PATH of the data holds oxford_iiit_pet/4.0.0. Without --config.data.source_dir it is looked for, and made, in
data.data_dir. For any other set of the TFDS catalogue change config.data.tfds.
"""

from pwcrf_jax.configs import paper


def get_config():
    config = paper.get_config()
    config.data.name = "tfds"
    config.data.tfds.dataset = "oxford_iiit_pet"
    config.data.tfds.class_names = ("pet", "background", "border")
    config.data.num_classes = 3
    config.data.eval_split = "test"  # there is no other
    config.data.crop_size = (400, 400)  # [choice] times 1.2 a multiple of the stride, as 520 is
    config.data.eval_size = (520, 520)
    config.data.tfds.max_side = 520  # [choice] nothing bounds the size of its images
    return config
