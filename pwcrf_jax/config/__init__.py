"""Configs: every key once (`keys`), checked before any compute is spent, kept in the workdir, read as typed values."""

from pwcrf_jax.config.keys import defaults, flat, relation
from pwcrf_jax.config.model import build_model, identity
from pwcrf_jax.config.offsets import check_edges, keep_offsets, relations
from pwcrf_jax.config.settings import (
    augments,
    crf_relations,
    crf_settings,
    dataset_options,
    final_row,
    loss_settings,
    objective,
    scored_classes,
    shown_rows,
    table_rows,
    unary_steps,
)
from pwcrf_jax.config.validation import check_classes, check_keys, unknown, validate
from pwcrf_jax.config.workdir import (
    CLASSES,
    CONFIG,
    TUNED,
    apply_tuned,
    check_tuned,
    load,
    load_checked,
    load_classes,
    save,
    save_classes,
    tuning_conditions,
    write_tuned,
)
from pwcrf_jax.runtime.errors import ConfigError

__all__ = [
    "CLASSES",
    "CONFIG",
    "TUNED",
    "ConfigError",
    "apply_tuned",
    "augments",
    "build_model",
    "check_classes",
    "check_edges",
    "check_keys",
    "check_tuned",
    "crf_relations",
    "crf_settings",
    "dataset_options",
    "defaults",
    "final_row",
    "flat",
    "identity",
    "keep_offsets",
    "load",
    "load_checked",
    "load_classes",
    "loss_settings",
    "objective",
    "relation",
    "relations",
    "save",
    "save_classes",
    "scored_classes",
    "shown_rows",
    "table_rows",
    "tuning_conditions",
    "unary_steps",
    "unknown",
    "validate",
    "write_tuned",
]
