"""The exported predictor: the labels of pwcrf predict, without the package, on all platforms."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import commands
import jax
import numpy as np
import pytest
from jax import export as jax_export
from PIL import Image
from rows import full_row

from pwcrf_jax import config as configs
from pwcrf_jax.configs import demo
from pwcrf_jax.data import DataError
from pwcrf_jax.prediction import export, predict, restore
from pwcrf_jax.prediction import predictor as inference
from pwcrf_jax.runtime import checkpoint, files

ROOT = Path(__file__).resolve().parents[3]
SIZE = (96, 128)


def small(**keys):
    config = demo.get_config()
    config.model.tiny.features, config.model.hidden = (4, 4, 8, 8), 8
    config.data.eval_size = config.data.crop_size = SIZE
    config.model.input_scaling = "tf"
    config.update_from_flattened_dict(keys)
    return config


def random_params(config, seed=0):
    """Of which every layer has a say: pair scores would start at zero."""
    params = restore.init_params(configs.build_model(config), seed)
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(tree, [x + 0.5 * rng.normal(size=x.shape).astype(np.float32) for x in leaves])


def scene(rng, height, width):
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3)).astype(np.uint8))
    return np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run with its best checkpoint, as training leaves it."""
    folder = tmp_path_factory.mktemp("export") / "work"
    config = small(**{"crf.weights": (8.0,)})
    params = random_params(config)
    with checkpoint.Store(str(folder / "best"), configs.identity(config), 1) as store:
        store.save(7, {"params": params}, {})
        store.wait()
    configs.save(config, folder / "config.json")
    configs.save_classes([f"class {i}" for i in range(6)], [(40 * i, 0, 255) for i in range(6)], str(folder))
    return folder


LOADER = """
import sys
sys.modules["pwcrf_jax"] = None  # to import it fails
import json
import numpy as np
about = json.load(open("p.stablehlo.json"))
scope = {}
exec("\\n".join(about["load"]), scope)
batch = np.load("batch.npz")
np.savez("labels.npz", photo=scope["labels"], batch=scope["predictor"](batch["images"], batch["valid_size"]))
ours = {"pwcrf_jax", "flax", "ml_collections", "orbax", "optax"}
assert not [name for name, module in sys.modules.items() if module and name.split(".")[0] in ours]
"""


def test_the_file_gives_the_labels_of_eval_without_the_package(workdir, tmp_path):
    rng = np.random.default_rng(1)
    sizes = [SIZE, (96, 5), (1, 128), *zip(rng.integers(20, 97, 17), rng.integers(20, 129, 17), strict=True)]
    images = [scene(rng, *map(int, size)) for size in sizes]
    (tmp_path / "images").mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / "images" / f"{i:02d}.png")
    Image.fromarray(images[5]).save(tmp_path / "photo.png")
    frames = rng.integers(0, 256, (20, *SIZE, 3)).astype(np.uint8)  # what lies beside an image is not read
    for frame, image in zip(frames, images, strict=True):
        frame[: image.shape[0], : image.shape[1]] = image
    np.savez(tmp_path / "batch.npz", images=frames, valid_size=np.array([x.shape[:2] for x in images], np.int32))

    words = ["-m", "pwcrf_jax", "export", "--workdir", workdir, "--output", tmp_path / "p.stablehlo"]
    done = commands.run(words)
    assert done.returncode == 0, done.stderr
    told, about = json.loads(done.stdout.splitlines()[-1]), json.loads((tmp_path / "p.stablehlo.json").read_text())
    assert told["bytes"] == about["bytes"] == (tmp_path / "p.stablehlo").stat().st_size
    assert done.stdout.splitlines()[:-1] == about["load"] and len(about["load"]) == 4
    assert about["platforms"] == ["cpu", "cuda", "tpu"] and about["step"] == 7 and about["size"] == list(SIZE)
    assert about["classes"][2] == {"name": "class 2", "colour": [80, 0, 255]}
    assert about["unary_temperature"] == 1.0 and about["label_weights"] == []
    assert about["message_weights"] == {"surrounding": 8.0, "above_below": 8.0}
    assert about["versions"]["jax"] == jax.__version__ and about["calling_convention_version"] >= 9

    (tmp_path / "load.py").write_text(LOADER)
    done = subprocess.run([sys.executable, "-I", "load.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = np.load(tmp_path / "labels.npz")
    config = configs.load(workdir / "config.json")
    predict.predict(config, str(workdir), str(tmp_path / "out"), images=str(tmp_path / "images"), overlay=False)
    for i, (image, labels) in enumerate(zip(images, loaded["batch"], strict=True)):
        height, width = image.shape[:2]
        wanted = np.asarray(Image.open(tmp_path / "out" / "labels" / f"{i:02d}.png"))
        np.testing.assert_array_equal(labels[:height, :width], wanted)
        assert (labels[height:] == 255).all() and (labels[:, width:] == 255).all()
    np.testing.assert_array_equal(loaded["photo"], loaded["batch"][5][tuple(map(slice, images[5].shape[:2]))])
    assert len(np.unique(loaded["batch"])) > 3
    # The CRF has a say in them.
    config.crf.num_iterations = 0
    predictor = inference.Predictor(config, *restore.restore_params(config, str(workdir))[:2])
    assert (next(predictor([(None, images[0])]))[2].labels() != loaded["batch"][0]).mean() > 0.05


@pytest.mark.full
def test_refinement_convolutions_and_sizes_beyond_the_frame_of_evaluation():
    """The distances of relations stay those of the frame, as `Predictor` has it, which sees this image in one tile."""
    convs = {"model.refinement_convs.layers": ("conv2", "conv3"), "model.refinement_convs.width": 4}
    config, size = small(**convs, **{"crf.relations": ("above_below",), "crf.weights": (0.7,)}), (192, 160)
    model, params = configs.build_model(config), random_params(config)
    image = scene(np.random.default_rng(2), *size)
    exported = export.lower(export.make_predictor(config, model, params, size), size)
    labels = np.asarray(jax.jit(exported.call)(image[None], np.array([size], np.int32)))[0]
    wanted = next(inference.Predictor(config, model, params)([(None, image)]))[2].labels()
    np.testing.assert_array_equal(labels, wanted)


BACKBONE = {"model.scales": (1.0, 0.5), "model.block6": ((3, 4),), "model.pyramid_windows": (3,)}


@pytest.mark.parametrize(
    "keys",
    [
        full_row(
            {"model.backbone": "vgg16", "model.parameterisation": "free", "crf.algorithm": "factored", **BACKBONE}
        ),
        full_row(
            {
                "model.backbone": "mobilenet_v2",
                "model.mobilenet_v2.depthwise": "grouped",
                "model.refinement_convs.layers": ("block_3_expand", "block_6_expand"),
                "crf.algorithm": "table",
                **BACKBONE,
            }
        ),
        full_row({"model.backbone": "mobilenet_v2", "model.dtype": "bfloat16", **BACKBONE}),
        {"model.relations": ()},
    ],
)
def test_every_model_lowers_for_every_platform(keys):
    config = small(**keys)
    model = configs.build_model(config)
    params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), restore.abstract_params(model))
    exported = export.lower(export.make_predictor(config, model, params, SIZE), SIZE)
    assert exported.platforms == ("cpu", "cuda", "tpu")
    assert not exported.disabled_safety_checks
    assert str(exported.in_avals[0].shape) == "(b, 96, 128, 3)" and exported.out_avals[0].dtype == np.uint8
    again = jax_export.deserialize(exported.serialize())
    assert str(again.in_avals) == str(exported.in_avals) and again.platforms == exported.platforms


def test_what_cannot_be_exported_is_refused(workdir, tmp_path, monkeypatch):
    config = configs.load(workdir / "config.json")
    write = lambda file="p", **options: export.export_predictor(config, str(workdir), str(tmp_path / file), **options)
    for size in ("640", "0x64", "64x99999", "axb", "64x64x3"):
        with pytest.raises(configs.ConfigError, match=f"--size={size} must be HEIGHTxWIDTH"):
            write(size=size)
    with pytest.raises(DataError, match="there is no folder .*gone; make it"):
        write("gone/p")
    (tmp_path / "p.json").write_text("mine")
    with pytest.raises(DataError, match="p.json is there already; name another file, or add --overwrite"):
        write()
    assert (tmp_path / "p.json").read_text() == "mine" and not (tmp_path / "p").exists()
    assert write(overwrite=True, size="64x80")["size"] == [64, 80]
    assert sorted(os.listdir(tmp_path)) == ["p", "p.json"]
    before = {name: (tmp_path / name).read_bytes() for name in ("p", "p.json")}
    resource.setrlimit(resource.RLIMIT_FSIZE, (9000, resource.RLIM_INFINITY))  # room for one of the two
    try:
        with pytest.raises(files.FileError, match=r"/p cannot be written \(File too large\)"):
            write(overwrite=True, size="32x32")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == before
    with monkeypatch.context() as m:
        m.setitem(sys.modules, "flatbuffers", None)
        with pytest.raises(configs.ConfigError, match=r"pip install .pwcrf_jax\[export\]."):
            write("q")
    config.tta.flip = True
    with pytest.raises(configs.ConfigError, match="config.tta is not part of an exported predictor"):
        write("q")


@pytest.mark.parametrize(
    ("args", "match"),
    [
        (["--output=p", "--overwrite", "--refine=full"], "--refine is of pwcrf eval, predict, tune: see"),
        full_row((["--size=64x64"], "--output must be given")),
    ],
)
def test_flags_that_do_not_go_together(workdir, args, match):
    done = commands.run(["-m", "pwcrf_jax", "export", "--workdir", workdir, *args])
    assert done.returncode == 2 and match in done.stderr and "Traceback" not in done.stderr
