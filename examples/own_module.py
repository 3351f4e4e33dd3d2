"""Trains a network with this package's LightningModule and BatchNorm, without Hydra.

python examples/own_module.py [--max-steps 500] [--without-batch-norm]
"""

import argparse
from functools import partial

import torch
from lightning import Trainer
from torch import nn

from bn_lightning import BatchNorm1d, Classifier
from bn_lightning.data import DigitsDataModule


def network(batch_norm: bool) -> nn.Sequential:
    """Return the paper's network, 784-100-100-100-10, with or without BatchNorm."""
    layers: list[nn.Module] = [nn.Flatten()]
    for in_features in (784, 100, 100):
        linear = nn.Linear(in_features, 100)
        nn.init.normal_(linear.weight, std=0.05)
        layers += [linear, *([BatchNorm1d(100)] if batch_norm else []), nn.Sigmoid()]
    return nn.Sequential(*layers, nn.Linear(100, 10))


def main() -> None:
    """Train it on the digits and print its accuracy on the test set."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--max-steps", type=int, default=500)
    parser.add_argument("--without-batch-norm", action="store_true")
    arguments = parser.parse_args()

    torch.set_num_threads(1)  # layers of 100 units are too small for several threads
    torch.manual_seed(1)
    model = Classifier(
        network(batch_norm=not arguments.without_batch_norm),
        optimizer=partial(torch.optim.SGD, lr=1.0),
    )
    data = DigitsDataModule(60, eval_batch_size=360, validation_fraction=0.1, seed=1)
    trainer = Trainer(
        max_steps=arguments.max_steps,
        max_epochs=-1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, data)
    [metrics] = trainer.test(model, data, verbose=False)
    print(f"test accuracy {metrics['test/accuracy']:.3f} after {trainer.global_step} steps")


if __name__ == "__main__":
    main()
