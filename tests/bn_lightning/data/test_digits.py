"""The digits that scikit-learn carries."""

import torch

from bn_lightning.data import DigitsDataModule


def digits(seed: int = 0, fraction: float = 1 / 12, **options: bool) -> DigitsDataModule:
    data = DigitsDataModule(60, 2500, fraction, seed, **options)
    data.prepare_data()
    data.setup("fit")
    return data


def test_shapes_range_and_dtypes() -> None:
    data = digits()
    for batches, samples in (
        (data.train_dataloader(), 1317),
        (data.val_dataloader(), 120),
        (data.test_dataloader(), 360),
    ):
        assert batches.inputs.shape == (samples, 1, 28, 28)
        assert batches.inputs.dtype == torch.float32
        assert batches.targets.dtype == torch.int64
        assert batches.inputs.min() == 0
        assert batches.inputs.max() == 1
        assert batches.targets.unique().tolist() == list(range(10))


def test_info_pins_the_data() -> None:
    assert digits().info == {
        "source": "digits",
        "root": "scikit-learn",
        "sha256": {
            "images": "8f26b2bd9d135c256808f68f14fdabddde6d9c7f869ae419704b051f0f14b3b3",
            "targets": "8ba4f891220f5e4c9c819638d1602d74b83618f167043c6da52a2a247841ddf0",
        },
        "classes": 10,
        "train": 1317,
        "validation": 120,
        "test": 360,
    }


def test_the_test_set_is_fixed() -> None:
    some, other = digits(seed=0).test_dataloader(), digits(1, fraction=0.5).test_dataloader()
    assert torch.equal(some.inputs, other.inputs)
    assert torch.equal(some.targets, other.targets)


def test_enlarging_keeps_the_mean() -> None:
    # Each pixel of 8x8 becomes 3.5x3.5 of 28x28; the weights at the border are no exact average.
    from sklearn.datasets import load_digits

    small = load_digits().images[-360:].mean() / 16
    assert abs(digits().test_dataloader().inputs.mean().item() - small) < 0.02
