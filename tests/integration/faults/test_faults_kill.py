"""Real processes, ended from outside: nothing is lost, nothing is left, the result is the same bit for bit."""

import pytest
from faults import kill


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return kill.undisturbed(tmp_path_factory.mktemp("lives"), devices=2, forked=True)


@pytest.fixture(scope="module")
def undisturbed_from_its_start(tmp_path_factory):
    return kill.undisturbed(tmp_path_factory.mktemp("lives"), devices=2)


def _check(summary):
    print(summary)
    assert not summary["violations"] and summary["finished runs"]
    return summary


@pytest.mark.full
def test_killed_in_training_and_in_a_save(undisturbed):
    """`tests/integration/faults/kill.py` does it a hundred times."""
    assert _check(kill.campaign(undisturbed, 2, kinds=("step", "save")))["kills"] == 2


@pytest.mark.full
def test_terminated(undisturbed):
    summary = _check(kill.campaign(undisturbed, 1, kill=False, kinds=("step",)))
    assert summary["kills"] == summary["code 143"] == 1


@pytest.mark.slow
def test_killed_a_hundred_times(undisturbed_from_its_start):
    assert _check(kill.campaign(undisturbed_from_its_start, 100, seed=1))["kills"] == 100


@pytest.mark.slow
def test_terminated_many_times(undisturbed_from_its_start):
    summary = _check(kill.campaign(undisturbed_from_its_start, 40, kill=False, seed=2))
    assert summary["kills"] == 40 and summary["code 143"] > 20
