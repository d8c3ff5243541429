"""An emulator of Google Cloud Storage for the tests of a module, and a cache folder for each test."""

import emulator
import pytest
import small


@pytest.fixture(scope="module")
def service():
    if emulator.MISSING:
        pytest.skip(emulator.WHY)
    with emulator.started() as service:
        yield service


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    with small.programs(tmp_path_factory):
        yield
