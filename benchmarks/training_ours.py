"""Our side of `training.py`: the steps that `pwcrf train` and `pwcrf eval` run, of a unary alone."""

import jax
import jax.numpy as jnp
import numpy as np

from pwcrf_jax import config as configs
from pwcrf_jax.configs import camvid_mobilenet_v2, image_folder
from pwcrf_jax.evaluation import evaluate
from pwcrf_jax.nets import efficientnet_lite, mobilenet_v2
from pwcrf_jax.prediction import restore
from pwcrf_jax.runtime import parallel
from pwcrf_jax.training import steps
from pwcrf_jax.training.optimizer import make_optimizer

NETWORKS = {
    "mobilenet_v2": (camvid_mobilenet_v2, "tf", mobilenet_v2),
    "efficientnet_lite0": (image_folder, "efficientnet_lite", efficientnet_lite),
}
"""By network: its configuration, the input scaling of its weights, and the module that knows its layers."""


def config_of(network, sizes, num_classes):
    """The configuration without relations, of the sizes that are measured."""
    module, scaling, _ = NETWORKS[network]
    config = module.get_config()
    config.model.relations, config.model.input_scaling = (), scaling
    config.crf.weights = (1.0,)
    config.loss.dice_weight = 0.0  # the twin has cross-entropy alone
    config.data.num_classes = num_classes
    config.data.crop_size, config.data.eval_size = sizes.train, sizes.evaluation
    config.train.batch_size = config.eval.batch_size = sizes.batch
    return config


class Ours:
    """Parameters and state of a network, and its compiled steps, which take batches of the host."""

    def __init__(self, network, sizes, num_classes):
        self._network, self.config = network, config_of(network, sizes, num_classes)
        config, self.model = self.config, configs.build_model(self.config)
        tx = make_optimizer(config.optimizer, config.model, config.train.steps)
        # Arrays are kept once, on one device, whatever the host can be made to look like.
        self._devices = jax.devices()[:1]
        params = jax.jit(lambda: restore.init_params(self.model, config.seed))()
        self.params = jax.tree.map(np.asarray, params)  # the first step takes the state's own
        self._state = parallel.replicated(steps.TrainState.create(params, tx), self._devices)  # as in a run
        self._step = parallel.pmap_train(steps.from_config(config, self.model, tx), devices=self._devices)
        self._eval = evaluate.make_eval_fn(config, self.model, devices=self._devices)
        self._evaluated = parallel.replicated(self.params, self._devices)
        self._confusion = np.int64(0)

    def layers(self):
        """(kernel, bias) of all layers in the order in which images go through them."""
        featmap, order = self.params["featmap"], NETWORKS[self._network][2].layer_names()
        backbone = [featmap["backbone"][name] for name in order if name in featmap["backbone"]]
        block6 = [layer for i in range(len(self.config.model.scales)) for layer in featmap[f"block6_{i}"].values()]
        head = [self.params["unary"][name] for name in ("first", "last")]
        return [(layer["kernel"], layer["bias"]) for layer in (*backbone, *block6, *head)]

    def num_params(self):
        return sum(x.size for x in jax.tree.leaves(self.params))

    def train(self, batch):
        """(loss, norm of the gradient) of a training step."""
        self._state, metrics = self._step(self._state, parallel.split(batch, 1))
        return jax.block_until_ready((metrics["loss"], metrics["grad_norm"]))

    def evaluate(self, batch):
        """(int64 confusions [1 + bands, K, K], sum and count of the log-likelihood) of a batch."""
        sums, _ = self._eval(self._evaluated, evaluate.inputs_of(batch, 1))
        confusion = np.asarray(sums.confusion["all"], np.int64)
        self._confusion = self._confusion + confusion
        return confusion, tuple(map(float, sums.terms["unary"]))

    def scores(self, images):
        """The unary's scores [B, h, w, K] of the parameters that it began with."""
        return np.asarray(
            jax.jit(lambda p, x: self.model.apply({"params": p}, x).unary)(self.params, jnp.asarray(images))
        )
