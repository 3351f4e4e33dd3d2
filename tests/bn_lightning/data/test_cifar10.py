"""CIFAR-10 from binary files written here: the format, the archive, the augmentation."""

import hashlib
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bn_lightning.data import CIFAR10DataModule
from bn_lightning.data.cifar10 import read_records, shifted_and_flipped
from bn_lightning.data.errors import DataError, DataUnavailableError

FOLDER = "cifar-10-batches-bin"
RECORDS = 12  # in each file


def write_files(root: Path) -> dict[str, np.ndarray]:
    """Writes six files of noise; returns their records by name."""
    random = np.random.default_rng(0)
    folder = root / "cifar10" / FOLDER
    folder.mkdir(parents=True)
    written = {}
    for name in CIFAR10DataModule.sha256:
        records = random.integers(256, size=(RECORDS, 3073), dtype=np.uint8)
        records[:, 0] %= 10
        records.tofile(folder / name)
        written[name] = records
    return written


def module_of(root: Path, **options: Any) -> CIFAR10DataModule:
    """A data module that believes the files which are there."""

    files = {name: root / "cifar10" / FOLDER / name for name in CIFAR10DataModule.sha256}

    class Written(CIFAR10DataModule):
        mirrors = ()

    if all(path.exists() for path in files.values()):
        Written.sha256 = {
            name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()
        }
    defaults = {
        "root": root,
        "batch_size": 6,
        "eval_batch_size": 4,
        "validation_fraction": 0.1,
        "seed": 1,
        "augment": True,
        "mean": (0, 0, 0),
        "std": (1, 1, 1),
        "test_curve": False,
    }
    return Written(**{**defaults, **options})


def ready(root: Path, **options: Any) -> CIFAR10DataModule:
    module = module_of(root, **options)
    module.prepare_data()
    module.setup("fit")
    return module


class TestFormat:
    def test_class_first_then_red_green_blue_by_rows(self, tmp_path: Path) -> None:
        record = np.zeros(3073, np.uint8)
        record[0] = 7
        record[1 + 0 * 1024 + 2 * 32 + 5] = 11  # red, row 2, column 5
        record[1 + 2 * 1024 + 31 * 32] = 13  # blue, last row, first column
        record.tofile(tmp_path / "one.bin")
        images, labels = read_records(tmp_path / "one.bin")
        assert labels.tolist() == [7]
        assert images.shape == (1, 3, 32, 32)
        assert images[0, 0, 2, 5] == 11
        assert images[0, 2, 31, 0] == 13
        assert images.astype(int).sum() == 24

    @pytest.mark.parametrize("size", [0, 3072, 3074 * 10], ids=["empty", "truncated", "cifar100"])
    def test_no_whole_records(self, tmp_path: Path, size: int) -> None:
        (tmp_path / "one.bin").write_bytes(bytes(size))
        with pytest.raises(DataError, match=r"one\.bin: expected records of 3,073"):
            read_records(tmp_path / "one.bin")


class TestSplits:
    def test_official_test_set_and_validation_from_training(self, tmp_path: Path) -> None:
        written = write_files(tmp_path)
        module = ready(tmp_path, augment=False)
        info = module.info
        assert (info["train"], info["validation"], info["test"]) == (54, 6, 12)
        assert info["source"] == "cifar10"
        assert info["root"] == str(tmp_path)
        assert module.num_classes == 10
        images, targets = zip(*module.test_dataloader(), strict=True)
        records = written["test_batch.bin"]
        assert torch.cat(targets).tolist() == records[:, 0].tolist()
        expected = torch.from_numpy(records[:, 1:].reshape(-1, 3, 32, 32)).float() / 255
        assert torch.allclose(torch.cat(images), expected, rtol=0, atol=1e-6)

    def test_bytes_are_kept_and_batches_normalised(self, tmp_path: Path) -> None:
        write_files(tmp_path)
        mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
        plain = ready(tmp_path, augment=False).test_dataloader()
        assert plain.inputs.dtype == torch.uint8
        normal = ready(tmp_path, augment=False, mean=mean, std=std).test_dataloader()
        shape = (3, 1, 1)
        for (x, _), (y, _) in zip(plain, normal, strict=True):
            expected = (x - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)
            assert y.dtype == torch.float32
            assert torch.allclose(y, expected, rtol=0, atol=1e-5)


class TestAugmentation:
    def test_shifts_and_flips(self) -> None:
        images = torch.randint(1, 256, (90, 3, 32, 32), dtype=torch.uint8)
        shifts = torch.randint(9, (90, 3))
        shifts[:, 2] %= 2
        got = shifted_and_flipped(images, shifts)
        padded = torch.nn.functional.pad(images, (4, 4, 4, 4))
        for image, (top, left, flip), result in zip(padded, shifts.tolist(), got, strict=True):
            cut = image[:, top : top + 32, left : left + 32]
            assert torch.equal(result, cut.flip(2) if flip else cut)
        still = torch.tensor([[4, 4, 0]] * 90)
        assert torch.equal(shifted_and_flipped(images, still), images)

    def test_all_shifts_occur(self, tmp_path: Path) -> None:
        write_files(tmp_path)
        module = ready(tmp_path)
        shifts = torch.cat([module._shifts_of(epoch) for epoch in range(40)])
        assert [len(column.unique()) for column in shifts.unbind(1)] == [9, 9, 2]
        assert shifts.max(0).values.tolist() == [8, 8, 1]

    def test_it_depends_on_seed_epoch_and_image_alone(self, tmp_path: Path) -> None:
        write_files(tmp_path)

        def batches(batch_size: int, epoch: int, seed: int = 1) -> dict[bytes, int]:
            loader = ready(tmp_path, batch_size=batch_size, seed=seed).train_dataloader()
            loader.set_epoch(epoch)
            return {
                image.numpy().tobytes(): int(target)
                for inputs, targets in loader
                for image, target in zip(inputs, targets, strict=True)
            }

        first = batches(6, 0)
        assert len(first) == 54
        assert batches(9, 0) == first, "another size of batch, the same images"
        assert batches(6, 0) == first
        assert len(first.keys() & batches(6, 1).keys()) < 5
        assert len(first.keys() & batches(6, 0, seed=2).keys()) < 5

    def test_evaluations_are_not_augmented(self, tmp_path: Path) -> None:
        write_files(tmp_path)
        augmented, plain = (ready(tmp_path, augment=value) for value in (True, False))
        for mine, other in zip(augmented.val_dataloader(), plain.val_dataloader(), strict=True):
            assert torch.equal(mine[0], other[0])

    def test_a_resumed_epoch_goes_on(self, tmp_path: Path) -> None:
        write_files(tmp_path)
        whole = ready(tmp_path).train_dataloader()
        whole.set_epoch(3)
        iterator = iter(whole)
        for _ in range(4):
            next(iterator)
        resumed = ready(tmp_path).train_dataloader()
        resumed.load_state_dict(whole.state_dict())
        resumed.set_epoch(3)
        rest = list(resumed)
        assert len(rest) == 5
        for (x, target), (y, other) in zip(iterator, rest, strict=True):
            assert torch.equal(x, y)
            assert torch.equal(target, other)


class TestFiles:
    def test_unpacked_from_the_archive(self, tmp_path: Path) -> None:
        write_files(tmp_path / "there")
        root = tmp_path / "here"
        module = module_of(tmp_path / "there")
        module.folder = root / "cifar10" / FOLDER
        (root / "cifar10").mkdir(parents=True)
        archive = root / "cifar10" / "cifar-10-binary.tar.gz"
        with tarfile.open(archive, "w:gz") as tar:
            tar.add(tmp_path / "there" / "cifar10" / FOLDER, FOLDER)
        with pytest.raises(DataError, match=r"cifar-10-binary\.tar\.gz: expected sha256 c4a38c50"):
            module.prepare_data()
        assert archive.exists()
        type(module).archive_sha256 = hashlib.sha256(archive.read_bytes()).hexdigest()
        module.prepare_data()
        module.setup("fit")
        assert module.info["train"] == 54

    def test_absent_and_no_mirror(self, tmp_path: Path) -> None:
        module = module_of(tmp_path)
        module.prepare_data()
        with pytest.raises(DataUnavailableError, match=r"cifar-10-binary\.tar\.gz.*no mirror"):
            module.setup("fit")
        assert list(tmp_path.iterdir()) == []

    def test_only_looked_for(self, tmp_path: Path) -> None:
        module = module_of(tmp_path, download=False)
        module.prepare_data()
        with pytest.raises(DataUnavailableError, match="data_batch_1.bin, .*`?data.download"):
            module.setup("fit")

    def test_a_file_is_missing(self, tmp_path: Path) -> None:
        write_files(tmp_path)
        module = module_of(tmp_path)
        (tmp_path / "cifar10" / FOLDER / "data_batch_4.bin").unlink()
        module.prepare_data()
        with pytest.raises(DataUnavailableError, match=r"to have data_batch_4\.bin, got"):
            module.setup("fit")

    def test_another_file_is_refused_and_left(self, tmp_path: Path) -> None:
        write_files(tmp_path)
        module = module_of(tmp_path)
        path = tmp_path / "cifar10" / FOLDER / "data_batch_2.bin"
        payload = bytearray(path.read_bytes())
        payload[100] ^= 1
        path.write_bytes(payload)
        module.prepare_data()
        with pytest.raises(DataError, match=r"data_batch_2\.bin: expected sha256"):
            module.setup("fit")
        assert path.read_bytes() == payload

    @pytest.mark.parametrize("change", [{"mean": (0, 0)}, {"std": (1, 1, -1)}], ids=str)
    def test_arguments(self, tmp_path: Path, change: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match="`mean`.*`std`"):
            module_of(tmp_path, **change)
