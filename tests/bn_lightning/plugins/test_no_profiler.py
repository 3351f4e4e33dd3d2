"""A profiler that measures nothing, wherever Lightning asks for one."""

from functools import partial
from pathlib import Path

import pytest
import torch
from lightning import Trainer
from torch import nn

from bn_lightning import Classifier
from bn_lightning.data.batches import TensorBatches
from bn_lightning.plugins.no_profiler import NoProfiler


def test_blocks_nest_and_let_errors_through() -> None:
    profiler = NoProfiler()
    with profiler.profile("outer"), profiler.profile("inner"), profiler.profile("inner"):
        pass
    with pytest.raises(ValueError, match="mine"), profiler.profile("step"):
        raise ValueError("mine")


def test_it_has_nothing_to_say() -> None:
    profiler = NoProfiler()
    with profiler.profile("step"):
        pass
    assert profiler.summary() == ""


# Lightning 2.6 asks torch 2.13 for a class that the latter has deprecated.
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")
def test_a_trainer_trains_the_same_with_it(tmp_path: Path) -> None:
    weights = []
    for profiler in (None, NoProfiler()):
        torch.manual_seed(0)
        x, y = torch.randn(12, 4), torch.randint(3, (12,))
        module = Classifier(nn.Linear(4, 3), partial(torch.optim.SGD, lr=0.1), num_classes=3)
        trainer = Trainer(
            accelerator="cpu",
            default_root_dir=tmp_path,
            profiler=profiler,
            max_epochs=2,
            log_every_n_steps=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, TensorBatches(x, y, 4), TensorBatches(x, y, 4))
        assert trainer.global_step == 6
        weights.append(module.network.weight)
    assert torch.equal(*weights)
