"""The timer of all benchmarks: rivals take turns in one process, so that a drift of the machine falls on all alike."""

import math
import statistics
import time

import jax

MIN_TURNS = 3  # that whoever takes long has all the same


def timed(run, *args):
    """Seconds of a call, until what it returns is there."""
    start = time.perf_counter()
    jax.block_until_ready(run(*args))
    return time.perf_counter() - start


def interleaved(turns, repeats, *, warm=1, patience=math.inf):
    """Seconds of every turn, {name: list}.

    Args:
      turns: {name: function of no arguments that returns its seconds}, as `timed` with what it calls.
      repeats: rounds that are kept, in each of which every rival has one turn.
      warm: rounds before them that are not kept; the first compiles.
      patience: seconds after which a rival that has had `MIN_TURNS` sits out the rest.
    """
    for _ in range(warm):
        for turn in turns.values():
            turn()
    seconds = {name: [] for name in turns}
    for _ in range(repeats):
        for name, turn in turns.items():
            if len(seconds[name]) < MIN_TURNS or sum(seconds[name]) <= patience:
                seconds[name].append(turn())
    return seconds


def medians(turns, repeats, **options):
    """The medians of `interleaved`, {name: seconds}."""
    return {name: statistics.median(values) for name, values in interleaved(turns, repeats, **options).items()}
