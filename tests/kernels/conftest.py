"""Memory that was not written shows: it holds NaN."""

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor

from bn_lightning.kernels import launch_plan


@pytest.fixture
def nan_in_empty_tensors(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fill what torch.empty returns and what plans allocate with NaN, bytes with 255."""

    def filled(empty_strided: Callable[..., Tensor], *arguments: object) -> Tensor:
        tensor = empty_strided(*arguments)
        # `data`, because it does not count as changed in place.
        tensor.data.fill_(float("nan") if tensor.is_floating_point() else 255)
        return tensor

    allocators = {name: partial(filled, f) for name, f in launch_plan.EMPTY_STRIDED.items()}
    monkeypatch.setattr(launch_plan, "EMPTY_STRIDED", allocators)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
