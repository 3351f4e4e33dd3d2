"""The common base of this package's data modules."""

import copy
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from typing_extensions import override

from bn_lightning.data.errors import DataError


class LoadedDataModule(LightningDataModule):
    """A data module that reads its data once, in `setup`, and yields batches on the device.

    A subclass sets `_info` at the end of `setup`.
    """

    def __init__(self) -> None:
        super().__init__()
        self._info: dict[str, Any] = {}

    @property
    def is_loaded(self) -> bool:
        """Whether `setup` has run in this process."""
        return bool(self._info)

    @property
    def info(self) -> dict[str, Any]:
        """Description of the data, see `DescribedData`, with the folder of the data as `root`.

        Raises:
            RuntimeError: `setup` has not run.
        """
        self._require_setup()
        return copy.deepcopy(self._info)

    @property
    def num_classes(self) -> int:
        """Number of classes, available after `setup`."""
        return self._info.get("classes", 0)

    @override
    def transfer_batch_to_device(
        self, batch: Any, device: torch.device, dataloader_idx: int
    ) -> Any:
        """Return `batch`, which is already on the device."""
        return batch

    def _require_setup(self) -> None:
        if not self.is_loaded:
            raise RuntimeError("expected `setup` to have run, got no data; call it first")

    def _placement(self) -> tuple[torch.device, dict[str, Any]]:
        """Return the device of the batches, and `rank` and `world_size` of several processes."""
        if self.trainer is None:
            return torch.device("cpu"), {}
        ranks = self.trainer.distributed_sampler_kwargs
        options = {"rank": ranks["rank"], "world_size": ranks["num_replicas"]} if ranks else {}
        return self.trainer.strategy.root_device, options

    def _check_same_on_all_ranks(self, source: str, root: str, sha256: dict[str, str]) -> None:
        if self.trainer is None or self.trainer.world_size == 1:
            return
        if self.trainer.strategy.broadcast(sha256) != sha256:
            raise DataError(
                "expected the same data on all ranks, got other files on rank"
                f" {self.trainer.global_rank} ({source!r} in {root}) than on rank 0; put the same"
                " files on each machine"
            )
