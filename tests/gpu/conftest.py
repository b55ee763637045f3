"""The tests of tests/ that are imported into these files run on the CUDA device."""

import gc

import pytest
import torch


@pytest.fixture
def device() -> str:
    return "cuda"


@pytest.fixture(autouse=True)
def _nothing_left_over():
    """A 4-bit weight and its layer refer to each other: only a collection gives them back."""
    gc.collect()
    torch.cuda.empty_cache()
