"""What every test shares: no network, fixed hypothesis examples, GPU tests that explain a skip."""

from __future__ import annotations

import gc
import os
import socket

# Set before any test module imports a library that reads them. Nothing here may reach a hub:
# what a test needs is in the repository or in the packages that requirements.txt installs.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "agg")

import pytest
from hypothesis import HealthCheck, settings

# "ci" is the default: the same examples every time, so that a red run can be repeated by anyone.
# HYPOTHESIS_PROFILE=explore looks for new ones. No deadline in either: bitsandbytes compiles its
# odd-width kernels on first use, which takes a second and means nothing.
_COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("ci", derandomize=True, max_examples=50, database=None, **_COMMON)
settings.register_profile("explore", max_examples=1000, **_COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

_LOOPBACK = ("127.", "::1", "localhost", "0.0.0.0")


@pytest.fixture(scope="session", autouse=True)
def _no_network():
    """Fail a test that opens a connection to anywhere but this machine."""
    connect = socket.socket.connect

    def guarded(self, address):
        internet = self.family in (socket.AF_INET, socket.AF_INET6)
        if internet and not str(address[0]).startswith(_LOOPBACK):
            raise RuntimeError(f"a test tried to reach {address[0]}: tests use no network")
        return connect(self, address)

    patch = pytest.MonkeyPatch()
    patch.setattr(socket.socket, "connect", guarded)
    yield
    patch.undo()


@pytest.fixture
def device() -> str:
    """Where the tests compute that tests/gpu repeats; its own conftest.py says "cuda"."""
    return "cpu"


@pytest.fixture(scope="module")
def short_collections():
    """The Trainer collects garbage after each run: let it not search the imported libraries."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def pytest_collection_modifyitems(config, items):
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu:
        return  # do not import torch for a run that has no GPU test in it
    import torch

    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="no CUDA device on this machine (torch.cuda.is_available())")
        for item in gpu:
            item.add_marker(skip)
