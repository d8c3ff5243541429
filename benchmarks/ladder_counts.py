"""What `ladder.py` counts of a trained run: pixels of each image, its curve, its seconds; and of two unaries as one."""

import functools
import hashlib
import json
from pathlib import Path

import jax
import numpy as np
from ladder_table import EVAL_SPLIT
from tqdm import tqdm

from pwcrf_jax import config as configs
from pwcrf_jax.data import eval_batches
from pwcrf_jax.evaluation import evaluate, kernel_search, tuning
from pwcrf_jax.model import decode
from pwcrf_jax.model.counts import confusions
from pwcrf_jax.prediction import refinement, restore
from pwcrf_jax.runtime import files, logs

CURVE_ROWS = ("unary", "all", "convs")


def of_classes(matrices):
    """Hits, pixels of the truth and pixels predicted of each class, [..., 3, K], of confusion matrices [..., K, K]."""
    return np.stack([np.diagonal(matrices, axis1=-2, axis2=-1), matrices.sum(-1), matrices.sum(-2)], axis=-2)


def counts_of_images(config, workdir, refined="", split=EVAL_SPLIT, params=None):
    """{row: int64 [images, 1 + bands, 3, K]}: hits, pixels of the truth, pixels predicted; and the images' ids.

    refined: a row, "all" or "convs"; the dense CRF on it is one more row, "refined".
    params: in place of those that the run is evaluated with.
    """
    model, stored, _, dataset = restore.load(config, str(workdir), "latest", split)
    params = stored if params is None else params
    step = evaluate.make_eval_fn(config, model, keep=[refined or "all"], devices=jax.devices()[:1])
    counts, ids = {}, []
    for batch in _one_by_one(config, dataset, split, workdir):
        sums, per_image = step(params, evaluate.inputs_of(batch, 1))
        matrices = {row: np.asarray(matrix, np.int64) for row, matrix in sums.confusion.items()}
        if refined:
            marginals = np.asarray(per_image.rows[refined].log_marginals)[0]
            matrices["refined"] = refinement.refine_batch(marginals, batch, configs.refine_settings(config, "full"))[0]
        for row, n in matrices.items():
            counts.setdefault(row, []).append(of_classes(n))
        ids += batch["id"]
    return {row: np.stack(values) for row, values in counts.items()}, ids, dataset.class_names


def counts_of_ensemble(config, workdirs, split=EVAL_SPLIT):
    """As `counts_of_images`, of the first unary alone, of all of them averaged, and of the dense CRF on that."""
    counts, ids = {}, []
    dataset, averaged = _averaged(config, workdirs, split)
    for batch, first, log_marginals in averaged:
        rows = {"unary": first, "all": _confusion(log_marginals, batch["label"], batch["valid_box"])}
        rows["refined"] = refinement.refine_batch(log_marginals, batch, configs.refine_settings(config, "full"))[0]
        for row, matrix in rows.items():
            counts.setdefault(row, []).append(of_classes(np.asarray(matrix, np.int64)))
        ids += batch["id"]
    return {row: np.stack(values) for row, values in counts.items()}, ids, dataset.class_names


def tune_ensemble(config, workdirs, split, folder, trials):
    """The dense CRF of averaged unaries, chosen on a split: as `tuning.tune` gives it, with its notes in a folder."""
    dataset, averaged = _averaged(config, workdirs, split)
    Path(folder).mkdir(parents=True, exist_ok=True)
    paths, total, digest = [], 0, hashlib.sha256()
    for number, (batch, _, log_marginals) in enumerate(averaged):
        paths.append(str(Path(folder, f"{number:06d}.npy")))
        with files.replacing(paths[-1]) as file:
            np.save(file, log_marginals[0])
        digest.update(log_marginals.tobytes())
        total = total + np.asarray(_confusion(log_marginals, batch["label"], batch["valid_box"]), np.int64)[0]
    notes = Path(folder, digest.hexdigest()[:12])  # trials of these marginals, not of others
    notes.mkdir(exist_ok=True)
    settings, after = tuning.tune_kernels(config, dataset, split, str(notes), paths, "full", trials)
    before = tuning.mean_iou(total, config, dataset, split)
    chosen = {f"refine.{name}": getattr(settings.params, name) for name in kernel_search.KERNELS}
    return dict(config=chosen, split=split, miou_before=before, miou_messages=before, miou_after=after)


def _averaged(config, workdirs, split):
    """The data set, and of each image its batch, the first unary's confusions and the log of the mean probability.

    The mean is that of the unaries' probabilities, cell by cell.
    """
    loaded = [restore.load(config, str(workdir), "latest", split) for workdir in workdirs]
    model, _, _, dataset = loaded[0]
    step = evaluate.make_eval_fn(config, model, keep=["all"], devices=jax.devices()[:1])

    def every():
        for batch in _one_by_one(config, dataset, split, workdirs[0]):
            arrays = evaluate.inputs_of(batch, 1)
            found = [step(params, arrays) for _, params, _, _ in loaded]
            logs_of = [np.asarray(per_image.rows["all"].log_marginals)[0] for _, per_image in found]
            mean = functools.reduce(np.logaddexp, logs_of) - np.log(len(logs_of))
            yield batch, found[0][0].confusion["unary"], mean.astype(np.float32)

    return dataset, every()


@jax.jit
def _confusion(log_marginals, label, valid_box):
    size = label.shape[1:3]
    decoded = decode.Decoded(log_marginals, decode.grid_mask(valid_box, log_marginals.shape[1:3], size))
    valid = decode.grid_mask(valid_box, size, size)
    return confusions(decode.frame_labels(decoded, size), label, valid, log_marginals.shape[-1])


def _one_by_one(config, dataset, split, workdir):
    batches = eval_batches(dataset, split, batch_size=1, size=config.data.eval_size)
    return tqdm(batches, desc=str(workdir), disable=None, leave=False)


def parameters_of(config):
    """Number of parameters of a config's model."""
    return sum(x.size for x in jax.tree.leaves(restore.abstract_params(configs.build_model(config))))


def curve_of(workdir):
    """{row: [[step, mean IoU in %], ...]} of a run's evaluations while it trained."""
    curve = {}
    for line in _metrics(workdir):
        for row in CURVE_ROWS:
            if (value := line.get(f"val/miou_{row}")) is not None:
                curve.setdefault(row, []).append([line["step"], value])
    return curve


def seconds_of(workdir, config):
    """Seconds that a run's steps took, by the rates that it told; None where it told none."""
    rates = [rate for line in _metrics(workdir) if (rate := line.get("train/images_per_second"))]
    images = config.train.steps * config.train.batch_size
    return round(images * float(np.mean(1 / np.array(rates)))) if rates else None


def _metrics(workdir):
    return [json.loads(line) for line in files.read_lines(str(Path(workdir, logs.METRICS)))]
