"""Jitter of colours against its four steps done one by one; functions of the user's own, and what they must not do."""

import colorsys
import re
import sys

import numpy as np
import pytest
from test_data_pipeline import DATA, VOID, assert_equal, joined, take

from pwcrf_jax.data import DataError, augment
from pwcrf_jax.runtime.errors import ConfigError

LUMA = np.array([0.299, 0.587, 0.114])
STRENGTHS = (0.4, 0.3, 0.5, 0.1)
OWN = '''
import numpy as np

def shuffled(image, mask, rng):
    """Another size, values that depend on rng, a mask of another dtype."""
    rows = rng.permutation(len(mask))[: len(mask) - 3]
    return image[rows], mask[rows].astype(np.int64)

def inverted(image, mask, rng):
    for _ in range(int(rng.integers(5))):
        rng.random()
    image[:] = 255 - image
    return image, mask

def fails(image, mask, rng):
    raise KeyError("what it\\nwanted")

pair = lambda image, mask, rng: image
floats = lambda image, mask, rng: (image / 255, mask)
grey = lambda image, mask, rng: (image[..., 0], mask)
cropped = lambda image, mask, rng: (image[2:], mask)
soft = lambda image, mask, rng: (image, mask / 1.0)
label = lambda image, mask, rng: (image, np.full_like(mask, 21))
number = 7
'''


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Name of a module in the current folder."""
    (tmp_path / "own_augment.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield "own_augment"
    sys.modules.pop("own_augment", None)


def by_steps(image, drawn):
    """Brightness, contrast, saturation, then hue in YIQ, in float64; nothing is rounded or clipped in between."""
    x, (b, c, s, h) = image.astype(float), drawn
    x = (1 + b) * x
    mean = (x @ LUMA).mean()
    x = mean + (1 + c) * (x - mean)
    grey = (x @ LUMA)[..., None]
    x = grey + (1 + s) * (x - grey)
    yiq = np.array([LUMA, [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
    y, i, q = np.moveaxis(x @ yiq.T, -1, 0)
    turned = (i + 1j * q) * np.exp(2j * np.pi * h)
    x = np.stack([y, turned.real, turned.imag], -1) @ np.linalg.inv(yiq).T
    return np.clip(np.floor(x + 0.5), 0, 255)


def test_jitter_is_its_four_steps():
    for seed in range(20):
        image = np.random.default_rng(seed).integers(0, 256, (7, 9, 3), dtype=np.uint8)
        got = augment.jitter(image, np.random.default_rng(seed), STRENGTHS)
        rng = np.random.default_rng(seed)
        expected = by_steps(image, [rng.uniform(-s, s) for s in STRENGTHS])
        assert got.dtype == np.uint8 and got.shape == image.shape
        off = np.abs(got - expected)  # float32 may round a value at a half to the other side
        assert off.max() <= 1 and (off > 0).mean() < 0.02 and np.any(got != image)


def test_a_strength_of_zero_changes_nothing():
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    np.testing.assert_array_equal(augment.jitter(image, np.random.default_rng(1), (0.0,) * 4), image)


def test_hue_keeps_luma_and_turns_colours():
    image = np.full((1, 1, 3), (160, 100, 100), np.uint8)
    hues = []
    for seed in range(30):
        got = augment.jitter(image, np.random.default_rng(seed), (0, 0, 0, 0.5))
        assert got[0, 0] @ LUMA == pytest.approx(image[0, 0] @ LUMA, abs=1)
        hues.append(colorsys.rgb_to_hsv(*got[0, 0] / 255)[0])
    assert np.ptp(hues) > 0.8


def test_jitter_changes_colours_of_what_is_no_padding_and_nothing_else():
    for plain, got in zip(take(4, crop_size=(48, 48)), take(4, crop_size=(48, 48), jitter=STRENGTHS), strict=True):
        np.testing.assert_array_equal(plain["label"], got["label"])
        np.testing.assert_array_equal(plain["valid_box"], got["valid_box"])
        for before, after, (y0, x0, y1, x1) in zip(plain["image"], got["image"], plain["valid_box"], strict=True):
            assert np.mean(before[y0:y1, x0:x1] != after[y0:y1, x0:x1]) > 0.1  # of dark colours
            before[y0:y1, x0:x1] = after[y0:y1, x0:x1]
            np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize("function", ["", "shuffled"])
def test_threads_processes_hosts_and_resuming_change_nothing(own, function):
    of = {"jitter": STRENGTHS, "augment_by": function and f"{own}:{function}"}
    whole = take(5, num_threads=0, **of)
    assert_equal(whole, take(5, num_threads=4, **of))
    assert_equal(whole, take(5, num_workers=2, **of))
    assert_equal(whole[3:], take(2, start_step=3, **of))
    assert_equal(whole, joined([take(5, host=h, hosts=2, **of) for h in range(2)]))
    assert not np.array_equal(whole[0]["image"], take(1, seed=1, **of)[0]["image"])


def test_a_function_of_ones_own_comes_first_and_changes_no_other_draw(own):
    records = [r["image"].copy() for r in DATA.records]
    plain, got = take(3, pad_value=(0, 0, 0)), take(3, pad_value=(255,) * 3, augment_by=f"{own}:inverted")
    for a, b in zip(plain, got, strict=True):
        np.testing.assert_array_equal(a["label"], b["label"])
        assert np.abs(255 - a["image"] - b["image"].astype(int)).max() <= 1  # as resizing rounds
    assert all(np.array_equal(a, r["image"]) for a, r in zip(records, DATA.records, strict=True)), "it got a copy"


@pytest.mark.parametrize(
    "function, said",
    [
        ("fails", r"image 'r\d+': KeyError: 'what it\\nwanted' \(own_augment.py, line 16\)$"),
        ("pair", r"must return \(image, mask\), got ndarray"),
        ("floats", r"the image must be uint8 \[H, W, 3\], got float64 \[\d+, \d+, 3\]"),
        ("grey", r"the image must be uint8 \[H, W, 3\], got uint8 \[\d+, \d+\]"),
        ("cropped", r"the mask must be integers \[\d+, \d+\] as the image, got uint8"),
        ("soft", r"the mask must be integers .*, got float64"),
        ("label", r"the mask must hold 0..20 or void \(255\), got 21 in \d+ pixels"),
    ],
)
def test_what_a_function_must_not_return(own, function, said):
    with pytest.raises(DataError) as error:
        take(1, augment_by=f"{own}:{function}")
    text = str(error.value).partition("\n-----")[0]  # after it Grain may speak of itself
    assert re.match(rf"config\.data\.augment = 'own_augment:{function}', .*{said}", text) and "\n" not in text, text


@pytest.mark.parametrize(
    "name, said",
    [
        ("own_augment:gone", "own_augment has no gone"),
        ("own_augment:number", "is no function but int"),
        ("nowhere_at_all:f", r"nowhere_at_all cannot be imported: ModuleNotFoundError: .*install it, or start in the"),
    ],
)
def test_what_is_no_function(own, name, said):
    with pytest.raises(ConfigError, match=rf"config\.data\.augment = '{name}'.*{said}"):
        take(1, augment_by=name)


def test_void_may_be_painted(own):
    custom = augment.Custom("own_augment:shuffled", 21)
    image, mask = np.zeros((8, 8, 3), np.uint8), np.full((8, 8), VOID, np.uint8)
    assert custom(image, mask, np.random.default_rng(0), "a")[1].dtype == np.uint8
