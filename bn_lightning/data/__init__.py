"""Data modules, one a file: whole data sets in one tensor, or images that workers decode."""

from bn_lightning.data.cifar10 import CIFAR10DataModule
from bn_lightning.data.digits import DigitsDataModule
from bn_lightning.data.fashion_mnist import FashionMNISTDataModule
from bn_lightning.data.image_folder import ImageFolderDataModule
from bn_lightning.data.mnist import MNISTDataModule
from bn_lightning.data.tabular import TabularDataModule

__all__ = [
    "CIFAR10DataModule",
    "DigitsDataModule",
    "FashionMNISTDataModule",
    "ImageFolderDataModule",
    "MNISTDataModule",
    "TabularDataModule",
]
