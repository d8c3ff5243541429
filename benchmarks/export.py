"""Is the exported predictor as fast as the one it was made from, and are its labels the same.

    python benchmarks/export.py --workdir DIR [--images 20] [--repeats 5]

Images of the validation split, one at a time, in one process: the file that `pwcrf export` writes, read back, beside
the same function jitted with the parameters as arguments, and beside what `pwcrf predict` runs. Medians over images and
repeats, the three interleaved. Prints milliseconds and ratios, and the number of pixels whose label differs;
ends with one line of JSON.
"""

import argparse
import json
import os
import statistics
import tempfile
from functools import partial

import jax
import numpy as np
import timing
from jax import export as jax_export

from pwcrf_jax import config as configs
from pwcrf_jax.data import load_dataset
from pwcrf_jax.data.readers.image_io import MEAN_COLOUR
from pwcrf_jax.prediction import export, restore
from pwcrf_jax.prediction import predictor as inference


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--images", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    config = configs.load(os.path.join(args.workdir, "config.json"))
    configs.apply_tuned(config, args.workdir)
    model, params, _ = restore.restore_params(config, args.workdir)
    size = tuple(config.data.eval_size)
    source = load_dataset(**configs.dataset_options(config)).source(config.data.eval_split)
    images = [source[i]["image"] for i in range(min(args.images, len(source)))]

    with tempfile.TemporaryDirectory() as folder:
        file = os.path.join(folder, "predictor")
        export.export_predictor(config, args.workdir, file)
        with open(file, "rb") as f:
            exported = jax.jit(jax_export.deserialize(f.read()).call)
    jitted = jax.jit(lambda params, *arrays: export.make_predictor(config, model, params, size)(*arrays))
    predictor = inference.Predictor(config, model, params)

    def framed(predict):
        def run(image):
            height, width = image.shape[:2]
            frame = np.empty((1, *size, 3), np.uint8)
            frame[:] = MEAN_COLOUR
            frame[0, :height, :width] = image
            return np.asarray(predict(frame, np.array([[height, width]], np.int32)))[0, :height, :width]

        return run

    ways = {
        "exported": framed(exported),
        "jitted": framed(lambda *arrays: jitted(params, *arrays)),
        "eval.py": lambda image: next(predictor([(None, image)]))[2].labels(),
    }
    different = dict.fromkeys(ways, 0)
    for image in images:
        labels = {name: way(image) for name, way in ways.items()}
        for name in ways:
            different[name] += int((labels[name] != labels["exported"]).sum())
    turns = {(name, i): partial(timing.timed, way, x) for i, x in enumerate(images) for name, way in ways.items()}
    seconds = timing.interleaved(turns, args.repeats, warm=0)
    median = {name: statistics.median(s for i in range(len(images)) for s in seconds[name, i]) for name in ways}
    print(f"{args.workdir}: {len(images)} images in frames of {size[0]} x {size[1]}, {jax.devices()[0].device_kind}")
    for name, x in median.items():
        print(f"  {name:10s} {1000 * x:8.1f} ms an image; exported takes {median['exported'] / x:.2f} of it, "
              f"{different[name]} pixels differ")  # fmt: skip
    ratios = {f"ratio_to_{name}": round(median["exported"] / median[name], 3) for name in ("jitted", "eval.py")}
    print(json.dumps({**ratios, "pixels_differ": max(different.values()), "images": len(images)}))


if __name__ == "__main__":
    main()
