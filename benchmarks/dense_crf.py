"""The dense CRF against pydensecrf, the C++ that everyone installs: same result, same input, one run.

    python benchmarks/dense_crf.py --workdir runs/camvid --workdir runs/voc        (real unaries of trained models)
    python benchmarks/dense_crf.py --images DIR                                    (photographs, made-up unaries)
    python benchmarks/dense_crf.py --quick

`pip install -e ".[bench]"` brings pydensecrf2. Both with pydensecrf's usual parameters: smoothness sxy 3, compat 3;
appearance sxy 80, srgb 13, compat 10; 10 iterations, symmetric normalisation.

* agreement: share of pixels with the same label, and mean |difference| of marginals, image by image at full size. The
  unaries are a workdir's upsampled marginals of its validation split; with --images and one --workdir, that model's on
  those images; with --images alone, colour classes. Where they come from is printed.
* cause: on crops small enough for sums over all pairs of pixels, both against the exact CRF, and ours with each kernel
  alone: which approximation is it that makes the two differ.
* filter: error of both lattices against the exact filter on random and on image features.
* speed: seconds for one image of 500 x 375, from NumPy arrays in the layout each of them takes to the marginals (ours:
  their logarithms), set-up included, medians of interleaved calls after one of each; K = 21 and 60, ours also for a
  batch of 8, under jit (no frame, no look at values) and by pydensecrf's own calls (drop-in).
* sizes: photographs of as many sizes in a new process, start and compilation included, by pydensecrf, by the same
  program with the drop-in and by ours, with an empty and a warm cache of compiled programs; dense_crf_sizes.py.
* small images: where the exact filter is the faster one.
* devices (where the backend is not a CPU): milliseconds of both filters at 500 x 375 and 1024 x 2048 and images
  a second, with the share of the rate of a plain matrix product that the exact one reaches.

Ends with one line of JSON.
"""

import argparse
import json
import os
import statistics
import sys
from functools import partial

import dense_crf_sizes
import jax
import jax.numpy as jnp
import numpy as np
import timing
from dense_crf_sizes import made_up_photograph, read_images
from PIL import Image

from pwcrf_jax import config as configs
from pwcrf_jax import dense_crf, gaussian
from pwcrf_jax.data import eval_batches, load_dataset
from pwcrf_jax.model import decode
from pwcrf_jax.prediction import restore
from pwcrf_jax.pydensecrf import densecrf as drop_in

try:
    import pydensecrf.densecrf as rival
except ImportError:
    sys.exit('pydensecrf is not installed: pip install -e ".[bench]" (or pydensecrf2)')

ITERATIONS = 10
SIZE = (375, 500)
PARAMS = dense_crf.DEFAULT_PARAMS


def theirs(log_probs, image, params=PARAMS, num_iterations=ITERATIONS):
    """pydensecrf from the same arrays: log P [H, W, K], RGB uint8 [H, W, 3] -> marginals [H, W, K]."""
    return run_rival(energies(log_probs), image, params, num_iterations).T.reshape(log_probs.shape)


def energies(log_probs):
    """As pydensecrf takes them: [K, H W]."""
    return np.ascontiguousarray(-log_probs.reshape(-1, log_probs.shape[-1]).T)


def run_rival(unary, image, params, num_iterations=ITERATIONS, module=rival):
    """Energies [K, H W] -> marginals [K, H W]."""
    crf = module.DenseCRF2D(image.shape[1], image.shape[0], len(unary))
    crf.setUnaryEnergy(unary)
    if params.smoothness_compat is not None:
        crf.addPairwiseGaussian(sxy=params.smoothness_sxy, compat=params.smoothness_compat)
    if params.appearance_compat is not None:
        crf.addPairwiseBilateral(
            sxy=params.appearance_sxy,
            srgb=params.appearance_srgb,
            rgbim=np.ascontiguousarray(image),
            compat=params.appearance_compat,
        )
    return np.asarray(crf.inference(num_iterations))


def ours(log_probs, image, params=PARAMS, num_iterations=ITERATIONS, **options):
    log_marginals, info = dense_crf.refine(log_probs, image, params, num_iterations, **options)
    if info.exceeded:
        room = 6 * image.shape[-3] * image.shape[-2]
        log_marginals, _ = dense_crf.refine(log_probs, image, params, num_iterations, **options, capacity=room)
    return np.exp(np.asarray(log_marginals))


def compare(a, b):
    """(share of pixels with the same label, mean |difference|)."""
    return float((a.argmax(-1) == b.argmax(-1)).mean()), float(np.abs(a - b).mean())


def spread(items, count):
    """`count` of the items, evenly spaced."""
    return [items[i] for i in np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int)]


def colour_classes(image, num_classes, seed=0):
    """Log-probabilities from the distance to random colours, blurred: for images without a model."""
    centres = np.random.default_rng(seed).uniform(0, 255, (num_classes, 3)).astype(np.float32)
    scores = -0.5 * np.square((image[:, :, None].astype(np.float32) - centres) / 60.0).sum(-1)
    return np.asarray(jax.nn.log_softmax(gaussian.spatial(jnp.asarray(scores), 8.0) / (2 * np.pi * 64)))


def model_unaries(workdir, count, folder=None):
    """Yields (log P [H, W, K], image) of a workdir's validation images, or of images in a folder."""
    config = configs.load(os.path.join(workdir, "config.json"))
    model, params, _ = restore.restore_params(config, workdir)
    frame = tuple(config.data.eval_size)

    @jax.jit
    def infer(image, valid_box):
        potentials = model.apply({"params": params}, image)._replace(refinement_logits=None)
        decoded = decode.decode(potentials, valid_box, frame, configs.crf_settings(config))
        return decode.log_probs(decoded, *decode.frame_taps(decoded.mask.shape[1:], frame))[0]

    if folder is None:
        dataset = load_dataset(**configs.dataset_options(config))
        split = config.data.eval_split
        wanted = set(spread(range(len(dataset.source(split))), count))
        batches = enumerate(eval_batches(dataset, split, batch_size=1, size=frame))
        samples = ((b["image"], b["valid_box"]) for i, b in batches if i in wanted)
    else:
        samples = (
            _framed(np.array(Image.open(p).convert("RGB")), frame, p) for p in spread(read_images(folder), count)
        )
    for image, valid_box in samples:
        _, _, height, width = valid_box[0]
        log_probs = infer(image, valid_box)[:height, :width]
        yield np.asarray(log_probs), image[0, :height, :width]


def _framed(image, frame, path):
    height, width = image.shape[:2]
    if height > frame[0] or width > frame[1]:
        sys.exit(f"{path}: {height} x {width} is larger than the model's data.eval_size {frame}")
    padded = np.zeros((1, *frame, 3), np.uint8)
    padded[0, :height, :width] = image
    return padded, np.array([[0, 0, height, width]], np.int32)


def samples_of(args):
    """(where the unaries are from, their generator) of each source."""
    count = args.count
    if args.images and args.workdir:
        return [(f"{args.images}, unaries of {args.workdir[0]}", model_unaries(args.workdir[0], count, args.images))]
    if args.workdir:
        return [(f"validation split of {w}", model_unaries(w, -(-count // len(args.workdir)))) for w in args.workdir]
    if args.images:
        paths = read_images(args.images)
        if args.quick:  # one size, so that ours is compiled once
            sizes = [Image.open(p).size for p in paths]
            paths = [p for p, size in zip(paths, sizes, strict=True) if size == statistics.mode(sizes)]
        pictures = (np.array(Image.open(p).convert("RGB")) for p in spread(paths, count))
        return [(f"{args.images}, colour classes as unaries", ((colour_classes(x, 21), x) for x in pictures))]
    pictures = (made_up_photograph(seed, SIZE) for seed in range(count))
    return [("made-up images, colour classes as unaries", ((colour_classes(x, 21), x) for x in pictures))]


def agreement(args, kept):
    """Prints and returns mean label agreement and mean |difference|; `kept` collects some of the inputs."""
    every = []
    for source, samples in samples_of(args):
        rows = []
        for log_probs, image in samples:
            rows.append(compare(ours(log_probs, image), theirs(log_probs, image)))
            if len(kept) < 8 or image.shape[:2] in (SIZE, SIZE[::-1]):
                kept.append((log_probs, image))
        labels, difference = np.array(rows).T
        print(
            f"{source}: {len(rows)} images, K = {log_probs.shape[-1]}: same label {100 * labels.mean():.3f} % "
            f"(worst image {100 * labels.min():.3f} %), mean |difference| {difference.mean():.5f}",
            flush=True,
        )
        every += rows
    return np.mean(every, axis=0)


def cause(kept, args):
    """Both against the exact CRF on crops, and with one kernel at a time."""
    crops = []
    for log_probs, image in spread(kept, args.crops):
        top, left = ((n - c) // 2 for n, c in zip(image.shape[:2], args.crop, strict=True))
        window = np.s_[max(top, 0) :, max(left, 0) :]
        crops.append([x[window][: args.crop[0], : args.crop[1]] for x in (log_probs, image)])
    print(f"\ncrops of {args.crop[0]} x {args.crop[1]}, {len(crops)} images: same label in %, mean |difference|")
    only = {
        "both kernels": PARAMS,
        "appearance alone": PARAMS._replace(smoothness_compat=None),
        "smoothness alone": PARAMS._replace(appearance_compat=None),
    }
    for name, params in only.items():
        rows = []
        for log_probs, image in crops:
            lattice, other = ours(log_probs, image, params, method="lattice"), theirs(log_probs, image, params)
            exact = ours(log_probs, image, params, method="exact")
            rows.append([compare(lattice, other), compare(lattice, exact), compare(other, exact)])
        means = np.mean(rows, axis=0)
        said = [f"{what} {100 * a:.3f} {d:.5f}" for what, (a, d) in zip(
            ("ours : pydensecrf", "ours : exact", "pydensecrf : exact"), means, strict=True)]  # fmt: skip
        print(f"  {name:18s}" + "   ".join(said), flush=True)


def filter_errors(args, kept):
    """Relative error of both lattices against the exact filter, normalised, on the same points and values."""
    rng = np.random.default_rng(0)
    image = kept[0][1]
    colours = np.asarray(dense_crf.pixel_features(jnp.asarray(image), 80.0, 13.0)).reshape(-1, 5)
    cases = {
        "random, 5 dimensions": rng.normal(size=(3000, 5)),
        "random, 3 dimensions": 2 * rng.normal(size=(3000, 3)),
        "random, 2 dimensions": 3 * rng.normal(size=(3000, 2)),
        "image, 5 dimensions": colours[:: max(1, len(colours) // 4000)],
    }
    if args.quick:  # one shape, compiled once
        cases = {name: points[:2400] for name, points in cases.items() if "5" in name}
    print("\nfilter: mean |error| over mean |value| against the exact filter")
    errors = {}
    for name, points in cases.items():
        # In fours: pydensecrf fills up with points at the origin.
        points = np.ascontiguousarray(points[: len(points) // 4 * 4], np.float32)
        probs = rng.dirichlet(np.ones(4), len(points)).astype(np.float32)
        exact, lattice = (_normalized(points, probs, method) for method in ("exact", "lattice"))
        crf = rival.DenseCRF(len(points), 4)
        crf.setUnaryEnergy(np.ascontiguousarray(-np.log(probs.T)))
        crf.addPairwiseEnergy(np.ascontiguousarray(points.T), compat=0.5)
        # log Q - log P is 0.5 of the filtered marginals, up to a constant of each point.
        other = (np.log(np.asarray(crf.inference(1)).T) - np.log(probs)) / 0.5
        centred = [x - x.mean(1, keepdims=True) for x in (exact, lattice, other)]
        error = [np.abs(x - centred[0]).mean() / np.abs(centred[0]).mean() for x in centred[1:]]
        errors[name] = error
        print(f"  {name:22s} ours {error[0]:.5f}   pydensecrf {error[1]:.5f}", flush=True)
    return errors


def _normalized(points, values, method):
    prepared = gaussian.prepare(jnp.asarray(points), method=method, capacity=points.shape[0] * (points.shape[1] + 1))
    norm = 1 / np.sqrt(np.asarray(gaussian.apply(prepared, jnp.ones((len(points), 1)))) + 1e-20)
    return np.asarray(gaussian.apply(prepared, jnp.asarray(values * norm))) * norm


def speed(args, kept):
    """Ratios by what is compared, seconds interleaved."""
    image = next((x for _, x in kept if x.shape[:2] in (SIZE, SIZE[::-1])), None)
    where = "a sample image" if image is not None else "a made-up image"
    image = made_up_photograph(0, SIZE) if image is None else image
    ratios = {}
    print(f"\nspeed on {where} of {image.shape[1]} x {image.shape[0]}, medians of {args.repeats} interleaved calls")
    for num_classes in (21, 60):
        log_probs = next((p for p, x in kept if x is image and p.shape[-1] == num_classes), None)
        log_probs = colour_classes(image, num_classes) if log_probs is None else log_probs
        batch = np.stack([log_probs] * args.batch), np.stack([image] * args.batch)
        unary = energies(log_probs)
        jitted = jax.jit(lambda p, x: dense_crf.refine(p, x, PARAMS, ITERATIONS)[0])  # for this size, unchecked
        turns = {
            "pydensecrf": partial(timing.timed, run_rival, unary, image, PARAMS),
            "ours": partial(timing.timed, dense_crf.refine, log_probs, image, PARAMS, ITERATIONS),
            "ours, under jit": partial(timing.timed, jitted, log_probs, image),
            "drop-in": partial(timing.timed, run_rival, unary, image, PARAMS, ITERATIONS, drop_in),
        }
        if num_classes == 21 and args.batch > 1:
            turns[f"ours, batch of {args.batch}"] = partial(timing.timed, dense_crf.refine, *batch, PARAMS, ITERATIONS)
        median = timing.medians(turns, args.repeats)
        median = {name: s / (args.batch if "batch" in name else 1) for name, s in median.items()}
        for name, value in median.items():
            print(
                f"  K = {num_classes:3d}  {name:18s} {value:.3f} s an image, {median['pydensecrf'] / value:.2f} x",
                flush=True,
            )
        ratios[num_classes] = median["pydensecrf"] / median["ours"]
        ratios[f"drop_in_{num_classes}"] = median["pydensecrf"] / median["drop-in"]
        ratios[f"jit_{num_classes}"] = median["pydensecrf"] / median["ours, under jit"]
        if f"ours, batch of {args.batch}" in median:
            ratios["batch"] = median["pydensecrf"] / median[f"ours, batch of {args.batch}"]
            ratios["batch_gain"] = median["ours"] / median[f"ours, batch of {args.batch}"]
    return ratios


def crossover(sizes=(256, 512, 1024, 2048)):
    """Seconds of preparing and 10 applications to 21 values, by size: what `gaussian.EXACT_POINTS` goes by."""
    print("\nfilter of a small image, prepared and applied 10 times to 21 values, ms")
    for size in sizes:
        side = int(size**0.5)
        image = made_up_photograph(0, (side, size // side))
        features = dense_crf.pixel_features(jnp.asarray(image), 80.0, 13.0).reshape(-1, 5)
        values = jnp.asarray(np.random.default_rng(0).random((len(features), 21)), jnp.float32)

        def ten(features, values, method):
            prepared = gaussian.prepare(features, method=method)
            return jax.lax.scan(lambda v, _: (gaussian.apply(prepared, v) / len(v), None), values, None, length=10)[0]

        ten = jax.jit(ten, static_argnums=2)
        ms = timing.medians({m: partial(timing.timed, ten, features, values, m) for m in ("lattice", "exact")}, 5)
        said = "".join(f"   {method} {1e3 * seconds:7.1f}" for method, seconds in ms.items())
        print(f"  {len(features):6d} points{said}", flush=True)


def devices(args):
    """Filters and whole refinements on an accelerator."""
    out = {}
    for height, width in (SIZE, (1024, 2048)):
        image, num_classes = made_up_photograph(0, (height, width)), 21
        log_probs = jax.device_put(colour_classes(image, num_classes))
        features = dense_crf.pixel_features(jax.device_put(image), 80.0, 13.0).reshape(-1, 5)
        values = jnp.exp(log_probs).reshape(-1, num_classes)
        name = f"{width}x{height}"
        for method in ("lattice", "exact"):
            prepared = jax.jit(lambda f, m=method: gaussian.prepare(f, method=m))(features)
            seconds = _median(jax.jit(gaussian.apply), prepared, values)
            out[f"{method}_filter_ms_{name}"] = 1e3 * seconds
            if method == "exact":
                out[f"exact_product_share_{name}"] = 2 * len(features) ** 2 * num_classes / seconds / _product_rate()
            refine = lambda p, x, m=method: dense_crf.refine(p, x, num_iterations=ITERATIONS, method=m)[0]
            if method == "lattice" or (height, width) == SIZE:
                out[f"{method}_images_per_second_{name}"] = 1 / _median(
                    jax.jit(refine), log_probs, jax.device_put(image)
                )
    for key, value in out.items():
        print(f"  {key}: {value:.4g}")
    return out


def _product_rate():
    a = jnp.ones((8192, 8192), jnp.float32)
    return 2 * 8192**3 / _median(jax.jit(lambda a: jnp.matmul(a, a, precision="highest")), a)


def _median(fn, *arguments):
    return timing.medians({"": partial(timing.timed, fn, *arguments)}, 5)[""]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", help="folder of images")
    parser.add_argument("--workdir", action="append", default=[], help="of a training run: unaries; may be repeated")
    parser.add_argument("--count", type=int, help="images compared in all (40; quick: 3)")
    parser.add_argument("--crops", type=int, help="images compared with the exact CRF (8; quick: 1)")
    parser.add_argument("--repeats", type=int, help="timed calls (9; quick: 3)")
    parser.add_argument("--batch", type=int, help="of ours, beside the single image (8; quick: none)")
    parser.add_argument("--photographs", type=int, help="of as many sizes in a new process (40; quick: 3)")
    parser.add_argument("--rounds", type=int, help="of new processes (3; quick: 1)")
    parser.add_argument("--cores", type=int, help="that this process and its children run on (all)")
    parser.add_argument("--quick", action="store_true", help="under two minutes; figures are rougher")
    args = parser.parse_args()
    amounts = dict(count=(40, 3), crops=(8, 1), repeats=(9, 3), batch=(8, 1), photographs=(40, 3), rounds=(3, 1))
    there = sorted(os.sched_getaffinity(0))
    for name, (whole, quick) in (amounts | {"cores": (len(there), len(there))}).items():
        if getattr(args, name) is None:
            setattr(args, name, quick if args.quick else whole)
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1")
    args.crop = (60, 80) if args.quick else (120, 160)
    for workdir in args.workdir:
        if not os.path.isfile(os.path.join(workdir, "config.json")):
            parser.error(f"--workdir {workdir}: no config.json there; name the folder of a training run")
    if args.images and not os.path.isdir(args.images):
        parser.error(f"--images {args.images}: no such folder")
    if args.images and len(args.workdir) > 1:
        parser.error("--images takes one --workdir at most")
    os.sched_setaffinity(0, there[: args.cores])  # before JAX counts them
    device = jax.devices()[0]
    print(
        f"{device.platform}, {device.device_kind}, {min(args.cores, len(there))} cores, JAX {jax.__version__}",
        flush=True,
    )
    kept = []
    label_agreement, difference = agreement(args, kept)
    cause(kept, args)
    errors = filter_errors(args, kept)
    ratios = speed(args, kept)
    paths = read_images(args.images) if args.images else []
    of_sizes = dense_crf_sizes.run(dense_crf_sizes.photographs_of_many_sizes(paths, args.photographs), args.rounds)
    if not args.quick:
        crossover()
    summary = dict(
        label_agreement=round(float(label_agreement), 6),
        mean_abs_diff=round(float(difference), 6),
        speed_ratio=round(ratios[21], 3),
        speed_ratio_k60=round(ratios[60], 3),
    )
    named = {key: ratio for key, ratio in ratios.items() if isinstance(key, str)}
    summary |= {f"speed_ratio_{key}": round(ratio, 3) for key, ratio in named.items()} | of_sizes
    summary["filter_errors"] = {name: [round(float(e), 6) for e in error] for name, error in errors.items()}
    if device.platform != "cpu":
        summary |= devices(args)
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
