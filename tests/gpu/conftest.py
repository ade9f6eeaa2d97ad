"""Tests run side by side, each process with a cache of GPU memory of its own: none keeps what it no longer needs."""

import pytest
import torch


@pytest.fixture(autouse=True)
def cached_memory_is_given_back():
    yield
    torch.cuda.empty_cache()
