"""What the tests of several callbacks share: a run on two ranks."""

from typing import Any

import pytest
import torch


@pytest.fixture
def two_ranks(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The Trainer's options for two processes on the CPU, forked from this one."""
    if torch.cuda.is_available():
        pytest.skip("CUDA forbids to fork a process that has used it")
    # Lightning sets the port here and leaves it: this gives the environment back as it was.
    monkeypatch.setenv("MASTER_PORT", "")
    monkeypatch.delenv("MASTER_PORT")
    return {"strategy": "ddp_fork", "devices": 2}
