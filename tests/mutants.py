# ruff: noqa: E501
"""Mutants of the core: one wrong line each, which the tests must notice.

    python tests/mutants.py            (each mutant against the tests named beside it: fast tier)
    python tests/mutants.py --full     (both tiers of tests/unit/core, for those that the fast tier let live)
    python tests/mutants.py 3 17       (these alone)

Works on a copy of the checkout. Prints a line for each mutant, then how many were killed; exit code 1 where one lives.
"""

import argparse
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[1]

# (module of pwcrf_jax, line as it is, line as the mutant has it, files of tests/unit/core that should notice)
MUTANTS = [
    ("relations", "if lo < 0 == hi:\n        high = -1", "if lo < 0 == hi:\n        high = 0", "relations"),
    ("relations", "low = min(low, -1)", "low = low", "relations"),
    ("relations", "(r, c) != (0, 0) and abs(r)", "abs(r)", "relations"),
    ("relations", "(rows + dr >= 0) & (rows + dr < height)", "(rows + dr >= 0)", "relations"),
    ("relations", "p = row * width + col", "p = row * height + col", "relations"),
    ("potentials", "jax.nn.relu(", "jnp.abs(", "encodings"),
    ("messages", 'to_q = einsum("...ekl,...ek->...el"', 'to_q = einsum("...elk,...ek->...el"', "mean_field"),
    ("messages", ".at[..., q, :].add(to_q)", ".at[..., q, :].add(to_p)", "mean_field"),
    ("messages", "return only_sound(message), count * mask", "return message, count * mask", "masks encodings"),
    ("messages", "return only_sound(message), count * mask", "return only_sound(message), count", "masks encodings"),
    ("messages", "sent = only_sound(marginals)", "sent = marginals", "masks"),
    ("messages", "_send(hidden_q, hidden_p, sent, -box,", "_send(hidden_q, hidden_p, sent, box,", "encodings"),
    ("messages", "jnp.moveaxis(kernel, 1, 0), bias, chunk_edges)", "jnp.moveaxis(kernel, 1, 0), bias.T, chunk_edges)", "encodings"),
    ("messages", "return to_p + shift.crop(to_q)", "return to_p", "encodings mean_field"),
    ("messages", "real = (number < total)", "real = (number <= total)", "encodings full_range"),
    ("messages", "return jnp.where(scores == -jnp.inf, jnp.asarray(RULED_OUT, scores.dtype), scores)", "return scores", "infinities"),
    ("mean_field", "total = total + weight * message", "total = total + message", "mean_field"),
    ("mean_field", "message = message / jnp.maximum(count, 1.0)[..., None]", "message = message / jnp.maximum(count, 2.0)[..., None]", "mean_field"),
    ("mean_field", "mixed = new * finite(updated) + old * finite(state)", "mixed = old * finite(updated) + new * finite(state)", "mean_field"),
    ("mean_field", "jnp.abs(jnp.exp(updated) - marginals), 0.0)", "jnp.abs(jnp.exp(updated) - marginals) / 2, 0.0)", "mean_field"),
    ("mean_field", "jnp.where(takes_part[..., None], jnp.abs(", "jnp.where(True, jnp.abs(", "masks mean_field"),
    ("mean_field", "return jnp.where(empty[..., None], jnp.nan, state), MeanFieldInfo(change)", "return state, MeanFieldInfo(change)", "infinities"),
    ("mean_field", "not 0 <= float(damping) < 1", "not 0 <= float(damping) <= 1", "mean_field"),
    ("likelihood", "jax.nn.logsumexp(flat, axis=-1)", "jnp.max(flat, axis=-1)", "piecewise encodings"),
    ("likelihood", "(labels[..., p] * num_classes + labels[..., q])", "(labels[..., q] * num_classes + labels[..., p])", "piecewise encodings"),
    ("likelihood", "edge_weight = weight[..., p] * weight[..., q]", "edge_weight = weight[..., p]", "piecewise encodings"),
    ("likelihood", "unary[..., p, :, None] + unary[..., q, None, :]", "unary[..., p, :, None]", "piecewise encodings"),
    ("likelihood", "count = jnp.sum(weight * sum_over_neighbours", "count = jnp.sum(sum_over_neighbours", "encodings piecewise"),
    ("edge_likelihood", "p, q = np.concatenate([part, fill]).T", "q, p = np.concatenate([part, fill]).T", "encodings"),
    ("edge_likelihood", "valid = (p < height) & (q >= 0) & (q < height)", "valid = (p < height) & (q >= 0)", "full_range encodings piecewise gradients"),
    ("edge_likelihood", "total * (len(box) / sample.shape[0])", "total", "piecewise gradients encodings full_range"),
    ("edge_likelihood", "jnp.where(edges.hidden > 0, matmul(narrow, self.matrix.T), 0.0)", "matmul(narrow, self.matrix.T)", "gradients"),
    ("edge_likelihood", "- exp * (edges.weight[:, None] / norm)", "- exp * edges.weight[:, None]", "gradients"),
    ("edge_likelihood", "jnp.sum(pair, axis=2), jnp.sum(pair, axis=1))", "jnp.sum(pair, axis=1), jnp.sum(pair, axis=2))", "gradients"),
    ("edge_likelihood", "to_p = value * edges.weight_q * chunk", "to_p = value * edges.weight_p * chunk", "gradients"),
    ("piecewise", "return jnp.sum(weight * value), jnp.sum(weight)", "return jnp.sum(weight * value), jnp.sum(valid, dtype=jnp.float32)", "piecewise"),
    ("piecewise", "** -jnp.asarray(power, jnp.float32)", "** jnp.asarray(power, jnp.float32)", "piecewise"),
    ("piecewise", "loss -= pairwise_weight * total", "loss -= total", "heads"),
    ("piecewise", "jax.lax.stop_gradient(jax.nn.log_softmax(unary.astype(jnp.float32), axis=-1))", "jax.nn.log_softmax(unary.astype(jnp.float32), axis=-1)", "heads"),
    ("heads", "return of_p + bias, of_q", "return of_p, of_q", "heads"),
    ("heads", "variance_scaling(0.5,", "variance_scaling(1.0,", "heads"),
    ("pixels", "node_mask = None if valid_box is None else mask", "node_mask = None", "heads"),
    ("piecewise", "(2 * np.arange(n) + 1) * size // (2 * n)", "(2 * np.arange(n)) * size // (2 * n)", "piecewise"),
    ("piecewise", "possible = scores != -jnp.inf", "possible = scores != jnp.inf", "recipe"),
    ("piecewise", "jnp.where(shown, over_nodes(probs + true), 1.0)", "jnp.where(shown, over_nodes(probs), 1.0)", "recipe"),
    ("piecewise", "probs = jnp.where(valid[..., None], probs, 0.0)", "probs = probs", "recipe"),
    ("piecewise", "shown = over_nodes(true) > 0", "shown = over_nodes(probs) > 0", "recipe"),
    ("objectives", "settings = dataclasses.replace(settings, weights=weights, damping=0.0)", "settings = dataclasses.replace(settings, weights=weights)", "objectives"),
    ("objectives", "valid if node_mask is None else valid & node_mask", "valid", "objectives masks"),
    ("objectives", "agrees = jnp.all((every == labels[None]) | ~known[None], axis=1)", "agrees = jnp.all(every == labels[None], axis=1)", "objectives"),
    ("metrics", "index = row * num_classes + column", "index = column * num_classes + row", "metrics"),
    ("metrics", "iou = _ratio(hit, true + predicted - hit)", "iou = _ratio(hit, true + predicted)", "metrics"),
    ("metrics", "window[axis] = 2 * width + 1", "window[axis] = 2 * width - 1", "metrics"),
    ("metrics", "np.nansum((true * iou)[of]), true[of].sum()", "np.nansum((predicted * iou)[of]), predicted[of].sum()", "metrics"),
    ("labels", "valid = (wide >= 0) & (wide < num_classes)", "valid = wide < num_classes", "labels"),
    ("labels", "wrong &= values != operator.index(void)", "wrong &= values < 0", "labels"),
    ("dense_crf", "norm = jax.lax.rsqrt(norm + 1e-20)", "norm = 1.0 / (norm + 1e-20)", "dense_crf"),
    ("dense_crf", "symmetric = 0.5 * (compat + compat.T)", "symmetric = compat", "dense_crf"),
    ("dense_crf", "jnp.stack([x / sigma_x, y / sigma_y], axis=-1)", "jnp.stack([x / sigma_y, y / sigma_x], axis=-1)", "dense_crf"),
    ("dense_crf", "log_marginals = jnp.where(mask[..., None], log_marginals, given)", "log_marginals = log_marginals", "dense_crf"),
    ("gaussian", "return weight[0] * at(0) + sum(weight[k] * (at(-k) + at(k))", "return weight[0] * at(0) + sum(weight[k] * (at(k) + at(k))", "gaussian"),
    ("gaussian", "jnp.exp(-0.5 * distance)", "jnp.exp(-distance)", "gaussian"),
    ("permutohedral", "* (1.0 / (1.0 + 2.0**-d))", "* 1.0", "permutohedral"),
    ("permutohedral", "rows + 0.5 * sums", "rows + sums", "permutohedral"),
    ("permutohedral", "directions = neighbours[::-1] if backwards else neighbours", "directions = neighbours", "permutohedral"),
    ("permutohedral", "return jnp.where(touching, out, 0.0).reshape(values.shape)", "return out.reshape(values.shape)", "permutohedral"),
    ("gaussian", "math.ceil(4 * float(", "math.ceil(2 * float(", "gaussian dense_crf"),
]  # fmt: skip


def killed(folder: pathlib.Path, files: str, full: bool) -> bool:
    tests = ["tests/unit/core"] if full else [f"tests/unit/core/test_core_{name}.py" for name in files.split()]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    command += ["-m", "not slow" if full else "not slow and not full"]
    done = subprocess.run(command, cwd=folder, env=os.environ | {"PYTHONPATH": str(folder)}, capture_output=True)
    if done.returncode not in (0, 1):
        sys.exit(done.stdout.decode()[-2000:] + done.stderr.decode()[-2000:])
    return done.returncode == 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("numbers", nargs="*", type=int, help="of mutants, as printed; none: all")
    parser.add_argument("--full", action="store_true", help="all tests of the core, both tiers")
    options = parser.parse_args()
    living = []
    chosen = options.numbers or range(len(MUTANTS))
    for number in chosen:
        module, line, wrong, files = MUTANTS[number]
        with tempfile.TemporaryDirectory() as folder:
            copy = pathlib.Path(folder, "copy")
            shutil.copytree(ROOT, copy, symlinks=True, ignore=shutil.ignore_patterns(".*", "runs", "site", "results"))
            path = copy / "pwcrf_jax" / f"{module}.py"
            text = path.read_text()
            if line not in text:
                sys.exit(f"mutant {number}: {module}.py has no {line!r}; write the mutant anew")
            path.write_text(text.replace(line, wrong))
            dead = killed(copy, files, options.full)
        print(f"{number:3} {'killed' if dead else 'LIVES '} {module}: {line.strip()} -> {wrong.strip()}", flush=True)
        living += [] if dead else [number]
    print(f"{len(chosen) - len(living)} of {len(chosen)} killed" + (f"; living: {living}" if living else ""))
    return bool(living)


if __name__ == "__main__":
    sys.exit(main())
