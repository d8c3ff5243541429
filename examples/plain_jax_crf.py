"""A net in plain JAX with two relations: python examples/plain_jax_crf.py. Sky and water are one blue, in noise."""

import jax
import jax.numpy as jnp
import numpy as np

import pwcrf_jax as pw

BOXES = {r.name: pw.offsets(r, 12, 12) for r in (pw.SURROUNDING, pw.ABOVE_BELOW)}  # on the grid of training, once


def scenes(count, rng):  # images, and labels of their pixels: 0 sky above 1 land above 2 water
    labels = (np.arange(48)[:, None, None] >= rng.uniform(0, 48, (count, 1, 1, 2))).sum(-1).repeat(48, axis=2)
    return np.eye(3)[[2, 1, 2]][labels] + rng.normal(0, 0.7, (count, 48, 48, 3)), labels


def model(params, images):  # your net: scores of cells, and potentials of the relations on the same features
    cells = images.reshape(-1, 12, 4, 12, 4, 3).swapaxes(2, 3).reshape(-1, 12, 12, 48)
    features = jax.nn.relu(cells @ params["features"])
    return features @ params["unary"], [pw.pairwise_apply(params[name], features, box) for name, box in BOXES.items()]


@jax.jit
def step(params, speed, images, labels):
    gradients = jax.grad(lambda params: pw.piecewise_loss(*model(params, images), labels))(params)
    speed = jax.tree.map(lambda old, gradient: 0.9 * old - 0.5 * gradient, speed, gradients)
    return jax.tree.map(jnp.add, params, speed), speed


rng, keys = np.random.default_rng(0), jax.random.split(jax.random.key(0), 4)
params = {name: pw.pairwise_init(key, 32, 16, 3) for name, key in zip(BOXES, keys[2:], strict=True)}
params |= {"features": 0.1 * jax.random.normal(keys[0], (48, 32)), "unary": 0.1 * jax.random.normal(keys[1], (32, 3))}
speed = jax.tree.map(jnp.zeros_like, params)
for _ in range(100):
    params, speed = step(params, speed, *scenes(8, rng))
images, labels = scenes(50, rng)
unary, potentials = model(params, images)
for name, used in {"unary": [], "unary + CRF": potentials}.items():
    print(f"{name}: {np.mean(pw.decode(unary, used, size=(48, 48)).labels == labels):.1%} of pixels right")
