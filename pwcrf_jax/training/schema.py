"""What every key of a config may hold. One table, so that a wrong value is refused by name before any compute."""

import math


class Number:
    """An int, or a float (ints pass for floats), low <= x <= high; `above` is an exclusive lower bound."""

    def __init__(self, kind, low=None, high=None, above=None, below=None):
        self.kind, self.low, self.high, self.above, self.below = kind, low, high, above, below

    def problem(self, x):
        kinds = (int,) if self.kind is int else (int, float)
        if isinstance(x, bool) or not isinstance(x, kinds):
            return f"must be {'an integer' if self.kind is int else 'a number'}"
        if not math.isfinite(x):
            return "must be finite"
        if self.above is not None and x <= self.above:
            return "must be positive" if self.above == 0 else f"must be above {self.above}"
        if self.low is not None and x < self.low:
            return f"must be {self.low} or more"
        if self.high is not None and x > self.high:
            return f"must be at most {self.high}"
        if self.below is not None and x >= self.below:
            return f"must be below {self.below}"
        return None


class Text:
    def problem(self, x):
        return None if isinstance(x, str) else "must be text"


class Flag:
    def problem(self, x):
        return None if isinstance(x, bool) else "must be True or False"


class Tuple:
    """A tuple whose elements are all of one kind; of `length` elements where it is given."""

    def __init__(self, element, length=None, empty=True):
        self.element, self.length, self.empty = element, length, empty

    def problem(self, x):
        if not isinstance(x, (tuple, list)):
            return "must be a tuple"
        if self.length is not None and len(x) != self.length:
            return f"must hold {self.length} values"
        if not x and not self.empty:
            return "must not be empty"
        for value in x:
            if wrong := self.element.problem(value):
                return f"{wrong}, got {value!r} in it"
        return None


_POSITIVE_INT, _COUNT = Number(int, low=1), Number(int, low=0)
_POSITIVE, _NOT_NEGATIVE = Number(float, above=0), Number(float, low=0)
_SIZE = Tuple(_POSITIVE_INT, 2)
_NAMES = Tuple(Text())

RELATION = {
    "rows": Tuple(Number(float), 2),
    "cols": Tuple(Number(float), 2),
    "unit": Text(),
    "grid": _COUNT,
    "parameterisation": Text(),
}

SCHEMA = {
    "seed": Number(int, low=0, high=2**32 - 1),
    "init_from": Text(),
    "data.name": Text(),
    "data.source_dir": Text(),
    "data.data_dir": Text(),
    "data.partial": Flag(),
    "data.train_split": Text(),
    "data.eval_split": Text(),
    "data.num_classes": Number(int, low=2, high=255),
    "data.crop_size": _SIZE,
    "data.eval_size": _SIZE,
    "data.scale_range": Tuple(_POSITIVE, 2),
    "data.flip": Flag(),
    "data.num_threads": _COUNT,
    "data.synthetic.num_train": _POSITIVE_INT,
    "data.synthetic.num_val": _POSITIVE_INT,
    "data.synthetic.image_size": _SIZE,
    "data.synthetic.seed": _COUNT,
    "data.image_folder.val_fraction": Number(float, above=0, below=1),
    "data.image_folder.seed": Number(int),
    "data.tfds.dataset": Text(),
    "data.tfds.image_key": Text(),
    "data.tfds.label_key": Text(),
    "data.tfds.label_offset": Number(int),
    "data.tfds.void": Number(int),
    "data.tfds.class_names": _NAMES,
    "data.tfds.num_classes": Number(int, low=0, high=255),
    "data.tfds.max_side": _COUNT,
    "model.backbone": Text(),
    "model.mobilenet_v2.output": Text(),
    "model.mobilenet_v2.depthwise": Text(),
    "model.mobilenet_v2.freeze_until": Text(),
    "model.tiny.features": Tuple(_POSITIVE_INT, 4),
    "model.scales": Tuple(_POSITIVE, empty=False),
    "model.block6": Tuple(Tuple(_POSITIVE_INT, 2)),
    "model.pyramid_windows": Tuple(_POSITIVE_INT),
    "model.hidden": _POSITIVE_INT,
    "model.relations": _NAMES,
    "model.parameterisation": Text(),
    "model.pairwise_trains_features": Flag(),
    "model.input_scaling": Text(),
    "model.dtype": Text(),
    "loss.objective": Text(),
    "loss.unary_share": Number(float, low=0, below=1),
    "loss.reduction": Text(),
    "loss.pairwise_weight": _NOT_NEGATIVE,
    "loss.balance_power": _NOT_NEGATIVE,
    "loss.sampled_offsets": _COUNT,
    "loss.chunk_edges": _COUNT,
    "optimizer.name": Text(),
    "optimizer.learning_rate": _POSITIVE,
    "optimizer.backbone_factor": _NOT_NEGATIVE,
    "optimizer.schedule": Text(),
    "optimizer.warmup_steps": _COUNT,
    "optimizer.momentum": Number(float, low=0, below=1),
    "optimizer.weight_decay": _NOT_NEGATIVE,
    "optimizer.clip_norm": _NOT_NEGATIVE,
    "train.batch_size": _POSITIVE_INT,
    "train.steps": _POSITIVE_INT,
    "train.log_every": _POSITIVE_INT,
    "train.eval_every": _COUNT,
    "train.checkpoint_every": _POSITIVE_INT,
    "train.keep_checkpoints": _POSITIVE_INT,
    "crf.relations": _NAMES,
    "crf.num_iterations": _COUNT,
    "crf.weights": Tuple(Number(float), empty=False),
    "crf.damping": Number(float, low=0, below=1),
    "crf.normalize": Flag(),
    "crf.route": Text(),
    "crf.chunk_edges": _COUNT,
    "refine.num_iterations": _COUNT,
    "refine.smoothness_compat": Number(float),
    "refine.smoothness_sxy": _POSITIVE,
    "refine.appearance_compat": Number(float),
    "refine.appearance_sxy": _POSITIVE,
    "refine.appearance_srgb": _POSITIVE,
    "refine.method": Text(),
    "tiles.size": Tuple(_POSITIVE_INT),
    "tiles.overlap": Number(float, low=0, below=1),
    "tta.scales": Tuple(_POSITIVE, empty=False),
    "tta.flip": Flag(),
    "eval.batch_size": _POSITIVE_INT,
    "eval.classes": _NAMES,
}


def problems(flat: dict, relation_names):
    """Yields a sentence for every key that is missing, unknown or holds a wrong value; flat: {dotted key: value}."""
    schema = dict(SCHEMA)
    for name in relation_names:
        schema |= {f"relations.{name}.{field}": kind for field, kind in RELATION.items()}
    for key, kind in schema.items():
        if key not in flat:
            yield f"config.{key} is missing; start from configs/default.py"
        elif wrong := kind.problem(flat[key]):
            yield f"config.{key} = {flat[key]!r} {wrong}"
    for key in flat:
        if key not in schema:
            yield f"config.{key} is not a key that anything reads; remove it, or see configs/default.py for the names"
