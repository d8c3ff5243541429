"""Weights files that are damaged or lie: a WeightsError that names file and layer, before memory is taken."""

import json
import os
import random
import struct
from contextlib import ExitStack

import h5py
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from pwcrf_jax import nets
from pwcrf_jax.nets import stored, vgg16
from pwcrf_jax.nets.stored import WeightsError
from pwcrf_jax.nets.vgg16 import TORCH_CONVS
from pwcrf_jax.nets.weight_files import open_keras

NAMES = vgg16.layer_names()


def _write(path, **options):
    with h5py.File(path, "w", **options.pop("file", {})) as file:
        for name in NAMES:
            kernel = np.random.default_rng(0).random((3, 3, 2, 2), np.float32)
            file.create_dataset(f"{name}/{name}/kernel:0", data=kernel, **options)
            file[f"{name}/{name}/bias:0"] = np.zeros(2, np.float32)
    return path


def _read(path):
    """Everything in the file."""
    if path.suffix == ".safetensors":
        shapes = {name: {"kernel": np.zeros((3, 3, 2, 2)), "bias": np.zeros(2)} for name in NAMES}
        new, _ = nets.load_pretrained(path, {"backbone": shapes})
        return {name: tuple(layer.values()) for name, layer in new["backbone"].items()}
    with ExitStack() as stack:
        return {name: layer() for name, layer in open_keras(path, stack).layers.items()}


def _refused(path, *words):
    with pytest.raises(WeightsError) as told:
        _read(path)
    line = str(told.value)
    assert str(path) in line and "\n" not in line and all(word in line for word in words), line


KERNEL = "block2_conv1/block2_conv1/kernel:0"


def _nested(file, levels):
    for _ in range(levels):
        file = file.create_group("g")


def _virtual(file):
    layout = h5py.VirtualLayout((3, 3, 2, 2), np.float32)
    layout[:] = h5py.VirtualSource("other.h5", "secret", (3, 3, 2, 2))
    file.create_virtual_dataset(KERNEL, layout)


def _dataset(**options):
    return lambda file: file.create_dataset(KERNEL, **options)


def _setting(value):
    return lambda file: file.__setitem__(KERNEL, value)


SHAPE = (3, 3, 2, 2)
LIES = {  # words of the message, and what replaces a kernel
    "far too large, in pieces": ("declares", _dataset(shape=(3, 3, 50_000, 50_000), chunks=(3, 3, 9, 9), dtype="f4")),
    "far too large, never written": ("declares", _dataset(shape=(3, 3, 9_000, 9_000), dtype="f8")),
    "pieces far too large": (
        "declares", _dataset(shape=SHAPE, maxshape=(3, 3, None, None), chunks=(3, 3, 5000, 5000), dtype="f4")),
    "compressed zeros": ("declares", _dataset(data=np.zeros((3, 3, 999, 999), np.float32), compression="gzip")),
    "text": ("not floating-point", _setting("text")),
    "texts": ("not floating-point", _setting(np.array([b"a", b"b"]))),
    "objects": ("not floating-point", _dataset(shape=SHAPE, dtype=h5py.vlen_dtype(np.float32))),
    "records": ("not floating-point", _setting(np.zeros(SHAPE, [("a", "f4"), ("b", "f4")]))),
    "whole numbers": ("not floating-point", _setting(np.zeros(SHAPE, np.int32))),
    "complex numbers": ("not floating-point", _setting(np.zeros(SHAPE, np.complex64))),
    "choices": ("not floating-point", _dataset(shape=SHAPE, dtype=h5py.enum_dtype({"a": 1}, "i4"))),
    "references": ("not floating-point", _dataset(shape=SHAPE, dtype=h5py.ref_dtype)),
    "nothing": ("is empty", _setting(h5py.Empty("f4"))),
    "no values": ("is empty", _setting(np.zeros((3, 3, 0, 2), np.float32))),
    "one number": ("not 4 axes", _setting(np.float32(1))),
    "NaN": ("not finite", _setting(np.full(SHAPE, np.nan, np.float32))),
    "infinity": ("not finite", _setting(np.full(SHAPE, -np.inf, np.float32))),
    "beyond float32": ("not finite", _setting(np.full(SHAPE, 1e300))),
    "checksums": ("checksums", _dataset(data=np.zeros(SHAPE, np.float32), fletcher32=True)),
    "of other files": ("another file", _virtual),
    "bytes of another file": (
        "another file", _dataset(shape=SHAPE, dtype="f4", external=[("other.bin", 0, h5py.h5f.UNLIMITED)])),
    "a group": ("has no kernel", lambda file: file.create_group(KERNEL)),
    "a type": ("has no kernel", _setting(np.dtype("f4"))),
}  # fmt: skip


@pytest.mark.parametrize("case", LIES)
def test_a_kernel_that_lies(case, tmp_path, monkeypatch):
    words, replace = LIES[case]
    monkeypatch.chdir(tmp_path)
    with h5py.File("other.h5", "w") as other:
        other["secret"] = np.ones(SHAPE, np.float32)
    np.ones(SHAPE, np.float32).tofile("other.bin")
    with h5py.File(_write(tmp_path / "net.h5"), "a") as file:
        del file[KERNEL]
        replace(file)
    if words != "not finite":  # the others are refused by what they declare
        read = h5py.Dataset.__getitem__
        refuse = lambda data, key: pytest.fail("read") if data.name == f"/{KERNEL}" else read(data, key)
        monkeypatch.setattr(h5py.Dataset, "__getitem__", refuse)
    _refused(tmp_path / "net.h5", words, "block2_conv1")


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", ">f4"])
@pytest.mark.parametrize("options", [{}, {"compression": "gzip", "shuffle": True}, {"compression": "lzf"}])
def test_floating_point_of_every_size_is_read(dtype, options, tmp_path):
    kernel = np.random.default_rng(1).random((3, 3, 40, 40)).astype(dtype)
    with h5py.File(_write(tmp_path / "net.h5"), "a") as file:
        del file[KERNEL]
        file.create_dataset(KERNEL, data=kernel, **options)
        del file["block2_conv1/block2_conv1/bias:0"]
        file["block2_conv1/block2_conv1/bias:0"] = np.zeros(40, dtype)
    layer = _read(tmp_path / "net.h5")["block2_conv1"]
    assert layer.kernel.dtype == layer.bias.dtype == np.float32
    np.testing.assert_array_equal(layer.kernel, kernel.astype(np.float32))


STRUCTURES = {
    "nested": lambda file: _nested(file, 3000),
    "nested below a layer": lambda file: _nested(file["block1_conv1"], 40),
    "a circle": lambda file: file.__setitem__("block1_conv1/again", file["/"]),
    "a circle of two": lambda file: (
        file["block1_conv1"].__setitem__("a", file["block1_conv2"]),
        file["block1_conv2"].__setitem__("b", file["block1_conv1"]),
    ),
    "many": lambda file: [file.create_group(f"many/{i}") for i in range(10_001)],
    "a soft link": lambda file: file.__setitem__("block9/kernel:0", h5py.SoftLink(f"/{KERNEL}")),
    "a soft link to nothing": lambda file: file.__setitem__("block9/kernel:0", h5py.SoftLink("/none")),
    "a link of a name of two lines": lambda file: file.__setitem__("block9/a\nb", h5py.SoftLink("/none")),
    "a soft link round": lambda file: file.__setitem__("block9", h5py.SoftLink("/block9")),
    "a link to another file": lambda file: file.__setitem__("block9", h5py.ExternalLink("other.h5", "/")),
}


@pytest.mark.parametrize("case", STRUCTURES)
def test_files_without_end_and_links(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    h5py.File("other.h5", "w").close()
    with h5py.File(_write(tmp_path / "net.h5"), "a") as file:
        STRUCTURES[case](file)
    _refused(tmp_path / "net.h5", "is a link" if "link" in case else "more groups than any network")


@pytest.mark.parametrize("suffix", [".h5", ".safetensors"])
def test_names_of_an_unknown_network_are_one_line(suffix, tmp_path):
    path = tmp_path / f"net{suffix}"
    if suffix == ".h5":
        with h5py.File(path, "w") as file:
            file["a\nb/kernel:0"] = np.zeros(1, np.float32)
    else:
        save_file({"a\nb.weight": np.zeros(1, np.float32)}, path)
    _refused(path, "not a network known here", r"a\nb")


LAYOUTS = {
    "as Keras": {},
    "packed": {"chunks": SHAPE, "compression": "gzip"},
    "in pieces": {"chunks": (3, 3, 1, 2), "shuffle": True, "compression": "lzf"},
    "latest": {"file": {"libver": "latest"}, "chunks": SHAPE, "maxshape": (None, None, 2, 2)},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_changed_bytes(layout, tmp_path):
    """Each file is refused in one line, or its layers have the shapes and numbers that a network can take."""
    whole, rng = _write(tmp_path / "net.h5", **LAYOUTS[layout]).read_bytes(), random.Random(layout)
    used = [i for i, byte in enumerate(whole) if byte]  # most of a file is padding
    counts = {"refused": 0, "read": 0}
    for _ in range(80):
        data = bytearray(whole)
        for _ in range(rng.choice((1, 3, 8))):
            data[rng.choice(used)] = rng.choice((0, 255, rng.randrange(256)))
        (tmp_path / "net.h5").write_bytes(data[: rng.randrange(len(data))] if rng.random() < 0.1 else data)
        try:
            layers = _read(tmp_path / "net.h5")
        except WeightsError as error:
            assert str(tmp_path / "net.h5") in str(error) and "\n" not in str(error)
            counts["refused"] += 1
        else:
            assert all(np.isfinite(part).all() for layer in layers.values() for part in layer)
            counts["read"] += 1
    assert counts["refused"] > 20, counts


# --- safetensors ---------------------------------------------------------------------------------------------


def _tensors():
    return {
        f"features.{i}.{part}": np.ones(shape, np.float32)
        for i in TORCH_CONVS
        for part, shape in (("weight", (2, 2, 3, 3)), ("bias", (2,)))
    }


def _split(path):
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def _join(path, header, data, size=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if size is None else size) + text + data)


def _changed(name, **fields):
    return lambda header, data: (header | {name: header[name] | fields}, data)


FIRST = "features.0.bias"
SPOILED = {
    "unknown numbers": _changed(FIRST, dtype="Q7"),
    "numbers of eight bits": lambda header, data: (
        header | {"x": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [len(data), len(data) + 2]}},
        data + b"\0\0",
    ),
    "a shape that does not fit": _changed(FIRST, shape=[3]),
    "a shape beyond all": _changed(FIRST, shape=[2**40, 2**40]),
    "a negative shape": _changed(FIRST, shape=[-2]),
    "overlapping": _changed(FIRST, data_offsets=[4, 12]),
    "behind the end": _changed(FIRST, data_offsets=[2**40, 2**40 + 8]),
    "back to front": _changed(FIRST, data_offsets=[8, 0]),
    "cut": lambda header, data: (header, data[:-5]),
    "more than said": lambda header, data: (header, data + b"more"),
    "no list": lambda header, data: (b"[1, 2]", data),
    "deep": lambda header, data: (b'{"a":' + b"[" * 100_000, data),
    "header of 2^60 bytes": lambda header, data: (header, data, 2**60),
    "header of 50 MB": lambda header, data: (header, data, 50_000_000),
    "header longer than the file": lambda header, data: (header, data, 5_000),
    "header of nothing": lambda header, data: (header, data, 0),
}


@pytest.mark.parametrize("case", SPOILED)
def test_safetensors_that_lie(case, tmp_path):
    path = tmp_path / "net.safetensors"
    save_file(_tensors(), path)
    assert len(_read(path)) == 13
    _join(path, *SPOILED[case](*_split(path)))
    if case == "numbers of eight bits":
        assert len(_read(path)) == 13  # of a tensor that nobody needs
    else:
        _refused(path)


@pytest.mark.parametrize("kind", ["BF16", "F8_E4M3", "F8_E5M2", "I8", "I64", "BOOL", "U16"])
def test_safetensors_of_other_numbers_than_floating_point(kind, tmp_path):
    path = tmp_path / "net.safetensors"
    save_file(_tensors(), path)
    header, data = _split(path)
    about = {"BF16": 2, "U16": 2, "I64": 8}.get(kind, 1)
    start, end = header[FIRST]["data_offsets"]
    values, header = (end - start) // about, header | {FIRST: header[FIRST] | {"dtype": kind}}
    header[FIRST]["shape"] = [values]
    _join(path, header, data)
    _refused(path, FIRST, kind, "save it as F32")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_safetensors_that_are_not_finite(value, tmp_path):
    tensors = _tensors()
    tensors["features.5.weight"][1, 1, 1, 1] = value
    save_file(tensors, tmp_path / "net.safetensors")
    _refused(tmp_path / "net.safetensors", "block2_conv1", "not finite")


# --- what is no file, and files of another network --------------------------------------------------------------


@pytest.fixture(scope="module")
def params():
    """Of a narrow VGG-16."""
    layer = {"kernel": jnp.zeros(SHAPE), "bias": jnp.zeros(2)}
    return {"backbone": {name: layer for name in NAMES}}


@pytest.mark.parametrize("suffix", [".h5", ".safetensors"])
@pytest.mark.parametrize("kind", ["FIFO", "folder", "device", "link round", "nothing", "long", "empty", "unreadable"])
def test_what_is_no_file(kind, suffix, params, tmp_path, monkeypatch):
    path = tmp_path / f"net{suffix}"
    match kind:
        case "FIFO":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case "device":
            path.symlink_to("/dev/zero")
        case "link round":
            path.symlink_to(path)
        case "long":
            path = tmp_path / f"{'y' * 300}{suffix}"
        case "empty":
            path.touch()
        case "unreadable":
            path.mkdir()  # opened as if it were a file
            monkeypatch.setattr(os.path, "isfile", lambda _: True)
    with pytest.raises(WeightsError) as told:
        nets.load_pretrained(path, params)
    assert str(path) in str(told.value) and "\n" not in str(told.value)


@pytest.mark.parametrize("suffix", [".h5", ".safetensors"])
def test_a_layer_of_another_shape_is_not_read(suffix, params, tmp_path, monkeypatch):
    path = tmp_path / f"net{suffix}"
    if suffix == ".h5":
        with h5py.File(_write(path), "a") as file:
            del file[KERNEL]
            file[KERNEL] = np.zeros((3, 3, 2, 900), np.float32)
    else:
        save_file(_tensors() | {"features.5.weight": np.zeros((900, 2, 3, 3), np.float32)}, path)
    read = stored.StoredArray.read
    sizes = []
    seen = property(lambda array: sizes.append(array.shape) or read.__get__(array))
    monkeypatch.setattr(stored.StoredArray, "read", seen)
    with pytest.raises(WeightsError, match=r"block2_conv1 has a kernel of shape \(3, 3, 2, 900\), the network needs"):
        nets.load_pretrained(path, params)
    assert sizes and not any(900 in shape for shape in sizes)
