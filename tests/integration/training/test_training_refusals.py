"""Bad input is refused before training, with a message that names the file or key and the remedy."""

import pathlib
import shutil

import commands
import jax
import numpy as np
import pytest
from PIL import Image
from rows import full_row

from pwcrf_jax import config as configs
from pwcrf_jax.configs import camvid_mobilenet_v2
from pwcrf_jax.data import DataError
from pwcrf_jax.evaluation import evaluate
from pwcrf_jax.nets import WeightsError
from pwcrf_jax.runtime import checkpoint
from pwcrf_jax.training import guard, loop, steps

ROOT = pathlib.Path(__file__).parents[3]


@pytest.fixture
def camvid(tmp_path):
    """A CamVid folder of four images, as a config that trains on it."""
    source = tmp_path / "camvid"
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        (source / split).mkdir(parents=True)
        (source / f"{split}annot").mkdir()
        for i in range(2):
            Image.fromarray(rng.integers(0, 256, (32, 48, 3)).astype(np.uint8)).save(source / split / f"{i}.png")
            Image.fromarray(rng.integers(0, 12, (32, 48)).astype(np.uint8)).save(source / f"{split}annot" / f"{i}.png")
        lines = [f"{split}/{i}.png {split}annot/{i}.png" for i in range(2)]
        (source / f"{split}.txt").write_text("\n".join(lines) + "\n")
    config = camvid_mobilenet_v2.get_config()
    config.data.source_dir, config.data.data_dir = str(source), str(tmp_path / "prepared")
    config.data.partial = True
    config.data.crop_size = config.data.eval_size = (32, 48)
    config.model.backbone, config.model.hidden, config.model.scales, config.model.block6 = "tiny", 4, (1.0,), ()
    config.train.batch_size = config.eval.batch_size = jax.device_count()
    config.train.steps = 1
    return source, config


def _refused(config, tmp_path, error, match, monkeypatch):
    # Before training: no step may be built, let alone run.
    monkeypatch.setattr(steps, "make_train_step", lambda *_, **__: pytest.fail("training was started"))
    with pytest.raises(error, match=match):
        loop.train_and_evaluate(config, str(tmp_path / "work"))


def test_the_folder_itself_is_fine(camvid, tmp_path):
    loop.train_and_evaluate(camvid[1], str(tmp_path / "work"))


def _missing_image(source):
    (source / "train" / "1.png").unlink()


def _unreadable_image(source):
    (source / "train" / "1.png").write_bytes(b"not a picture")


def _mask_of_another_size(source):
    Image.fromarray(np.zeros((16, 48), np.uint8)).save(source / "trainannot" / "1.png")


def _label_out_of_range(source):
    Image.fromarray(np.full((32, 48), 77, np.uint8)).save(source / "valannot" / "1.png")


def _empty_split(source):
    (source / "val.txt").write_text("")
    shutil.rmtree(source / "val")
    (source / "val").mkdir()


@pytest.mark.parametrize(
    "spoil, match",
    [
        (_missing_image, r"1\.png"),
        (_unreadable_image, r"1\.png"),
        (_mask_of_another_size, r"1\.png.*16|1\.png.*48"),
        (_label_out_of_range, r"valannot.*1\.png.*77"),
        (_empty_split, r"val"),
    ],
)
def test_spoiled_data(camvid, tmp_path, monkeypatch, spoil, match):
    source, config = camvid
    spoil(source)
    _refused(config, tmp_path, DataError, match, monkeypatch)


def test_wrong_number_of_classes(camvid, tmp_path, monkeypatch):
    config = camvid[1]
    config.data.num_classes = 12
    _refused(config, tmp_path, configs.ConfigError, r"data\.num_classes = 12.*num_classes=11", monkeypatch)
    assert not pathlib.Path(config.data.data_dir).exists()  # where the classes are known, nothing is prepared first


@pytest.mark.parametrize(
    ("classes", "match"),
    [(("Sky", "Rode"), r"eval\.classes = 'Rode'.*did you mean 'Road'"), (("Sky", "Sky"), "names a class twice")],
    ids=["unknown", "twice"],
)
def test_scored_classes(camvid, tmp_path, monkeypatch, classes, match):
    config = camvid[1]
    config.eval.classes = classes
    _refused(config, tmp_path, configs.ConfigError, match, monkeypatch)


def test_image_larger_than_eval_size(camvid, tmp_path, monkeypatch):
    config = camvid[1]
    config.data.eval_size = (32, 32)
    _refused(config, tmp_path, DataError, r"32x48.*data\.eval_size", monkeypatch)


def test_batch_size_that_devices_do_not_divide(config, tmp_path, monkeypatch):
    config.train.batch_size = 12
    _refused(config, tmp_path, configs.ConfigError, r"train\.batch_size = 12.*8 devices.*16", monkeypatch)


@pytest.mark.parametrize(
    "key, value, match",
    [
        ("model.hidden", 16, r"model\.hidden is 8 in the checkpoint and 16"),
        ("model.relations", ("surrounding",), r"model\.relations is \['surrounding', 'above_below'\]"),
        ("model.parameterisation", "free", r"parameterisation is 'residual'"),
        ("model.input_scaling", "caffe", r"model\.input_scaling is 'tf'"),
        ("relations.surrounding.rows", (-0.4, 0.4), r"relations\.surrounding\.rows"),
        ("optimizer.name", "sgd", r"opt_state"),
    ],
)
def test_checkpoint_of_another_model(config, trained, tmp_path, monkeypatch, key, value, match):
    shutil.copytree(trained, tmp_path / "work")
    before = (tmp_path / "work" / "config.json").read_text()
    config.update_from_flattened_dict({key: value})
    config.train.steps = 2
    _refused(config, tmp_path, checkpoint.CheckpointError, rf"another model.*({match}).*--workdir", monkeypatch)
    assert (tmp_path / "work" / "config.json").read_text() == before, "the refused config replaced the run's own"


def test_checkpoint_of_another_model_in_evaluation(config, trained):
    config.model.hidden = 16
    with pytest.raises(checkpoint.CheckpointError, match=r"model\.hidden is 8"):
        evaluate.evaluate(config, str(trained))


def test_no_checkpoint(config, tmp_path):
    with pytest.raises(checkpoint.CheckpointError, match="no checkpoint in.*train first"):
        evaluate.evaluate(config, str(tmp_path))


def test_missing_weights(config, tmp_path, monkeypatch):
    config.init_from = str(tmp_path / "gone.h5")
    config.model.backbone = "mobilenet_v2"
    _refused(config, tmp_path, WeightsError, r"gone\.h5", monkeypatch)


def test_unknown_split(config, tmp_path, monkeypatch):
    config.data.eval_split = "vall"
    _refused(config, tmp_path, DataError, r"vall.*val", monkeypatch)


@pytest.mark.parametrize(
    "key, value, match",
    [
        ("data.name", "camvd", "camvid"),
        ("model.backbone", "vgg61", "vgg16"),
        ("model.parameterisation", "residul", "residual"),
        ("model.pairwise_features", "owned", "own"),
        ("model.relations", ("surounding",), "surrounding"),
        ("model.scales", (), "scales"),
        ("model.scales", (1.0, -1.0), "scales.*at least 0.01"),
        ("model.block6", ((2, 8),), "odd"),
        ("model.mobilenet_v2.output", "block_99", "block_99"),
        ("crf.relations", ("left",), "crf.relations"),
        ("crf.weights", (1.0, 1.0, 1.0), "crf.weights"),
        ("crf.unary_temperature", 0.0, "unary_temperature.*above 0"),
        ("crf.label_weights", (((1.0,), (1.0,)),) * 2, r"label_weights, of sizes .* two tuples of 6 numbers"),
        ("crf.label_weights", (((1.0,) * 6, (1.0,) * 6),), r"label_weights, .*, must be"),
        ("loss.evidence_temperature", (4.0, 1.0), "evidence_temperature.*lower one first"),
        ("crf.damping", 1.0, "damping"),
        ("crf.algorithm", "tabel", "crf.algorithm = 'tabel'.*did you mean 'table'"),
        ("loss.sampled_offsets", -1, "loss.sampled_offsets.*integer from 0"),
        ("optimizer.learning_rate", float("nan"), "learning_rate.*finite"),
        ("optimizer.learning_rate", 0.0, "learning_rate.*above 0"),
        ("train.batch_size", 0, "batch_size.*integer from 1"),
        ("train.steps", -1, "steps.*integer from 0"),
        ("data.scale_range", (1.2, 0.7), "scale_range"),
        ("data.num_classes", 256, "num_classes.*to 255"),
        ("relations.surrounding.unit", "pixels", "surrounding.*unit"),
        ("relations.surrounding.rows", (0.51, 0.52), "surrounding.*no edge"),
        ("crf.relations", ("surrounding", "surrounding"), "twice"),
        ("crf.weights", ("a", "b"), "crf.weights.*'a'.*number"),
        ("crf.weights", (True,), "crf.weights.*number"),
        ("data.crop_size", (192.5, 256), "crop_size.*integer"),
        ("data.crop_size", ("a", "b"), "crop_size.*integer"),
        ("data.eval_size", (192, 256, 3), "eval_size.*2 values"),
        ("data.synthetic.image_size", (1, 2, 3), "image_size.*2 values"),
        ("model.block6", ((3, 64.5),), "block6.*integer"),
        ("model.tiny.features", (1.5, 4, 4, 4), "features.*integer"),
        ("loss.unary_share", 1.0, "unary_share.*below 1"),
        ("seed", 10**23, "seed.*to 4294967295"),
        ("relations.surrounding.parameterisation", "fre", "free"),
    ],
)
def test_config_values(config, key, value, match):
    if key.startswith("model.mobilenet_v2"):
        config.model.backbone = "mobilenet_v2"
    config.update_from_flattened_dict({key: value})
    with pytest.raises(configs.ConfigError, match=match):
        configs.validate(config)


@pytest.mark.parametrize("name", ["unary", "all", "a/b"])
def test_relation_names(config, name):
    config.relations[name] = config.relations.surrounding.copy_and_resolve_references()
    config.model.relations = (name,)
    with pytest.raises(configs.ConfigError, match="another name"):
        configs.validate(config)


def test_missing_and_unknown_keys(config):
    del config.relations.surrounding.unit
    with pytest.raises(configs.ConfigError, match=r"relations\.surrounding\.unit is missing"):
        configs.validate(config)
    config.relations.surrounding.unit = "short_side"
    config.train.stepz = 3
    with pytest.raises(configs.ConfigError, match=r"train\.stepz is not a key"):
        configs.validate(config)


def test_best_without_a_state_to_go_on_from(config, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "work")
    shutil.rmtree(tmp_path / "work" / "checkpoints")
    with pytest.raises(checkpoint.CheckpointError, match="best holds a model.*has no whole checkpoint"):
        loop.train_and_evaluate(config, str(tmp_path / "work"))


def test_damaged_checkpoint(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "work")
    for path in (tmp_path / "work" / "best" / "1").rglob("*"):
        if path.is_file() and "params" in str(path):
            path.write_bytes(b"")
    with pytest.raises(checkpoint.CheckpointError, match=r"best/1 cannot be read.*move it away"):
        evaluate.evaluate(configs.load(tmp_path / "work" / "config.json"), str(tmp_path / "work"))


@pytest.mark.parametrize("content", [b"{}", b"[1]", b"{", b"\xff\xfe"])
def test_unreadable_config(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(configs.ConfigError, match="config.json cannot be used"):
        configs.load(tmp_path / "config.json")


def _run(script, *args):
    return commands.run([script, *args])


@pytest.mark.parametrize(
    "args, match",
    [
        (["--config=configs/demo.py", "--config.model.hiden=3"], "did you mean config.model.hidden?"),
        full_row((["--config=configs/demo.py", "--config.train.steps=many"], "many")),
        full_row((["--config=configs/demo.py", "--config.data.nope.x=1"], "nope")),
        (["--config=configs/nothing.py", "--workdir=somewhere"], "configs/nothing.py: there is no such file; name one"),
        full_row((["--config=configs/demo.py:x", "--workdir=somewhere"], "demo.py has no variants; leave out :x")),
        full_row(
            (["--config=configs/camvid_mobilenet_v2.py:x", "--workdir=somewhere"], "known are residual, free, both")
        ),
        full_row((["--config=configs/demo.py"], "--workdir")),
        (
            [
                "--config=configs/demo.py",
                "--workdir=setup.cfg",
                "--config.data.data_dir={tmp}",
                "--config.eval.batch_size=8",
                "--config.data.synthetic.num_train=8",
                "--config.data.synthetic.num_val=8",
            ],
            "setup.cfg",
        ),
        full_row((["--workdir=somewhere"], "--config")),
        (["--config=dmeo", "--workdir=somewhere"], "no config of that name; did you mean demo?"),
        full_row((["--config=demo:x", "--workdir=somewhere"], "demo.py has no variants; leave out :x")),
        full_row((["--workdir", "--dry-run"], "--workdir takes a value, and --dry-run follows it")),
        full_row((["--config=demo", "--images=a"], "--images is of pwcrf predict, crf: see pwcrf predict --help")),
    ],
)
def test_command_line(args, match, tmp_path):
    done = _run("train.py", *(arg.replace("{tmp}", str(tmp_path)) for arg in args))
    assert done.returncode == 2, done.stderr
    assert match in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "args, match",
    [
        full_row((["--config.crf.wieghts=(1.0,)"], "did you mean config.crf.weights?")),
        full_row((["--config.crf.weights=('a',)"], "config.crf.weights")),
        (["--config.model.input_scaling=caffe"], "model.input_scaling is 'tf' in the checkpoint"),
        full_row((["--split=tset"], "tset")),
    ],
)
def test_command_line_of_eval(trained, args, match):
    done = _run("eval.py", f"--workdir={trained}", *args)
    assert done.returncode == 2, done.stderr
    assert match in done.stderr
    assert "Traceback" not in done.stderr


def test_eval_without_a_run(tmp_path):
    done = _run("eval.py", f"--workdir={tmp_path}")
    assert done.returncode == 2 and "config.json does not exist" in done.stderr and "Traceback" not in done.stderr


def test_patience_without_evaluations(config):
    config.train.patience, config.train.eval_every = 2, 0
    with pytest.raises(configs.ConfigError, match="train.patience = 2 does nothing without evaluations in training"):
        configs.validate(config)


def test_non_finite_loss_stops_and_keeps_the_last_checkpoint(config, tmp_path):
    config.optimizer.learning_rate = 1e30
    config.optimizer.clip_norm = 0.0
    config.optimizer.name = "sgd"
    config.train.log_every = config.train.checkpoint_every = 1
    with pytest.raises(guard.NonFiniteError, match="learning_rate"):
        loop.train_and_evaluate(config, str(tmp_path))


ENDS = """
from absl import flags
from pwcrf_jax.cli import command as cli
from pwcrf_jax.training import guard
for name in ("config", "workdir"):
    flags.DEFINE_string(name, None, "")
def main(_):
    raise {error}
cli.run(main, interrupted="stopped")
"""


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        ("KeyboardInterrupt", 130, "stopped"),
        ("guard.NonFiniteError('step 3: loss nan')", 1, "error: step 3: loss nan"),
        full_row(("cli.ConfigError('config.seed')", 2, "error: config.seed")),
        full_row(
            (
                "OSError(28, 'No space left', 'runs/a')",
                2,
                "error: runs/a cannot be used (No space left); make room on its disk",
            )
        ),
    ],
)
def test_exit_codes(error, code, said):
    done = commands.run(["-c", ENDS.format(error=error)])
    assert (done.returncode, done.stderr.strip()) == (code, said)
