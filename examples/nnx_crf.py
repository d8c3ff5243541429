"""A Flax NNX network with our CRF: nothing of the project but its functional core.

    python examples/nnx_crf.py

Scenes of 8 x 16 cells of 4 x 4 pixels: sea on one side, field on the other, and red things on both. A red thing in the
sea is a boat, in the field a car. The network sees one cell and cannot know; the relation "surrounding" can.
Training is piecewise: each cell and each pair of cells is a classification, and no inference runs. Decoding is
mean field.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import pwcrf_jax as pw

CLASSES = SEA, FIELD, BOAT, CAR = range(4)
COLOURS = np.array([(0.1, 0.3, 0.9), (0.2, 0.8, 0.2), (0.9, 0.1, 0.1), (0.9, 0.1, 0.1)])
HEIGHT, WIDTH, HIDDEN = 8, 16, 32
BOX = pw.offsets(pw.SURROUNDING, HEIGHT, WIDTH)  # on the grid of training, once: the net learns these distances alone


def scenes(count, rng):
    """Images float32 [count, 32, 64, 3] and labels int [count, 8, 16]."""
    shore, sea_left = rng.integers(4, WIDTH - 4, (count, 1, 1)), rng.random((count, 1, 1)) < 0.5
    ground = np.where((np.arange(WIDTH) < shore) == sea_left, SEA, FIELD)
    labels = np.where(rng.random((count, HEIGHT, WIDTH)) < 0.2, ground + 2, ground)
    pixels = COLOURS[labels].repeat(4, axis=1).repeat(4, axis=2)
    return (pixels + rng.normal(0, 0.3, pixels.shape)).astype(np.float32), labels


class Net(nnx.Module):
    def __init__(self, rngs):
        self.features = nnx.Conv(3, HIDDEN, (4, 4), strides=4, rngs=rngs)
        self.unary = nnx.Linear(HIDDEN, len(CLASSES), rngs=rngs)
        self.first_p = nnx.Linear(HIDDEN, HIDDEN, rngs=rngs)
        self.first_q = nnx.Linear(HIDDEN, HIDDEN, use_bias=False, rngs=rngs)
        self.last = nnx.Param(jnp.zeros((HIDDEN, len(CLASSES), len(CLASSES))))
        self.bias = nnx.Param(jnp.zeros((len(CLASSES), len(CLASSES))))

    def __call__(self, images):
        x = nnx.relu(self.features(images))
        unary = self.unary(x)
        log_probs = jax.lax.stop_gradient(jax.nn.log_softmax(unary))  # so that the pairwise net learns context alone
        parts = self.first_p(x), self.first_q(x), self.last[...], self.bias[...]
        return unary, pw.factored_pairwise(*parts, BOX, log_probs)


@nnx.jit
def train_step(net, optimizer, images, labels):
    def loss(net):
        unary, around = net(images)
        terms = [pw.unary_log_likelihood(unary, labels), pw.pairwise_log_likelihood(around, labels)]
        return -sum(total / count for total, count in terms)

    value, gradients = nnx.value_and_grad(loss)(net)
    optimizer.update(net, gradients)
    return value


@nnx.jit(static_argnames="use_crf")
def predict(net, images, use_crf):
    unary, around = net(images)
    settings = pw.mean_field.Settings(num_iterations=3, average_messages=True)
    return pw.mean_field.run(unary, [around] if use_crf else [], settings)[0].argmax(-1)


def main():
    rng, net = np.random.default_rng(0), Net(nnx.Rngs(0))
    optimizer = nnx.Optimizer(net, optax.adam(3e-3), wrt=nnx.Param)
    for step in range(401):
        value = train_step(net, optimizer, *scenes(8, rng))
        if step % 200 == 0:
            print(f"step {step}: loss {value:.3f}")
    images, labels = scenes(50, rng)
    things = labels >= BOAT
    for name, use_crf in (("unary", False), ("unary + CRF", True)):
        right = np.array(predict(net, images, use_crf)) == labels
        print(f"{name}: {right.mean():.1%} of cells right, {right[things].mean():.1%} of boats and cars")


if __name__ == "__main__":
    main()
