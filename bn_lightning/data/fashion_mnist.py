"""Fashion-MNIST: photographs of clothes in the format of MNIST."""

from typing import ClassVar

from bn_lightning.data.mnist import MNISTDataModule
from bn_lightning.data.published import FASHION_MNIST


class FashionMNISTDataModule(MNISTDataModule):
    """Fashion-MNIST, 60,000 training and 10,000 test images of ten kinds of clothes.

    Like `MNISTDataModule`, from `<root>/fashion_mnist/`.

    Source: H. Xiao, K. Rasul and R. Vollgraf, "Fashion-MNIST: a Novel Image Dataset for
    Benchmarking Machine Learning Algorithms", 2017, arXiv 1708.07747.
    """

    source: ClassVar[str] = "fashion_mnist"
    mirrors: ClassVar[tuple[str, ...]] = (
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
    )
    digests: ClassVar[dict[str, str]] = FASHION_MNIST
