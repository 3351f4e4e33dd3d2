"""Checkpoints that are on the disk whole, or not at all."""

import io
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from typing_extensions import override

from bn_lightning.runs.atomic_write import write_atomically


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place, flushes it to the disk, then renames it.

    Lightning's own writes it into the system's temporary folder and moves it: where the run lies on
    another file system, that is a copy, and a process killed meanwhile leaves a part of one under
    the checkpoint's name.
    """

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Writes it.

        Args:
            checkpoint: plain values and tensors.
            path: a local one; its folder is made.
            storage_options: must be None.

        Raises:
            OSError: the disk is full, or the folder cannot be written; the old file is whole.
        """
        if storage_options is not None:
            raise TypeError(f"`storage_options` expected None, got {storage_options!r}")
        # In memory first, as torch hides what the system said behind an error of its own.
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(Path(path), buffer.getbuffer())
