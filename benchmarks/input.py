"""The input pipeline against what else people read images with: the same work, one run.

    python benchmarks/input.py --voc PATH/VOCdevkit/VOC2012 --camvid PATH/CamVid      (real images)
    python benchmarks/input.py [--quick]                                             (made-up photographs)

Each takes the same JPEG images and PNG masks through decoding, a random scale (bilinear, masks nearest neighbour), a
flip, a random crop and batching, at 500 x 375 and 480 x 360:

* ours: `pwcrf_jax.data.train_batches`, records of TFDS read by Grain in two threads;
* loops over the loose files with Pillow and with OpenCV, in this process;
* PyTorch's DataLoader over the same functions, with one worker process a core.

A rival that is not installed is left out and named (`pip install opencv-python-headless torch`). Figures are images a
second, medians of interleaved turns, each begun after the rival is warm. Ends with one line of JSON: `input_ratio` is
ours over the best rival, the smaller of the two sizes; and shows that batches are the same for any number of threads.

At 500 x 375 also how much of the input a training step hides, with the batches made and transferred ahead of it
(`parallel.ahead`, as the trainer does) and without. The device is a stand-in that takes as long as our reader takes for
a batch, the hardest case, and no core; as in the trainer, each step is waited for when the next one is started.
"""

import argparse
import hashlib
import itertools
import json
import os
import sys
import tempfile
import time
from concurrent import futures
from functools import partial
from pathlib import Path

import jax
import numpy as np
import timing
from PIL import Image

from pwcrf_jax.data import load_dataset, train_batches
from pwcrf_jax.runtime import parallel

try:
    import cv2
except ImportError:
    cv2 = None
try:
    import torch
    import torch.utils.data
except ImportError:
    torch = None

CROP, SCALES, BATCH = (320, 320), (0.7, 1.2), 8
FILL = np.full((*CROP, 3), (124, 116, 104), np.uint8)
VOID = np.full(CROP, 255, np.uint8)
SIZES = {"500x375": (375, 500), "480x360": (360, 480)}


def write_photographs(root, size, count):
    """A folder in VOC layout of made-up photographs: shading, edges and a little noise."""
    rng = np.random.default_rng(0)
    height, width = size
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    for i in range(count):
        resize = lambda x, how: np.asarray(Image.fromarray(x).resize((width, height), how), np.float32)
        smooth = resize(rng.integers(0, 256, (6, 8, 3), np.uint8), Image.Resampling.BICUBIC)
        edges = resize(rng.integers(0, 120, (12, 16, 3), np.uint8), Image.Resampling.NEAREST)
        image = (smooth + edges - 60 + rng.normal(0, 5, (height, width, 3))).clip(0, 255).astype(np.uint8)
        Image.fromarray(image).save(root / f"JPEGImages/{i:04d}.jpg", quality=90)
        label = resize(rng.integers(0, 21, (6, 8), np.uint8), Image.Resampling.NEAREST).astype(np.uint8)
        Image.fromarray(label).save(root / f"SegmentationClass/{i:04d}.png")
    (root / "ImageSets/Segmentation/train.txt").write_text("".join(f"{i:04d}\n" for i in range(count)))


def pairs_of(name, root, size):
    """The (image, mask) files of one size, as every loop reads them."""
    if name == "camvid":
        pairs = [(p, root / "trainannot" / f"{p.stem}.png") for p in sorted((root / "train").glob("*.[jp][pn]g"))]
    else:
        folder, masks = root / "JPEGImages", root / "SegmentationClass"
        lists = [root / f"ImageSets/Segmentation/{split}.txt" for split in ("train_aug", "train")]
        names = next(p for p in lists if p.is_file()).read_text().split()
        pairs = [(folder / f"{n}.jpg", masks / f"{n}.png") for n in names]
    pairs = [pair for pair in pairs if Image.open(pair[0]).size == size[::-1]]
    if not pairs:
        sys.exit(f"{root}: no image of {size[0]} x {size[1]} in its train split")
    return pairs


def as_voc(pairs, root):
    """The same files as a folder in VOC layout, whatever they come from."""
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    for image, mask in pairs:
        (root / "JPEGImages" / f"{image.stem}.jpg").symlink_to(image.resolve())
        (root / "SegmentationClass" / f"{image.stem}.png").symlink_to(mask.resolve())
    (root / "ImageSets/Segmentation/train.txt").write_text("".join(f"{image.stem}\n" for image, _ in pairs))
    return root


def draw(rng, height, width):
    """(scale, flip, (top, left) of the crop in the scaled image, negative where it is padded)."""
    scale, flip = rng.uniform(*SCALES), rng.random() < 0.5
    extra = [max(1, round(n * scale)) - c for n, c in zip((height, width), CROP, strict=True)]
    return scale, flip, [int(np.sign(e)) * int(rng.integers(abs(e) + 1)) for e in extra]


def place(array, top, left, padding):
    """The crop; outside the image what `padding` holds."""
    out = padding.copy()
    inside = array[max(top, 0) : max(top + CROP[0], 0), max(left, 0) : max(left + CROP[1], 0)]
    out[max(-top, 0) :, max(-left, 0) :][: inside.shape[0], : inside.shape[1]] = inside
    return out


def with_pillow(pair, rng):
    image, label = Image.open(pair[0]).convert("RGB"), Image.open(pair[1])
    scale, flip, at = draw(rng, image.height, image.width)
    size = [max(1, round(n * scale)) for n in image.size]
    image = image.resize(size, Image.Resampling.BILINEAR)
    image = np.asarray(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else image)
    label = np.asarray(label.resize(size, Image.Resampling.NEAREST))
    return _finish(image, label, flip, at)


def with_opencv(pair, rng):
    image = cv2.imread(str(pair[0]), cv2.IMREAD_COLOR_RGB)
    label = np.asarray(Image.open(pair[1]))  # OpenCV turns a palette into colours
    scale, flip, at = draw(rng, *label.shape)
    size = [max(1, round(n * scale)) for n in label.shape[::-1]]
    # As Pillow does it, areas are averaged when an image is made smaller.
    image = cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    image = cv2.flip(image, 1) if flip else image
    return _finish(image, cv2.resize(label, size, interpolation=cv2.INTER_NEAREST), flip, at)


def _finish(image, label, flip, at):
    return place(image, *at, FILL), place(label[:, ::-1] if flip else label, *at, VOID)


def loop(read, pairs):
    rng = np.random.default_rng(0)
    while True:
        samples = [read(pairs[rng.integers(len(pairs))], rng) for _ in range(BATCH)]
        yield np.stack([image for image, _ in samples]), np.stack([label for _, label in samples])


class Files(torch.utils.data.Dataset if torch else object):
    def __init__(self, read, pairs):
        self.read, self.pairs = read, pairs

    def __len__(self):
        return 10**9

    def __getitem__(self, index):
        if cv2 is not None:
            cv2.setNumThreads(0)  # one process a core
        return self.read(self.pairs[index % len(self.pairs)], np.random.default_rng(index))


def torch_loader(read, pairs):
    rng = np.random.default_rng(0)
    sampler = iter(lambda: int(rng.integers(10**9)), None)
    loader = torch.utils.data.DataLoader(
        Files(read, pairs), batch_size=BATCH, sampler=_Endless(sampler), num_workers=os.cpu_count() or 1
    )
    return iter(loader)


class _Endless:
    def __init__(self, indices):
        self._indices = indices

    def __iter__(self):
        return self._indices

    def __len__(self):
        return 10**9


def ours(dataset, split, num_threads=None):
    threads = (os.cpu_count() or 1) if num_threads is None else num_threads
    return train_batches(dataset, split, batch_size=BATCH, crop_size=CROP, scale_range=SCALES, num_threads=threads)


def seconds_of(batches, count):
    started = time.perf_counter()
    for batch in itertools.islice(batches, count):
        assert np.shape(batch["image"] if isinstance(batch, dict) else batch[0]) == (BATCH, *CROP, 3)
    return time.perf_counter() - started


def turn(start, count):
    """Seconds of some batches of a reader that is begun here and warm when they are read."""
    batches = start()
    # Past the start of threads and processes and what they read ahead.
    seconds_of(batches, 2 + count // 4)
    seconds = seconds_of(batches, count)
    if hasattr(batches, "close"):
        batches.close()
    return seconds


def measure(dataset, split, pairs, args):
    """{reader: images a second}"""
    readers = {"ours": lambda: ours(dataset, split), "Pillow loop": lambda: loop(with_pillow, pairs)}
    if cv2 is not None:
        readers["OpenCV loop"] = lambda: loop(with_opencv, pairs)
    if torch is not None:
        readers["DataLoader, Pillow"] = lambda: torch_loader(with_pillow, pairs)
    if torch is not None and cv2 is not None:
        readers["DataLoader, OpenCV"] = lambda: torch_loader(with_opencv, pairs)
    turns = {name: partial(turn, start, args.batches) for name, start in readers.items()}
    return {name: args.batches * BATCH / s for name, s in timing.medians(turns, args.repeats, warm=0).items()}


def training(dataset, how, step, count):
    """Seconds of some steps of `step` seconds each, on a stand-in for a device, and of their input."""
    batches, waits = ours(dataset, "train"), 1 if how == "in turn" else 2
    transferred = (jax.device_put(parallel.split({"image": b["image"], "label": b["label"]})) for b in batches)
    inputs, running = parallel.ahead(batches) if how == "ahead" else transferred, []
    with futures.ThreadPoolExecutor(1) as device:
        for n in range(count + 4):
            if n == 4:  # warm
                started = time.perf_counter()
            jax.block_until_ready(next(inputs))
            running.append(device.submit(time.sleep, step))
            if len(running) == waits:
                running.pop(0).result()
    inputs.close()
    batches.close()
    return time.perf_counter() - started


def overlap(dataset, rate, args):
    """{how: images a second of a step as long as the input of its batch, beside those of the step alone}"""
    step = BATCH / rate
    turns = {how: partial(training, dataset, how, step, args.batches) for how in ("in turn", "without", "ahead")}
    return {how: args.batches * step / s for how, s in timing.medians(turns, args.repeats, warm=0).items()}


def digest(batches, count=6):
    sha = hashlib.sha256()
    for batch in itertools.islice(batches, count):
        sha.update(batch["image"].tobytes() + batch["label"].tobytes() + repr(batch["id"]).encode())
    batches.close()
    return sha.hexdigest()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--voc", help="folder in VOC layout, for 500 x 375")
    parser.add_argument("--camvid", help="CamVid folder, for 480 x 360")
    parser.add_argument("--repeats", type=int, help="turns of each reader (7; quick: 3)")
    parser.add_argument("--batches", type=int, help="timed batches of 8 a turn (40; quick: 10)")
    parser.add_argument("--quick", action="store_true", help="under a minute; figures are rougher")
    args = parser.parse_args()
    for name, whole, quick in (("repeats", 7, 3), ("batches", 40, 10)):
        value = getattr(args, name)
        setattr(args, name, (quick if args.quick else whole) if value is None else value)
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1")
    for name in ("voc", "camvid"):
        if getattr(args, name) and not os.path.isdir(getattr(args, name)):
            parser.error(f"--{name} {getattr(args, name)}: no such folder")
    missing = [name for name, module in (("OpenCV", cv2), ("PyTorch", torch)) if module is None]
    print(f"{os.cpu_count()} cores" + (f"; not installed and left out: {', '.join(missing)}" if missing else ""))
    figures, ratios, same, hidden = {}, {}, True, {}
    with tempfile.TemporaryDirectory() as scratch:
        for (what, size), given in zip(SIZES.items(), (args.voc, args.camvid), strict=True):
            name = "camvid" if given and what == "480x360" else "voc"
            root = Path(given) if given else Path(scratch) / what
            if not given:
                write_photographs(root, size, 128 if args.quick else 400)
            pairs = pairs_of(name, root, size)
            same_files = as_voc(pairs, Path(scratch) / f"{what}-files")
            dataset = load_dataset("voc", source_dir=str(same_files), data_dir=scratch, partial=True)
            rates = measure(dataset, "train", pairs, args)
            rivals = {reader: rate for reader, rate in rates.items() if reader != "ours"}
            ratios[what] = rates["ours"] / max(rivals.values())
            print(
                f"\n{what}, {root if given else 'made-up photographs'}, {len(pairs)} files, crop {CROP[0]} x {CROP[1]}"
            )
            for reader, rate in rates.items():
                print(f"  {reader:20s} {rate:7.1f} images/s   ours {rates['ours'] / rate:5.2f} x", flush=True)
            figures[what] = {reader: round(rate, 1) for reader, rate in rates.items()}
            if what == "500x375":
                hidden = {how: round(share, 3) for how, share in overlap(dataset, rates["ours"], args).items()}
                print(
                    f"  a step of {1000 * BATCH / rates['ours']:.1f} ms a batch, beside no input: {hidden}", flush=True
                )
            digests = {threads: digest(ours(dataset, "train", threads)) for threads in (0, 1, 2, 4, 8)}
            same &= len(set(digests.values())) == 1
    print(f"\nthe same batches with 0, 1, 2, 4 and 8 threads: {'yes' if same else 'NO'}")
    print(
        json.dumps(
            dict(
                input_ratio=round(min(ratios.values()), 3),
                input_ratios={what: round(ratio, 3) for what, ratio in ratios.items()},
                images_per_second=figures,
                step_with_input=hidden,
                same_batches_for_any_number_of_threads=same,
            )
        )
    )


if __name__ == "__main__":
    main()
