"""The training batches of a stack: each member sees those of its own run."""

import copy
import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bn_lightning.data.batches import Batches
from bn_lightning.data.protocol import check_data_module
from bn_lightning.data.tensor_data_module import TensorDataModule
from bn_lightning.stack.context import Placed
from bn_lightning.stack.same_architecture import NotStackableError


def loaded_data(config: Mapping[str, Any]) -> Any:
    """Build and set up a data module; the one of the last call again, if only the seed differs.

    Args:
        config: of the data module, resolved.
    """
    same = {key: 0 if key == "seed" else value for key, value in config.items()}
    return _loaded(json.dumps(same, sort_keys=True))


@functools.lru_cache(maxsize=1)
def _loaded(config: str) -> Any:
    from hydra.utils import instantiate

    datamodule = instantiate(json.loads(config))
    check_data_module(datamodule)
    datamodule.prepare_data()
    datamodule.setup("fit")
    return datamodule


class SeedBatches:
    """Batches of the seeds of a stack, in step. Members of one seed share the batch.

    Args:
        datamodule: set up; its own seed does not matter.
        seeds: of each member's data.

    Raises:
        NotStackableError: the batches may depend on more than the seed and the epoch.
    """

    def __init__(self, datamodule: Any, seeds: Sequence[int]) -> None:
        if not isinstance(datamodule, TensorDataModule):
            raise NotStackableError(
                f"`data` is {type(datamodule).__name__}, whose batches may depend on more than the"
                " seed; a TensorDataModule can be stacked"
            )
        different = sorted(set(seeds))
        self.stream_of = [different.index(seed) for seed in seeds]
        self.streams: list[Batches] = []
        for seed in different:
            own = copy.copy(datamodule)  # shares the tensors
            own.seed = seed
            self.streams.append(own.train_dataloader())

    def __len__(self) -> int:
        """Return the number of batches in an epoch."""
        return len(self.streams[0])

    def epoch(self, number: int) -> Iterator[tuple[Placed, Placed]]:
        """Yield inputs and targets of each batch of an epoch: shared, or (K, N, ...)."""
        for stream in self.streams:
            stream.set_epoch(number)
        for batches in zip(*self.streams, strict=True):
            inputs, targets = zip(*batches, strict=True)
            yield self._placed(inputs), self._placed(targets)

    def member_state(self, member: int) -> dict[str, Any]:
        """Return where a member is in its batches, as its own run saves it."""
        return self.streams[self.stream_of[member]].state_dict()

    def take(self, members: Sequence[int]) -> None:
        """Keep the given members only."""
        self.stream_of = [self.stream_of[k] for k in members]

    def _placed(self, tensors: Sequence[Tensor]) -> Placed:
        used = sorted(set(self.stream_of))
        if len(used) == 1:
            return Placed(tensors[used[0]], None)
        if self.stream_of == list(range(len(tensors))):
            return Placed(torch.stack(list(tensors)), 0)
        return Placed(torch.stack([tensors[of] for of in self.stream_of]), 0)
