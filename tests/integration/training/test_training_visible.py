"""What a run shows: the panel of validation images in TensorBoard, tables above the bar, --dry-run, --help."""

import fcntl
import hashlib
import importlib
import io
import logging
import os
import pty
import re
import shutil
import struct
import sys
import termios
from pathlib import Path

import commands
import jax
import numpy as np
import pytest
from absl import flags
from PIL import Image
from tensorboardX.proto.event_pb2 import Event
from tqdm import tqdm

from pwcrf_jax import config as configs
from pwcrf_jax.cli import command as cli
from pwcrf_jax.cli import usage
from pwcrf_jax.cli.main import COMMANDS, main
from pwcrf_jax.data import load_dataset
from pwcrf_jax.evaluation import evaluators
from pwcrf_jax.evaluation import steps as eval_steps
from pwcrf_jax.prediction import predictor, restore
from pwcrf_jax.report import pictures
from pwcrf_jax.runtime import logs
from pwcrf_jax.runtime.files import FileError
from pwcrf_jax.training import dry_run, loop

ROOT = Path(__file__).resolve().parents[3]
TAG = "val/image_truth_unary_all"


def panels(workdir):
    """{step: picture uint8 [H, W, 3]} of all event files."""
    out = {}
    for path in sorted((workdir / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:  # length, its checksum, an event, its checksum
            (length,) = struct.unpack("<Q", data[:8])
            event, data = Event.FromString(data[12 : 12 + length]), data[16 + length :]
            for value in event.summary.value:
                if value.HasField("image"):
                    assert value.tag == TAG
                    out[event.step] = np.asarray(Image.open(io.BytesIO(value.image.encoded_image_string)))
    return out


def cells(picture, height, width):
    """Rows of the pictures that a mosaic of one size was made of."""
    return [
        [picture[y : y + height, x : x + width] for x in range(0, picture.shape[1], width + 4)]
        for y in range(0, picture.shape[0], height + 4)
    ]


# --- TensorBoard -----------------------------------------------------------------------------------------


@pytest.mark.full
def test_the_panel_shows_images_truth_and_predictions(trained, config, tmp_path):
    workdir = tmp_path / "work"
    shutil.copytree(trained, workdir)
    config.train.steps, config.eval.panel = 2, 4
    loop.train_and_evaluate(config, str(workdir))  # goes on
    config.train.steps, config.eval.panel = 3, 0
    loop.train_and_evaluate(config, str(workdir))
    shown = panels(workdir)
    assert list(shown) == [1, 2]  # none of step 3

    dataset = load_dataset(**configs.dataset_options(config))
    source, palette = dataset.source("val"), np.array(dataset.palette, np.uint8)
    chosen = pictures.chosen(len(source), config.eval.batch_size, 4)
    assert chosen == [0, 1, 8, 9]
    stored = configs.load(trained / "config.json")
    model, params, step = restore.restore_params(stored, str(trained), "latest")
    assert step == 1
    alone = stored.copy_and_resolve_references()
    alone.crf.num_iterations = 0
    ways = [predictor.Predictor(c, model, params) for c in (alone, stored)]
    for i, row, later in zip(chosen, cells(shown[1], 192, 256), cells(shown[2], 192, 256), strict=True):
        record = source[i]
        assert len(row) == 4
        np.testing.assert_array_equal(row[0], record["image"])
        truth = np.where(record["label"][..., None] == 255, np.uint8(255), palette[record["label"] % 255])
        np.testing.assert_array_equal(row[1], truth)
        assert (record["label"] == 255).any()
        for cell, way in zip(row[2:], ways, strict=True):
            labels = next(way([(None, record["image"])]))[2].labels()
            assert (cell != palette[labels]).any(-1).mean() < 1e-3  # but for ties
        np.testing.assert_array_equal(row[:2], later[:2])  # the same images after going on
    assert (shown[1] != shown[2]).any()


@pytest.mark.parametrize(
    ("num_images", "batch_size", "count", "wanted"),
    [(100, 8, 4, [0, 24, 48, 72]), (10, 8, 4, [0, 1, 8, 9]), (9, 8, 4, [0, 1, 2, 8]), (3, 8, 4, [0, 1, 2])],
)
def test_images_are_spread_over_the_split_and_belong_to_process_0(num_images, batch_size, count, wanted):
    assert pictures.chosen(num_images, batch_size, count) == wanted


def test_a_panel_has_what_its_process_has():
    palette = [(10, 0, 0), (0, 20, 0)]
    rng = np.random.default_rng(0)
    image, label = rng.integers(0, 256, (2, 8, 6, 3)).astype(np.uint8), rng.integers(0, 2, (2, 8, 6)).astype(np.uint8)
    batch = {"image": image, "label": label, "valid_box": np.array([[0, 0, 8, 6], [0, 0, 5, 4]]), "id": ["a", "b"]}
    kept = eval_steps.PerImage({"unary": eval_steps.Row(1 - label.reshape(2, 1, 8, 6), None)}, ())  # of two devices
    panel = pictures.Panel([4, 5, 6], 4, ("unary",), palette)  # the second of two batches; 6 is another process's
    for number in (0, 1):
        panel.add(evaluators.Seen(number, batch, kept, {}, {}, {}))
    picture = panel.picture()
    assert picture.shape == (2 * 8 + 4, 3 * 6 + 2 * 4, 3)
    first, second = cells(picture, 8, 6)
    np.testing.assert_array_equal(first[2], np.array(palette, np.uint8)[1 - label[0]])
    np.testing.assert_array_equal(second[0][:5, :4], image[1, :5, :4])
    assert (second[0][5:] == 128).all() and (second[0][:, 4:] == 128).all()


def test_large_pictures_lose_pixels_and_no_colour():
    labels = np.random.default_rng(0).integers(0, 3, (700, 321)).astype(np.uint8)
    palette = [(1, 2, 3), (4, 5, 6), (7, 8, 9)]
    picture = pictures.mosaic([[pictures.coloured(labels, palette)]])
    np.testing.assert_array_equal(picture, np.array(palette, np.uint8)[labels[::3, ::3]])


# --- the terminal ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [80, 200])
def test_the_bar_tells_loss_speed_and_time_left_on_any_terminal(monkeypatch, columns):
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, columns, 0, 0))
    with open(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        progress = logs.Progress(0, 900, 16, ("surrounding", "above_below"))
        numbers = dict(loss=9.452, nll_unary=1.895, nll_above_below=3.7, nll_surrounding=3.8)
        assert progress.report(20, numbers) > 0
        progress.close()
        print("the end", file=terminal, flush=True)
        text = ""
        while "the end" not in text:  # a terminal hands over what was written in parts, each in its own time
            text += os.read(ours, 1 << 16).decode()
    shown = text.replace("\n", "\r").split("\r")
    (line,) = {x.strip() for x in shown if "loss" in x}
    assert "20/900" in line and "loss 9.4520" in line
    assert re.search(r"[\d.]+ img/s  \d+:\d\d:\d\d left  nll unary", line)
    assert len(line) < columns and ("(2 x unary 3.790)" in line) == (columns == 200)


@pytest.mark.parametrize("name", ["unrolled_mean_field", "refinement_convs"])
def test_what_is_of_nodes_is_not_held_against_twice_the_unary(caplog, name):
    with caplog.at_level("INFO", logger="pwcrf_jax"):
        logs.Progress(0, 9, 1, ("surrounding",)).report(1, {"loss": 1.0, "nll_unary": 1.5, f"nll_{name}": 1.25})
    assert f"{name} 1.250" in caplog.text and "2 x unary" not in caplog.text


class NoTerminal:
    """A notebook's stream: it writes, and knows nothing of terminals."""

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text

    def flush(self):
        pass


def closed():
    stream = io.StringIO()
    stream.close()
    return stream


@pytest.mark.parametrize("make", [NoTerminal, io.StringIO, closed, lambda: None])
def test_standard_error_may_be_anything(monkeypatch, make):
    monkeypatch.setattr(sys, "stderr", stream := make())
    monkeypatch.setattr(logs.log, "handlers", [])
    monkeypatch.setattr(logs.log, "propagate", False)
    logs.setup()
    assert list(logs.bar(range(3), "eval val")) == [0, 1, 2]
    progress = logs.Progress(0, 9, 1)
    progress.report(1, {"loss": 1.0, "nll_unary": 1.5})
    progress.close()
    text = getattr(stream, "text", None) or (
        isinstance(stream, io.StringIO) and not stream.closed and stream.getvalue()
    )
    assert not text or "step 1/9  loss 1.0000  nll unary 1.500" in text
    assert text or make not in (NoTerminal, io.StringIO)


@pytest.mark.parametrize(
    "metrics", [{}, {"nll_above_below": 2.5}, {"loss": 0.0}, {"loss": 0.0, "nll_surrounding": 1.0}]
)
def test_a_batch_without_a_valid_pixel_has_no_unary_figure(caplog, metrics):
    with caplog.at_level("INFO", logger="pwcrf_jax"):
        logs.Progress(0, 9, 1, ("surrounding", "above_below")).report(1, metrics)
    assert "nll unary -" in caplog.text and "nan" not in caplog.text and "2 x unary" not in caplog.text


def test_lines_stand_above_the_bar():
    stream = io.StringIO()
    handler = logs._AboveBars(stream)
    with tqdm(total=3, file=stream) as bar:
        bar.update(1)
        bar.refresh()
        handler.emit(logging.LogRecord("x", logging.INFO, "", 0, "a table\nof %d lines", (2,), None))
    lines = [line.rpartition("\r")[2] for line in stream.getvalue().split("\n")]
    assert lines[:2] == ["a table", "of 2 lines"] and "1/3" in lines[2]


# --- --dry-run -------------------------------------------------------------------------------------------


def files(folder):
    return {p.relative_to(folder): hashlib.sha256(p.read_bytes()).digest() for p in folder.rglob("*") if p.is_file()}


def flat(config):
    keys = ("data.data_dir", "data.synthetic.num_train", "data.synthetic.num_val", "data.crop_size", "model.hidden")
    keys += ("model.tiny.features", "train.batch_size", "eval.batch_size")
    values = dict(configs.flat(config))
    return [f"--config.{key}={values[key]}" for key in keys]


def test_dry_run_leaves_its_picture_alone(config, tmp_path):
    command = ["train.py", "--config=configs/demo.py", f"--workdir={tmp_path / 'work'}", "--dry-run"]
    done = commands.run([*command, *flat(config)])
    assert done.returncode == 0, done.stderr
    assert [p.name for p in (tmp_path / "work").iterdir()] == ["dry_run.png"]
    model = configs.build_model(config)
    leaves = jax.tree.leaves(restore.abstract_params(model))
    assert re.search(rf"^all +{sum(x.size for x in leaves):,}$", done.stdout, re.MULTILINE)
    hidden = rf"{config.train.batch_size // jax.device_count()} x 6 x 8 x {config.model.hidden} float32"
    assert re.search(rf"^unary/first +{hidden} +bias 8, kernel 8 x 8 +72$", done.stdout, re.MULTILINE)
    assert re.search(r"^v5e   fits: [\d.]+ .?B of 17.2 GB, \d+ images a device would$", done.stdout, re.MULTILINE)
    assert "training step" in done.stdout and "nothing was trained" in done.stderr
    # The picture is the first batch of the run.
    batches = loop.batches_from(config, load_dataset(**configs.dataset_options(config)), 0)
    batch = next(batches)
    batches.close()
    palette = np.array(load_dataset(**configs.dataset_options(config)).palette, np.uint8)
    rows = cells(np.asarray(Image.open(tmp_path / "work" / "dry_run.png")), 96, 128)
    assert [len(row) for row in rows] == [4] * 4
    for i, (image, label) in enumerate(zip(batch["image"], batch["label"], strict=True)):
        np.testing.assert_array_equal(rows[i // 2][i % 2 * 2], image)
        inside = label != 255
        np.testing.assert_array_equal(rows[i // 2][i % 2 * 2 + 1][inside], palette[label[inside]])
        assert (rows[i // 2][i % 2 * 2 + 1][~inside] == 255).all()


def test_dry_run_beside_a_run(trained, config, tmp_path, capsys, caplog, monkeypatch):
    workdir = tmp_path / "work"
    shutil.copytree(trained, workdir)
    before = files(workdir)
    monkeypatch.setattr(logs.log, "propagate", True)
    with caplog.at_level("INFO", logger=logs.log.name):
        dry_run.run(config, str(workdir), str(tmp_path / "new" / "batch.png"))
    assert files(workdir) == before and "would go on with the run there" in caplog.text
    assert (tmp_path / "new" / "batch.png").exists() and "optimizer state" in capsys.readouterr().out
    with pytest.raises(configs.ConfigError, match="--picture=a.jpg must end in .png"):
        dry_run.run(config, str(workdir), "a.jpg")
    with pytest.raises(configs.ConfigError, match="name --workdir, or where to write"):
        dry_run.run(config)
    with pytest.raises(FileError, match="config.json cannot be written"):
        dry_run.run(config, picture=str(workdir / "config.json" / "a.png"))
    config.model.hidden = 0
    with pytest.raises(configs.ConfigError, match="model.hidden"):
        dry_run.run(config, str(workdir))


# --- --help ----------------------------------------------------------------------------------------------


def in_process(command, *words):
    """(text of --help, names of the flags that the command defines, in order)."""
    module, values = importlib.import_module(f"pwcrf_jax.cli.{command}"), flags.FlagValues()
    cli.define(module.define_flags, values)
    return usage.asked(["pwcrf", *words], module.__doc__, values), list(values)


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "check"])
def test_help_shows_every_flag_with_default_and_example(command):
    text, names = in_process(command, "--workdir=gone", "--help")
    text, _, ours = text.partition("\nFlags:\n\n")
    assert f"    pwcrf {command} " in text and in_process(command, "--workdir=gone")[0] is None
    blocks = dict(re.findall(r"^  --(?:\[no\])?([\w-]+)(.*?)(?=^  --|\Z)", ours, re.MULTILINE | re.DOTALL))
    assert list(blocks) == names and names
    for name, block in blocks.items():
        assert re.match(r"(=[\w|]+)?  \(default: .+\)\n      \w", block), block
        (example,) = re.findall(r"\n      Example: (.*)", block)
        assert re.search(rf"--(no)?{name}\b", example), block
        assert {re.sub("^no", "", x) for x in re.findall(r"--([\w-]+)", example)} <= {*names, "config", "tuned"}


def test_full_help_shows_the_keys_of_the_config_too():
    text = in_process("train", "--helpfull")[0]
    for key, value in configs.flat(configs.defaults()):
        if not key.startswith("relations."):
            assert f"--config.{key}=" in text, (key, value)
    assert "Flags of libraries" in text


@pytest.mark.parametrize("argument", ["--help", "-h", "help", None])
def test_the_list_of_commands(argument, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["pwcrf", *filter(None, [argument])])
    with pytest.raises(SystemExit) as end:
        main()
    out = capsys.readouterr().out
    assert end.value.code == 0 and all(re.search(rf"^    pwcrf {name} +\w", out, re.MULTILINE) for name in COMMANDS)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["predcit"], "'predcit' is no command; did you mean pwcrf predict?"),
        (["nothing"], "'nothing' is no command; name one of train, eval, "),
        (["--workdir=x", "eval"], "'--workdir=x' is no command"),
    ],
)
def test_a_command_that_is_not_there(words, says, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["pwcrf", *words])
    with pytest.raises(SystemExit) as end:
        main()
    told = capsys.readouterr()
    assert end.value.code == 2 and not told.out and says in told.err and told.err.count("\n") == 1


def test_a_command_without_its_packages(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["pwcrf", "eval", "--help"])
    monkeypatch.delitem(sys.modules, "pwcrf_jax.cli.eval", raising=False)
    monkeypatch.setitem(sys.modules, "ml_collections", None)
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2 and 'pip install "pwcrf_jax[train]"' in capsys.readouterr().err


@pytest.mark.parametrize("words", [["train.py"], ["eval.py"], ["-m", "pwcrf_jax", "check"]])
def test_help_of_a_process(words):
    done = commands.run([*words, "--help"])
    name = words[-1].removesuffix(".py")
    assert done.returncode == 0 and not done.stderr and f"    pwcrf {name} " in done.stdout
    sources = [(ROOT / f"{x}.py").read_text() for x in ("train", "eval")]
    assert all(len(source.splitlines()) <= 30 for source in sources)


@pytest.mark.parametrize(
    ("flag", "of"),
    [
        ("trials", "tune, crf"),
        ("export_size", "export"),
        ("tune-refinement", "tune"),
        ("noprobabilities", "predict, crf"),
        ("dry-run", "train"),
        ("split", "eval, tune"),
        ("nothing", None),
    ],
)
def test_a_flag_of_another_command_is_refused_with_its_name(flag, of):
    said = cli._elsewhere(flag)
    assert said == (of and f"--{flag} is of pwcrf {of}: see pwcrf {of.partition(',')[0]} --help")
