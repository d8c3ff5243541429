"""JSON files of another shape: one line that names the file and the remedy, or what they hold is made anew."""

import json
import os
import pathlib
import shutil

import pytest
import small
from faults import states

from pwcrf_jax import config as configs
from pwcrf_jax.data import DataError, label_guard, load_dataset, prepare, splits
from pwcrf_jax.evaluation import evaluate
from pwcrf_jax.runtime import checkpoint, files, logs
from pwcrf_jax.runtime.files import FileError
from pwcrf_jax.training import initial

SHAPES = {
    "empty": "",
    "space": " \n",
    "zeros": "\0" * 100,
    "cut": '{"config": {"crf.wei',
    "list": "[]",
    "lists": "[[1, 2], [3, 4]]",
    "number": "7",
    "huge": "1" * 5000,
    "null": "null",
    "text": '"config"',
    "true": "true",
    "nan": "NaN",
    "deep": "[" * 100_000,
    "deep objects": '{"config":' * 100_000,
    "other keys": '{"a": {"b": 1}}',
    "nulls": '{"config": null, "conditions": null, "split": null, "step": null, "splits": null, "json": null}',
    "numbers": '{"config": 1, "conditions": 2, "split": 3, "step": 4, "splits": 5, "json": 6, "sha256": 7}',
    "latin": b'{"split": "\xe9"}',
}


@pytest.fixture(params=SHAPES)
def spoiled(request):
    content = SHAPES[request.param]
    return content if isinstance(content, bytes) else content.encode()


def _one_line(error, path):
    assert str(path) in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 600


def test_tuned_values(spoiled, tmp_path):
    (tmp_path / "tuned.json").write_bytes(spoiled)
    with pytest.raises(configs.ConfigError, match="delete it, tune again, or add --tuned=false") as error:
        configs.apply_tuned(small.config(""), str(tmp_path))
    _one_line(error, tmp_path / "tuned.json")


@pytest.mark.parametrize(
    "change, says",
    [
        ({"config": {"crf.weights": "abc"}}, "crf.weights = 'abc' must be"),
        ({"config": {"crf.weights": [float("nan")]}}, r"crf.weights = \[nan\] must be"),
        ({"config": {"refine.smoothness_sxy": -1.0}}, "refine.smoothness_sxy = -1.0 must be"),
        ({"config": {"refine.": 1}}, "no 'refine.'"),
        ({"config": {"model.hidden": 3}}, "no 'model.hidden'"),
        ({"config": [["crf.weights", [1.0]]]}, "'config' is no dict"),
        ({"conditions": [1]}, "'conditions' is no dict"),
        ({"split": ["val"]}, "'split' is no str"),
        ({"step": None}, "'step' is no int"),
    ],
)
def test_tuned_values_of_other_types(change, says, tmp_path):
    whole = {"config": {"crf.num_iterations": 3}, "conditions": {}, "split": "val", "step": 3}
    (tmp_path / "tuned.json").write_text(json.dumps(whole))
    assert configs.apply_tuned(small.config(""), str(tmp_path)) == whole
    (tmp_path / "tuned.json").write_text(json.dumps(whole | change))
    config = small.config("")
    with pytest.raises(configs.ConfigError, match=says):
        configs.apply_tuned(config, str(tmp_path))
    assert config.to_dict() == small.config("").to_dict()


def test_a_config(spoiled, tmp_path):
    (tmp_path / "config.json").write_bytes(spoiled)
    with pytest.raises(configs.ConfigError) as error:
        configs.load_checked(str(tmp_path))
    _one_line(error, tmp_path / "config.json")


@pytest.mark.parametrize("section", ["train", "model", "data", "crf", "relations", "model.tiny", "eval"])
@pytest.mark.parametrize("value", [None, 3, [], [1], "text", {}, "missing"])
def test_parts_of_a_config(section, value, tmp_path):
    stored = json.loads(json.dumps(small.config("").to_dict()))
    *above, name = section.split(".")
    place = stored[above[0]] if above else stored
    del place[name]
    if value != "missing":
        place[name] = value
    (tmp_path / "config.json").write_text(json.dumps(stored))
    with pytest.raises(configs.ConfigError, match=r"config\.") as error:
        configs.load_checked(str(tmp_path))
    _one_line(error, tmp_path / "config.json")


def test_a_run_to_start_from_without_a_config_of_ours(tmp_path):
    (tmp_path / "config.json").write_text('{"model": {"input_scaling": "tf"}}')
    config = small.config("", init_from=str(tmp_path))
    with pytest.raises(configs.ConfigError, match=f"{tmp_path}/config.json cannot be used: config.* is missing"):
        initial.resolve_init(config, str(tmp_path / "new"))


def test_classes(spoiled, tmp_path):
    (tmp_path / "classes.json").write_bytes(spoiled)
    with pytest.raises(configs.ConfigError, match="delete it, training writes it again") as error:
        configs.load_classes(str(tmp_path))
    _one_line(error, tmp_path / "classes.json")


@pytest.mark.parametrize(
    "entry",
    [{"name": 3, "colour": [1, 2, 3]}, {"name": "a", "colour": [1, 2]}, {"name": "a", "colour": [1, 2, 256]},
     {"name": "a", "colour": "123"}, {"name": "a", "colour": [True, 1, 2]}, {"name": "a", "colour": [1.5, 1, 2]},
     {"name": "a"}, ["a", [1, 2, 3]], None],
)  # fmt: skip
def test_classes_of_other_types(entry, tmp_path):
    (tmp_path / "classes.json").write_text(json.dumps([{"name": "sky", "colour": [1, 2, 3]}, entry]))
    with pytest.raises(configs.ConfigError, match="classes.json cannot be used"):
        configs.load_classes(str(tmp_path))


def test_a_note_of_another_shape_is_none(spoiled, folder):
    assert "score" in states.store(folder).meta()
    (folder / "6" / "note.json").write_bytes(spoiled)
    meta = states.store(folder).meta()
    assert meta["step"] == 6 and "score" not in meta


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("prepared"))
    return load_dataset("synthetic", data_dir=folder, image_size=(128, 192), num_train=3, num_val=2)


def test_a_label_report_is_made_anew(spoiled, prepared):
    path = pathlib.Path(prepared.folder, label_guard.REPORT)
    report = prepared.label_report()
    path.write_bytes(spoiled)
    assert prepared.label_report() == report == json.loads(path.read_text())


@pytest.mark.parametrize("change", [{"splits": {}}, {"splits": {"train": {}}}, {"classes": []}, {"warnings": 3}])
def test_a_label_report_without_its_parts(change, prepared):
    report = prepared.label_report()
    label_guard.write_report(report | change, prepared.folder)
    assert prepared.label_report() == report


@pytest.mark.parametrize("name", ["dataset_info.json", "features.json"])
@pytest.mark.parametrize(
    "make",
    [*(SHAPES[shape] for shape in ("empty", "cut", "nan", "deep", "other keys")), os.mkfifo, os.mkdir, "/dev/zero"],
)
def test_a_prepared_set_whose_description_is_damaged(name, make, prepared, tmp_path):
    """One line, and no wait for a FIFO."""
    home = pathlib.Path(prepared.folder)
    copy = tmp_path.joinpath(*home.parts[-3:])
    shutil.copytree(home, copy)
    (copy / name).unlink()
    if callable(make):
        make(copy / name)
    else:
        (copy / name).symlink_to(make) if make.startswith("/dev") else (copy / name).write_text(make)
    with pytest.raises(DataError, match="of the prepared data set cannot be read .*; delete this folder") as error:
        found = load_dataset("synthetic", data_dir=str(tmp_path), image_size=(128, 192), num_train=3, num_val=2)
        prepare._reopened(found.folder, (splits.Part("train"),))  # as workers do, which read all of it
    assert str(copy.parent) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("line", ["[1]", "3", "null", '{"step": null}', '{"step": "1"}', '{"step": 1e999}', "[" * 10**5,
                                  '{"step": NaN}', "\0\0", '{"a": 1}'])  # fmt: skip
def test_lines_of_metrics(line, tmp_path):
    good = '{"step": 1, "train/loss": 2.0}\n'
    (tmp_path / "metrics.jsonl").write_text(f"{line}\n{good}{line}\n")
    assert logs.last_step(str(tmp_path)) == 1
    logs.Writer(str(tmp_path), 2).close()
    assert (tmp_path / "metrics.jsonl").read_text() == good


@pytest.mark.parametrize("kind", ["config.json", "tuned.json", "classes.json"])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path), "denied"])
def test_what_is_no_file_is_named_and_not_waited_for(make, kind, tmp_path, monkeypatch):
    path = tmp_path / kind
    if make == "denied":
        path.write_text("{}")

        def denied(*_, **__):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(files.os, "open", denied)
    else:
        make(path)
    load = {
        "config.json": lambda: configs.load(path),
        "tuned.json": lambda: configs.apply_tuned(small.config(""), str(tmp_path)),
        "classes.json": lambda: configs.load_classes(str(tmp_path)),
    }[kind]
    with pytest.raises(configs.ConfigError, match="cannot be read") as error:
        load()
    _one_line(error, path)


def test_a_file_too_large_is_not_read(tmp_path):
    with open(tmp_path / "a.json", "wb") as file:
        file.truncate(2**40)
    with pytest.raises(FileError, match="a.json cannot be used .it has 1099511627776 bytes.; delete it"):
        files.read_json(tmp_path / "a.json", "delete it")


@pytest.mark.parametrize("kind", ["best", "checkpoints"])
def test_evaluation_refuses_links_before_it_computes(kind, whole, tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    for name in ("config.json", "classes.json"):
        (tmp_path / "work" / name).write_bytes((whole / name).read_bytes())
    (tmp_path / "work" / kind).symlink_to(whole / kind)
    monkeypatch.setattr(evaluate, "make_eval_fn", None)
    with pytest.raises((FileError, checkpoint.CheckpointError), match=f"{kind} is a link, which is not followed"):
        config = configs.load(tmp_path / "work" / "config.json")
        evaluate.evaluate(config, str(tmp_path / "work"), {"best": "best", "checkpoints": "latest"}[kind])
