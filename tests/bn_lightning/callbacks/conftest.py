"""Fixture for several callbacks: a run on two ranks."""

from typing import Any

import pytest
import torch


@pytest.fixture
def two_ranks(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Trainer options for two forked processes on the CPU."""
    if torch.cuda.is_available():
        pytest.skip("CUDA forbids to fork a process that has used it")
    # Lightning sets the port in the environment; monkeypatch removes it afterwards.
    monkeypatch.setenv("MASTER_PORT", "")
    monkeypatch.delenv("MASTER_PORT")
    return {"strategy": "ddp_fork", "devices": 2}
