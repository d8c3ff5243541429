"""What --images means: every image there is predicted or named, whatever it is called and however it is linked."""

import io
import os
import pathlib
import socket

import numpy as np
import pytest
from PIL import Image

from pwcrf_jax.data import DataError
from pwcrf_jax.prediction import image_files
from pwcrf_jax.runtime.files import FileError


def picture(form="PNG"):
    out = io.BytesIO()
    Image.fromarray(np.zeros((8, 9, 3), np.uint8)).save(out, form)
    return out.getvalue()


@pytest.fixture
def photos(tmp_path):
    """add(name, content) writes photos/NAME; find(pattern) looks for it as --images does."""
    root = tmp_path / "photos"
    (root / "a").mkdir(parents=True)
    (root / "a" / "first.png").write_bytes(picture())

    class Photos:
        def add(self, name, content=None):
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(picture() if content is None else content)

        def link(self, name, target):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).symlink_to(target)

        def find(self, pattern="", output="out"):
            found = image_files.find_images(str(root / pattern), str(tmp_path / output))
            below = lambda paths: {os.path.relpath(path, root) for path in paths}
            return set(found.images), below(found.failed), below(found.left_out)

    photos = Photos()
    photos.root = root
    return photos


@pytest.mark.parametrize(
    ("name", "form", "wanted"),
    [
        ("b.JFIF", "JPEG", "b"),
        ("b.jpe", "JPEG", "b"),
        ("b", "PNG", "b"),
        ("scan.0001", "TIFF", "scan.0001"),
        ("b.txt", "WEBP", "b.txt"),
        ("b.gif", "BMP", "b.gif"),
        ("b.heic", "JPEG", "b.heic"),
        ("b.jpg", "PNG", "b"),
    ],
)
@pytest.mark.parametrize("pattern", ["", "**/*", "**"])
def test_images_are_told_by_what_they_are(photos, name, form, wanted, pattern):
    photos.add(f"deep/{name}", picture(form))
    assert photos.find(pattern) == ({"a/first", f"deep/{wanted}"}, set(), set())


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("b.gif", picture("GIF")),
        ("b", picture("GIF")),
        ("b.ppm", picture("PPM")),
        ("b.HEIC", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"),
        ("b.dat", b"\0\0\0\x18ftypavif\0\0\0\0mif1avif"),
        ("b.NEF", picture("TIFF")),
        (".b.png", picture()),
        (".thumbnails/b", picture("JPEG")),
    ],
)
def test_images_that_are_not_predicted_have_failed(photos, name, content):
    photos.add(name, content)
    assert photos.find() == ({"a/first"}, {name}, set())


@pytest.mark.parametrize("name", ["Thumbs.db", "a.json", "README", "a/first.png.xmp", "BMW.txt", "P1 plan.md"])
def test_what_is_no_image_is_named(photos, name):
    photos.add(name, b"BM no image, and P1 none")
    for pattern in ("", "**/*"):
        assert photos.find(pattern) == ({"a/first"}, set(), {name})


def test_hidden_folders_are_named_once(photos):
    for name in (".git/a", ".git/b/c", ".DS_Store"):
        photos.add(name, b"no image")
    assert photos.find() == ({"a/first"}, set(), {".git", ".DS_Store"})
    assert photos.find("**/*") == ({"a/first"}, set(), set()), "a pattern asks for what it matches"
    photos.add(".c/d.png")
    assert photos.find(".c/*")[0] == {"d"} and photos.find(".*/*.png")[0] == {".c/d"}


def _loops(photos):
    for name in ("b", "c", "d", "a/e", "a/f"):
        photos.link(name, photos.root)
    return {"a/first"}, set(), {"b", "c", "d", "a/e", "a/f"}


def _other_disk(photos):
    photos.add("../disk/x/b.png")
    photos.link("c", "../disk")
    photos.link("d", "../disk/x")
    return {"a/first", "c/x/b"}, set(), {"d"}


def _in_a_circle(photos):
    photos.add("../disk/b.png")
    photos.link("c", "../disk")
    photos.link("../disk/back", "../photos/a")
    photos.link("../disk/self", "self")
    photos.link("../disk/here", ".")
    return {"a/first", "c/b"}, {"c/self"}, {"c/back", "c/here"}


def _above(photos):
    photos.add("../disk/b.png")
    photos.link("up", "..")
    photos.link("top", "/")
    return {"a/first"}, {"up", "top"}, set()


def _to_nothing(photos):
    photos.link("b.png", "gone.png")
    photos.link("c", "gone")
    photos.link("d", "d")
    photos.add("b.jpg")
    photos.add("c.jpg")
    return {"a/first", "b", "c"}, {"b.png", "c", "d"}, set()


def _many_ways(photos):
    """2**30 ways lead to the last folder."""
    for i in range(30):
        photos.add(f"../steps/{i}/b.txt", b"")
        for name in ("x", "y"):
            photos.link(f"../steps/{i}/{name}", f"../{i + 1}")
    photos.add("../steps/30/b.png")
    photos.link("c", "../steps/0")
    return {"a/first", "c/" + "x/" * 30 + "b"}, set(), None


@pytest.mark.parametrize("links", [_loops, _other_disk, _in_a_circle, _above, _to_nothing, _many_ways])
@pytest.mark.parametrize("pattern", ["", "**/*", "**/**/*"])
def test_linked_folders_are_followed_once(photos, links, pattern):
    images, failed, left_out = links(photos)
    found = photos.find(pattern)
    assert found[:2] == (images, failed) and left_out in (None, found[2])


def _fifo(path):
    os.mkfifo(path)


def _socket(path):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


def _link_to_a_device(path):
    path.symlink_to("/dev/zero")


def _link_to_nothing(path):
    path.symlink_to("gone")


@pytest.mark.parametrize("make", [_fifo, _socket, _link_to_a_device, _link_to_nothing])
def test_special_files_do_not_hang(tmp_path, monkeypatch, make):
    monkeypatch.chdir(tmp_path)  # a socket's path is short
    (tmp_path / "in").mkdir()
    make(pathlib.Path("in", "x"))
    for pattern in ("in", "in/x", "in/*", "in/**/*"):
        with pytest.raises(DataError, match=r"in/x: (no image|is a|cannot be read)"):
            image_files.find_images(pattern, "out")


def test_folders_that_cannot_be_looked_into(photos, monkeypatch):
    photos.add("b/second.png")
    scandir = os.scandir

    def refusing(path):
        if path == photos.root / "b":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(image_files.os, "scandir", refusing)
    for pattern in ("", "**/*.png"):
        assert photos.find(pattern) == ({"a/first"}, {"b"}, set())


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), OSError(5, "Input/output error")])
def test_files_that_cannot_be_looked_at(photos, monkeypatch, error):
    photos.add("b", b"who knows")
    photos.add("c.txt", b"who knows")

    def refusing(path):
        if path.name == "b":
            raise error
        return "other" if path.name == "c.txt" else "image"

    monkeypatch.setattr(image_files, "image_kind", refusing)
    assert photos.find() == ({"a/first"}, {"b"}, {"c.txt"})


@pytest.mark.parametrize(
    ("pattern", "wanted"),
    [
        ("*", {"top"}),
        ("**/*.png", {"top", "a/first", "a/b/c", "d[1]/e"}),
        ("*/**/*.png", {"a/first", "a/b/c", "d[1]/e"}),
        ("**/b/*", {"a/b/c"}),
        ("a/**/*", {"first", "b/c"}),
        ("?/*.png", {"a/first"}),
        ("d[1]/*.png", {"e"}),
        ("[ad]/**", {"a/first", "a/b/c"}),
        ("**/*.[pq]ng", {"top", "a/first", "a/b/c", "d[1]/e"}),
        ("a/*", {"first"}),
    ],
)
def test_patterns(photos, pattern, wanted):
    for name in ("top.png", "a/b/c.png", "d[1]/e.png", ".h/f.png"):
        photos.add(name)
    images, failed, _ = photos.find(pattern)
    assert images == wanted and not failed


def test_folders_that_a_pattern_matches_are_named(photos):
    photos.add("b.png")
    assert photos.find("*") == ({"b"}, set(), {"a"})


@pytest.mark.parametrize("pattern", ["nowhere", "nowhere/*.png", "*.png", "a/first.png/*", "[", "**/*.jpg"])
def test_patterns_of_nothing_are_refused(photos, pattern):
    with pytest.raises(DataError, match="--images=.*: no (image )?files there"):
        photos.find(pattern)


def test_a_name_that_no_file_can_have(photos):
    with pytest.raises(FileError, match="photos/bbb.* cannot be read .*shorter"):
        photos.find("b" * 300)


@pytest.mark.parametrize("output", ["photos", "photos/a", "."])
def test_images_that_lie_in_the_output(photos, output):
    with pytest.raises(DataError, match="photos/a/first.png: lies in --output=.*; name another output"):
        photos.find(output=output)


def test_earlier_predictions_are_no_images(photos):
    for name in ("out/labels/b.png", "out/overlays/c/d.jpg", "out/results/e.png"):
        photos.add(name)
    written = {"out/labels", "out/overlays", "out/results"}
    assert photos.find(output="photos/out") == ({"a/first"}, set(), written)
    photos.add("out/f.png")
    assert photos.find(output="photos/out") == ({"a/first"}, {"out/f.png"}, written)


@pytest.mark.parametrize("name", ["two\nlines.png", "\x1b[2J.png", "\udcff.png", "tab\t.png"])
def test_names_that_would_break_a_line_are_escaped(photos, name):
    photos.add(name)
    photos.add(name.replace(".png", ".jpg"))
    with pytest.raises(DataError) as refused:
        photos.find()
    assert str(refused.value).isprintable() and str(refused.value).encode()
