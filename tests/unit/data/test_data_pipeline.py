"""Batches: reproducible whatever the threads, hosts or resume point; image and label stay together."""

import numpy as np
import pytest
from PIL import Image

from pwcrf_jax.data import VOID, DataError, eval_batches, load_dataset, train_batches
from pwcrf_jax.data.pipeline import _Augment
from pwcrf_jax.data.readers.image_io import MEAN_COLOUR


class Memory:
    """A data set in memory: colour (k, k, k) has label k, in blocks of 8x8 pixels."""

    class_names = tuple(map(str, range(21)))

    def __init__(self, count=11, sizes=((40, 56), (24, 40), (48, 32))):
        self.records = []
        for i in range(count):
            height, width = sizes[i % len(sizes)]
            blocks = np.random.default_rng(i).integers(0, 21, (height // 8, width // 8), dtype=np.uint8)
            label = blocks.repeat(8, 0).repeat(8, 1)
            self.records.append({"image": label[..., None].repeat(3, 2), "label": label, "id": f"r{i}"})

    def source(self, split):
        return self

    def __len__(self):
        return len(self.records)

    def __getitem__(self, i):
        return self.records[i]

    def open(self, i):
        return self[i] | {"image": Image.fromarray(self[i]["image"])}

    def image_size(self, i):
        return self.records[i]["label"].shape


DATA = Memory()


def take(count, **kw):
    batches = train_batches(DATA, "train", **{"batch_size": 4, "crop_size": (32, 32), **kw})
    out = [next(batches) for _ in range(count)]
    batches.close()
    return out


def assert_equal(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert x["id"] == y["id"]
        np.testing.assert_array_equal(x["image"], y["image"])
        np.testing.assert_array_equal(x["label"], y["label"])


def test_batch_shapes():
    (batch,) = take(1, crop_size=(40, 24))
    assert batch["image"].shape == (4, 40, 24, 3) and batch["image"].dtype == np.uint8
    assert batch["label"].shape == (4, 40, 24) and batch["label"].dtype == np.uint8
    assert len(batch["id"]) == 4 and all(isinstance(i, str) for i in batch["id"])


@pytest.mark.parametrize("threads", [0, 2, 8])
def test_threads_change_nothing(threads):
    assert_equal(take(8, num_threads=1), take(8, num_threads=threads))


def joined(parts):
    """The global batches of what each host took."""
    return [
        {
            "image": np.concatenate([p["image"] for p in step]),
            "label": np.concatenate([p["label"] for p in step]),
            "id": sum((p["id"] for p in step), []),
        }
        for step in zip(*parts, strict=True)
    ]


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_share_the_global_batch(hosts):
    assert_equal(take(7), joined([take(7, host=h, hosts=hosts) for h in range(hosts)]))


@pytest.mark.parametrize("start", [1, 2, 3, 6, 9])  # 11 records in batches of 4: epochs end inside batches
def test_resume_is_exact(start):
    assert_equal(take(12)[start:], take(12 - start, start_step=start))
    assert_equal(take(12)[start:], take(12 - start, start_step=start, num_threads=1))


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_resume_on_another_number_of_hosts(hosts):
    """The state of a run is one number, of samples seen, that knows nothing of hosts."""
    position = train_batches(DATA, "train", batch_size=4, crop_size=(8, 8), hosts=4 // hosts)
    for _ in range(3):
        next(position)
    step = position.samples_seen // 4
    assert_equal(take(7)[step:], joined([take(7 - step, host=h, hosts=hosts, start_step=step) for h in range(hosts)]))


def test_position():
    batches = train_batches(DATA, "train", batch_size=4, crop_size=(8, 8), hosts=2, start_step=5)
    assert (batches.step, batches.samples_seen) == (5, 20)
    next(batches)
    assert (batches.step, batches.samples_seen) == (6, 24)


def test_a_far_start_is_quick_and_exact():
    far = 10**7
    assert_equal(take(2, start_step=far)[1:], take(1, start_step=far + 1))


def test_epochs_are_different_permutations():
    ids = sum((b["id"] for b in take(11)), [])
    epochs = [ids[i : i + 11] for i in (0, 11, 22, 33)]
    assert all(sorted(e) == sorted(r["id"] for r in DATA.records) for e in epochs)
    assert len({tuple(e) for e in epochs}) == 4


def test_seeds_differ_in_order_and_in_content():
    one, other = take(3), take(3, seed=1)
    assert [b["id"] for b in one] != [b["id"] for b in other]
    options = {"batch_size": 4, "crop_size": (32, 32)}
    a, b = (next(train_batches(Memory(count=1), "train", seed=s, **options))["image"] for s in (0, 1))
    assert (a != b).any()
    assert len({x.tobytes() for x in a}) == 4  # and so do repeats of a record


def test_split_smaller_than_a_batch_repeats():
    batch = next(train_batches(Memory(count=2), "train", batch_size=6, crop_size=(16, 16)))
    assert sorted(batch["id"]) == ["r0"] * 3 + ["r1"] * 3


@pytest.mark.parametrize("scale_range", [(1.0, 1.0), (0.7, 1.2), (2.0, 2.0)])
def test_image_and_label_stay_aligned(scale_range):
    """Inside a block, away from its border where scaling mixes colours, the colour is the label."""
    for batch in take(6, scale_range=scale_range, crop_size=(40, 48)):
        label, image = batch["label"], batch["image"]
        inside = np.ones(label.shape, bool)
        for axis in (1, 2):
            for shift in (-2, -1, 1, 2):
                inside &= np.roll(label, shift, axis) == label
                inside &= np.roll(np.roll(label, shift, axis), shift, 3 - axis) == label
        scene = inside & (label != VOID)
        assert scene.mean() > 0.1
        np.testing.assert_array_equal(image[scene], np.repeat(label[scene][:, None], 3, 1))


def test_padding_is_void_and_pad_colour():
    for pad in (MEAN_COLOUR, (1, 2, 3)):
        for batch in take(3, scale_range=(1.0, 1.0), crop_size=(64, 64), pad_value=pad):
            void = batch["label"] == VOID
            assert void.any() and (batch["image"][void] == pad).all()
            heights = [(~v).any(1).sum() for v in void]
            assert all(h in (40, 24, 48) for h in heights)  # nothing of the image is lost


def test_flip_and_crop():
    square = Memory(count=1, sizes=((32, 32),))
    original = square.records[0]["label"]
    options = {"batch_size": 32, "crop_size": (32, 32), "scale_range": (1.0, 1.0)}
    labels = next(train_batches(square, "train", **options))["label"]
    flipped = [np.array_equal(x, original[:, ::-1]) for x in labels]
    assert 6 < sum(flipped) < 26
    assert all(f or np.array_equal(x, original) for f, x in zip(flipped, labels, strict=True))
    labels = next(train_batches(square, "train", **options, flip=False))["label"]
    assert all(np.array_equal(x, original) for x in labels)

    windows = {original[y : y + 25, x : x + 20].tobytes() for y in range(8) for x in range(13)}
    crops = next(train_batches(square, "train", **{**options, "crop_size": (25, 20)}, flip=False))["label"]
    assert {c.tobytes() for c in crops} <= windows and len({c.tobytes() for c in crops}) > 10


@pytest.mark.parametrize(
    "options, match",
    [
        ({"batch_size": 0}, "batch_size: 0"),
        ({"batch_size": 5, "hosts": 2}, "batch_size: 5 is not a multiple of the 2 hosts"),
        ({"host": 2, "hosts": 2}, "host: 2"),
        ({"crop_size": (0, 8)}, r"data\.crop_size: \(0, 8\)"),
        ({"crop_size": 8}, r"data\.crop_size: 8"),
        ({"scale_range": (1.2, 0.7)}, r"data\.scale_range: \(1\.2, 0\.7\)"),
        ({"seed": -1}, "seed: -1"),
        ({"start_step": -1}, "start_step: -1"),
        ({"num_threads": -1}, r"data\.num_threads: -1"),
    ],
)
def test_bad_arguments_are_refused_at_once(options, match):
    with pytest.raises(DataError, match=match):
        train_batches(DATA, "train", **{"batch_size": 4, "crop_size": (8, 8), **options})


# Evaluation --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [0, 1, 4])
def test_eval_in_order_with_filler(threads):
    batches = list(eval_batches(DATA, "val", batch_size=4, size=(64, 56), num_threads=threads))
    assert [b["image"].shape for b in batches] == [(4, 64, 56, 3)] * 3
    assert sum((b["id"] for b in batches), []) == [f"r{i}" for i in range(11)] + [""]
    for batch in batches:
        assert batch["valid_box"].dtype == np.int32 and batch["valid_box"].shape == (4, 4)
        assert batch["image"].dtype == batch["label"].dtype == np.uint8
        keys = ("image", "label", "valid_box", "id")
        for image, label, (top, left, h, w), name in zip(*(batch[k] for k in keys), strict=True):
            outside = np.ones(label.shape, bool)
            outside[:h, :w] = False
            assert (label[outside] == VOID).all() and (image[outside] == MEAN_COLOUR).all()
            if name:
                record = DATA.records[int(name[1:])]
                np.testing.assert_array_equal(label[:h, :w], record["label"])
                np.testing.assert_array_equal(image[:h, :w], record["image"])
            else:
                assert (h, w) == (0, 0)
            assert top == left == 0


@pytest.mark.parametrize("size", [(64, 64), None])
@pytest.mark.parametrize("hosts, batch_size", [(2, 4), (4, 8)])
def test_eval_hosts_yield_equal_counts_and_shapes(size, hosts, batch_size):
    options = {"batch_size": batch_size, "size": size}
    whole = list(eval_batches(DATA, "val", **options))
    parts = [list(eval_batches(DATA, "val", **options, host=h, hosts=hosts)) for h in range(hosts)]
    assert {len(p) for p in parts} == {len(whole)}
    for batch, step in zip(whole, zip(*parts, strict=True), strict=True):
        for key in ("image", "label", "valid_box"):
            np.testing.assert_array_equal(batch[key], np.concatenate([s[key] for s in step]))
        assert batch["id"] == sum((s["id"] for s in step), [])


def test_eval_size_none_rounds_up_to_32():
    shapes = [b["label"].shape for b in eval_batches(DATA, "val", batch_size=1)]
    assert shapes[:3] == [(1, 64, 64), (1, 32, 64), (1, 64, 32)]


def test_eval_image_too_large():
    with pytest.raises(DataError, match=r"image 'r0' is 40x56 .*data\.eval_size 40x48"):
        list(eval_batches(DATA, "val", batch_size=2, size=(40, 48)))
    with pytest.raises(DataError, match=r"data\.eval_size: \(0, 8\)"):
        eval_batches(DATA, "val", batch_size=2, size=(0, 8))


@pytest.mark.parametrize("threads", [0, 2])
def test_a_damaged_record_reaches_the_caller(threads):
    class Damaged(Memory):
        def __getitem__(self, i):
            if i == 3:
                raise DataError("record 'r3' is damaged")
            return super().__getitem__(i)

    with pytest.raises(DataError, match="record 'r3' is damaged"):
        list(eval_batches(Damaged(), "val", batch_size=2, size=(64, 64), num_threads=threads))
    batches = train_batches(Damaged(), "train", batch_size=2, crop_size=(8, 8), num_threads=threads)
    with pytest.raises(DataError, match="record 'r3' is damaged"):
        for _ in range(10):
            next(batches)


def test_prepared_data_set_end_to_end(tmp_path):
    data = load_dataset("synthetic", data_dir=str(tmp_path), num_train=6, num_val=5, image_size=(128, 192))
    batch = next(train_batches(data, "train[:50%]", batch_size=4, crop_size=(96, 96)))
    assert batch["image"].shape == (4, 96, 96, 3) and len(set(batch["id"])) == 3
    batches = list(eval_batches(data, "val", batch_size=2))
    assert len(batches) == 3 and batches[0]["image"].shape == (2, 128, 192, 3)
    source = data.source("val")
    assert batches[1]["id"][0] == source[2]["id"]
    with pytest.raises(DataError, match="no split 'test'"):
        train_batches(data, "test", batch_size=2, crop_size=(8, 8))


@pytest.mark.parametrize("flip", [False, True])
def test_a_crop_is_a_window_of_the_whole_scaled_image(flip):
    """Against scaling all of the image first, by Pillow."""
    rng = np.random.default_rng(5)
    shape, crop = (45, 67), (40, 30)
    image, label = rng.integers(0, 256, (*shape, 3), np.uint8), rng.integers(0, 21, shape, np.uint8)
    sample = {"image": Image.fromarray(image), "label": label, "id": "a"}
    for g in range(40):
        draw = np.random.default_rng([9, g])
        scale, mirrored = draw.uniform(0.5, 1.5), draw.random() < 0.5
        height, width = (max(1, round(n * scale)) for n in shape)
        whole = np.asarray(sample["image"].resize((width, height), Image.Resampling.BILINEAR), int)
        labels = np.asarray(Image.fromarray(label).resize((width, height), Image.Resampling.NEAREST))
        if flip and mirrored:
            whole, labels = whole[:, ::-1], labels[:, ::-1]
        extra = (height - crop[0], width - crop[1])
        top, left = (int(np.sign(e)) * int(draw.integers(abs(e) + 1)) for e in extra)
        got = _Augment(crop, (0.5, 1.5), flip, 9, (1, 2, 3))(sample, g)
        for y in range(crop[0]):
            for x in range(0, crop[1], 7):
                inside = 0 <= y + top < height and 0 <= x + left < width
                assert got["label"][y, x] == (labels[y + top, x + left] if inside else VOID)
                expected = whole[y + top, x + left] if inside else (1, 2, 3)
                assert np.abs(got["image"][y, x] - expected).max() <= 1
