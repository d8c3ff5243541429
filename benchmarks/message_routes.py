"""Is the choice between the two algorithms of messages the right one: "factored", "table", over a range of shapes.

    python benchmarks/message_routes.py [--quick]

One relation, float32, both algorithms jitted, interleaved repeats in one process. An iteration is
`messages.compute_messages`; "table" forms its scores before the first. Columns: seconds of one and of ten iterations by
each, what `costs.algorithm` chooses for 3 and for 10 iterations, and what that costs beside the faster one (1.00: it is
the faster). Tables above `costs.TABLE_BYTES` are left out. Ends with one line of JSON.
"""

import argparse
import json
import os
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, os.path.join(os.path.dirname(__file__), ".."))

from pwcrf_jax import costs, relations
from pwcrf_jax.messages import compute_messages, prepare_messages
from pwcrf_jax.potentials import factored_pairwise

GRID5 = relations.Relation("grid5", (-0.2, 0.2), (-0.2, 0.2), grid=5)
FULL = relations.SURROUNDING
SHAPES = [  # height, width, relation, hidden, classes
    (29, 38, FULL, 512, 6),
    (29, 38, FULL, 512, 11),
    (29, 38, FULL, 512, 21),
    (29, 38, FULL, 128, 11),
    (29, 38, FULL, 64, 21),
    (29, 38, GRID5, 512, 6),
    (29, 38, GRID5, 512, 21),
    (29, 38, GRID5, 512, 40),
    (29, 38, GRID5, 512, 60),
    (12, 16, FULL, 64, 6),
    (12, 16, FULL, 512, 11),
    (12, 16, FULL, 512, 40),
    (60, 60, GRID5, 256, 19),
]
QUICK = [(12, 16, FULL, 64, 6), (12, 16, GRID5, 128, 21)]


def iterate(iterations, algorithm):
    def run(potential, marginals):
        prepared = prepare_messages(potential, iterations, algorithm=algorithm)

        def body(q, _):
            message, count = compute_messages(prepared, q)
            return jax.nn.softmax(message / count[..., None]), None

        return jax.lax.scan(body, marginals, None, length=iterations)[0]

    return jax.jit(run)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two small shapes, three repeats")
    args = parser.parse_args()
    rng, rows = np.random.default_rng(0), []
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape).astype(np.float32))
    print("map      offsets hidden classes | factored 1   10 | table 1     10 | choice 3, cost | choice 10, cost")
    for height, width, relation, hidden, k in QUICK if args.quick else SHAPES:
        box = relations.offsets(relation, height, width)
        if costs.table_messages(box, height, width, k, hidden).temp_bytes > costs.TABLE_BYTES:
            continue
        hidden_p, hidden_q = draw(2, height, width, hidden)
        potential = factored_pairwise(hidden_p, hidden_q, 0.1 * draw(hidden, k, k), draw(k, k), box)
        marginals = jax.nn.softmax(draw(height, width, k))
        runs = {(algorithm, n): iterate(n, algorithm) for algorithm in ("factored", "table") for n in (1, 10)}
        seconds = {key: [] for key in runs}
        for repeat in range(4 if args.quick else 6):
            for key, run in runs.items():
                start = time.perf_counter()
                jax.block_until_ready(run(potential, marginals))
                if repeat:  # the first compiles
                    seconds[key].append(time.perf_counter() - start)
        median = {key: statistics.median(values) for key, values in seconds.items()}
        row = dict(height=height, width=width, offsets=len(box), hidden=hidden, classes=k)
        row |= {f"{algorithm}_{n}": round(s, 5) for (algorithm, n), s in median.items()}
        for n in (3, 10):
            at = {r: median[r, 1] + (n - 1) * (median[r, 10] - median[r, 1]) / 9 for r in ("factored", "table")}
            choice = costs.algorithm(box, height, width, k, hidden, num_iterations=n)
            row |= {f"choice_{n}": choice, f"regret_{n}": round(at[choice] / min(at.values()), 3)}
        rows.append(row)
        print(
            f"{height:2d} x {width:2d} {len(box):9d} {hidden:6d} {k:7d} |"
            f" {row['factored_1']:8.4f} {row['factored_10']:6.3f} | {row['table_1']:7.4f} {row['table_10']:6.3f} |"
            f" {row['choice_3']:6s} {row['regret_3']:7.2f} | {row['choice_10']:6s} {row['regret_10']:8.2f}",
            flush=True,
        )
    worst = max(row[f"regret_{n}"] for row in rows for n in (3, 10))
    print(json.dumps({"device": jax.devices()[0].device_kind, "worst_regret": worst, "rows": rows}))


if __name__ == "__main__":
    main()
