"""Files of torch.save, written by hand: read as they are meant, refused in a line where damaged or hostile."""

import random
import struct
import zipfile

import numpy as np
import pytest

from pwcrf_jax.nets import torch_files
from pwcrf_jax.nets.state_dicts import open_state
from pwcrf_jax.nets.stored import WeightsError

MAGIC = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
PROTOCOL = b"\x80\x02M\xe9\x03."
SYSTEM = b"\x80\x02}X\x0d\x00\x00\x00little_endian\x88s."
ORDERED = b"ccollections\nOrderedDict\n)R"
CODES = {"f4": "Float", "f8": "Double", "f2": "Half", "u2": "BFloat16", "i8": "Long"}


def text(words):
    return b"X" + struct.pack("<I", len(words.encode())) + words.encode()


def whole(number):
    return b"J" + struct.pack("<i", number)


def whole_tuple(numbers):
    return b"(" + b"".join(map(whole, numbers)) + b"t"


def tensor(key, array, view=b"N", *, shape=None, strides=None, offset=0, values=None):
    """The pickle of a tensor over all of an array; view: what streams say and archives do not."""
    shape = array.shape if shape is None else shape
    strides = [n // array.itemsize for n in array.strides] if strides is None else strides
    kind = f"ctorch\n{CODES[array.dtype.str[1:]]}Storage\n".encode()
    storage = b"(" + text("storage") + kind + text(key) + text("cpu") + whole(array.size if values is None else values)
    parts = whole(offset) + whole_tuple(shape) + whole_tuple(strides) + b"\x89" + ORDERED
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + view + b"tQ" + parts + b"tR"


def program(tensors, view=b"N", **options):
    items = b"".join(
        text(name) + tensor(str(i), array, view, **options) for i, (name, array) in enumerate(tensors.items())
    )
    return b"\x80\x02" + ORDERED + b"(" + items + b"u."


def stream(path, tensors, code=None):
    keys = [str(i) for i in range(len(tensors))]
    listed = b"\x80\x02](" + b"".join(map(text, keys)) + b"e."
    data = b"".join(struct.pack("<q", array.size) + array.tobytes() for array in tensors.values())
    path.write_bytes(MAGIC + PROTOCOL + SYSTEM + (code or program(tensors)) + listed + data)
    return path


def archive(path, tensors, code=None, compression=zipfile.ZIP_STORED, order=b"little"):
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("net/data.pkl", code or program(tensors, b""))
        file.writestr("net/byteorder", order)
        for i, array in enumerate(tensors.values()):
            file.writestr(f"net/data/{i}", array.tobytes())
    return path


def arrays():
    rng = np.random.default_rng(0)
    return {
        "a.weight": rng.standard_normal((4, 3, 2, 2)).astype(np.float32),
        "a.bias": rng.standard_normal(4).astype(np.float64),
        "b.weight": rng.standard_normal((2, 3)).astype(np.float16),
        "b.count": np.array(7, np.int64),
    }


def refused(path, *told):
    with pytest.raises(WeightsError) as error:
        with open_state(path) as state:
            {name: state.array(name) for name in state}
    line = str(error.value)
    assert str(path) in line and "\n" not in line and all(words in line for words in told), line


@pytest.mark.parametrize("write", [stream, archive])
def test_both_forms(write, tmp_path):
    tensors = arrays()
    with open_state(write(tmp_path / "net.pth", tensors)) as state:
        assert list(state) == list(tensors)
        for name in ("a.weight", "a.bias", "b.weight"):
            assert state[name].shape == tensors[name].shape
            np.testing.assert_array_equal(state.array(name), tensors[name].astype(np.float32))
        with pytest.raises(WeightsError, match="b.count holds whole numbers"):
            state.array("b.count")
        with pytest.raises(WeightsError, match=r"a.bias has the shape \(4,\), the network needs \(5,\)"):
            state.array("a.bias", (5,))
        with pytest.raises(WeightsError, match="has no tensor c"):
            state.array("c")
        assert state.unused() == ()
    with open_state(tmp_path / "net.pth") as state:
        state.array("a.bias")
        assert state.unused() == ("b",)


def test_bfloat16_is_the_upper_half_of_a_float(tmp_path):
    values = np.array([1.5, -2.0, 0.15625], np.float32)
    with open_state(stream(tmp_path / "net.pt", {"x": (values.view("<u4") >> 16).astype("<u2")})) as state:
        np.testing.assert_array_equal(state.array("x"), values)


def test_views_of_a_storage(tmp_path):
    array = np.arange(12, dtype=np.float32)
    code = program({"x": array}, shape=(3, 2), strides=(1, 3), offset=4)
    with open_state(stream(tmp_path / "net.pth", {"x": array}, code)) as state:
        np.testing.assert_array_equal(state.array("x"), [[4, 7], [5, 8], [6, 9]])


@pytest.mark.parametrize("key", ["state_dict", "model"])
def test_a_checkpoint_has_the_weights_below_a_name(key, tmp_path):
    tensors = {"x": np.ones(3, np.float32)}
    inner = program(tensors)[2:-1]
    code = b"\x80\x02}(" + text("epoch") + whole(3) + text(key) + inner + b"u."
    with open_state(stream(tmp_path / "net.pth", tensors, code)) as state:
        assert list(state) == ["x"]


X = np.ones((2, 2), np.float32)
LONGEST = 200_000
HOSTILE = {
    "a call": (b"\x80\x02cos\nsystem\n" + text("true") + b"\x85R.", "os.system"),
    "a call by another way": (b"\x80\x02cbuiltins\neval\n(" + text("1") + b"tR.", "builtins.eval"),
    "an object": (b"\x80\x02ctorch.nn.modules.conv\nConv2d\n)\x81.", "save model.state_dict()"),
    "an operation of protocol 4": (b"\x80\x04\x8c\x01x.", "the operation"),
    "more than the storage": (program({"x": X}, shape=(3, 2)), "larger than its storage"),
    "no end of copies": (program({"x": X}, shape=(1 << 20, 1 << 10), strides=(0, 0)), "larger than its storage"),
    "beyond the storage": (program({"x": X}, offset=1), "larger than its storage"),
    "before the storage": (program({"x": X}, offset=-1), "no tensor of the usual form"),
    "backwards": (program({"x": X}, strides=(-1, 1)), "no tensor of the usual form"),
    "axes that differ": (program({"x": X}, shape=(2,)), "no tensor of the usual form"),
    "a storage without end": (program({"x": X}, values=1 << 30), "do not fit"),
    "a storage in two forms": (program({"x": X})[:-2] + text("y") + tensor("0", X.astype("f8")) + b"u.", "two forms"),
    "no tensors": (b"\x80\x02}" + text("lr") + whole(1) + b"s.", "holds no tensors by name, but lr"),
    "a list": (b"\x80\x02].", "no dictionary of tensors"),
    "a key that hashes for ever": (b"\x80\x02}" + b")" + b"\x85" * 100_000 + b"Ns.", "dictionary by names"),
    "an empty stack": (b"\x80\x02R.", "cannot be read"),
    "a memo that was never": (b"\x80\x02j\xff\xff\xff\xff.", "cannot be read"),
    "a memo far away": (b"\x80\x02Nr\xff\xff\xff\xff.", "no dictionary of tensors"),
    "a mark that is none": (b"\x80\x02t.", "cannot be read"),
    "text longer than the file": (b"\x80\x02X\xff\xff\xff\xff.", "a longer pickle"),
    "a pickle that does not end": (b"\x80\x02" + b"]" * (LONGEST + 9) + b".", "a longer pickle"),
    "a name that does not end": (b"\x80\x02c" + b"x" * 1000, "a name without end"),
}  # fmt: skip


@pytest.mark.parametrize("write", [stream, archive])
@pytest.mark.parametrize("case", HOSTILE)
def test_what_is_hostile_is_refused_unrun(case, write, tmp_path, monkeypatch):
    monkeypatch.setattr(torch_files, "_MAX_PROGRAM", LONGEST)
    code, told = HOSTILE[case]
    if write is archive:
        code = code.replace(b"NtQ", b"tQ")
    refused(write(tmp_path / "net.pth", {"x": X} if b"storage" in code else {}, code), told)


def test_archives_of_other_kinds(tmp_path):
    path = tmp_path / "net.pth"
    refused(archive(path, {"x": X}, compression=zipfile.ZIP_DEFLATED), "compressed")
    refused(archive(path, {"x": X}, order=b"big"), "another byte order")
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("readme.txt", "hello")
    refused(path, "no data.pkl")


def test_other_files(tmp_path):
    path = tmp_path / "net.pth"
    for content in (
        b"",
        b"x",
        b"\x80\x02",
        b"PK\x03\x04",
        b"PK\x03\x04" + bytes(100),
        bytes(1000),
        MAGIC,
        MAGIC + PROTOCOL,
    ):
        path.write_bytes(content)
        refused(path)


@pytest.mark.parametrize("write", [stream, archive])
def test_spoiled_bytes_and_ends_are_read_or_refused(write, tmp_path):
    data = write(tmp_path / "whole.pth", {"x": X, "y": np.arange(5, dtype=np.float32)}).read_bytes()
    rng, path, counts = random.Random(0), tmp_path / "net.pth", {"read": 0, "refused": 0}
    for turn in range(150):
        spoiled = bytearray(data)
        if turn % 3 == 0:
            del spoiled[rng.randrange(len(data)) :]
        for _ in range(turn % 3):
            spoiled[rng.randrange(len(spoiled))] = rng.randrange(256)
        path.write_bytes(spoiled)
        try:
            with open_state(path) as state:
                [state.array(name) for name in state]
        except WeightsError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            counts["refused"] += 1
        else:
            counts["read"] += 1
    assert counts["refused"] > 50, counts
