"""PASCAL VOC 2012 with VGG-16 as in the paper: three scales, pyramid pooling, 512 hidden units, free pair scores.

Each relation samples its box on the 5 x 5 grid of the journal version, and messages are plain sums.

    python train.py --config configs/voc_vgg16.py --workdir runs/voc \\
        --config.data.source_dir=PATH/VOCdevkit/VOC2012 \\
        --config.init_from=PATH/vgg16_weights_tf_dim_ordering_tf_kernels.h5

Learning rate, batch size and steps are not given by the paper; these are for one accelerator.
"""

from configs import default


def get_config():
    config = default.get_config()
    config.data.name = "voc"
    config.data.num_classes = 21
    config.data.crop_size = (400, 400)
    config.data.eval_size = (520, 520)  # times 1.2 a multiple of the stride, as 400 is: cells cover the image evenly
    config.model.parameterisation = "free"
    config.crf.normalize = False
    config.model.dtype = "bfloat16"
    config.optimizer.name = "sgd"
    config.optimizer.learning_rate = 1e-2
    config.optimizer.weight_decay = 5e-4
    config.train.steps = 20_000
    config.train.eval_every = 2000
    config.train.checkpoint_every = 500
    return config
