"""Official archives and MATLAB files: found, unpacked once, and refused by name when damaged."""

import io
import os
import tarfile
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
import scipy.io

from pwcrf_jax.data.readers.archives import locate, open_mat73, read_mat
from pwcrf_jax.data.readers.image_io import DataError, voc_palette


def _zip(path, files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)


def _tar(path, files):
    with tarfile.open(path, "w:gz" if path.suffix in (".gz", ".tgz") else "w") as archive:
        for name, text in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(text)
            archive.addfile(info, io.BytesIO(text.encode()))


@pytest.fixture
def places(tmp_path):
    (tmp_path / "source").mkdir()
    return tmp_path / "source", str(tmp_path / "prepared")


@pytest.mark.parametrize(("name", "write"), [("a.zip", _zip), ("a.tar", _tar), ("a.tar.gz", _tar), ("a.tgz", _tar)])
def test_archives_are_unpacked_once(places, name, write):
    source, data_dir = places
    write(source / name, {"kit/list.txt": "one"})
    folder = locate(source, ["kit", "elsewhere"], [name, "b.zip"], data_dir)
    assert (folder / "list.txt").read_text() == "one" and source not in folder.parents
    (folder / "list.txt").write_text("still here")
    assert (locate(source, ["kit"], [name], data_dir) / "list.txt").read_text() == "still here"
    assert [p.name for p in folder.parent.parent.iterdir()] == [folder.parent.name]  # nothing partial is left


def test_several_archives_make_one_folder(places):
    source, data_dir = places
    _zip(source / "images.zip", {"kit/a.jpg": "image"})
    _tar(source / "masks.tar", {"kit/a.png": "mask"})
    folder = locate(source, ["kit"], ["images.zip", "masks.tar"], data_dir)
    assert sorted(p.name for p in folder.iterdir()) == ["a.jpg", "a.png"]


def test_a_folder_comes_before_an_archive(places):
    source, data_dir = places
    (source / "kit").mkdir()
    _zip(source / "a.zip", {"kit/list.txt": "one"})
    assert locate(source, ["kit"], ["a.zip"], data_dir) == source / "kit"
    assert locate(source, [""], ["a.zip"], data_dir) == source
    assert locate(source, ["other"], ["b.zip"], data_dir) is None


def test_nothing_leaves_the_folder(places, tmp_path):
    source, data_dir = places
    _tar(source / "a.tar", {"../../evil": "x", "kit/list.txt": "one"})
    with pytest.raises(DataError, match=r"a\.tar"):
        locate(source, ["kit"], ["a.tar"], data_dir)
    assert not list(tmp_path.rglob("evil"))


@pytest.mark.parametrize("name", ["a.zip", "a.tar", "a.tar.gz"])
@pytest.mark.parametrize("damage", ["empty", "noise", "cut", "another"])
def test_damaged_archives(places, name, damage):
    source, data_dir = places
    path = source / name
    write = _zip if name == "a.zip" else _tar
    noise = np.random.default_rng(0).bytes(60_000)
    write(path, {"other/x" if damage == "another" else "kit/x": noise.hex()})
    content = path.read_bytes()
    path.write_bytes({"empty": b"", "noise": noise, "cut": content[: len(content) // 2], "another": content}[damage])
    with pytest.raises(DataError, match=name.replace(".", r"\.")):
        locate(source, ["kit"], [name], data_dir)


@pytest.mark.parametrize("name", ["a.zip", "a.tgz"])
def test_flipped_bits_in_compressed_archives(places, name):
    """Each is refused, or what comes out is what went in."""
    source, data_dir = places
    path, text = source / name, "".join(f"image_{i * i}\n" for i in range(2000))
    if name == "a.zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("kit/list.txt", text)
    else:
        _tar(path, {"kit/list.txt": text})
    whole, refused = path.read_bytes(), 0
    for position in np.random.default_rng(0).integers(0, 8 * len(whole), 60):
        content = bytearray(whole)
        content[position // 8] ^= 1 << position % 8
        path.write_bytes(bytes(content))
        try:
            folder = locate(source, ["kit"], [name], f"{data_dir}/{position}")
            assert (folder / "list.txt").read_text() == text
        except DataError as e:
            assert name in str(e)
            refused += 1
    assert refused > 40


@pytest.fixture
def old(tmp_path):
    path = tmp_path / "old.mat"
    scipy.io.savemat(path, {"S": np.eye(3, dtype=np.uint8), "names": np.array(["a", "bc"], object)})
    return path


@pytest.fixture
def new(tmp_path):
    path = tmp_path / "new.mat"
    with h5py.File(path, "w", userblock_size=512) as file:
        file["labels"] = np.arange(6, dtype=np.uint16).reshape(2, 3)
    return path


def test_variables(old, new):
    eye, names = read_mat(old, "S", "names")
    assert eye.dtype == np.uint8 and (eye == np.eye(3)).all() and list(names) == ["a", "bc"]
    with open_mat73(new, "labels") as (labels,):
        assert labels.shape == (2, 3)


@pytest.mark.parametrize("damage", ["missing", "empty", "noise", "cut", "other version", "no such variable"])
def test_damaged_mat_files(old, new, tmp_path, damage):
    for path, other in ((old, new), (new, old)):
        content = path.read_bytes()
        spoiled = tmp_path / f"spoiled_{path.name}"
        names = ("S", "labels") if damage == "no such variable" else ("S",) if path is old else ("labels",)
        if damage != "missing":
            kept = {
                "empty": b"",
                "noise": b"x" * 900,
                "cut": content[: len(content) // 2],
                "other version": other.read_bytes(),
            }
            spoiled.write_bytes(kept.get(damage, content))
        with pytest.raises(DataError, match=f"spoiled_{path.name}"):
            if path is old:
                read_mat(spoiled, *names)
            else:
                with open_mat73(spoiled, *names):
                    pass


@pytest.mark.parametrize("kind", ["external link", "soft link", "virtual", "external bytes"])
def test_mat_files_that_would_read_others(kind, new, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.arange(6, dtype=np.uint16).tofile("other.bin")
    with h5py.File("other.mat", "w") as other:
        other["labels"] = np.arange(6, dtype=np.uint16)
    with h5py.File(new, "a") as file:
        file.move("labels", "mine")
        match kind:
            case "external link":
                file["labels"] = h5py.ExternalLink("other.mat", "/labels")
            case "soft link":
                file["labels"] = h5py.SoftLink("/mine")
            case "virtual":
                layout = h5py.VirtualLayout((6,), np.uint16)
                layout[:] = h5py.VirtualSource("other.mat", "labels", (6,))
                file.create_virtual_dataset("labels", layout)
            case "external bytes":
                file.create_dataset("labels", (6,), np.uint16, external=[("other.bin", 0, 12)])
    with pytest.raises(DataError, match=r"new\.mat: 'labels' lies in another file"), open_mat73(new, "labels"):
        pass


def test_voc_palette():
    assert voc_palette(22)[:4] == ((0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0))
    assert voc_palette(256)[255] == (224, 224, 192) and voc_palette(21)[20] == (0, 64, 128)


def _dangling(path):
    path.symlink_to(path.with_name("nowhere"))


def _loop(path):
    path.symlink_to(path.name)


@pytest.mark.parametrize("name", ["a.zip", "a.tar", "a.tar.gz", "a.tgz"])
@pytest.mark.parametrize(
    ("put", "message"),
    [
        (_dangling, "is a link to nothing"),
        (_loop, "cannot be read"),
        (os.mkfifo, r"is a pipe \(FIFO\), expected a file"),
        (Path.mkdir, "is a folder, expected a file"),
    ],
)
def test_an_archive_that_is_no_file_never_counts_as_not_there(places, name, put, message):
    source, data_dir = places
    put(source / name)
    with pytest.raises(DataError, match=rf"source/{name}: {message}"):
        locate(source, ["kit"], [name], data_dir)


@pytest.mark.parametrize(
    ("put", "message"),
    [
        (_dangling, "source/kit: is a link to nothing"),
        (_loop, "source/kit/parts: cannot be read"),
        (os.mkfifo, "source/kit: is no folder, so that it cannot hold"),
        (Path.touch, "source/kit: is no folder, so that it cannot hold"),
        (lambda kit: (kit.mkdir(), _dangling(kit / "parts")), "source/kit/parts: is a link to nothing"),
        (lambda kit: (kit.mkdir(), (kit / "parts").touch()), "source/kit/parts: is a file, expected a folder"),
    ],
)
def test_a_folder_that_leads_nowhere_never_counts_as_not_there(places, put, message):
    source, data_dir = places
    _zip(source / "a.zip", {"kit/parts/list.txt": "one"})
    put(source / "kit")
    with pytest.raises(DataError, match=message):
        locate(source, ["kit/parts"], ["a.zip"], data_dir)


@pytest.mark.parametrize("read", [lambda path: read_mat(path, "x"), lambda path: open_mat73(path, "x").__enter__()])
@pytest.mark.parametrize("put", [_dangling, _loop, os.mkfifo, Path.mkdir])
def test_matlab_files_that_are_none_are_refused_by_name(tmp_path, read, put):
    put(tmp_path / "x.mat")
    with pytest.raises(DataError, match=r"x\.mat: (cannot be read \(|is a (pipe|folder))"):
        read(tmp_path / "x.mat")
