"""Every key of a config, once: the values that it takes, its default, its meaning.

Defaults, command line, validation, `--helpfull` and docs/configuration.md are made from `KEYS` and `RELATION`. Defaults
are the paper's where it gives a value; [choice] marks what it does not give.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from pwcrf_jax.config.kinds import Choice, ChoiceOrOwn, Flag, Function, Kind, Number, Pair, Path, Text, Tuple
from pwcrf_jax.data import DATASETS
from pwcrf_jax.data.scores import KINDS, LAYOUTS
from pwcrf_jax.messages import ALGORITHMS
from pwcrf_jax.model.losses import OBJECTIVES
from pwcrf_jax.model.segmenter import PAIRWISE_FEATURES, PARAMETERISATIONS, UNARIES
from pwcrf_jax.nets import BACKBONES, INPUT_SCALINGS
from pwcrf_jax.nets.depthwise import METHODS
from pwcrf_jax.nets.vit import PATCHES
from pwcrf_jax.relations import UNITS

_POSITIVE_INT, _COUNT = Number(int, low=1), Number(int, low=0)
_POSITIVE, _NOT_NEGATIVE, _SHARE = Number(float, above=0), Number(float, low=0), Number(float, low=0, below=1)
# Beyond these nothing is meant, and arrays and loops of such sizes would end otherwise than by a sentence.
_WIDTH, _BATCH, _SCALE = Number(int, 1, 65536), Number(int, 1, 65536), Number(float, 0.01, 100)
_WINDOW, _ITERATIONS, _WORKERS = Number(int, 1, 255, odd=True), Number(int, 0, 10000), Number(int, 0, 1024)
_SIZE, _SIZE_OR_SETS = (Tuple(Number(int, 1, 16384), length) for length in (2, (0, 2)))
_BOUNDS = Tuple(Number(float, -16384, 16384), 2, rising=True)
_OFFSETS = Tuple(Number(int, -16384, 16384))
_NAMES = Tuple(Text())


@dataclasses.dataclass(frozen=True)
class Key:
    """The kind of a key's values, its default, and its meaning in one line."""

    kind: Kind
    default: Any
    meaning: str


SECTIONS = {
    "": "The run",
    "data": "Data, see docs/datasets.md",
    "data.synthetic": "The built-in set",
    "data.image_folder": "Your own folder, where it has no lists",
    "data.tfds": "A set of the TFDS catalogue",
    "data.scores": "Scores of a network of yours, for model.unary = scores, see docs/relations-on-scores.md",
    "model": "The model",
    "model.efficientnet_lite": "The backbone efficientnet_lite",
    "model.mobilenet_v2": "The backbone mobilenet_v2",
    "model.resnet50": "The backbone resnet50",
    "model.resnet101": "The backbone resnet101",
    "model.convnext_tiny": "The backbone convnext_tiny",
    "model.vit_small": "The backbone vit_small",
    "model.vit_base": "The backbone vit_base",
    "model.tiny": "The backbone tiny",
    "model.refinement_convs": "Convolutions on skip layers of the backbone, ahead of the dense CRF [choice]",
    "loss": "The training objective",
    "optimizer": "The optimizer [choice]",
    "train": "Training",
    "crf": "Mean field",
    "refine": "The dense CRF of --refine, see pwcrf_jax.dense_crf.Params; pydensecrf's usual values",
    "tiles": "Images larger than data.eval_size",
    "tta": "Test-time augmentation",
    "eval": "Evaluation",
}
"""Titles of the sections of `KEYS`."""

_OUTPUT = "the layer whose features are taken, a stage or a block"
_FREEZE = Key(Text(), "", 'layers before this one are not trained; "": all are')
_STRIDE = Key(Choice((16, 8)), 16, "pixels to a cell; 8: with one more stage of dilated kernels")
_DEPTHWISE = Key(Choice(METHODS), "auto", "how depthwise convolutions are computed; auto: by device")
_RESNET = {"output": Key(Text(), "layer4", _OUTPUT), "stride": _STRIDE, "freeze_until": _FREEZE}
_VIT = {
    "output": Key(Text(), "norm", "the layer whose features are taken: norm, the last, or a block, such as blocks_8"),
    "patch": Key(Choice(tuple(PATCHES)), 16, "pixels of a patch, which is a cell; 14 in DINOv2"),
    "registers": Key(Number(int, 0, 1024), 0, "register tokens; 4 in DINOv2 with registers"),
    "layer_scale": Key(Flag(), False, "a factor for each channel on what a block adds, as in DINOv2"),
    "grid": Key(
        Number(int, 0, 1024), 0, "position embeddings a side; 0: 14 with patch 16, 28 with patch 8, 37 with patch 14"
    ),
    "freeze_until": _FREEZE,
}
# Sections of backbones that share options.
_BACKBONES = {
    "resnet50": _RESNET,
    "resnet101": _RESNET,
    "convnext_tiny": _RESNET | {"output": Key(Text(), "stages_3", _OUTPUT), "depthwise": _DEPTHWISE},
    "vit_small": _VIT,
    "vit_base": _VIT,
}

KEYS = {
    "seed": Key(Number(int, low=0, high=2**32 - 1), 0, "seed of parameters, order, crops and samples"),
    "init_from": Key(Path(), "", 'pretrained weights (a file, or "pip:NAME"), or the workdir of a run; "": random'),
    "compilation_cache": Key(Flag(), True, "keep compiled programs in ~/.cache/pwcrf_jax for the next start"),
    "data.name": Key(Choice(DATASETS), "synthetic", "the data set"),
    "data.source_dir": Key(Path(), "", "folder of the original files"),
    "data.data_dir": Key(Path(), "", 'folder of prepared sets; "": TFDS_DATA_DIR or ~/tensorflow_datasets'),
    "data.partial": Key(Flag(), False, "accept splits that do not have the official number of images"),
    "data.train_split": Key(Text(empty=False), "train", "split, or parts, such as train[:90%] or train[:90% by id]"),
    "data.eval_split": Key(Text(empty=False), "val", "split that evaluation takes"),
    "data.num_classes": Key(
        Number(int, low=2, high=255, besides=0), 6, "number of classes; void is none; 0: the set's"
    ),
    "data.crop_size": Key(_SIZE_OR_SETS, (192, 256), "(height, width) of training crops; (): as pwcrf check proposes"),
    "data.eval_size": Key(
        _SIZE_OR_SETS, (192, 256), "(height, width) that images are padded to, at least the largest; (): that one's"
    ),
    "data.scale_range": Key(Tuple(_SCALE, 2, rising=True), (0.7, 1.2), "scales that training images are drawn at"),
    "data.flip": Key(Flag(), True, "mirror half of the training images"),
    "data.jitter": Key(
        Tuple(Number(float, 0, 1), 4), (0.0, 0.0, 0.0, 0.0), "random brightness, contrast, saturation and hue, 0: none"
    ),
    "data.augment": Key(
        Function(), "", "(image, mask, rng) -> (image, mask), of whole training images, before scaling"
    ),
    "data.max_pixels": Key(
        _POSITIVE_INT, 89_478_485, "pixels of one image or mask at most, as a damaged header may claim any size"
    ),
    "data.num_threads": Key(_WORKERS, 2, "threads that read images"),
    "data.num_workers": Key(_WORKERS, 0, "processes that read training images instead of threads; 0: none"),
    "data.synthetic.num_train": Key(_POSITIVE_INT, 400, "training scenes"),
    "data.synthetic.num_val": Key(_POSITIVE_INT, 100, "validation scenes"),
    "data.synthetic.image_size": Key(_SIZE, (192, 256), "(height, width) of scenes"),
    "data.synthetic.seed": Key(_COUNT, 0, "seed of the scenes"),
    "data.image_folder.val_fraction": Key(Number(float, above=0, below=1), 0.1, "share of images held out as val"),
    "data.image_folder.seed": Key(Number(int), 0, "seed of that choice"),
    "data.tfds.dataset": Key(Text(), "oxford_iiit_pet", "name, name/config or name/config:1.0.0"),
    "data.tfds.image_key": Key(Text(), "image", "feature of images"),
    "data.tfds.label_key": Key(Text(), "segmentation_mask", "feature of masks"),
    "data.tfds.label_offset": Key(Number(int), -1, "added to stored labels"),
    "data.tfds.void": Key(Number(int), 255, "label that means void, after the offset"),
    "data.tfds.class_names": Key(_NAMES, (), "names of the classes; (): the set's own, or class_0, class_1, ..."),
    "data.tfds.num_classes": Key(Number(int, low=0, high=255), 3, "number of classes; 0: as many as there are names"),
    "data.tfds.max_side": Key(_COUNT, 0, "longest side, to which larger images are shrunk; 0: none is"),
    "data.scores.dir": Key(
        Path(in_bucket=False), "", "folder of score files, one an image, by the names of the images"
    ),
    "data.scores.layout": Key(Choice(("auto", *LAYOUTS)), "auto", "axes of a file; auto: by its shape"),
    "data.scores.kind": Key(Choice(("auto", *KINDS)), "auto", "what a file holds; auto: by its values"),
    "data.scores.confidence": Key(
        Number(float, low=0, below=1), 0.0, "of label images: probability that a label is right; 0: they are refused"
    ),
    "data.scores.per_cell": Key(
        Number(int, 1, 64), 4, "scores a side of a cell that labels of pixels are made of; training has one a cell"
    ),
    "model.backbone": Key(ChoiceOrOwn(BACKBONES), "vgg16", "the network below FeatMap-Net, or one of your own"),
    "model.factory_options": Key(
        Tuple(Text(empty=False)), (), "arguments of a backbone of your own, such as ('width=64',)"
    ),
    "model.efficientnet_lite.variant": Key(Number(int, 0, 2), 0, "EfficientNet-Lite 0, 1 or 2"),
    "model.efficientnet_lite.stride": _STRIDE,
    "model.efficientnet_lite.output": Key(Text(), "stage5_0_expand", "the layer whose features are taken"),
    "model.efficientnet_lite.deep": Key(
        Text(), "", "a later block, such as stage6_0, whose features at stride 32 are joined to these; '': none"
    ),
    "model.efficientnet_lite.depthwise": _DEPTHWISE,
    "model.efficientnet_lite.freeze_until": _FREEZE,
    "model.mobilenet_v2.output": Key(Text(), "block_13_expand", "the layer whose features are taken"),
    "model.mobilenet_v2.depthwise": _DEPTHWISE,
    "model.mobilenet_v2.freeze_until": _FREEZE,
    **{f"model.{name}.{option}": key for name, options in _BACKBONES.items() for option, key in options.items()},
    "model.tiny.features": Key(Tuple(_WIDTH, 4), (16, 32, 48, 64), "features of its four convolutions"),
    "model.refinement_convs.layers": Key(
        Tuple(Text(empty=False)), (), 'layers, such as ("block_3_expand", "block_6_expand"); (): off'
    ),
    "model.refinement_convs.width": Key(_WIDTH, 32, "features of each convolution"),
    "model.scales": Key(Tuple(_SCALE, empty=False), (1.2, 0.8, 0.4), "scales of the image that the backbone sees"),
    "model.block6": Key(
        Tuple(Pair(_WINDOW, _WIDTH)),
        ((7, 4096), (3, 512), (3, 512)),
        "(kernel, features) of convolutions on the backbone",
    ),
    "model.pyramid_windows": Key(Tuple(_WINDOW), (5, 9), "windows of sliding pyramid pooling; (): off"),
    "model.hidden": Key(_WIDTH, 512, "hidden units of Unary-Net and Pairwise-Nets"),
    "model.unary": Key(
        Choice(UNARIES), "net", "scores of the unary: of a Unary-Net, or those of data.scores, which nothing trains"
    ),
    "model.relations": Key(_NAMES, ("surrounding", "above_below"), "names of sections of relations; (): unary only"),
    "model.parameterisation": Key(
        Choice(PARAMETERISATIONS), "residual", "pair scores: free (the paper's), or residual beside the unary"
    ),
    "model.pairwise_features": Key(
        Choice(PAIRWISE_FEATURES), "shared", "Pairwise-Nets on the unary's FeatMap-Net, or on one of their own [choice]"
    ),
    "model.pairwise_trains_features": Key(Flag(), True, "whether pair terms train shared features"),
    "model.input_scaling": Key(
        Choice(("auto", *INPUT_SCALINGS)), "auto", "range of input colours; auto: as the pretrained weights ask for"
    ),
    "model.dropout": Key(_SHARE, 0.0, "share of the feature channels that heads do without in training; 0: off"),
    "model.dtype": Key(Choice(("float32", "bfloat16")), "float32", "type that the nets compute in"),
    "loss.objective": Key(
        Choice(OBJECTIVES),
        "piecewise",
        "the objective; ..._staged: the unary first, then the relations on its features, frozen",
    ),
    "loss.unary_share": Key(
        _SHARE, 0.5, "share of the steps in which objectives in stages train the unary; 0: it comes with init_from"
    ),
    "loss.reduction": Key(
        Choice(("mean", "sum")),
        "mean",
        "over factors: mean of each kind [choice], or sum over an image (the paper's)",
    ),
    "loss.pairwise_weight": Key(_NOT_NEGATIVE, 1.0, "weight of the relations' terms"),
    "loss.balance_power": Key(
        _NOT_NEGATIVE, 0.0, "power of the inverse class frequency in the image, which weighs its cells; 0: off"
    ),
    "loss.pairwise_balance_power": Key(
        Number(float, low=0, besides=-1), -1.0, "the same of the relations; -1: loss.balance_power"
    ),
    "loss.sampled_offsets": Key(_COUNT, 0, "offsets of each relation, drawn anew every step, at most; 0: all"),
    "loss.evidence_temperature": Key(
        Tuple(Number(float, 0.01, 100), 2, rising=True),
        (1.0, 1.0),
        "range of each image's temperature of the unary in residual scores, drawn log-uniformly",
    ),
    "loss.evidence_dropout": Key(_SHARE, 0.0, "share of the nodes whose unary in residual scores is uniform; 0: off"),
    "loss.label_smoothing": Key(_SHARE, 0.0, "share of the unary's targets that is uniform over the classes; 0: off"),
    "loss.dice_weight": Key(_NOT_NEGATIVE, 0.0, "weight of 1 - soft Dice of the unary, beside cross-entropy; 0: off"),
    "loss.chunk_edges": Key(_COUNT, 0, "edges whose scores are held at a time; 0: chosen from the shapes"),
    "optimizer.name": Key(Choice(("adamw", "sgd")), "adamw", "the update rule; sgd has a momentum of 0.9"),
    "optimizer.learning_rate": Key(_POSITIVE, 1e-3, "peak of the rate, which falls to 0 by a polynomial of power 0.9"),
    "optimizer.backbone_factor": Key(_NOT_NEGATIVE, 0.1, "the backbone's rate as a share of the learning rate"),
    "optimizer.warmup_steps": Key(_COUNT, 50, "steps of linear warm-up"),
    "optimizer.weight_decay": Key(_NOT_NEGATIVE, 1e-4, "weight decay of kernels; biases and scales have none"),
    "optimizer.clip_norm": Key(
        _NOT_NEGATIVE, 10.0, "norm that gradients are clipped to, those of the relations and all others apart; 0: off"
    ),
    "optimizer.ema_decay": Key(
        _SHARE, 0.0, "decay a step of averaged parameters, which all but the gradient then uses; 0: off"
    ),
    "train.batch_size": Key(_BATCH, 8, "images a step, over all devices and hosts"),
    "train.accumulate": Key(_BATCH, 1, "parts that a device does its images of a step in, one by one, to save memory"),
    "train.steps": Key(_COUNT, 1000, "steps of training; 0: by the number of images"),
    "train.log_every": Key(_POSITIVE_INT, 20, "steps between lines of the log"),
    "train.eval_every": Key(_COUNT, 250, "steps between evaluations; 0: only at the end"),
    "train.checkpoint_every": Key(_POSITIVE_INT, 100, "steps between saved states"),
    "train.keep_checkpoints": Key(_POSITIVE_INT, 2, "states that are kept; with 1 there is none to fall back to"),
    "train.patience": Key(_COUNT, 0, "evaluations of the last stage without a better score that end the run; 0: never"),
    "train.hook": Key(Function(), "", "(step, metrics), called with all that metrics.jsonl gets, such as for W&B"),
    "train.max_skipped_steps": Key(
        _COUNT, 3, "steps without a finite loss and gradient that are skipped; one more ends the run"
    ),
    "crf.relations": Key(_NAMES, (), "those of the model's that inference uses; (): all"),
    "crf.num_iterations": Key(_ITERATIONS, 3, "iterations of mean field"),
    "crf.weights": Key(
        Tuple(Number(float), empty=False), (1.0,), "weights of the messages, one for all or one a relation"
    ),
    "crf.unary_temperature": Key(_POSITIVE, 1.0, "T that mean field divides the unary's scores by; above 1: less sure"),
    "crf.label_weights": Key(
        Tuple(Tuple(Tuple(_NOT_NEGATIVE), 2)),
        (),
        "factors of messages by label: for each relation one for each label of p, then of q; (): 1",
    ),
    "crf.damping": Key(_SHARE, 0.0, "share of the old log marginals that an iteration keeps"),
    "crf.average_messages": Key(Flag(), True, "mean of a node's messages a relation; False: the paper's plain sum"),
    "crf.algorithm": Key(Choice(ALGORITHMS), "auto", "how messages are computed; auto: the cheaper by the cost model"),
    "refine.num_iterations": Key(_ITERATIONS, 10, "iterations of the dense CRF"),
    "refine.smoothness_compat": Key(Number(float), 3.0, "strength of the smoothness kernel"),
    "refine.smoothness_sxy": Key(_POSITIVE, 3.0, "width of the smoothness kernel in pixels"),
    "refine.appearance_compat": Key(Number(float), 10.0, "strength of the appearance kernel"),
    "refine.appearance_sxy": Key(_POSITIVE, 80.0, "width of the appearance kernel in pixels"),
    "refine.appearance_srgb": Key(_POSITIVE, 13.0, "width of the appearance kernel in colours 0..255"),
    "tiles.size": Key(
        Tuple(_POSITIVE_INT, (0, 2)), (), "largest (height, width) of a tile; (): three times data.eval_size"
    ),
    "tiles.overlap": Key(_SHARE, 0.5, "least overlap of neighbouring tiles, as a share of a tile"),
    "tta.scales": Key(Tuple(_SCALE, empty=False), (1.0,), "scales of the image, over which probabilities are averaged"),
    "tta.flip": Key(Flag(), False, "take the mirrored image as well"),
    "eval.batch_size": Key(_BATCH, 8, "images a step, over all devices and hosts"),
    "eval.classes": Key(_NAMES, (), "names of the classes that means are taken over; (): all"),
    "eval.each_relation": Key(Flag(), True, "a row of each relation alone in the table: half of inference"),
    "eval.panel": Key(Number(int, 0, 64), 4, "validation images that TensorBoard shows at each evaluation of training"),
}
"""All keys but those of relations, in the order in which they are shown."""

RELATION = {
    "rows": Key(_BOUNDS, (-0.2, 0.2), "least and largest row of q - p"),
    "cols": Key(_BOUNDS, (-0.2, 0.2), "least and largest column of q - p"),
    "unit": Key(Choice(UNITS), "short_side", "rows and cols in fractions of the short side of the map, or in cells"),
    "grid": Key(Number(int, 0, 1024), 0, "offsets on a grid of this side, 5 in the journal version; 0: all of the box"),
    "row_offsets": Key(_OFFSETS, (), "rows of offsets in cells, of which every pair but (0, 0) is one; (): of the box"),
    "col_offsets": Key(_OFFSETS, (), "columns of offsets in cells"),
    "parameterisation": Key(Choice(("", *PARAMETERISATIONS)), "", 'that of this relation; "": model.parameterisation'),
}
"""The keys of relations.NAME, a range box, see `pwcrf_jax.relations.Relation`.

Its offsets are made once, on the grid of data.crop_size, and kept by the run in row_offsets and col_offsets: nothing
that comes later changes the distances that a net is used at.
"""


def relation(**values: Any) -> ConfigDict:
    """A section of config.relations: the defaults of `RELATION`, with values of your own."""
    return ConfigDict({name: key.default for name, key in RELATION.items()} | values)


def defaults() -> ConfigDict:
    """A config of all keys, with the two relations of the paper."""
    config = ConfigDict({section: ConfigDict() for section in SECTIONS if section and "." not in section})
    for key, entry in KEYS.items():
        *sections, name = key.split(".")
        part = config
        for section in sections:
            if section not in part:
                part[section] = ConfigDict()
            part = part[section]
        part[name] = entry.default
    config.relations = ConfigDict()
    config.relations.surrounding = relation(grid=5)
    config.relations.above_below = relation(rows=(-0.4, 0.0), grid=5)
    return config


def flat(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of all keys that a config has."""
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def of(key: str) -> Key | None:
    """The entry of a dotted key; None if there is no such key."""
    section, _, name = key.partition(".")
    if section == "relations" and key.count(".") == 2:
        return RELATION.get(name.partition(".")[2])
    return KEYS.get(key)
