"""The predictor as an ONNX file: labels and marginals of evaluation, in onnxruntime; each rule of the conversion."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from jax import lax
from PIL import Image

from pwcrf_jax import config as configs
from pwcrf_jax.configs import demo
from pwcrf_jax.data.readers.image_io import MEAN_COLOUR
from pwcrf_jax.evaluation import evaluate, evaluators
from pwcrf_jax.prediction import onnx_convert, onnx_export, predictor, restore
from pwcrf_jax.prediction.onnx_rules import NoRule
from pwcrf_jax.runtime import checkpoint

SIZE = (64, 80)
ROWS = {
    "demo, scores stored": {"crf.algorithm": "table"},
    "mobilenet_v2, scores never formed, refinement convolutions": {
        "model.backbone": "mobilenet_v2",
        "model.mobilenet_v2.depthwise": "grouped",  # which compiles faster
        "model.refinement_convs.layers": ("block_3_expand",),
        "model.refinement_convs.width": 4,
        "crf.algorithm": "factored",
    },
}


@pytest.fixture(scope="module")
def runtime():
    pytest.importorskip("onnx", reason='onnx is not installed: pip install "pwcrf_jax[onnx]"')
    return pytest.importorskip("onnxruntime", reason='onnxruntime is not installed: pip install "pwcrf_jax[onnx]"')


def tiny(**keys):
    config = demo.get_config()
    config.model.tiny.features, config.model.hidden = (4, 4, 8, 8), 8
    config.data.eval_size = config.data.crop_size = SIZE
    config.model.input_scaling = "tf"
    config.update_from_flattened_dict({"crf.weights": (2.0,), **keys})
    return config


def random_params(model, seed=0):
    """Of which every layer has a say, and none too much."""
    rng = np.random.default_rng(seed)
    spread = lambda shape: 1.5 / np.sqrt(np.prod(shape[:-1])) if len(shape) > 1 else 0.1
    draw = lambda x: (spread(x.shape) * rng.normal(size=x.shape)).astype(np.float32)
    return jax.tree.map(draw, restore.abstract_params(model))


def scene(rng, height, width):
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3)).astype(np.uint8))
    return np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))


def framed(images):
    """The batch that evaluation sees."""
    frames = np.full((len(images), *SIZE, 3), MEAN_COLOUR, np.uint8)
    for frame, image in zip(frames, images, strict=True):
        frame[: image.shape[0], : image.shape[1]] = image
    boxes = np.array([(0, 0, *image.shape[:2]) for image in images], np.int32)
    return {"image": frames, "label": np.zeros(frames.shape[:3], np.uint8), "valid_box": boxes}


def twenty(rng):
    heights, widths = rng.integers(9, SIZE[0] + 1, 17), rng.integers(9, SIZE[1] + 1, 17)
    return [scene(rng, *map(int, x)) for x in (SIZE, (SIZE[0], 5), (1, SIZE[1]), *zip(heights, widths, strict=True))]


@pytest.mark.full
@pytest.mark.parametrize("keys", ROWS.values(), ids=ROWS)
def test_the_file_gives_labels_and_marginals_of_evaluation(keys, runtime):
    """On 20 images of many sizes, four at a time; labels but for ties to within rounding."""
    config = tiny(**keys)
    model, row, batch = configs.build_model(config), configs.final_row(config), framed(twenty(np.random.default_rng(1)))
    params = random_params(model)
    grouped = configs.build_model(configs.portable(config))
    proto = onnx_export.convert(onnx_export.make_predictor(config, grouped, params, SIZE), SIZE, batch=4)
    session = runtime.InferenceSession(proto.SerializeToString(), onnx_export._quiet(runtime))
    sizes = batch["valid_box"][:, 2:]
    parts = [
        session.run(["labels", "probabilities"], {"images": batch["image"][i : i + 4], "valid_size": sizes[i : i + 4]})
        for i in range(0, 20, 4)
    ]
    labels, probabilities = (np.concatenate(x) for x in zip(*parts, strict=True))
    with small.compiled_quickly():
        step = evaluate.make_eval_fn(config, model, devices=jax.devices()[:1], keep=("unary", row))
        seen = evaluators.Seen(0, batch, step(params, evaluate.inputs_of(batch, 1))[1], {}, {}, {})
        alone = seen.labels("unary")
        marginals = [predictor.Marginals.of_frame(x, box, SIZE) for x, box in zip(
            seen.log_marginals(row), batch["valid_box"], strict=True)]  # fmt: skip
        wanted = [(seen.labels(row)[i], np.exp(x.log_probs())) for i, x in enumerate(marginals)]
    different = total = 0
    for got, probs, (want, marginal), (h, w) in zip(labels, probabilities, wanted, sizes, strict=True):
        np.testing.assert_allclose(probs[:h, :w], marginal, atol=1e-4)
        assert not probs[h:].any() and not probs[:, w:].any() and (got[h:] == 255).all() and (got[:, w:] == 255).all()
        best = np.sort(marginal, -1)
        clear = best[..., -1] - best[..., -2] > 1e-4
        np.testing.assert_array_equal(got[:h, :w][clear], want[:h, :w][clear])
        different, total = different + (got[:h, :w] != want[:h, :w]).sum(), total + h * w
    assert different <= 1e-3 * total and len(np.unique(labels)) > 3
    assert np.mean([(x != y).mean() for x, y in zip(alone, seen.labels(row), strict=True)]) > 0.02, "the CRF has a say"


LOADER = """
import json, sys
sys.modules["jax"] = sys.modules["pwcrf_jax"] = None  # to import them fails
scope = {}
exec("\\n".join(json.load(open("p.onnx.json"))["load"]), scope)
session = scope["session"]
frames = scope["frames"]
frames[0] = scope["np"].resize(scope["image"], frames.shape[1:])
whole = session.run(["labels"], {"images": frames})[0]  # valid_size has a default
scope["np"].savez("got.npz", labels=scope["labels"], probabilities=scope["probabilities"], whole=whole)
print(json.dumps(session.get_modelmeta().custom_metadata_map))
"""


@pytest.mark.full
def test_a_file_of_a_workdir_says_what_it_is_and_runs_without_jax(runtime, tmp_path, caplog):
    config, folder = tiny(), tmp_path / "work"
    model = configs.build_model(config)
    params = random_params(model)
    with checkpoint.Store(str(folder / "best"), configs.identity(config), 1) as store:
        store.save(7, {"params": params}, {})
        store.wait()
    configs.save(config, folder / "config.json")
    configs.save_classes([f"class {i}" for i in range(6)], [(40 * i, 0, 255) for i in range(6)], str(folder))
    with small.compiled_quickly(), caplog.at_level("INFO", logger="pwcrf_jax"):
        about = onnx_export.export_onnx(config, str(folder), str(tmp_path / "p.onnx"), batch=2)
    assert json.loads(json.dumps(about)) == json.loads((tmp_path / "p.onnx.json").read_text())
    assert about["bytes"] == (tmp_path / "p.onnx").stat().st_size
    assert about["checked"]["largest_difference"] < 1e-4 and about["checked"]["labels_differ"] < 1e-3

    Image.fromarray(scene(np.random.default_rng(3), 50, 70)).save(tmp_path / "photo.png")
    (tmp_path / "load.py").write_text(LOADER)
    done = subprocess.run([sys.executable, "-I", "load.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told, got = json.loads(done.stdout), np.load(tmp_path / "got.npz")
    assert json.loads(told["classes"])[2] == {"name": "class 2", "colour": [80, 0, 255]}
    assert json.loads(told["size"]) == list(SIZE) and told["step"] == "7" and told["batch"] == "2"
    assert json.loads(told["message_weights"]) == {"surrounding": 2.0, "above_below": 2.0}
    assert got["labels"].shape == (50, 70) and got["labels"].dtype == np.uint8
    assert got["probabilities"].shape == (2, *SIZE, 6)
    np.testing.assert_allclose(got["probabilities"][0, :50, :70].sum(-1), 1, atol=1e-5)
    assert got["whole"].max() < 6, "no pixel beside the image"

    # Another file than that of the function is found out, and an environment without onnxruntime says so.
    other = onnx_export.make_predictor(config, model, random_params(model, seed=5), SIZE)
    with small.compiled_quickly(), pytest.raises(configs.ConfigError, match="computes something else from the file"):
        onnx_export.compare((tmp_path / "p.onnx").read_bytes(), other, SIZE, 2)
    with pytest.MonkeyPatch.context() as m:
        m.setitem(sys.modules, "onnxruntime", None)
        assert onnx_export.compare(b"", other, SIZE, 2) is None


X, Y = np.linspace(-2, 2.5, 24, dtype=np.float32).reshape(2, 3, 4), np.arange(24, dtype=np.int32).reshape(2, 3, 4) - 9
I = np.array([2, 0], np.int32)  # noqa: E741


def _counted(x, i):
    """Adds rows of x, chosen by number, to an array, in loops within loops; and stacks what it had."""

    def inner(carry, j):
        return carry.at[j % 2, i[0]].add(x[1, j], mode="promise_in_bounds"), carry[0, 0]

    def outer(carry, row):
        carry, seen = lax.scan(inner, carry + row[0], jnp.arange(3))
        return carry, (seen, row.sum())

    return lax.scan(outer, jnp.zeros((2, 3, 4)), x, length=2)


RULED = {
    "elementwise": lambda x, y, i: (
        -x, jnp.abs(x), jnp.sign(y), jnp.exp(x), jnp.sqrt(jnp.abs(x)), lax.rsqrt(jnp.abs(x) + 1), lax.erf(x),
        lax.erfc(x), jnp.tanh(x), jax.nn.sigmoid(x), jnp.log1p(jnp.abs(x)), lax.integer_pow(x, 3), jnp.square(x),
        jnp.floor(x), jnp.ceil(x), lax.pow(jnp.abs(x), jnp.float32(1.5)), jax.nn.gelu(x, approximate=False),
    ),
    "whole numbers": lambda x, y, i: (y // 4, y % 4, lax.rem(y, jnp.full_like(y, 4)), lax.div(y, jnp.full_like(y, 4)),
                                      y.astype(jnp.float32), (x * 3).astype(jnp.int32), y.astype(bool)),
    "truths": lambda x, y, i: (x < 1, x <= x[0, 0, 3], x > 1, x >= 0, y == 3, y != 3, (x > 0) & (y > 3),
                               (x > 0) | (y > 3), (x > 0) ^ (y > 3), ~(x > 0), jnp.isfinite(jnp.log(x)),
                               jnp.where(x > 0, y > 5, y < 2),
                               (x > 0).any(-1), (x > 0).all((0, 2))),
    "minus infinity": lambda x, y, i: (jnp.where(x > 0, x, -jnp.inf).max(-1), jax.nn.log_softmax(
        jnp.where(x > 0, x, -jnp.inf), axis=0)[:, :, 2:], jnp.clip(x, -1, 1), jnp.maximum(x, y), jnp.minimum(y, 3)),
    "layout": lambda x, y, i: (x.reshape(6, 4), x.transpose(2, 0, 1), x[:, ::2, 1:3], x[::-1, :, ::-1], x[None, :, 1],
                               jnp.concatenate([x, x + 1], 1), jnp.stack([x, 2 * x], -1), jnp.split(x, 2, axis=2)[1],
                               jnp.broadcast_to(x[:, :1], (2, 3, 4)),
                               lax.pad(x, 7.0, ((1, 0, 0), (-1, 2, 0), (0, -2, 0)))),
    "sums": lambda x, y, i: (x.sum((0, 2)), x.prod(-1), x.min(1), y.sum(), x.mean(), jnp.argmax(jnp.floor(x), -1),
                             jnp.argmin(x % 1, 1), jnp.argmax(jnp.zeros_like(x) + y * 0, 0)),
    "products": lambda x, y, i: (jnp.einsum("abc,adc->abd", x, x), jnp.einsum("abc,dbc->ad", x, x),
                                 jnp.einsum("abc,ca->cb", x, x[:, 0].T), x[0] @ x[1].T),
    "reading at indices": lambda x, y, i: (
        jnp.take(x, i, axis=1, mode="clip"), jnp.take(x, jnp.array([[1, 0], [0, 2]]), axis=1), x[:, i[0]], x[1, i],
        lax.dynamic_slice(x, (i[1], i[0], 1), (1, 2, 2)), x[:, jnp.array([0, 2]), jnp.array([3, 1])],
        lax.gather(x, jnp.stack([i // 2, i], -1), lax.GatherDimensionNumbers((1,), (0, 1), (0, 1)), (1, 1, 4)),
        lax.gather(x, i[:, None], lax.GatherDimensionNumbers((0, 2), (0,), (1,)), (1, 2, 3), mode="clip"),
    ),
    "writing at indices": lambda x, y, i: (
        lax.dynamic_update_slice(x, x[:1, :2] * 9, (i[1], i[0], 0)), lax.dynamic_update_slice(x, x + 1, (0, 0, 0)),
        x.at[jnp.array([1, 0, 1]), jnp.array([2, 0, 2])].add(x[0]), x.at[:, 1].set(5.0),
    ),
    "loops": lambda x, y, i: _counted(x, i),
    "convolutions": lambda x, y, i: (
        lax.conv_general_dilated(x[..., None], jnp.arange(8.0).reshape(2, 2, 1, 2), (1, 2), ((1, 0), (0, 1)),
                                 rhs_dilation=(1, 2), dimension_numbers=("NHWC", "HWIO", "NHWC")),
        lax.conv_general_dilated(x[:, None], jnp.arange(16.0).reshape(1, 2, 1, 8), (1, 1), "SAME",
                                 dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=4),
    ),
}  # fmt: skip


@pytest.mark.full
@pytest.mark.parametrize("name", RULED)
def test_each_operation_computes_what_jax_computes(name, runtime):
    import onnx

    function = lambda x, y, i: {f"{n:02d}": out for n, out in enumerate(jax.tree.leaves(RULED[name](x, y, i)))}
    arguments = {"x": X, "y": Y, "i": I}
    proto = onnx_convert.convert(function, {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in arguments.items()})
    onnx.checker.check_model(proto, full_check=True)
    session = runtime.InferenceSession(proto.SerializeToString(), onnx_export._quiet(runtime))
    used = {x.name for x in session.get_inputs()}
    got = session.run(None, {k: v for k, v in arguments.items() if k in used})
    with small.compiled_quickly():
        wanted = jax.device_get(jax.jit(function)(*arguments.values()))
    for number, want in wanted.items():
        out = got[int(number)]
        assert out.dtype == want.dtype and out.shape == want.shape, number
        np.testing.assert_allclose(out, want, rtol=2e-6, atol=2e-6, err_msg=number)


def test_what_cannot_be_onnx_is_refused(tmp_path, monkeypatch):
    config = tiny()
    write = lambda **options: onnx_export.export_onnx(config, "nowhere", str(tmp_path / "p.onnx"), **options)
    with pytest.raises(configs.ConfigError, match="--batch=0 must be 1 to 1024"):
        write(batch=0)
    config.model.dtype = "bfloat16"
    with pytest.raises(configs.ConfigError, match="add --config.model.dtype=float32"):
        write()
    config.model.dtype = "float32"
    with monkeypatch.context() as m:
        m.setitem(sys.modules, "onnx", None)
        with pytest.raises(configs.ConfigError, match=r"pip install .pwcrf_jax\[onnx\]."):
            write()
    with pytest.raises(configs.ConfigError, match="an operation without a form in ONNX here, cumsum; use"):
        onnx_export.convert(lambda images, size: {"x": jnp.cumsum(size, axis=0)}, SIZE)
    far = lambda x, i: {"x": x.at[i].get(mode="fill")}
    arguments = {"x": jax.ShapeDtypeStruct((3,), np.float32), "i": jax.ShapeDtypeStruct((), np.int32)}
    with pytest.raises(NoRule, match="indices that may lie outside"):
        onnx_convert.convert(far, arguments)
