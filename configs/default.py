"""Every key there is, with the paper's setting where the paper gives one; [choice] marks what it does not give."""

from ml_collections import ConfigDict


def relation(rows, cols, unit="short_side", grid=0, parameterisation=""):
    """A range box; see `pwcrf_jax.relations.Relation`. grid 0: all offsets; parameterisation "": the model's.

    Its offsets are made once, on the grid of data.crop_size, and kept by the run in row_offsets and col_offsets, in
    cells, of which every pair but (0, 0) is one: nothing that comes later changes the distances that a net is used at.
    """
    own = dict(row_offsets=(), col_offsets=())  # (): of the box
    return ConfigDict(dict(rows=rows, cols=cols, unit=unit, grid=grid, parameterisation=parameterisation) | own)


def get_config():
    config = ConfigDict()
    config.seed = 0
    # A file of pretrained weights (.h5, .safetensors), or the workdir of a run to start from; "": random.
    config.init_from = ""
    config.compilation_cache = True  # compiled programs are kept in ~/.cache/pwcrf_jax, for the next start

    config.data = ConfigDict()
    config.data.name = "synthetic"  # see docs/datasets.md
    config.data.source_dir = ""  # folder of the original files
    config.data.data_dir = ""  # where TFDS keeps prepared sets; "": TFDS_DATA_DIR or ~/tensorflow_datasets
    config.data.partial = False  # accept splits that do not have the official number of images
    config.data.train_split = "train"
    config.data.eval_split = "val"
    config.data.num_classes = 6
    config.data.crop_size = (192, 256)
    config.data.eval_size = (192, 256)  # every image is padded to this size; the largest of the set
    config.data.scale_range = (0.7, 1.2)
    config.data.flip = True
    # Of one image or mask, at most: a damaged header may claim any size. Larger ones need memory, see config.tiles.
    config.data.max_pixels = 89_478_485
    config.data.num_threads = 2
    config.data.num_workers = 0  # processes that read training images instead of the threads; 0: none
    config.data.synthetic = ConfigDict(dict(num_train=400, num_val=100, image_size=(192, 256), seed=0))
    # Of the data set image_folder, where it has no lists.
    config.data.image_folder = ConfigDict(dict(val_fraction=0.1, seed=0))
    config.data.tfds = ConfigDict()  # of the data set tfds, see pwcrf_jax/data/sets/tfds_set.py
    config.data.tfds.dataset = "oxford_iiit_pet"  # TFDS' name of it: "name", "name/config" or "name/config:1.0.0"
    config.data.tfds.image_key = "image"
    config.data.tfds.label_key = "segmentation_mask"
    config.data.tfds.label_offset = -1  # added to stored labels
    config.data.tfds.void = 255  # what means void, after the offset
    config.data.tfds.class_names = ()  # (): the set's own, or class_0, class_1, ...
    config.data.tfds.num_classes = 3  # 0: as many as there are names
    config.data.tfds.max_side = 0  # larger images are shrunk to it, with their masks; 0: none is

    config.model = ConfigDict()
    config.model.backbone = "vgg16"  # vgg16, mobilenet_v2, tiny
    config.model.mobilenet_v2 = ConfigDict(dict(output="block_13_expand", depthwise="auto", freeze_until=""))
    config.model.tiny = ConfigDict(dict(features=(16, 32, 48, 64)))
    config.model.scales = (1.2, 0.8, 0.4)
    config.model.block6 = ((7, 4096), (3, 512), (3, 512))  # (kernel, features) of each convolution
    config.model.pyramid_windows = (5, 9)  # sliding pyramid pooling; (): off
    # Convolutions on middle layers of the backbone, which sharpen what inference says ahead of the dense CRF; the
    # paper's best model has some. layers: such as ("block_3_expand", "block_6_expand"); (): off. Both are [choice].
    config.model.refinement_convs = ConfigDict(dict(layers=(), width=32))
    config.model.hidden = 512
    config.model.relations = ("surrounding", "above_below")  # names in config.relations; (): unary only
    config.model.parameterisation = "residual"  # free (the paper's), residual
    # shared: relations and unary stand on one FeatMap-Net; own: relations have one of theirs [choice]
    config.model.pairwise_features = "shared"
    config.model.pairwise_trains_features = True  # of shared ones
    config.model.input_scaling = "auto"  # tf, caffe, torch; auto: what the pretrained weights ask for
    config.model.dtype = "float32"  # computed in: float32, bfloat16

    config.relations = ConfigDict()
    config.relations.surrounding = relation(rows=(-0.2, 0.2), cols=(-0.2, 0.2), grid=5)
    config.relations.above_below = relation(rows=(-0.4, 0.0), cols=(-0.2, 0.2), grid=5)

    config.loss = ConfigDict()
    # piecewise; piecewise_staged: the unary first, then the relations on its features, frozen. With config.crf in
    # training: pseudo_likelihood, unrolled_mean_field, unrolled_mean_field_staged
    config.loss.objective = "piecewise"
    config.loss.unary_share = 0.5  # of the steps, that those in stages train the unary; 0: it comes with init_from
    config.loss.reduction = "mean"  # mean: of each kind of factor [choice]; sum: over all of an image (the paper's)
    config.loss.pairwise_weight = 1.0
    config.loss.balance_power = 0.0  # 1: per-image inverse class frequency; 0: off
    config.loss.pairwise_balance_power = -1.0  # that of the relations; -1: the same
    config.loss.sampled_offsets = 0  # of each relation, drawn anew every step, at most; 0: all
    config.loss.chunk_edges = 0  # edges whose scores are held at a time; 0: chosen from the shapes

    config.optimizer = ConfigDict()  # all [choice]
    config.optimizer.name = "adamw"  # adamw, sgd
    config.optimizer.learning_rate = 1e-3
    config.optimizer.backbone_factor = 0.1  # of the learning rate, for the backbone
    config.optimizer.schedule = "poly"  # poly (power 0.9), cosine, constant
    config.optimizer.warmup_steps = 50
    config.optimizer.momentum = 0.9  # of sgd
    config.optimizer.weight_decay = 1e-4
    config.optimizer.clip_norm = 10.0  # of the gradient of the relations, and of all else; 0: off

    config.train = ConfigDict()
    config.train.batch_size = 8  # over all devices and hosts
    config.train.steps = 1000
    config.train.log_every = 20
    config.train.eval_every = 250  # steps; 0: only at the end
    config.train.checkpoint_every = 100
    config.train.keep_checkpoints = 2  # with 1 there is none to fall back to
    config.train.max_skipped_steps = 3  # steps without a finite loss and gradient are skipped; one more ends the run

    config.crf = ConfigDict()
    config.crf.relations = ()  # of the model's, those that inference uses; (): all
    config.crf.num_iterations = 3
    config.crf.weights = (1.0,)  # of the messages, one for all or one a relation
    config.crf.damping = 0.0
    config.crf.average_messages = True  # mean of a node's messages a relation; False: the paper's plain sum
    config.crf.algorithm = "auto"  # how messages are computed: factored, table; auto: the cheaper by the cost model
    config.crf.chunk_edges = 0  # factored: edges whose hidden units are held at a time; 0: chosen from the shapes

    config.refine = ConfigDict()  # of --refine; see pwcrf_jax.dense_crf.Params, defaults are pydensecrf's usual
    config.refine.num_iterations = 10
    config.refine.smoothness_compat = 3.0
    config.refine.smoothness_sxy = 3.0  # pixels
    config.refine.appearance_compat = 10.0
    config.refine.appearance_sxy = 80.0  # pixels
    config.refine.appearance_srgb = 13.0  # of colours 0..255
    config.refine.method = "auto"  # of the appearance filter: lattice, exact; auto: by size and device

    config.tiles = ConfigDict()  # of images larger than data.eval_size
    config.tiles.size = ()  # (height, width) at most; (): three times data.eval_size, the memory of nine images
    config.tiles.overlap = 0.5  # of neighbouring tiles, at least, as a share of a tile

    config.tta = ConfigDict()  # test-time augmentation
    config.tta.scales = (1.0,)  # of the image; probabilities of all of them are averaged
    config.tta.flip = False  # each of them mirrored as well

    config.eval = ConfigDict()
    config.eval.batch_size = 8  # over all devices and hosts
    config.eval.classes = ()  # names of the classes that means are taken over; (): all
    config.eval.panel = 4  # validation images that TensorBoard shows at each evaluation of training, with their labels
    return config
