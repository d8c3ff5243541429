"""docs/behind-other-networks.md, run as it stands with stand-ins for the libraries, and its files read back.

The stand-ins give what the libraries do: mmsegmentation's `SegDataSample.seg_logits.data`, logits of transformers'
SegFormer, of `predict` of segmentation_models_pytorch, and the files of nnU-Net's `--save_probabilities`.
"""

import contextlib
import re
import sys
import types

import numpy as np
import pytest
from PIL import Image
from test_docs_readme import ROOT, blocks

from pwcrf_jax.data import scores
from pwcrf_jax.pydensecrf import densecrf, eigen, utils

SIZES = {"a": (40, 64), "b": (33, 50)}
K = 5
PAGE = (ROOT / "docs/behind-other-networks.md").read_text()


class Tensor:
    """What the page asks of a tensor, on NumPy."""

    def __init__(self, array):
        self.array = array

    def __getitem__(self, index):
        return Tensor(self.array[index])

    def float(self):
        return Tensor(self.array.astype(np.float32))

    def cpu(self):
        return self

    def numpy(self):
        return self.array


def section(title):
    """The python blocks before the first heading, and those of one section, as one program."""
    parts = re.split(r"^## (.*)$", PAGE, flags=re.MULTILINE)
    own = dict(zip(parts[1::2], parts[2::2], strict=True))[title]
    return "\n".join(blocks(parts[0], "python") + blocks(own, "python"))


def run(title, monkeypatch, folder, **modules):
    """Runs a section in a folder of images, with modules for those that it imports."""
    (folder / "mine/images").mkdir(parents=True)
    for name, (height, width) in SIZES.items():
        Image.fromarray(np.zeros((height, width, 3), np.uint8)).save(folder / f"mine/images/{name}.jpg")
    for name, content in modules.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name.replace("__", "."), module)
    monkeypatch.chdir(folder)
    exec(compile(section(title), "behind-other-networks.md", "exec"), {})


def logits(name, *shape, dtype=np.float32):
    return np.random.default_rng(ord(name[0])).normal(0, 3, shape).astype(dtype)


def log_softmax(x):
    x = x.astype(np.float64)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def read_all(folder, kind, suffix=""):
    """{name: log-probabilities}, as `pwcrf crf` finds the form of all and reads each."""
    files = scores.find(folder)
    sizes = {f"{name}{suffix}": size for name, size in SIZES.items()}
    assert set(files) == set(sizes)
    form = scores.form(files, sizes)
    assert form == ("chw", K)
    found = {}
    for name, path in files.items():
        assert scores.kind_of(scores.read_values(path, form.layout), path) == kind
        found[name.removesuffix(suffix)] = scores.read(path, form.layout)
    return found


def same(got, expected, atol=1e-4):
    np.testing.assert_allclose(got, log_softmax(np.moveaxis(expected, 0, -1)), atol=atol)


def test_mmsegmentation(tmp_path, monkeypatch):
    def inference_model(model, image):
        name = image.rpartition("/")[2][0]
        data = Tensor(logits(name, K, *SIZES[name]))
        return types.SimpleNamespace(seg_logits=types.SimpleNamespace(data=data))

    apis = dict(inference_model=inference_model, init_model=lambda *files: None)
    run("mmsegmentation", monkeypatch, tmp_path, mmseg={}, mmseg__apis=apis)
    for name, found in read_all(tmp_path / "scores", "logits").items():
        same(found, logits(name, K, *SIZES[name]))


def test_labels_of_mmsegmentation(tmp_path):
    labels = np.random.default_rng(0).integers(0, K, SIZES["a"]).astype(np.uint8)
    Image.fromarray(labels).save(tmp_path / "a.png")
    found = scores.read(scores.find(tmp_path)["a"], num_classes=K, confidence=0.7)
    np.testing.assert_array_equal(found.argmax(-1), labels)
    np.testing.assert_allclose(np.exp(found).max(-1), 0.7, rtol=1e-5)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_hugging_face(tmp_path, monkeypatch, dtype):
    def processor(images, return_tensors):
        return {"pixel_values": next(name for name, size in SIZES.items() if size[::-1] == images.size)}

    # The processor makes each image 128 x 128; the map has a quarter of that.
    model = lambda pixel_values: types.SimpleNamespace(logits=Tensor(logits(pixel_values, 1, K, 32, 32, dtype=dtype)))
    loaded = lambda what: types.SimpleNamespace(from_pretrained=lambda name: what)
    auto = dict(AutoImageProcessor=loaded(processor), AutoModelForSemanticSegmentation=loaded(model))
    run("Hugging Face", monkeypatch, tmp_path, torch=dict(no_grad=contextlib.nullcontext), transformers=auto)
    for name, found in read_all(tmp_path / "scores", "logits").items():
        same(found, logits(name, 1, K, 32, 32, dtype=dtype)[0])


def test_half_precision_as_it_is_and_a_long_image(tmp_path):
    given = logits("a", 1, K, 32, 32, dtype=np.float16)
    np.save(tmp_path / "a.npy", given)
    same(scores.read(tmp_path / "a.npy", size=(128, 200)), given[0])
    with pytest.raises(scores.ScoresError, match="--layout chw"):
        scores.read(tmp_path / "a.npy", size=(128, 400))
    same(scores.read(tmp_path / "a.npy", "chw", size=(128, 400)), given[0])


def test_segmentation_models(tmp_path, monkeypatch):
    names = iter(SIZES)

    def predict(x):
        assert x.array.dtype == np.float32 and x.array.shape == (1, 3, 64, 64)  # which 32 divides
        return Tensor(logits(next(names), 1, K, 64, 64))

    smp = dict(Unet=lambda encoder, classes: types.SimpleNamespace(predict=predict))
    run(
        "segmentation_models_pytorch", monkeypatch, tmp_path, torch=dict(from_numpy=Tensor),
        segmentation_models_pytorch=smp,
    )  # fmt: skip
    for name, found in read_all(tmp_path / "scores", "logits").items():
        height, width = SIZES[name]
        same(found, logits(name, 1, K, 64, 64)[0, :, :height, :width])


def test_one_class_of_a_sigmoid_is_two_of_a_softmax(tmp_path):
    (way,) = re.findall(r"`(np\.concatenate\([^`]*)`", PAGE)
    one = logits("a", 1, 1, *SIZES["a"])
    np.save(tmp_path / "a.npy", eval(way, {"np": np, "logits": one}))
    found = scores.read(tmp_path / "a.npy", size=SIZES["a"])
    np.testing.assert_allclose(np.exp(found[..., 1]), 1 / (1 + np.exp(-one[0, 0])), atol=1e-5)
    np.save(tmp_path / "a.npy", one)
    with pytest.raises(scores.ScoresError):
        scores.read(tmp_path / "a.npy", size=SIZES["a"])


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_nnunet(tmp_path, monkeypatch, dtype):
    expected = {}
    (tmp_path / "predicted").mkdir()
    for name, size in SIZES.items():
        p = np.exp(log_softmax(np.moveaxis(logits(name, K, 1, *size), 0, -1)))
        expected[name] = p[0]
        probabilities = np.moveaxis(p, -1, 0).astype(dtype)  # [classes, 1, H, W]
        np.savez_compressed(tmp_path / f"predicted/{name}.npz", probabilities=probabilities)
        Image.fromarray(p[0].argmax(-1).astype(np.uint8)).save(tmp_path / f"predicted/{name}.png")
    (tmp_path / "predicted/dataset.json").write_text("{}")
    with pytest.raises(scores.ScoresError, match="two scores for one image"):
        scores.find(tmp_path / "predicted")
    run("nnU-Net", monkeypatch, tmp_path)
    for name, found in read_all(tmp_path / "scores", "probabilities", "_0000").items():
        np.testing.assert_allclose(np.exp(found), expected[name], atol=2e-3 if dtype == np.float16 else 1e-5)


# --- docs/from-pydensecrf.md ---------------------------------------------------------------------------


def test_the_table_has_every_call_of_pydensecrf():
    text = (ROOT / "docs/from-pydensecrf.md").read_text()
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    table = " ".join(rows)
    public = lambda where: {n for n, x in vars(where).items() if not n.startswith("_") and callable(x)}
    own = lambda module: {n for n in public(module) if getattr(module, n).__module__ == module.__name__}
    names = own(densecrf) | own(utils) | own(eigen)
    names |= public(densecrf.DenseCRF) | public(densecrf.DenseCRF2D)
    names |= {n for n in vars(densecrf) if n.isupper() and not n.startswith("_")}
    known = {"Unary", "NormalizationType", "KernelType", "MatrixXf", "VectorXf"}  # of what calls take and return
    assert {"addPairwiseBilateral", "klDivergence", "NORMALIZE_AFTER", "create_pairwise_gaussian"} <= names
    assert not {n for n in names - known if not re.search(rf"\b{n}\b", table)}
