"""Batches of images: the same bits from any number of workers, resumed, and in steady memory."""

import copy
import itertools
import multiprocessing
import os
import signal
import subprocess
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_folders import image_module, write_images
from torch import Tensor

from bn_lightning.data.image_batches import Buffers, DecodedBatches, ImageBatches, ImageFiles
from bn_lightning.data.image_file import ImageFileError, read_image
from bn_lightning.data.image_transforms import CenterCrop


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of 11: batches of 2 leave none over, of 4 two."""
    return write_images(tmp_path_factory.mktemp("images") / "noise", train=11, val=4)


def train_batches(folder: Path, **options: Any) -> ImageBatches:
    return image_module(folder, **options).train_dataloader()


def epochs(batches: ImageBatches, count: int = 2) -> list[list[tuple[Tensor, Tensor]]]:
    taken = []
    for epoch in range(count):
        batches.set_epoch(epoch)
        taken.append(list(batches))
    return taken


def same(first: Any, second: Any) -> bool:
    pairs = zip(sum(first, []), sum(second, []), strict=True)
    return all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in pairs)


@pytest.mark.parametrize("augment", ["resized_crop", "pad_crop"])
def test_any_number_of_workers_gives_the_same_bits(folder: Path, augment: str) -> None:
    alone = epochs(train_batches(folder, augment=augment))
    assert len(alone[0]) == 11
    assert not same(alone[:1], alone[1:]), "each epoch has pixels of its own"
    for workers in (1, 2):
        batches = train_batches(folder, augment=augment, num_workers=workers)
        assert same(epochs(batches), alone)
    assert not same(epochs(train_batches(folder, augment=augment, seed=2)), alone)


def test_evaluations_too(folder: Path) -> None:
    for workers in (0, 2):
        module = image_module(folder, num_workers=workers)
        images, targets = zip(*module.val_dataloader(), strict=True)
        assert torch.cat(targets).tolist() == [0] * 4 + [1] * 4
        first = images if workers == 0 else first
    assert torch.equal(torch.cat(images), torch.cat(first))


def test_what_becomes_of_an_image_is_its_own(folder: Path) -> None:
    """Neither the batch it is in nor the rank that decodes it changes its pixels."""
    one = {}
    for inputs, targets in train_batches(folder, batch_size=1):
        assert inputs.shape == (1, 3, 8, 8)
        assert inputs.is_contiguous()
        one[inputs.numpy().tobytes()] = int(targets)
    assert len(one) == 22
    ranks = []
    for rank in range(2):
        batches = train_batches(folder, batch_size=4)
        batches = ImageBatches(
            batches.decoded,
            4,
            on_failures=pytest.fail,
            mean=(0, 0, 0),
            std=(1, 1, 1),
            shuffle=True,
            seed=1,
            rank=rank,
            world_size=2,
        )
        ranks.append(
            [
                pixels.numpy().tobytes()
                for inputs, targets in batches
                for pixels in inputs
                if one[pixels.numpy().tobytes()] in targets
            ]
        )
    assert len(ranks[0]) == len(ranks[1]) == 11
    assert len({*ranks[0], *ranks[1]}) == 22


def test_pixels_are_scaled_shifted_and_divided(folder: Path) -> None:
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    module = image_module(folder, augment="none", image_size=16, mean=mean, std=std)
    inputs, _ = next(iter(module.val_dataloader()))
    path = folder / "val" / "cat" / "000.png"
    pixels = np.asarray(read_image(path))[:, 2:18] / 255  # 20x16: its middle
    expected = ((pixels - mean) / std).transpose(2, 0, 1)
    assert inputs.dtype == torch.float32
    assert np.allclose(inputs[0], expected, rtol=0, atol=1e-6)


class TestFixedBatches:
    def together(self, batches: ImageBatches) -> list[list[frozenset[int]]]:
        taken = []
        for epoch in range(3):
            batches.set_epoch(epoch)
            taken.append([frozenset(index.tolist()) for index in batches.indices()])
        return taken

    def test_the_same_samples_appear_together(self, folder: Path) -> None:
        first, second, third = self.together(train_batches(folder, shuffle="batches", batch_size=4))
        assert {*first} == {*second} == {*third}
        assert first != second != third
        assert sum(map(len, first)) == 20

    def test_and_else_do_not(self, folder: Path) -> None:
        first, second, _ = self.together(train_batches(folder, batch_size=4))
        assert {*first} != {*second}

    def test_a_run_of_the_other_kind_does_not_go_on(self, folder: Path) -> None:
        state = train_batches(folder).state_dict()
        with pytest.raises(ValueError, match="fixed_batches False, now True"):
            train_batches(folder, shuffle="batches").load_state_dict(state)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("position", [0, 3, 11])
def test_goes_on_after_the_batch_in_use(folder: Path, workers: int, position: int) -> None:
    """However many batches the workers had prepared beyond it."""
    whole = epochs(train_batches(folder))[1]
    batches = train_batches(folder, num_workers=workers)
    batches.set_epoch(1)
    iterator = iter(batches)
    for _ in range(position):
        next(iterator)
    state = batches.state_dict()
    assert state["position"] == position
    resumed = train_batches(folder, num_workers=2 - workers)
    resumed.load_state_dict(state)
    resumed.set_epoch(1)
    assert same([list(resumed)], [whole[position:]])


def test_a_second_reader_disturbs_nobody(folder: Path) -> None:
    """As PreciseBatchNorm reads the training batches once more, in the middle of an epoch."""
    whole = epochs(train_batches(folder), 1)
    batches = train_batches(folder, num_workers=1)
    iterator = iter(batches)
    taken = [next(iterator)]
    other = copy.copy(batches)
    assert same([list(other)], whole)
    taken += iterator
    assert same([taken], whole)


def test_workers_are_kept_from_epoch_to_epoch(folder: Path) -> None:
    batches = train_batches(folder, num_workers=1)
    list(batches)
    (worker,) = batches._loader._iterator._workers
    list(batches)
    assert batches._loader._iterator._workers == [worker]
    assert worker.is_alive()


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="no sigwaitinfo here")
def test_workers_outlive_the_signals_of_others_and_obey_the_run(folder: Path) -> None:
    batches = train_batches(folder, num_workers=1)
    iterator = iter(batches)
    next(iterator)
    (worker,) = batches._loader._iterator._workers
    for name in ("INT", "TERM"):
        subprocess.run(["kill", f"-{name}", str(worker.pid)], check=True)
    assert len(list(iterator)) == 10
    assert worker.is_alive()
    worker.terminate()
    worker.join(20)
    assert worker.exitcode == 0
    # What the end of the iterator would wait for is the worker that has just been ended.
    batches._loader._iterator._workers_status = [False]


def test_workers_that_are_not_kept_end(folder: Path) -> None:
    running = {*multiprocessing.active_children()}
    list(image_module(folder, num_workers=1).val_dataloader())
    assert {*multiprocessing.active_children()} == running


def plain_batches(folder: Path, names: list[str], batch_size: int, **options: Any) -> ImageBatches:
    """Of these images of `folder/val/cat`, in their order, by defaults."""
    encoded = np.array([name.encode() for name in names])
    files = ImageFiles(folder / "val" / "cat", encoded, np.arange(len(names)))
    decoded = DecodedBatches(files, CenterCrop(8), 0)
    options = {"on_failures": pytest.fail, "mean": (0, 0, 0), "std": (1, 1, 1), **options}
    return ImageBatches(decoded, batch_size, **options)


def test_defaults(folder: Path) -> None:
    """In this process, in order, to the CPU."""
    batches = plain_batches(folder, ["000.png", "001.png", "002.png"], 2)
    found = list(batches)
    assert [targets.tolist() for _, targets in found] == [[0, 1], [2]]
    assert batches.num_workers == 0 and not batches.fixed_batches
    assert {inputs.device.type for inputs, _ in found} == {"cpu"}
    with pytest.raises(ValueError, match="`num_workers`"):
        plain_batches(folder, ["000.png"], 1, num_workers=-1)


def test_another_device(folder: Path) -> None:
    """Meta, for want of another that is everywhere: pixels and targets go there."""
    for inputs, targets in plain_batches(folder, ["000.png"], 1, device="meta"):
        assert (inputs.device.type, targets.device.type) == ("meta", "meta")
        assert (inputs.shape, inputs.dtype) == ((1, 3, 8, 8), torch.float32)


class TestUnreadable:
    NAMES = ["bad0.png", "000.png", "bad1.png", "bad2.png", "001.png"]

    @pytest.fixture
    def spoilt(self, tmp_path: Path) -> Path:
        folder = write_images(tmp_path / "noise", train=1, val=2)
        for number in range(3):
            (folder / "val" / "cat" / f"bad{number}.png").write_bytes(b"x")
        return folder

    def test_a_batch_has_what_can_be_read(self, spoilt: Path) -> None:
        noted: list[Any] = []
        whole = list(plain_batches(spoilt, ["000.png", "001.png"], 1))
        ((inputs, targets),) = plain_batches(spoilt, self.NAMES, 5, on_failures=noted.extend)
        assert targets.tolist() == [1, 4]
        assert torch.equal(inputs, torch.cat([pixels for pixels, _ in whole]))
        assert [name for name, _ in noted] == ["bad0.png", "bad1.png", "bad2.png"]
        assert all(f"{name}: " in message for name, message in noted)

    def test_one_without_any_is_left_out_or_ends(self, spoilt: Path) -> None:
        noted: list[Any] = []
        options = {"on_failures": noted.extend, "skip_empty": True}
        found = list(plain_batches(spoilt, self.NAMES, 2, **options))
        assert [targets.tolist() for _, targets in found] == [[1], [4]]
        assert len(noted) == 3
        iterator = iter(plain_batches(spoilt, self.NAMES, 2, on_failures=noted.extend))
        next(iterator)
        with pytest.raises(ImageFileError, match=r"got 2 that .*first .*bad1.png"):
            next(iterator)


def test_the_global_random_streams_are_untouched(folder: Path) -> None:
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    epochs(train_batches(folder, num_workers=1), 1)
    epochs(train_batches(folder), 1)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])


class TestBuffers:
    def test_memory_is_used_again_when_nobody_holds_it(self) -> None:
        buffers = Buffers(np.float32)
        first = torch.from_numpy(buffers.take((2, 3)))
        address = first.data_ptr()
        part = first[1:]
        del first
        second = torch.from_numpy(buffers.take((2, 3)))
        assert second.data_ptr() != address, "a view holds it, too"
        del part
        assert torch.from_numpy(buffers.take((5,))).data_ptr() == address

    def test_one_that_fits_exactly_is_used_again_and_one_too_small_is_not(self) -> None:
        buffers = Buffers(np.float32)
        address = torch.from_numpy(buffers.take((2, 3))).data_ptr()
        assert torch.from_numpy(buffers.take((3, 2))).data_ptr() == address
        assert buffers.take((7,)).shape == (7,)

    def test_few_are_kept(self) -> None:
        """Four, however many were in use together."""
        buffers = Buffers(np.float32)
        arrays = [buffers.take((5,)) for _ in range(6)]
        kept = [weakref.ref(array.base) for array in arrays]
        del arrays
        assert sum(buffer() is not None for buffer in kept) == 4

    def test_batches_that_are_kept_do_not_change(self, folder: Path) -> None:
        batches = train_batches(folder)
        kept = list(batches)
        copies = [inputs.clone() for inputs, _ in kept]
        list(batches)
        assert all(torch.equal(i, c) for (i, _), c in zip(kept, copies, strict=True))


def resident_mib() -> float:
    """Of this process and of the workers."""
    pids = [os.getpid(), *(process.pid for process in multiprocessing.active_children())]
    pages = sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids)
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_memory_does_not_grow(folder: Path) -> None:
    """5,000 images, at most 50 MiB; a batch has 2 MiB of floats."""
    batches = train_batches(folder, image_size=96, batch_size=20, photometric=0, num_workers=1)
    for number, _ in enumerate(itertools.chain.from_iterable(itertools.repeat(batches))):
        if number == 25:
            before = resident_mib()
        if number == 275:
            break
    assert resident_mib() - before < 50
