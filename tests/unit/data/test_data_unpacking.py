"""Archives that bite: odd members, bombs and damage are refused by name, and nothing half-made is left."""

import errno
import io
import multiprocessing
import os
import shutil
import signal
import stat
import struct
import tarfile
import threading
import time
import unicodedata
import zipfile

import numpy as np
import pytest

from pwcrf_jax.data.readers import disk, unpacking
from pwcrf_jax.data.readers.image_io import DataError
from pwcrf_jax.data.readers.unpacking import unpack

DIGEST = "0123456789abcdef"


def member(name, content=b"x", **fields):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, content


def tar(path, *members, form=tarfile.PAX_FORMAT):
    with tarfile.open(path, "w:gz" if path.suffix == ".tgz" else "w", format=form) as archive:
        for info, content in members:
            archive.addfile(info, io.BytesIO(content) if info.isreg() else None)
    return path


def header(name, size=0, kind=b"0"):
    """A header block as no tool writes it: a size that octal digits do not hold is in base 256."""
    told = b"%011o\0" % size if 0 <= size < 8**11 else (size % 2**96 | 1 << 95).to_bytes(12, "big")
    fields = name.ljust(100, b"\0"), b"0000644\0", b"0000000\0", b"0000000\0", told, b"00000000000\0"
    block = b"".join((*fields, b" " * 8, kind, b"\0" * 100, b"ustar\x0000")).ljust(512, b"\0")
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


def raw(path, *blocks):
    path.write_bytes(b"".join(blocks) + bytes(1024))
    return path


def zipped(path, *members, method=zipfile.ZIP_DEFLATED):
    """members: (name or ZipInfo, content)."""
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return path


def zip_member(name, mode):
    info = zipfile.ZipInfo(name)
    info.create_system, info.external_attr = 3, mode << 16
    return info, b"../../outside"


@pytest.fixture
def home(tmp_path):
    return tmp_path / "data" / "unpacked" / DIGEST


def refused(path, home, *words):
    """The line that an archive is refused with."""
    around = {p for p in home.parents[2].rglob("*") if "data" not in p.parts}
    with pytest.raises(DataError) as told:
        unpack([path], home)
    line = str(told.value)
    assert str(path) in line and "\n" not in line and all(word in line for word in words), line
    assert not list(home.parent.iterdir())
    assert {p for p in home.parents[2].rglob("*") if "data" not in p.parts} == around
    return line


CAFE = "caf\N{LATIN SMALL LETTER E WITH ACUTE}"
ODD = {  # how the member that is refused is told, and the members
    "symbolic link": ("a/link", member("a/link", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd")),
    "link inside": ("a/link", member("a/b"), member("a/link", b"", type=tarfile.SYMTYPE, linkname="b")),
    "hard link": ("a/link", member("a/b"), member("a/link", b"", type=tarfile.LNKTYPE, linkname="a/b")),
    "link, then a file through it": ("a", member("a", b"", type=tarfile.SYMTYPE, linkname="/srv"), member("a/b")),
    "FIFO": ("a/pipe", member("a/pipe", b"", type=tarfile.FIFOTYPE)),
    "device": ("a/null", member("a/null", b"", type=tarfile.CHRTYPE, devmajor=1, devminor=3)),
    "disk": ("a/sda", member("a/sda", b"", type=tarfile.BLKTYPE, devmajor=8)),
    "absolute": ("/srv/evil", member("/srv/evil")),
    "drive": ("C:evil", member("C:evil")),
    "above": ("a/../../evil", member("a/../../evil")),
    "above and back": ("a/../b", member("a/../b")),
    "backslash": ("a\\\\b", member("a\\b")),
    "line end": ("a\\nb", member("a\nb")),
    "not UTF-8": ("a\\udcff", member("a\udcff")),
    "long": ("yyyy", member("a/" + "y" * 300)),
    "very long": ("a/a/a", member("a/" * 1000 + "b")),
    "the same name": ("a/b", member("a/b"), member("a/b", b"other")),
    "the same but for dots": ("a/./b", member("a/b"), member("a/./b", b"other")),
    "the same but for case": ("A/b", member("a/b"), member("A/b", b"other")),
    "the same but for the form of an accent": (
        "cafe", member(f"a/{CAFE}"), member(f"a/{unicodedata.normalize('NFD', CAFE)}")),
    "a folder that is a file": ("a/b/c", member("a/b"), member("a/b/c")),
    "a file that is a folder": ("a/b", member("a/b/c"), member("a/b")),
    "time 1e30": ("a/b", member("a/b", mtime=1e30)),
    "time before all": ("a/b", member("a/b", mtime=-5.5)),
    "no time": ("a/b", member("a/b", pax_headers={"mtime": "nan"})),
    "time without end": ("a/b", member("a/b", pax_headers={"mtime": "inf"})),
    "owner": ("a/b", member("a/b", uid=2**40)),
    "group": ("a/b", member("a/b", gid=2**40)),
    "sparse": ("a/b", member("a/b", pax_headers={"GNU.sparse.map": "0,1", "GNU.sparse.size": str(2**50)})),
}  # fmt: skip


@pytest.mark.parametrize("name", ["x.tar", "x.tgz"])
@pytest.mark.parametrize("case", ODD)
def test_odd_members_of_tar_archives(case, name, home, tmp_path):
    told, *members = ODD[case]
    refused(tar(tmp_path / name, member("good/one"), *members), home, told, "unpack it yourself")


@pytest.mark.parametrize("kind, size", [(b"0", -512), (b"0", -(2**70)), (b"x", -1), (b"x", 2**33), (b"L", 2**33)])
def test_headers_of_sizes_that_cannot_be(kind, size, home, tmp_path):
    """Some send tarfile round for ever, others have it take all memory."""
    refused(raw(tmp_path / "x.tar", header(b"good"), header(b"a/b", size, kind), bytes(2048)), home)


@pytest.mark.parametrize(
    "record", [b"99999999999 path=a\n", b"abc", b"11 path=\xff\xfe\n", b"0 a=b\n", b"20 mtime=1e999999\n"]
)
def test_bad_pax_headers(record, home, tmp_path):
    blocks = header(b"pax", len(record), b"x"), record.ljust(512, b"\0"), header(b"a/b")
    try:
        unpack([raw(tmp_path / "x.tar", *blocks)], home)
    except DataError as e:
        assert "x.tar" in str(e) and "\n" not in str(e)
    else:
        assert [p.name for p in home.iterdir()] == ["a"]


ODD_ZIPS = {
    "symbolic link": ("a/link", zip_member("a/link", stat.S_IFLNK | 0o777)),
    "FIFO": ("a/pipe", zip_member("a/pipe", stat.S_IFIFO | 0o644)),
    "device": ("a/null", zip_member("a/null", stat.S_IFCHR | 0o644)),
    "socket": ("a/socket", zip_member("a/socket", stat.S_IFSOCK | 0o644)),
    "absolute": ("/srv/evil", ("/srv/evil", b"x")),
    "above": ("../evil", ("../evil", b"x")),
    "drive": ("c:/evil", ("c:/evil", b"x")),
    "backslash": ("a\\\\b", ("a\\b", b"x")),
    "the same but for case": ("A/B", ("a/b", b"x"), ("A/B", b"y")),
    "a folder that is a file": ("a/b", ("a", b"x"), ("a/b", b"y")),
}


@pytest.mark.parametrize("case", ODD_ZIPS)
def test_odd_members_of_zip_archives(case, home, tmp_path):
    told, *members = ODD_ZIPS[case]
    refused(zipped(tmp_path / "x.zip", ("good/one", b"1"), *members), home, told, "unpack it yourself")


def patched(path, **fields):
    """Overwrites fields of the last member of a .zip, in both of its headers."""
    data = bytearray(path.read_bytes())
    central, local = data.rfind(b"PK\1\2"), data.rfind(b"PK\3\4")
    places = {"flags": ("<H", 8, 6), "method": ("<H", 10, 8), "crc": ("<I", 16, 14), "packed": ("<I", 20, 18)}
    places |= {"size": ("<I", 24, 22), "at": ("<I", 42, None)}
    for field, value in fields.items():
        form, in_central, in_local = places[field]
        struct.pack_into(form, data, central + in_central, value)
        if in_local is not None:
            struct.pack_into(form, data, local + in_local, value)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    "fields, told",
    [
        ({"flags": 1}, "encrypted"),
        ({"method": 14}, "compressed by method 14"),  # LZMA, whose header says how much memory to take
        ({"method": 9}, "compressed by method 9"),
        ({"crc": 7}, "damaged at 'a/b'"),
        ({"size": 9}, "damaged at 'a/b'"),
        ({"size": 5_000}, "damaged at 'a/b'"),
        ({"size": 2**32 - 2}, "would become"),
        ({"at": 0}, "lies in another one"),
        ({"packed": 10_000}, "lies in another one"),
    ],
)
def test_zip_archives_that_lie(fields, told, home, tmp_path):
    path = zipped(tmp_path / "x.zip", ("good/one", b"1" * 50), ("a/b", b"2" * 4_000))
    refused(patched(path, **fields), home, told)


@pytest.mark.parametrize("write", [tar, zipped])
def test_bombs(write, home, tmp_path, monkeypatch):
    """Refused before they fill the disk, a .zip before anything is written."""
    monkeypatch.setattr(unpacking, "_SMALL", 1 << 22)
    zeros, count = bytes(1 << 20), 16
    members = [(f"a/{i}", zeros) if write is zipped else member(f"a/{i}", zeros) for i in range(count)]
    refused(write(tmp_path / ("x.zip" if write is zipped else "x.tgz"), *members), home, "would become")
    monkeypatch.setattr(unpacking, "_SMALL", count << 20 | 1 << 16)
    unpack([tmp_path / ("x.zip" if write is zipped else "x.tgz")], home)
    assert sum(p.stat().st_size for p in home.rglob("?*") if p.is_file()) == count << 20


def test_a_million_empty_files_are_a_bomb(home, tmp_path, monkeypatch):
    monkeypatch.setattr(unpacking, "_SMALL", 1 << 20)
    refused(tar(tmp_path / "x.tgz", *(member(f"a/{i}", b"") for i in range(2000))), home, "would become")


@pytest.mark.parametrize(("name", "called"), [("x.tgz", "y.tar"), ("x.tar", "y.tgz"), ("x.tar", "y.tar.gz")])
def test_a_tar_archive_is_known_by_what_it_holds(name, called, home, tmp_path):
    """Some browsers unpack a .tgz while they download it, and keep its name."""
    tar(tmp_path / name, member("a/b", b"1")).rename(tmp_path / called)
    unpack([tmp_path / called], home)
    assert (home / "a/b").read_bytes() == b"1"


@pytest.mark.parametrize("name", ["x.tar", "x.tgz"])
def test_what_is_cut_short_is_not_taken_for_the_end(name, home, tmp_path):
    """tarfile takes a cut between two members, or a header that it cannot read, for the end of the archive."""
    path = tar(tmp_path / name, *(member(f"a/{i}", bytes([i]) * (700 * i)) for i in range(1, 6)))
    whole = path.read_bytes()
    cuts = range(512, len(whole) - 1024, 512) if name == "x.tar" else range(1, len(whole))
    for cut in cuts:
        path.write_bytes(whole[:cut])
        if not whole[cut:].strip(b"\0"):  # padding
            continue
        refused(path, home)


@pytest.mark.parametrize("hides", [1, 2, 3, 4])
def test_an_entry_that_hides_those_behind_it(hides, home, tmp_path):
    """A wrong length of the comment of one in a .zip's directory: zipfile sees fewer members, and says nothing."""
    path = zipped(tmp_path / "x.zip", *((f"a/{i}", b"x") for i in range(5)))
    data = bytearray(path.read_bytes())
    entry = data.find(b"PK\1\2")
    struct.pack_into("<H", data, entry + 32, hides * (46 + 3))
    path.write_bytes(data)
    refused(path, home, f"{5 - hides} members instead of 5")


@pytest.mark.parametrize("count", [65_535, 70_000])
def test_more_members_than_two_bytes_count(count, tmp_path):
    path = zipped(tmp_path / "x.zip", *((f"a/{i}", b"") for i in range(count)), method=zipfile.ZIP_STORED)
    with unpacking._Archive(path) as archive:
        assert sum(1 for _ in unpacking._zip(archive, tmp_path)) == count


def test_a_damaged_header_in_the_middle(home, tmp_path):
    path = tar(tmp_path / "x.tar", *(member(f"a/{i}", b"x" * 700) for i in range(4)))
    whole = path.read_bytes()
    for i in range(4):
        spoiled = bytearray(whole)
        spoiled[i * 3 * 512 + 20] ^= 1
        path.write_bytes(spoiled)
        refused(path, home)


def test_large_members_and_folders_come_out_as_they_went_in(home, tmp_path):
    big = np.random.default_rng(0).bytes(3 * (1 << 20) + 77)
    folders = [member(name, b"", type=tarfile.DIRTYPE) for name in ("./", "./a", "./a/empty", "./a")]
    archives = [
        tar(tmp_path / "x.tgz", *folders, member("./a/big", big), member("a/none", b""), member("a/ü b", b"1")),
        zipped(tmp_path / "y.zip", ("a/", b""), ("a/none", b"later"), ("b/big", big)),
    ]
    unpack(archives, home)
    found = {str(p.relative_to(home)): p.read_bytes() for p in home.rglob("*") if p.is_file()}
    assert found == {"a/big": big, "b/big": big, "a/none": b"later", "a/ü b": b"1"}
    assert (home / "a/empty").is_dir()
    umask = os.umask(0)
    os.umask(umask)
    assert all(p.stat().st_mode & 0o777 == (0o777 if p.is_dir() else 0o666) & ~umask for p in (home, *home.rglob("*")))


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_forms_of_tar(form, home, tmp_path):
    name = "a/" + "b" * 90 + "/" + "c" * 90
    unpack([tar(tmp_path / "x.tar", member(name, b"1", mtime=1e9, uid=1000), form=form)], home)
    assert (home / name).read_bytes() == b"1"


# --- several processes, and those that are killed ------------------------------------------------------------


def _killed_while_unpacking(path, home):
    write, count = unpacking._write, 0

    def kill(*args):
        nonlocal count
        write(*args)
        count += 1
        if count == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    unpacking._write = kill
    unpack([path], home)


def test_what_a_killed_process_leaves_is_deleted(home, tmp_path):
    path = tar(tmp_path / "x.tar", *(member(f"a/{i}") for i in range(9)))
    other = home.with_name("f" * 16)
    for _ in range(2):
        process = multiprocessing.get_context("fork").Process(target=_killed_while_unpacking, args=(path, other))
        process.start()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
        (left,) = home.parent.iterdir()
        assert not other.is_dir() and len(list(left.rglob("?"))) >= 3
    (home.parent / "mine.d").mkdir()
    unpack([path], home)
    assert sorted(p.name for p in home.parent.iterdir()) == [DIGEST, "mine.d"]
    assert len(list((home / "a").iterdir())) == 9


def test_of_two_at_once_one_unpacks_and_the_other_waits(home, tmp_path, monkeypatch, caplog):
    path, real, calls = tar(tmp_path / "x.tar", member("a/b")), unpacking._unpack_one, []
    inside, go_on = threading.Event(), threading.Event()

    def slow(*args):
        calls.append(args)
        inside.set()
        assert go_on.wait(60)
        real(*args)

    monkeypatch.setattr(unpacking, "_unpack_one", slow)
    threads = [threading.Thread(target=unpack, args=([path], home)) for _ in range(3)]
    threads[0].start()
    assert inside.wait(60)
    for thread in threads[1:]:
        thread.start()
    while sum("waiting" in line for line in caplog.messages) < 2:
        time.sleep(0.01)
    assert not home.exists() and len(list(home.parent.iterdir())) == 1  # nobody deletes what the first is writing
    go_on.set()
    for thread in threads:
        thread.join(60)
    assert len(calls) == 1 and [p.name for p in home.parent.iterdir()] == [DIGEST]


def _no_locks(*_):
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


def test_without_locks_nothing_of_others_is_deleted(home, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(disk.fcntl, "flock", _no_locks)
    others = home.with_name(f"{'f' * 16}.01234567")
    others.mkdir(parents=True)
    unpack([tar(tmp_path / "x.tar", member("a/b"))], home)
    assert (home / "a/b").is_file() and others.is_dir() and "no lock" in caplog.text


# --- disks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", ["ENOSPC", "EDQUOT", "EROFS", "EACCES", "EIO"])
@pytest.mark.parametrize("name", ["x.zip", "x.tgz"])
def test_disks_that_take_no_more(code, name, home, tmp_path, monkeypatch):
    path = tmp_path / name
    _ = zipped(path, ("a/1", b"x"), ("a/2", b"y")) if name == "x.zip" else tar(path, member("a/1"), member("a/2"))
    write = unpacking._write

    def refuse(stream, size, target):
        if target.name == "2":
            raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)), str(target))
        write(stream, size, target)

    monkeypatch.setattr(unpacking, "_write", refuse)
    with pytest.raises(DataError) as told:
        unpack([path], home)
    line = str(told.value)
    assert str(home.parent) in line and os.strerror(getattr(errno, code)) in line and "data.data_dir" in line
    assert "damaged" not in line and "\n" not in line and not list(home.parent.iterdir())


@pytest.mark.parametrize("name", ["x.zip", "x.tar"])
def test_a_disk_without_room_is_refused_before_anything_is_written(name, home, tmp_path, monkeypatch):
    path = tmp_path / name
    _ = zipped(path, ("a/1", bytes(9000))) if name == "x.zip" else tar(path, member("a/1", bytes(9000)))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 5000, 5000))
    monkeypatch.setattr(unpacking, "_write", lambda *_: pytest.fail("written"))
    refused(path, home, "5,000 bytes are free", "data.data_dir")


def test_an_archive_on_a_broken_disk(home, tmp_path, monkeypatch):
    """Told of the disk that is read, not of the one that is written."""
    path = tar(tmp_path / "x.tar", member("a/1", bytes(5000)))
    read = unpacking._Archive.read

    def broken(self, size=-1):
        if self.tell() > 600:
            with unpacking._reading(self.path):
                raise OSError(errno.EIO, "Input/output error")
        return read(self, size)

    monkeypatch.setattr(unpacking._Archive, "read", broken)
    assert "data.data_dir" not in refused(path, home, "cannot be read (Input/output error)")
