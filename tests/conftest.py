"""What every test shares: the device, and Triton's interpreter where there is no GPU."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    # Read by Triton when it is imported, so it is set before any test module is.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def device() -> str:
    """The name "cuda" where there is a GPU, else "cpu", where Triton interprets its kernels."""
    return "cuda" if torch.cuda.is_available() else "cpu"
