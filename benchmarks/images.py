"""Compares the throughput of the image folder's pipeline with bare Pillow, and measures memory.

    BN_LIGHTNING_DATA=DIR python benchmarks/images.py [--rounds 7] [--images 1000]

The images are the 32x32 photographs of DIR/cifar10_imagefolder.tar.gz, and mosaics of ImageNet's
usual size: 500x375 JPEG of quality 90, each made of 48 photographs enlarged to 64x64. Mosaics have
the size and detail of ImageNet's images, not their contents. Three loops run in turn, each on two
processes:

- `pillow`: opens each file, converts it to RGB, crops and scales it with one `resize`, flips half
  of them, and converts it to an array;
- `pipeline`: `ImageFolderDataModule.train_dataloader()` with two workers, which crops the same
  parts of the same files and yields float batches of 32 large or 128 small images;
- `distorted`: `pipeline` with `photometric=0.5`.

Processes run before the measurement starts. Prints the medians over rounds and appends a row for
each round to results/images.csv: images per second; `ratio` to `pillow` in the same round;
`cpu_ratio`, the same for the processor time of all processes, which other programs disturb less;
and `growth_mib`, the growth of the resident memory of `pipeline` over 5,000 images after the first
round.
"""

import argparse
import multiprocessing
import os
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from random import Random

import numpy as np
import PIL
import torch
from PIL import Image
from rows import append_rows

from bn_lightning.data import ImageFolderDataModule
from bn_lightning.data.image_batches import ImageBatches
from bn_lightning.data.image_transforms import random_part
from bn_lightning.runs.machine import git_commit, hardware

RESULTS = Path(__file__).parent / "results" / "images.csv"
BATCH_SIZE = {224: 32, 32: 128}
WORKERS = 2
GROWTH_IMAGES = 5000
Job = tuple[str, tuple[float, float, float, float], bool, int]


def make_mosaics(photographs: list[Path], folder: Path, count: int) -> None:
    """Write `count` JPEG files of 500x375 pixels in two classes."""
    random = np.random.default_rng(0)
    for number in range(count):
        mosaic = Image.new("RGB", (512, 384))
        for tile, choice in enumerate(random.integers(len(photographs), size=48)):
            with Image.open(photographs[choice]) as photograph:
                enlarged = photograph.resize((64, 64), Image.Resampling.BICUBIC)
            mosaic.paste(enlarged, (64 * (tile % 8), 64 * (tile // 8)))
        path = folder / str(number % 2) / f"{number:05}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        mosaic.crop((0, 0, 500, 375)).save(path, quality=90)


def bare(jobs: list[Job]) -> None:
    """Run the bare loop in one process."""
    for path, box, flip, size in jobs:
        image = Image.open(path).convert("RGB")
        image = image.resize((size, size), Image.Resampling.BILINEAR, box=box)
        if flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        np.asarray(image)


def bare_jobs(batches: ImageBatches, size: int) -> list[list[Job]]:
    """Return files, parts and flips of `batches`, batch by batch."""
    files, seed = batches.decoded.files, batches.seed
    jobs = []
    for indices in batches.indices():
        jobs.append([])
        for index in indices.tolist():
            random = Random(f"{seed} 0 {index}")
            with Image.open(files.path(index)) as image:
                box = random_part(image.size, random)
            jobs[-1].append((files.path(index), box, random.random() < 0.5, size))
    return jobs


def data_module(folder: Path, size: int, photometric: float) -> ImageFolderDataModule:
    """Return the data module with the values of `conf/data/image_folder.yaml`."""
    made = ImageFolderDataModule(
        root=folder.parent,
        name=folder.name,
        archive=None,
        image_size=size,
        batch_size=BATCH_SIZE[size],
        eval_batch_size=BATCH_SIZE[size],
        seed=1,
        num_workers=WORKERS,
        augment="resized_crop",
        photometric=photometric,
        shuffle="samples",
        corrupt="error",
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
    )
    made.setup("fit")
    return made


def read_all(batches: ImageBatches, least: int = 1) -> int:
    """Read whole epochs until at least `least` images; return their number."""
    images = 0
    while images < least:
        images += sum(len(targets) for _, targets in batches)
    return images


def children() -> list[int]:
    """Return the ids of the child processes."""
    return [process.pid for process in multiprocessing.active_children()]


def cpu_seconds(pids: list[int]) -> float:
    """Return the processor time of these processes, seconds."""
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def resident_mib(pids: list[int]) -> float:
    """Return the resident memory of these processes, MiB."""
    pages = sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids)
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def timed(read: Callable[[], int], pids: list[int]) -> tuple[float, float]:
    """Return images per second, and processor seconds per image."""
    cpu, started = cpu_seconds(pids), time.perf_counter()
    images = read()
    seconds = time.perf_counter() - started
    return images / seconds, (cpu_seconds(pids) - cpu) / images


def measure(name: str, folder: Path, size: int, rounds: int) -> Iterator[dict[str, object]]:
    """Yield a row for each round."""
    own = [os.getpid()]
    loaders, pids = {}, {}
    with multiprocessing.get_context("fork").Pool(WORKERS) as pool:
        pids["pillow"] = own + children()
        for arm, photometric in (("pipeline", 0.0), ("distorted", 0.5)):
            before = children()
            loaders[arm] = data_module(folder, size, photometric).train_dataloader()
            read_all(loaders[arm])
            pids[arm] = own + [pid for pid in children() if pid not in before]
        jobs = bare_jobs(loaders["pipeline"], size)

        def read_bare() -> int:
            for _ in pool.imap_unordered(bare, jobs):
                pass
            return sum(map(len, jobs))

        read_bare()
        resident = resident_mib(pids["pipeline"])
        read_all(loaders["pipeline"], GROWTH_IMAGES)
        growth = resident_mib(pids["pipeline"]) - resident
        for number in range(rounds):
            pillow, pillow_cpu = timed(read_bare, pids["pillow"])
            row: dict[str, object] = {
                "images": name,
                "size": size,
                "round": number,
                "pillow_images_s": round(pillow, 1),
            }
            for arm, batches in loaders.items():
                speed, cpu = timed(lambda batches=batches: read_all(batches), pids[arm])
                row[f"{arm}_images_s"] = round(speed, 1)
                row[f"{arm}_ratio"] = round(speed / pillow, 3)
                row[f"{arm}_cpu_ratio"] = round(pillow_cpu / cpu, 3)
            yield {**row, "growth_mib": round(growth, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--images", type=int, default=1000, help="mosaics, and photographs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    archive = Path(os.environ.get("BN_LIGHTNING_DATA", "data")) / "cifar10_imagefolder.tar.gz"
    constant = {
        "processor": hardware()["processor"],
        "pillow": PIL.__version__,
        "torch": torch.__version__,
        "date": datetime.now(UTC).date().isoformat(),
        "commit": git_commit(),
    }
    with tempfile.TemporaryDirectory() as temporary:
        with tarfile.open(archive) as tar:
            tar.extractall(temporary, filter="data")
        small = Path(temporary) / "cifar10_imagefolder"
        photographs = sorted(small.glob("train/*/*.jpg"))
        large = Path(temporary) / "mosaics"
        make_mosaics(photographs, large / "train", options.images)
        make_mosaics(photographs, large / "val", 2)
        for name, folder, size in (("500x375", large, 224), ("32x32", small, 32)):
            rows = []
            for row in measure(name, folder, size, options.rounds):
                print(row)
                rows.append({**row, **constant})
            for key in rows[0]:
                if key.endswith(("_s", "ratio", "mib")):
                    print(f"{name} {key}: {statistics.median(row[key] for row in rows)}")
            append_rows(RESULTS, rows)


if __name__ == "__main__":
    main()
