"""Image folders: their splits, their classes, what is wrong with them, and runs on them."""

import os
import shutil
import tarfile
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from image_folders import folder_options, image_module, write_images
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn

from bn_lightning import Classifier
from bn_lightning.data import ImageFolderDataModule
from bn_lightning.data.errors import CorruptImageWarning, DataError, DataUnavailableError
from bn_lightning.data.image_file import ImageFileError
from bn_lightning.data.image_transforms import CenterCrop, PadCrop, ResizedCrop
from bn_lightning.runs.machine import MAX_PROCESSES

# Lightning 2.6 asks torch 2.13 for a class that the latter has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_images(tmp_path / "noise")


class TestSplits:
    def test_train_and_val(self, folder: Path) -> None:
        module = image_module(folder)
        assert module.classes == ("cat", "dog")
        assert module.num_classes == 2
        sizes = [
            sum(len(targets) for _, targets in loader)
            for loader in (
                module.train_dataloader(),
                module.val_dataloader(),
                module.test_dataloader(),
            )
        ]
        assert sizes == [12, 6, 6]
        info = module.info
        assert info == {
            "source": "noise",
            "root": str(folder.parent),
            "sha256": info["sha256"],
            "folders": {"train": "train", "validation": "val", "test": "val"},
            "train": 12,
            "validation": 6,
            "test": 6,
            "classes": 2,
            "corrupt": 0,
        }
        assert {len(digest) for digest in info["sha256"].values()} == {64}

    def test_a_test_folder_is_the_test(self, folder: Path) -> None:
        shutil.copytree(folder / "val", folder / "test")
        (folder / "test" / "dog" / "002.png").unlink()
        module = image_module(folder)
        assert module.info["folders"]["test"] == "test"
        assert (module.info["validation"], module.info["test"]) == (6, 5)

    def test_training_drops_what_fills_no_batch(self, folder: Path) -> None:
        module = image_module(folder, batch_size=5)
        assert [len(targets) for _, targets in module.train_dataloader()] == [5, 5]
        # Dealt evenly: nothing is left to a batch of one.
        module = image_module(folder, eval_batch_size=5)
        assert [len(targets) for _, targets in module.val_dataloader()] == [3, 3]

    def test_the_digest_tells_names_and_sizes_apart(self, folder: Path) -> None:
        digests = [image_module(folder).info["sha256"]["train"]]
        (folder / "train" / "cat" / "000.png").rename(folder / "train" / "cat" / "zzz.png")
        digests.append(image_module(folder).info["sha256"]["train"])
        with open(folder / "train" / "cat" / "zzz.png", "ab") as file:
            file.write(b"\0")
        digests.append(image_module(folder).info["sha256"]["train"])
        assert len(set(digests)) == 3
        other = folder.rename(folder.with_name("elsewhere"))
        assert image_module(other).info["sha256"]["train"] == digests[-1]

    def test_names_of_any_alphabet(self, tmp_path: Path) -> None:
        module = image_module(write_images(tmp_path / "set", classes=("Katze", "σκύλος")))
        assert module.classes == ("Katze", "σκύλος")
        assert len(list(module.val_dataloader())) == 2


class TestArchive:
    def test_it_is_unpacked_once(self, folder: Path, tmp_path: Path) -> None:
        with tarfile.open(tmp_path / "noise.tar.gz", "w:gz") as tar:
            tar.add(folder, "noise")
        root = tmp_path / "root"
        options = {"root": root, "archive": tmp_path / "noise.tar.gz"}
        module = image_module(folder, **options)
        assert module.info["root"] == str(root)
        assert module.info["sha256"] == image_module(folder).info["sha256"]
        (tmp_path / "noise.tar.gz").unlink()
        image_module(folder, **options)


def spoiled(folder: Path, kind: str) -> None:
    if kind == "absent":
        shutil.rmtree(folder)
    elif kind == "empty":
        shutil.rmtree(folder / "train")
        (folder / "train").mkdir()
    elif kind == "no_val":
        shutil.rmtree(folder / "val")
    elif kind == "one_class":
        for split in ("train", "val"):
            shutil.rmtree(folder / split / "dog")
    elif kind == "class_without_images":
        for path in (folder / "train" / "dog").iterdir():
            path.rename(path.with_suffix(".txt"))
    elif kind == "other_names":
        (folder / "val" / "dog").rename(folder / "val" / "wolf")
    elif kind == "missing_class":
        shutil.rmtree(folder / "val" / "dog")


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("absent", DataUnavailableError, "noise to have a folder train/"),
        ("empty", DataError, "train: expected .* at least two classes, got 0$"),
        ("no_val", DataUnavailableError, "noise to have a folder val/"),
        ("one_class", DataError, r"train: expected .* at least two classes, got 1 \(cat\)"),
        ("class_without_images", DataError, r"train/dog: expected images .*\.jpg.*got none"),
        (
            "other_names",
            DataError,
            "val: expected the classes of train, got classes without dog and with",
        ),
        (
            "missing_class",
            DataError,
            "val: expected the classes of train, got classes without dog$",
        ),
    ],
)
def test_folders_that_are_refused(
    folder: Path, kind: str, error: type[Exception], message: str
) -> None:
    spoiled(folder, kind)
    with pytest.raises(error, match=message) as caught:
        image_module(folder)
    assert "\n" not in str(caught.value)


def test_other_files_are_left_out(folder: Path) -> None:
    (folder / "train" / "cat" / ".DS_Store").write_bytes(b"hidden")
    (folder / "train" / ".cache").mkdir()
    assert image_module(folder).info["train"] == 12
    (folder / "train" / "cat" / "notes.txt").write_text("not hidden")
    with pytest.warns(UserWarning, match=r"1 files.*cat/notes\.txt"):
        assert image_module(folder).info["train"] == 12


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"image_size": 4}, ValueError, "`image_size` to be at least 8"),
        ({"image_size": 32.0}, TypeError, "`image_size` to be an integer"),
        ({"num_workers": -1}, ValueError, "`num_workers` to be at least 0"),
        ({"augment": "crop"}, ValueError, "`augment`.*'resized_crop', 'pad_crop'"),
        ({"shuffle": True}, ValueError, "`shuffle`.*'samples', 'batches'"),
        ({"corrupt": "ignore"}, ValueError, "`corrupt`.*'error', 'skip'"),
        ({"photometric": 1.5}, ValueError, "`photometric`"),
        ({"std": (1, 1, 0)}, ValueError, "`std`"),
        ({"mean": (0,)}, ValueError, "`mean`"),
        ({"num_workers": MAX_PROCESSES + 1}, ValueError, "`num_workers` to be at most"),
        ({"batch_size": 0}, ValueError, "`batch_size` to be at least 1"),
        ({"eval_batch_size": 0}, ValueError, "`eval_batch_size` to be at least 1"),
        ({"seed": -1}, ValueError, "`seed` to be at least 0"),
        ({"photometric": -0.5}, ValueError, "`photometric`"),
        ({"name": "../noise"}, ValueError, "`name`.*`root`"),
        ({"name": "a/../../noise"}, ValueError, "`name`.*got 'a/../../noise'"),
        ({"name": "/noise"}, ValueError, "`name`.*`root`"),
        ({"name": ""}, ValueError, "`name`.*`root`"),
    ],
)
def test_arguments(
    tmp_path: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        ImageFolderDataModule(**folder_options(tmp_path, **options))


@pytest.mark.parametrize("photometric", [0, 1])
def test_arguments_at_their_bounds(tmp_path: Path, photometric: float) -> None:
    bounds = {"image_size": 8, "batch_size": 1, "eval_batch_size": 1, "seed": 0}
    bounds |= {"num_workers": MAX_PROCESSES, "photometric": photometric}
    module = ImageFolderDataModule(**folder_options(tmp_path, **bounds))
    assert module.input_shape == (3, 8, 8)


class TestChoices:
    @pytest.mark.parametrize(
        ("augment", "training", "share"),
        [
            ("resized_crop", ResizedCrop, 224 / 256),
            ("pad_crop", PadCrop, 1),
            ("none", CenterCrop, 1),
        ],
    )
    def test_what_training_and_evaluation_see(
        self, folder: Path, augment: str, training: type, share: float
    ) -> None:
        module = image_module(folder, augment=augment, photometric=0.25)
        seen = module.train_dataloader().decoded.transform
        assert type(seen) is training
        assert getattr(seen, "photometric", 0.25) == 0.25
        for loader in (module.val_dataloader(), module.test_dataloader()):
            assert type(loader.decoded.transform) is CenterCrop
            assert loader.decoded.transform.share == share

    def test_what_is_shuffled(self, folder: Path) -> None:
        for choice in ("samples", "batches"):
            module = image_module(folder, shuffle=choice)
            assert module.train_dataloader().fixed_batches == (choice == "batches")
            assert module.train_dataloader().shuffle and not module.val_dataloader().shuffle

    def test_workers_live_on_in_training_alone(self, folder: Path) -> None:
        module = image_module(folder, num_workers=2)
        assert module.train_dataloader().keep_workers and not module.val_dataloader().keep_workers
        assert module.train_dataloader().num_workers == module.val_dataloader().num_workers == 2

    def test_other_images_are_evaluated_as_the_test_is(self, folder: Path) -> None:
        """By workers where they are more than a batch; of what cannot be read, nothing comes."""
        module = image_module(folder, num_workers=2, corrupt="skip")
        path = folder / "val"
        module.eval_batch_size = 6
        column, kind, names, batches = module.prediction_inputs(path, pytest.fail)
        assert (column, kind, names[0]) == ("path", "images", str(path / "cat" / "000.png"))
        assert batches.num_workers == 0
        ((inputs, indices),) = batches
        ((expected, _),) = module.test_dataloader()
        assert torch.equal(inputs, expected) and indices.tolist() == list(range(6))
        module.eval_batch_size = 5
        assert module.prediction_inputs(path, pytest.fail).batches.num_workers == 2
        (path / "cat" / "000.png").write_bytes(b"")
        module.eval_batch_size, module.num_workers = 1, 0
        failures: list[Any] = []
        assert len(list(module.prediction_inputs(path, failures.extend).batches)) == 5
        assert [failure.name for failure in failures] == ["cat/000.png"]


@pytest.mark.parametrize(
    ("extra", "words"),
    [(3, "with f0, f1, f2$"), (4, "with f0, f1, f2 and 1 more$"), (5, "f2 and 2 more$")],
)
def test_few_of_many_classes_are_named(folder: Path, extra: int, words: str) -> None:
    for number in range(extra):
        (folder / "val" / f"f{number}").mkdir()
    with pytest.raises(DataError, match=words):
        image_module(folder)


class TestCorrupt:
    @pytest.fixture
    def corrupt(self, folder: Path) -> Path:
        """Two training images and one for validation that cannot be read."""
        (folder / "train" / "cat" / "001.png").write_bytes(b"not an image")
        whole = (folder / "train" / "dog" / "002.png").read_bytes()
        (folder / "train" / "dog" / "002.png").write_bytes(whole[: len(whole) // 2])
        (folder / "val" / "cat" / "000.png").write_bytes(b"")
        return folder

    @pytest.mark.parametrize("workers", [0, 1])
    def test_error_names_the_file(self, corrupt: Path, workers: int) -> None:
        module = image_module(corrupt, num_workers=workers)
        with pytest.raises(ImageFileError, match="val/cat/000.png: .*empty file.*skip") as caught:
            list(module.val_dataloader())
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("workers", [0, 2])
    def test_skip_names_and_counts_them_once(self, corrupt: Path, workers: int) -> None:
        module = image_module(corrupt, corrupt="skip", num_workers=workers, batch_size=6)
        loader = module.train_dataloader()
        with pytest.warns(CorruptImageWarning) as caught:
            sizes = [len(targets) for _, targets in loader]
            images = sum(len(targets) for _, targets in module.val_dataloader())
        assert sum(sizes) == 10
        assert images == 5
        names = sorted(str(warning.message) for warning in caught)
        assert len(names) == 3
        assert "data.corrupt=skip" in names[0] and "train/cat/001.png" in names[0]
        assert module.info["corrupt"] == 3
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            list(loader)
        assert module.info["corrupt"] == 3

    def test_the_rest_of_the_batch_is_as_ever(self, corrupt: Path) -> None:
        with pytest.warns(CorruptImageWarning):
            skipped, targets = next(iter(image_module(corrupt, corrupt="skip").val_dataloader()))
        assert targets.tolist() == [0, 0]
        shutil.copy(corrupt / "val" / "cat" / "001.png", corrupt / "val" / "cat" / "000.png")
        whole, _ = next(iter(image_module(corrupt).val_dataloader()))
        assert torch.equal(whole[1:], skipped)

    def test_a_batch_without_any_image(self, corrupt: Path) -> None:
        module = image_module(corrupt, corrupt="skip", eval_batch_size=1)
        with (
            pytest.warns(CorruptImageWarning),
            pytest.raises(ImageFileError, match="got 1 that .*000.png"),
        ):
            list(module.val_dataloader())

    def test_a_file_that_vanishes_is_no_corrupt_image(self, folder: Path) -> None:
        module = image_module(folder, corrupt="skip")
        (folder / "val" / "cat" / "000.png").unlink()
        with pytest.raises(FileNotFoundError):
            list(module.val_dataloader())


def classifier(num_classes: int = 2) -> Classifier:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, num_classes),
    )
    return Classifier(
        network, lambda parameters: torch.optim.SGD(parameters, 0.1), num_classes=num_classes
    )


def trainer(folder: Path, **options: Any) -> Trainer:
    return Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


@pytest.mark.slow
class TestRuns:
    @pytest.mark.parametrize("shuffle", ["samples", "batches"])
    def test_killed_and_resumed_it_ends_in_the_same_bits(
        self, folder: Path, tmp_path: Path, shuffle: str
    ) -> None:
        """Stopped in the middle of the second epoch, and gone on with by other workers."""

        path = tmp_path / "last.ckpt"

        class Save(Callback):
            def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
                if trainer.global_step == 9:
                    trainer.save_checkpoint(path)

        def run(workers: int, ckpt_path: Path | None = None) -> list[Tensor]:
            options = folder_options(folder, shuffle=shuffle, num_workers=workers)
            fit = trainer(tmp_path, max_steps=15, max_epochs=-1, callbacks=[Save()])
            data = ImageFolderDataModule(**options)
            fit.fit(classifier(), data, ckpt_path=ckpt_path, weights_only=True)
            return [value.clone() for value in fit.lightning_module.state_dict().values()]

        whole = run(workers=2)
        for other in (run(workers=0), run(workers=1, ckpt_path=path)):
            assert all(map(torch.equal, other, whole))

    def test_evaluations_are_on_their_folders(self, folder: Path, tmp_path: Path) -> None:
        data = ImageFolderDataModule(**folder_options(folder))
        fit = trainer(tmp_path, max_steps=2, val_check_interval=2)
        fit.fit(classifier(), data)
        validation = fit.callback_metrics["val/accuracy"]
        (test,) = fit.test(fit.lightning_module, data, verbose=False)
        # No folder of its own: the same images.
        assert test["test/accuracy"] == pytest.approx(float(validation))

    def test_ranks_divide_every_split(self, folder: Path) -> None:
        class Strategy:
            root_device = torch.device("cpu")

            def broadcast(self, value: Any) -> Any:
                return value

        class Ranked:
            """What a data module sees of a trainer on one of two ranks."""

            strategy, world_size = Strategy(), 2

            def __init__(self, rank: int) -> None:
                self.global_rank = rank
                self.distributed_sampler_kwargs = {"num_replicas": 2, "rank": rank}

        train, val = [], []
        for rank in range(2):
            module = ImageFolderDataModule(**folder_options(folder))
            module.trainer = Ranked(rank)
            module.setup("fit")
            train.append(torch.cat(list(module.train_dataloader().indices())))
            val.append(torch.cat(list(module.val_dataloader().indices())))
        assert len(train[0]) == len(train[1]) == 6
        assert torch.cat(train).sort().values.tolist() == list(range(12))
        assert torch.cat(val).sort().values.tolist() == list(range(6))

    def test_more_classes_than_outputs(self, tmp_path: Path) -> None:
        folder = write_images(tmp_path / "noise", classes=("cat", "cow", "dog"))
        data = ImageFolderDataModule(**folder_options(folder))
        message = "`num_classes` to be at least 3, .* got 2"
        with pytest.raises(ValueError, match=message):
            trainer(tmp_path, max_steps=2).fit(classifier(2), data)

    @pytest.mark.parametrize("loaded", ["before", "after"])
    def test_a_checkpoint_of_other_classes_is_refused(
        self, folder: Path, tmp_path: Path, loaded: str
    ) -> None:
        path = tmp_path / "last.ckpt"
        fit = trainer(tmp_path, max_steps=2)
        fit.fit(classifier(), ImageFolderDataModule(**folder_options(folder)))
        fit.save_checkpoint(path)
        state = torch.load(path, weights_only=True)["ImageFolderDataModule"]
        assert state == {"classes": ["cat", "dog"]}
        for split in ("train", "val"):
            (folder / split / "dog").rename(folder / split / "ape")
        data = ImageFolderDataModule(**folder_options(folder))
        message = "expected the classes of the checkpoint, got classes without dog and with ape"
        with pytest.raises(DataError, match=message):
            if loaded == "before":
                data.load_state_dict(state)
                data.setup("test")
            else:
                trainer(tmp_path, max_steps=4).fit(
                    classifier(), data, ckpt_path=path, weights_only=True
                )

    def test_setup_comes_first(self, tmp_path: Path) -> None:
        data = ImageFolderDataModule(**folder_options(tmp_path))
        with pytest.raises(RuntimeError, match="`setup`"):
            _ = data.info
        with pytest.raises(RuntimeError, match="`setup`"):
            data.train_dataloader()


ARCHIVE = Path(os.environ.get("BN_LIGHTNING_DATA", "data")) / "cifar10_imagefolder.tar.gz"


@pytest.mark.slow
@pytest.mark.skipif(not ARCHIVE.exists(), reason=f"{ARCHIVE} is absent (BN_LIGHTNING_DATA)")
def test_real_photographs(tmp_path: Path) -> None:
    for size in (32, 64, 224):
        module = image_module(
            tmp_path / "photographs", archive=ARCHIVE, image_size=size, batch_size=8, num_workers=2
        )
        assert (module.info["train"], module.info["validation"]) == (4000, 1000)
        assert module.num_classes == 10
        inputs, targets = next(iter(module.train_dataloader()))
        assert inputs.shape == (8, 3, size, size)
        assert 0.2 < inputs.mean() < 0.8
        assert len(set(targets.tolist())) > 2
