"""Two checkpoints, and a run small enough for a test."""

import pytest
import small
from faults import states


@pytest.fixture(scope="module", autouse=True)
def _compiled_once(tmp_path_factory):
    """Most runs here are of one config, and most of their time would be XLA's optimisation."""
    with small.programs(tmp_path_factory):
        yield


@pytest.fixture
def folder(tmp_path):
    """Checkpoints of steps 3 and 6."""
    with states.store(tmp_path / "checkpoints") as writer:
        for step in (3, 6):
            writer.save(step, states.trees(step), {"samples_seen": 8 * step})
            writer.wait()
            writer.note(step, {"score": 0.1 * step})
    return tmp_path / "checkpoints"


def _config(tmp_path_factory):
    changes = {"data.synthetic.num_val": 8, "loss.sampled_offsets": 3}
    return small.config(tmp_path_factory.getbasetemp() / "prepared", **changes)


@pytest.fixture
def config(tmp_path_factory):
    return _config(tmp_path_factory)


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """Workdir of a run of `config` that nothing disturbs, with checkpoints 3 and 6; not to be written to."""
    return small.workdir(tmp_path_factory, "whole", _config(tmp_path_factory))
