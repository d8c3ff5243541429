"""The built-in synthetic set, whose classes differ by context alone, in a few minutes on two CPU cores."""

from pwcrf_jax.configs import default


def get_config():
    config = default.get_config()
    # A field of view of one 16 x 16 cell: such a unary cannot tell sky from water, nor a car from a boat.
    config.model.backbone = "tiny"
    config.model.scales = (1.0,)
    config.model.block6 = ()
    config.model.pyramid_windows = ()
    config.model.hidden = 64
    config.data.scale_range = (1.0, 1.0)  # scaling would put two surfaces into one cell
    config.relations.surrounding.grid = 0
    config.relations.above_below.grid = 0
    config.crf.num_iterations = 10  # with averaged messages mean IoU still rises after the paper's 3
    config.optimizer.learning_rate = 3e-3
    config.optimizer.backbone_factor = 1.0
    config.train.batch_size = 16
    config.train.steps = 600
    config.train.log_every = 50
    config.train.eval_every = 200
    config.train.checkpoint_every = 200
    config.eval.batch_size = 20
    return config
