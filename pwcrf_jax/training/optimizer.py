"""The optimizer of a config."""

import jax
import optax
from ml_collections import ConfigDict

from pwcrf_jax.config import featmap_net

MOMENTUM = 0.9  # of sgd
# In names of parameters: biases, those of layer norms and layer scale, and what a ViT has beside its kernels.
_NOT_DECAYED = ("bias", "scale", "token", "positions", "epsilon")


def schedule(config, num_steps):
    """Learning rate by step: linear warm-up, then a polynomial of power 0.9 down to 0 at num_steps."""
    peak = config.learning_rate
    body = optax.polynomial_schedule(peak, 0.0, 0.9, max(num_steps - config.warmup_steps, 1))
    if not config.warmup_steps:
        return body
    # A warm-up from 0 would waste the first step.
    warmup = optax.linear_schedule(peak / (config.warmup_steps + 1), peak, config.warmup_steps)
    return optax.join_schedules([warmup, body], [config.warmup_steps])


def frozen_layers(model_config) -> frozenset[str]:
    """Layers of the backbone that the model cuts off from the gradient: those before freeze_until."""
    return frozenset(featmap_net(ConfigDict({"model": model_config})).bare_backbone().frozen_layers)


def _groups(params, frozen):
    """ "frozen", "backbone" or "new" for every leaf."""

    def group(path, _):
        names = [k.key for k in path]
        if names[0] not in ("featmap", "featmap_pairwise") or names[1] != "backbone":
            return "new"
        return "frozen" if names[2] in frozen else "backbone"

    return jax.tree_util.tree_map_with_path(group, params)


def _kinds(params):
    """ "pairwise" for every leaf of Pairwise-Nets, their own features and refinement convolutions, else "unary"."""
    later = ("pairwise_", "featmap_pairwise", "refinement_convs")
    kind = lambda path, _: "pairwise" if path[0].key.startswith(later) else "unary"
    return jax.tree_util.tree_map_with_path(kind, params)


def _decayed(params):
    """True for kernels. By name: the pairwise net's last bias is a matrix too, [K, K], and so are tokens of a ViT."""
    decayed = lambda path, _: not any(part in path[-1].key for part in _NOT_DECAYED)
    return jax.tree_util.tree_map_with_path(decayed, params)


def make_optimizer(config, model_config, num_steps, unary_steps=None):
    """optax transformation for config.optimizer.

    unary_steps: of an objective in stages: the relations have a schedule of their own, from this step on, and
    all else stands still from there; None: one schedule for all.

    Weight decay (the paper's lambda) acts on kernels, not on biases and scales; in adamw decoupled, in sgd as an L2
    term. The backbone learns at backbone_factor times the rate; layers that the model freezes get no update at all.
    """
    decay = optax.add_decayed_weights(config.weight_decay, mask=_decayed)
    rule = [optax.scale_by_adam(), decay] if config.name == "adamw" else [decay, optax.trace(MOMENTUM)]
    rule_of = lambda steps: optax.chain(*rule, optax.scale_by_learning_rate(schedule(config, steps)))
    # A common norm would tie together what piecewise training keeps apart: beside relations, the unary's parameters
    # would take other steps than alone. Stateless, so that states saved with one norm for all can be read.
    of_kind = optax.partition({k: optax.clip_by_global_norm(config.clip_norm) for k in ("unary", "pairwise")}, _kinds)
    by_kind = optax.stateless(lambda updates, _: of_kind.update(updates, of_kind.init(updates))[0])
    clip = [by_kind] if config.clip_norm else []
    if unary_steps is None:
        learn = rule_of(num_steps)
    else:
        # Each has moments and a schedule of its own, which begin with its stage.
        stages = {
            "unary": optax.conditionally_mask(rule_of(unary_steps), lambda step: step < unary_steps),
            "pairwise": optax.conditionally_mask(rule_of(num_steps - unary_steps), lambda step: step >= unary_steps),
        }
        learn = optax.partition(stages, _kinds)
    frozen = frozen_layers(model_config)
    factors = {"new": optax.identity(), "backbone": optax.scale(config.backbone_factor), "frozen": optax.set_to_zero()}
    return optax.chain(*clip, learn, optax.partition(factors, lambda params: _groups(params, frozen)))


def standing_still(config, params, unary_steps=None):
    """For every leaf of params the key of the config that keeps all steps from changing it; "" where it learns.

    unary_steps: of `make_optimizer`.
    """

    def key(path, group, kind):
        if group == "frozen":
            return f"model.{config.model.backbone}.freeze_until"
        if group == "backbone" and not config.optimizer.backbone_factor:
            return "optimizer.backbone_factor"
        if kind == "unary" and unary_steps == 0:
            return "loss.unary_share"
        of_relations = kind == "pairwise" and path[0].key != "refinement_convs"
        return "loss.pairwise_weight" if of_relations and not config.loss.pairwise_weight else ""

    return jax.tree_util.tree_map_with_path(key, _groups(params, frozen_layers(config.model)), _kinds(params))
