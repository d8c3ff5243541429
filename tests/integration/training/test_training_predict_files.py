"""Predictions as files: what goes in is read or named, and nothing is written but below --output."""

import errno
import os
import types

import numpy as np
import pytest
import small
from PIL import Image

from pwcrf_jax import config as configs
from pwcrf_jax.data import DataError
from pwcrf_jax.prediction import output_files, predict, restore
from pwcrf_jax.prediction import predictor as inference
from pwcrf_jax.runtime.files import FileError


class Zeros:
    """Stands for a predictor and for marginals: every pixel is of class 0."""

    def __init__(self, config, model, params):
        pass

    def __call__(self, images):
        for key, image in images:
            self._shape = image.shape[:2]
            yield key, image, self

    def labels(self):
        return np.zeros(self._shape, np.uint8)

    def log_probs(self):
        return np.zeros((*self._shape, 6), np.float32)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run(**options): what `predict` returns for tmp_path/in with --output tmp_path/out."""
    monkeypatch.setattr(inference, "Predictor", Zeros)
    monkeypatch.setattr(restore, "restore_params", lambda *_: (None, None, 7))
    (tmp_path / "in").mkdir()
    save(tmp_path / "in" / "a.png")
    work = tmp_path / "work"
    work.mkdir()
    configs.save_classes([f"thing {i}" for i in range(6)], [(i, i, i) for i in range(6)], str(work))

    def run(output="out", images="in", **options):
        config = small.config(tmp_path / "data")
        config.data.max_pixels = options.pop("max_pixels", config.data.max_pixels)
        images = "" if options.get("split") else str(tmp_path / images)
        return predict.predict(config, str(work), str(tmp_path / output), images=images, **options)

    return run


def save(path, size=(20, 30), **options):
    Image.fromarray(np.zeros((*size, 3), np.uint8)).save(path, **options)


def tree(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())


# --- in ----------------------------------------------------------------------------------------------


def _many(path, form):
    frames = [Image.new("RGB", (8, 8), (i, 0, 0)) for i in (0, 99, 200)]
    frames[0].save(path, form, save_all=True, append_images=frames[1:])


SPOILED = {
    "fifo.jpg": os.mkfifo,
    "device.png": lambda path: path.symlink_to("/dev/zero"),
    "gone.png": lambda path: path.symlink_to("nothing"),
    "circle.png": lambda path: path.symlink_to("circle.png"),
    "pages.tif": lambda path: _many(path, "TIFF"),
    "film.webp": lambda path: _many(path, "WEBP"),
    "film.gif": lambda path: _many(path, "GIF"),
    "film.png": lambda path: _many(path, "PNG"),
    "text.jpeg": lambda path: path.write_text("not a picture"),
    "empty.bmp": lambda path: path.touch(),
    "large.png": lambda path: save(path, (40, 60)),
}


@pytest.mark.parametrize("pattern", ["in", "in/**/*"])
def test_what_cannot_be_read_is_named_and_the_rest_predicted(run, tmp_path, monkeypatch, caplog, pattern):
    paths = [tmp_path / "in" / name.replace(".", "_") / name for name in SPOILED]
    for path, make in zip(paths, SPOILED.values(), strict=True):
        path.parent.mkdir()
        make(path)
    (tmp_path / "in" / "notes.txt").write_text("no image")
    monkeypatch.setattr(predict.log, "propagate", True)
    with caplog.at_level("INFO", logger=predict.log.name):
        result = run(images=pattern, max_pixels=2000)
    failed = sorted(map(str, paths))
    assert sorted(result["failed"]) == failed
    assert result["num_images"] == 1 and result["left_out"] == [str(tmp_path / "in" / "notes.txt")]
    assert tree(tmp_path / "out") == ["classes.json", "labels/a.png", "overlays/a.jpg"]
    told = [record.getMessage() for record in caplog.records]
    for path in failed:
        assert [line for line in told if path in line and line.startswith("error: ")], path
    assert f"left out: {tmp_path / 'in' / 'notes.txt'}: no image" in told
    assert [line for line in told if "large.png" in line and "config.data.max_pixels" in line]


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "TIFF", "BMP"])
def test_a_key_sets_the_largest_image(run, tmp_path, monkeypatch, form):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)  # as 89 million, for large ones
    (tmp_path / "in" / "a.png").unlink()
    save(tmp_path / "in" / "b", (30, 50), format=form)
    assert run(max_pixels=1500)["num_images"] == 1
    assert run(output="other", max_pixels=1499)["failed"] == [str(tmp_path / "in" / "b")]
    assert Image.MAX_IMAGE_PIXELS == 500


def test_files_that_are_no_images_are_told_up_to_a_number(run, tmp_path, monkeypatch, caplog):
    for i in range(output_files.TOLD + 5):
        (tmp_path / "in" / f"{i}.txt").write_text("")
    monkeypatch.setattr(predict.log, "propagate", True)
    with caplog.at_level("INFO", logger=predict.log.name):
        result = run()
    assert not result["failed"] and len(result["left_out"]) == output_files.TOLD + 5
    told = [record.getMessage() for record in caplog.records if record.getMessage().startswith("left out: ")]
    assert len(told) == output_files.TOLD + 1 and told[-1].startswith("left out: 5 more")


# --- out ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["../a", "/etc/a", "a/../../b", "", "a//b", "./a", "a\0b", "a/" + "x" * 252, "\ud800", "a/.."]
)
@pytest.mark.parametrize("form", ["palette", "voc"])
def test_names_that_are_no_files_below_the_output_are_refused(name, form):
    with pytest.raises(DataError, match="is no name of a file below --output"):
        predict.Targets("out", form)(name)


@pytest.mark.parametrize("names", [("a", "a.png/b"), ("x/a", "x/a.jpg/b/c"), ("a", "a.npz/b"), ("a/b", "a/b.png/c")])
@pytest.mark.parametrize("turn", [1, -1])
def test_names_of_a_file_and_a_folder_are_refused(names, turn):
    target = predict.Targets("out", "palette")
    first, second = names[::turn]
    target(first)
    target(first)
    with pytest.raises(DataError, match="would both be written to .*rename one of them"):
        target(second)


def test_ids_of_a_data_set_do_not_leave_the_output(run, tmp_path, monkeypatch):
    ids = ["a", "../b", str(tmp_path / "c"), "d/../../../e", "f" * 300, "g/h"]
    records = [{"id": name, "image": np.zeros((8, 8, 3), np.uint8)} for name in ids]
    names, colours = predict.class_info(small.config(tmp_path), str(tmp_path / "work"))
    dataset = types.SimpleNamespace(class_names=names, palette=colours, source=lambda split: records)
    monkeypatch.setattr(predict, "load_dataset", lambda **_: dataset)
    monkeypatch.setattr(configs, "check_classes", lambda *_: None)
    before = tree(tmp_path)
    result = run(split="val", probabilities=True)
    assert result["failed"] == [f"record {i} of val" for i in (1, 2, 3, 4)] and result["num_images"] == 2
    wanted = [f"{x}/{y}" for x, y in (("labels", "a.png"), ("overlays", "a.jpg"), ("probabilities", "a.npz"))]
    wanted += [file.replace("/a.", "/g/h.") for file in wanted]
    assert tree(tmp_path) == sorted([*before, "out/classes.json", *(f"out/{file}" for file in wanted)])


@pytest.mark.parametrize("name", ["two\nlines", "\x1b[2Jred", "\udcff", "x" * 251, "quote\"'", "ünï", "-x", "*"])
def test_any_name_of_a_file_is_predicted(run, tmp_path, name):
    save(tmp_path / "in" / name, format="PNG")
    result = run(probabilities=True)
    assert result["num_images"] == 2 and not result["failed"]
    assert (tmp_path / "out" / "labels" / f"{name}.png").exists()
    assert (tmp_path / "out" / "probabilities" / f"{name}.npz").exists()


@pytest.mark.parametrize("name", ["labels", "overlays", "probabilities"])
def test_folders_that_are_links_are_refused(run, tmp_path, monkeypatch, name):
    (tmp_path / "out").mkdir()
    (tmp_path / "else").mkdir()
    (tmp_path / "out" / name).symlink_to(tmp_path / "else")
    with pytest.raises(FileError, match=f"out/{name} is a link"):
        run(overwrite=True, probabilities=True)
    assert not tree(tmp_path / "else")


@pytest.mark.parametrize("name", ["labels/a.png", "overlays/a.jpg", "probabilities/a.npz", "classes.json"])
def test_links_are_replaced_and_not_followed(run, tmp_path, name):
    link = tmp_path / "out" / name
    link.parent.mkdir(parents=True)
    (tmp_path / "thesis").write_text("mine")
    link.symlink_to(tmp_path / "thesis")
    run(overwrite=True, probabilities=True)
    assert (tmp_path / "thesis").read_text() == "mine" and not link.is_symlink() and link.stat().st_size > 4


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
@pytest.mark.parametrize("file", ["labels/b.png", "overlays/b.jpg"])
def test_a_disk_that_fails_is_named_and_what_is_whole_stays(run, tmp_path, monkeypatch, number, file):
    save(tmp_path / "in" / "b.png")
    whole, form = Image.Image.save, "PNG" if file.endswith("png") else "JPEG"
    seen = []

    def failing(image, out, format, **options):
        whole(image, out, format, **options)
        seen.append(format)
        if seen.count(form) == 2:
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Image.Image, "save", failing)
    with pytest.raises(FileError, match=rf"out/{file} cannot be written \({os.strerror(number)}\)"):
        run()
    written = tree(tmp_path / "out")
    assert file not in written and {"labels/a.png", "overlays/a.jpg"} <= set(written)
    assert not [name for name in written if "partial" in name]
    Image.open(tmp_path / "out" / "labels" / "a.png").load()


def test_what_a_kill_left_is_cleared(run, tmp_path):
    run()
    (tmp_path / "out" / "labels" / "deep").mkdir()
    left = [
        tmp_path / "out" / f"{folder}/.0123456789abcdef.partial" for folder in ("labels", "labels/deep", "overlays")
    ]
    for path in left:
        path.write_bytes(b"half")
    run(overwrite=True)
    assert not any(path.exists() for path in left) and (tmp_path / "out" / "labels" / "a.png").exists()


@pytest.mark.parametrize("output", ["work", "in/../work", "link"])
def test_the_workdir_is_no_output(run, tmp_path, output):
    (tmp_path / "link").symlink_to("work")
    before = tree(tmp_path)
    with pytest.raises(DataError, match="is the workdir of the run; name another folder"):
        run(output=output, overwrite=True)
    assert tree(tmp_path) == before
