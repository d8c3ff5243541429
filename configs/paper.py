"""What the paper's experiments share: VGG-16, three scales, pyramid pooling, 512 hidden units, free pair scores.

Each relation samples its box on the 5 x 5 grid of the journal version, and messages are plain sums. Learning rate,
batch size and steps are not given by the paper; these are for one accelerator. Not a run by itself: the configs of the
data sets start from it.

One thing is not the paper's: the loss. Its likelihood is the plain sum over all factors, of which relations have many
more than the unary, 35.7 to each unary factor on a crop of 30 x 30 cells. Here each kind of factor counts by its mean,
so that a relation weighs as much as the unary, whatever its box and the crop. The paper's sum is
--config.loss.reduction=sum; gradients are then larger by about the number of cells, and of relations by that of their
factors, for which the learning rate and the norm of clipping below are not chosen and no run was measured.
"""

from pwcrf_jax.configs import default


def get_config():
    config = default.get_config()
    config.model.parameterisation = "free"
    config.crf.average_messages = False
    config.model.dtype = "bfloat16"
    config.optimizer.name = "sgd"
    config.optimizer.learning_rate = 1e-2
    config.optimizer.weight_decay = 5e-4
    config.train.steps = 20_000
    config.train.eval_every = 2000
    config.train.checkpoint_every = 500
    return config
