"""Data sets that live whole in one tensor and are batched by index: one data module a file."""

from bn_lightning.data.digits import DigitsDataModule
from bn_lightning.data.fashion_mnist import FashionMNISTDataModule
from bn_lightning.data.mnist import MNISTDataModule
from bn_lightning.data.tabular import TabularDataModule

__all__ = [
    "DigitsDataModule",
    "FashionMNISTDataModule",
    "MNISTDataModule",
    "TabularDataModule",
]
