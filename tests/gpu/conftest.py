"""The tests of tests/ that are imported into these files run on the CUDA device."""

import pytest


@pytest.fixture
def device() -> str:
    return "cuda"
