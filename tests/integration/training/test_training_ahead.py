"""Batches that are made and transferred while a step runs."""

import itertools
import threading
import time

import jax
import numpy as np
import pytest

from pwcrf_jax.runtime import parallel

LIMIT = 300  # seconds; against hangs


class Batches:
    """Numbered batches; taken: how many. The one of number `damaged` is an error."""

    def __init__(self, damaged=None):
        self.taken, self._damaged, self._took = 0, damaged, threading.Condition()

    def __iter__(self):
        return self

    def __next__(self):
        with self._took:
            n, self.taken = self.taken, self.taken + 1
            self._took.notify()
        if n == self._damaged:
            raise ValueError(f"record {n} is damaged")
        rows = jax.local_device_count()
        return {"image": np.full((2 * rows, 3), n, np.uint8) + np.arange(2 * rows)[:, None].astype(np.uint8), "id": [n]}

    def wait_until(self, taken):
        with self._took:
            assert self._took.wait_for(lambda: self.taken >= taken, LIMIT)


def input_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("input")]


def test_batches_are_those_of_the_iterator_and_lie_where_a_step_wants_them():
    traced = []

    def step(state, batch):
        traced.append(batch["image"].shape)
        return state + jax.lax.psum(batch["image"].astype(np.int32).sum(), parallel.AXIS), state

    fn, state = parallel.pmap_train(step), parallel.replicated(np.int32(0))
    expected, ahead = Batches(), parallel.ahead(Batches())
    total = 0
    for arrays, ids in itertools.islice(ahead, 5):
        batch = next(expected)
        np.testing.assert_array_equal(arrays["image"], parallel.split({"image": batch["image"]})["image"])
        assert ids == batch["id"] and arrays.keys() == {"image"} and arrays["image"].dtype == np.uint8
        assert [shard.device for shard in arrays["image"].addressable_shards] == jax.local_devices()
        state, _ = fn(state, arrays)
        total += int(batch["image"].astype(int).sum())
    ahead.close()
    assert int(state) == total and len(traced) == 1  # one program


def test_two_are_made_while_one_is_used_and_no_more():
    batches = Batches()
    ahead = parallel.ahead(batches)
    assert batches.taken == 0 and not input_threads()
    for n in range(3):
        assert next(ahead)[1] == [n]
        batches.wait_until(n + 3)
    time.sleep(0.1)  # for one too many
    ahead.close()
    assert not input_threads() and batches.taken == 5
    assert next(batches)["id"] == [5]  # still open


def test_an_error_comes_in_its_turn_and_ends_the_thread():
    ahead = parallel.ahead(Batches(damaged=2))
    assert [next(ahead)[1] for _ in range(2)] == [[0], [1]]
    with pytest.raises(ValueError, match="record 2 is damaged"):
        next(ahead)
    assert not input_threads()
