"""Write checkpoints in one step."""

import io
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from typing_extensions import override

from bn_lightning.runs.atomic_write import write_atomically


class AtomicCheckpointIO(TorchCheckpointIO):
    """Replaces a checkpoint in one step, so that a killed process leaves no part of one.

    Lightning's own writes to the system's temporary folder and moves the file. To another file
    system that is a copy, which a killed process leaves incomplete under the checkpoint's name.
    """

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write a checkpoint.

        Args:
            checkpoint: plain values and tensors.
            path: a local path; missing folders are made.
            storage_options: must be None.

        Raises:
            OSError: the disk is full, or the folder cannot be written; the old file is whole.
        """
        if storage_options is not None:
            raise TypeError(f"expected `storage_options` to be None, got {storage_options!r}")
        # In memory first: torch replaces the system's error by one of its own.
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(Path(path), buffer.getbuffer())
