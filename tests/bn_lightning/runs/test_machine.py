"""What a result was made with and on."""

import subprocess
import sys
from typing import Any

import pytest
import torch

from bn_lightning.runs.machine import git_commit, hardware, package_versions, peak_memory_mib


class TestSurroundings:
    def test_versions(self) -> None:
        versions = package_versions()
        assert versions["python"] == ".".join(map(str, sys.version_info[:3]))
        assert versions["lightning"].startswith("2.")
        assert "bn-lightning" in versions

    def test_hardware(self) -> None:
        found = hardware()
        assert found["processor"]
        assert found["torch_threads"] == torch.get_num_threads()
        assert len(found["accelerators"]) == torch.cuda.device_count()

    def test_peak_memory_is_in_mebibytes(self) -> None:
        """Of an interpreter that holds 300 MiB and one that holds none, not of who started it."""
        peaks = []
        for size in (0, 300):
            script = (
                "from bn_lightning.runs.machine import peak_memory_mib\n"
                f"held = b'x' * ({size} * 2**20)\n"
                "print(peak_memory_mib())"
            )
            done = subprocess.run(
                [sys.executable, "-c", script],
                capture_output=True,
                text=True,
                check=True,
            )
            peaks.append(float(done.stdout))
        assert peaks[1] - peaks[0] == pytest.approx(300, abs=20)
        assert peak_memory_mib() > 0

    def test_no_commit_outside_a_checkout(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def absent(*_: Any, **__: Any) -> None:
            raise FileNotFoundError("git")

        monkeypatch.setattr("subprocess.run", absent)
        assert git_commit() is None
