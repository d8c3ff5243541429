"""Photographs of all sizes in a new process, from its start to its last labels: a part of benchmarks/dense_crf.py.

    python benchmarks/dense_crf_sizes.py CALLS FOLDER OUTPUT SECONDS

is that process. CALLS: "pydensecrf", "drop-in" (the same program after `pwcrf_jax.pydensecrf.install()`) or "refine"
(`dense_crf.refine`). FOLDER holds what `store` wrote, OUTPUT becomes labels and seconds, SECONDS is the time.time() at
which the process was asked for. Reading images and making unaries is not counted, everything else is: start, imports,
compilation, set-up, inference.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

CELL = 8  # pixels along a side that share their unary, as those of a network do before upsampling
ITERATIONS = 10
SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp"}


def store(photographs, folder, num_classes=21):
    """Writes images and probabilities of colour classes, a file each; photographs: RGB uint8 [H, W, 3]."""
    centres = np.random.default_rng(0).uniform(0, 255, (num_classes, 3))
    for i, image in enumerate(photographs):
        rows, cols = (n // CELL for n in image.shape[:2])
        cells = image[: rows * CELL, : cols * CELL].reshape(rows, CELL, cols, CELL, 3).mean((1, 3))
        scores = -0.5 * np.square((cells[None] - centres[:, None, None]) / 60.0).sum(-1)
        probs = np.exp(scores - scores.max(0))
        np.savez(folder / f"{i:04d}.npz", image=image, probs=(probs / probs.sum(0)).astype(np.float32))


def load(path):
    """(image [H, W, 3], probabilities [K, H, W])."""
    with np.load(path) as stored:
        image, probs = stored["image"], stored["probs"]
    for axis, size in enumerate(image.shape[:2], start=1):
        probs = np.take(probs, np.minimum(np.arange(size) // CELL, probs.shape[axis] - 1), axis=axis)
    return image, np.ascontiguousarray(probs)


def with_pydensecrf():
    """The program of pydensecrf's example, for whatever goes by that name."""
    import pydensecrf.densecrf as dcrf
    from pydensecrf.utils import unary_from_softmax

    def labels(image, probs):
        d = dcrf.DenseCRF2D(image.shape[1], image.shape[0], len(probs))
        d.setUnaryEnergy(unary_from_softmax(probs))
        d.addPairwiseGaussian(sxy=3, compat=3)
        d.addPairwiseBilateral(sxy=80, srgb=13, rgbim=image, compat=10)
        return np.argmax(d.inference(ITERATIONS), axis=0).reshape(image.shape[:2])

    return labels


def with_refine():
    """The same with this package's own function."""
    from pwcrf_jax import dense_crf

    def labels(image, probs):
        log_probs = np.log(np.clip(probs, 1e-5, 1.0)).transpose(1, 2, 0)
        return np.asarray(dense_crf.refine(log_probs, image, num_iterations=ITERATIONS)[0]).argmax(-1)

    return labels


def main(calls, folder, output, asked):
    """The process."""
    if calls == "drop-in":
        import pwcrf_jax.pydensecrf

        pwcrf_jax.pydensecrf.install()
    labels = with_refine() if calls == "refine" else with_pydensecrf()
    found, reading = {}, 0.0
    for path in sorted(Path(folder).glob("*.npz")):
        start = time.perf_counter()
        image, probs = load(path)
        reading += time.perf_counter() - start
        found[path.stem] = labels(image, probs).astype(np.uint8)
    np.savez(output, seconds=time.time() - asked - reading, **found)


def read_images(folder):
    paths = sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in SUFFIXES)
    if not paths:
        sys.exit(f"{folder}: no image ({', '.join(sorted(SUFFIXES))})")
    return paths


def photographs_of_many_sizes(paths, count):
    """RGB uint8 [H, W, 3], `count` of as many sizes: of the files, evenly spaced by area; without files, drawn."""
    if not paths:
        sizes = [(500 - 4 * i, 375 - 3 * (i * 7 % 40)) for i in range(count)]
        return [made_up_photograph(i, size[:: 1 if i % 4 == 0 else -1]) for i, size in enumerate(sizes)]
    sizes = {}
    for path in paths:
        with Image.open(path) as image:
            sizes.setdefault(image.size, path)
    every = [sizes[s] for s in sorted(sizes, key=lambda s: (s[0] * s[1], s))]
    chosen = np.linspace(0, len(every) - 1, min(count, len(every))).round().astype(int)
    return [np.array(Image.open(every[i]).convert("RGB")) for i in chosen]


def made_up_photograph(seed, size):
    """Smooth shading, hard edges and noise, RGB uint8 [H, W, 3]: about as many lattice vertices as a photograph has."""
    rng = np.random.default_rng(seed)
    shading, steps = (rng.integers(0, 255, (*n, 3)).astype(np.uint8) for n in ((6, 8), (9, 12)))
    stretched = lambda x, how: np.asarray(Image.fromarray(x).resize(size[::-1], how), np.float32)
    smooth, hard = stretched(shading, Image.Resampling.BICUBIC), stretched(steps, Image.Resampling.NEAREST)
    return (smooth + (hard - 128) / 2 + rng.normal(0, 4, (*size, 3))).clip(0, 255).astype(np.uint8)


def run(photographs, repeats):
    """Prints and returns figures of processes that take turns."""
    pixels = [x.shape[0] * x.shape[1] for x in photographs]
    sizes = len({x.shape for x in photographs})
    print(
        f"\na new process for {len(photographs)} photographs of {sizes} sizes, {min(pixels)} to {max(pixels)} pixels, "
        f"K = 21; medians of {repeats} rounds"
    )
    seconds, labels = {}, {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "photographs"
        folder.mkdir()
        store(photographs, folder)
        for number in range(repeats):
            turns = [("pydensecrf", "pydensecrf", None)]
            for calls in ("drop-in", "refine"):
                cache = f"{place}/{calls}-{number}"
                turns += [(calls, f"{calls}, empty cache", cache), (calls, f"{calls}, warm cache", cache)]
            for calls, name, cache in turns:
                found = _process(calls, folder, Path(place) / "labels.npz", cache)
                seconds.setdefault(name, []).append(float(found.pop("seconds")))
                labels[name] = found
    theirs, out = statistics.median(seconds["pydensecrf"]), {}
    for name, values in seconds.items():
        value = statistics.median(values)
        same = np.mean([(labels[name][k] == labels["pydensecrf"][k]).mean() for k in labels[name]])
        print(f"  {name:22s} {value:7.2f} s, {theirs / value:.2f} x, same label {100 * same:.3f} %", flush=True)
        key = name.replace(", ", "_").replace(" ", "_").replace("-", "_")
        out |= {f"sizes_{key}_s": round(value, 3), f"sizes_{key}_labels": round(float(same), 6)}
    return out


def _process(calls, folder, output, cache):
    env = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    if cache:
        # JAX keeps what took a second to compile, unless told otherwise.
        keep = {"MIN_COMPILE_TIME_SECS": "0", "MIN_ENTRY_SIZE_BYTES": "-1"}
        env |= {f"JAX_PERSISTENT_CACHE_{key}": value for key, value in keep.items()}
        env["JAX_COMPILATION_CACHE_DIR"] = cache
    command = [sys.executable, os.path.abspath(__file__), calls, str(folder), str(output)]
    done = subprocess.run([*command, repr(time.time())], env=env, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}: {done.stderr}")
    with np.load(output) as stored:
        return dict(stored)


if __name__ == "__main__":
    main(*sys.argv[1:4], float(sys.argv[4]))
