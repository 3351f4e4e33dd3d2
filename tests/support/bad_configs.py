"""Every field of every composed configuration, and runs with a bad value in one of them.

As a script it is a server. It begins with a line of JSON, all [command, base, field]; then for a
line [command, base, field, value] it answers a line [exit code, stderr]. Each run is a fork, with
limits on memory and time, so that one that dies takes nothing with it.
"""

import contextlib
import functools
import hashlib
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra import compose, initialize_config_module
from hydra_plugins.bn_optuna import register
from image_folders import write_images
from omegaconf import DictConfig, OmegaConf

from bn_lightning.cli.command import run_with_exit_code

CONF = Path(__file__).parents[2] / "conf"
SECONDS = 30  # a run that lasts longer hangs: as it comes it takes a second
MEMORY = 3 << 30  # bytes a run may have beside what the server holds
STEPS = 5  # a run with a larger budget is ended here

# Two steps and one evaluation.
SHORT = (
    "paths.log_dir=logs",
    "paths.output_dir=run",
    "extras.num_threads=1",
    "extras.figures=false",
    "trainer.max_steps=2",
    "trainer.val_check_interval=2",
    "trainer.log_every_n_steps=1",
)
DIGITS = ("data=digits", "data.batch_size=8")
SMALL = ("model.network.widths=[4]",)
IMAGES = (
    "data=image_folder",
    "data.root=.",
    "data.name=images",
    "data.image_size=32",
    "data.batch_size=2",
    "data.num_workers=0",
    "model.num_classes=2",
)
MNIST = ("+experiment=mnist_bn", "data.batch_size=8", *SMALL)  # which falls back to the digits
CNN = ("+experiment=mnist_cnn", *DIGITS, "model.network.channels=[2,2]", *SMALL)
INCEPTION = ("+experiment=imagenet_inception", *IMAGES)
RESNET = ("+experiment=cifar_resnet", *IMAGES, "model.network.depth=8")
TABLE = ("+experiment=placement", "data.samples=200", "data.batch_size=8")

# What an experiment or an option needs to run in a second; others take the small MLP on the digits.
BASES: dict[str, tuple[str, ...]] = {
    "experiment=cifar_resnet": RESNET,
    "experiment=imagenet_inception": INCEPTION,
    "experiment=mnist_cnn": CNN,
    "experiment=mnist_cnn_source": (*CNN, "experiment=mnist_cnn_source"),
    "experiment=placement": TABLE,
    "data=cifar10": (*RESNET[:1], "data.root=.", "data.validation_fraction=0.3", *RESNET[-1:]),
    "data=fashion_mnist": (*MNIST, "data=fashion_mnist", "data.fallback=digits"),
    "data=image_folder": RESNET,
    "data=mnist": MNIST,
    "data=tabular": TABLE,
    "model=binary_mlp": TABLE,
    "model=cifar_resnet": RESNET,
    "model=cnn": CNN,
    "model=inception": INCEPTION,
}
# The other commands, on the checkpoint that `_write_checkpoint` writes.
OF_COMMAND = {
    "evaluate": ("ckpt_path=base/checkpoints/last.ckpt", "paths.output_dir=run"),
    "landscape": (
        "ckpt_path=base/checkpoints/last.ckpt",
        "paths.output_dir=run",
        "batches=1",
        "points=2",
    ),
    "inspect": ("ckpt_path=base/checkpoints/last.ckpt",),
}
GROUPS = ("data", "model", "norm", "init", "optimizer", "trainer", "callbacks", "logger", "variant")
# They start processes, or need a GPU; their fields are those of trainer=cpu.
LEFT_OUT = ("trainer=ddp", "trainer=ddp_sim", "trainer=gpu", "trainer=default")


def bases() -> dict[str, tuple[str, ...]]:
    """Name -> overrides: every experiment, and every option of the groups."""
    found = {}
    for group in ("experiment", *GROUPS):
        for path in sorted((CONF / group).glob("*.yaml")):
            name = f"{group}={path.stem}"
            if name in LEFT_OUT:
                continue
            if group == "variant":
                overrides = (*INCEPTION, name)
            elif group == "experiment":
                overrides = (f"+{name}", *DIGITS, *SMALL)
            else:
                option = f"callbacks=[default,{path.stem}]" if group == "callbacks" else name
                overrides = ("+experiment=mnist_bn", *DIGITS, *SMALL, option)
            found[name] = BASES.get(name, overrides)
    return found


@functools.cache
def composed(command: str, base: str) -> DictConfig:
    """The configuration of a command, of "train" with one of `bases`."""
    register()
    given = [*bases()[base], *SHORT] if command == "train" else OF_COMMAND[command]
    with initialize_config_module("bn_lightning.conf", version_base="1.3"):
        config = compose(command, list(given))
    if "activation_percentiles" in config.get("callbacks", {}):
        config.callbacks.activation_percentiles.update(probe_size=4, points=1)
    return config


def fields(config: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Every key, of nodes and of leaves, and the `_target_` beside it."""
    for key in config:
        name = f"{path}{key}"
        node = config._get_node(key)
        yield name, str(config.get("_target_", ""))
        if isinstance(node, DictConfig) and not node._is_none() and not node._is_interpolation():
            yield from fields(node, f"{name}.")


def all_fields() -> list[tuple[str, str, str]]:
    """Command, base and field: each field of each class once, of the first base that has it."""
    found: dict[tuple[str, str, str], tuple[str, str, str]] = {}
    places = [("train", base) for base in bases()] + [(command, "") for command in OF_COMMAND]
    for command, base in places:
        for field, owner in fields(composed(command, base)):
            found.setdefault((command, field, owner), (command, base, field))
    return list(found.values())


class _Enough(BaseException):
    """A run has gone far enough to say that it runs."""


def _ends(*_: Any, **__: Any) -> None:
    raise _Enough


def _with_limits() -> None:
    import pooch
    from lightning.pytorch import Callback, Trainer
    from lightning.pytorch.strategies.launchers import (
        _MultiProcessingLauncher,
        _SubprocessScriptLauncher,
    )

    class EndsSoon(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            if trainer.global_step > STEPS:
                raise _Enough

    fit = Trainer.fit

    def short(trainer: Trainer, *arguments: Any, **options: Any) -> None:
        trainer.callbacks.append(EndsSoon())
        fit(trainer, *arguments, **options)

    def offline(*_: Any) -> None:
        raise OSError("no network here")

    Trainer.fit = short
    torch.nn.Module.compile = lambda self: None  # a C++ compiler's minute
    # The other ranks would be this server again.
    _MultiProcessingLauncher.launch = _SubprocessScriptLauncher.launch = _ends
    pooch.HTTPDownloader.__call__ = offline


def _write_data() -> None:
    """Few images, and CIFAR-10 of as few records, believed."""
    from bn_lightning.data import CIFAR10DataModule

    write_images(Path("images"), ("cat", "dog"), train=4, val=2, size=(32, 32))
    folder = Path("cifar10", "cifar-10-batches-bin")
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for name in CIFAR10DataModule.sha256:
        records = random.integers(256, size=(4, 3073), dtype=np.uint8)
        records[:, 0] %= 10
        records.tofile(folder / name)
        digest = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        CIFAR10DataModule.sha256[name] = digest


def _run(task: Callable[[], Any], folder: Path) -> tuple[int, str]:
    """Exit code, negative for a signal, and stderr of a task in a fork."""
    child = os.fork()
    if not child:
        try:
            os.setsid()
            for number, name in ((1, "stdout"), (2, "stderr")):
                os.dup2(os.open(folder / name, os.O_CREAT | os.O_TRUNC | os.O_WRONLY), number)
            size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            signal.alarm(SECONDS)  # ends the process
            code = 0
            try:
                run_with_exit_code(task)
            except _Enough:
                pass
            except SystemExit as end:
                code = int(end.code)
            sys.stderr.flush()
        except BaseException:
            import traceback

            traceback.print_exc()
            sys.stderr.flush()
            code = 99
        os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # what it started, where it died first
    return code, (folder / "stderr").read_text(encoding="utf-8", errors="replace")


def _import() -> None:
    """What every run would import by itself: classes of all configurations, and git's answer."""
    import sklearn.datasets  # noqa: F401
    from hydra.utils import get_object

    from bn_lightning.runs import record

    for command, base, field in all_fields():
        if field.endswith("_target_"):
            get_object(OmegaConf.select(composed(command, base), field))
    commit = record.git_commit()
    record.git_commit = lambda: commit


def _write_checkpoint(task: Callable[[DictConfig], Any]) -> None:
    config = composed("train", "experiment=mnist_bn").copy()
    config.paths.output_dir = "base"
    code, said = _run(lambda: task(config), Path.cwd())
    if code:
        raise RuntimeError(said)


def serve() -> None:
    """Answer until standard input ends."""
    from bn_lightning.evaluate import evaluate
    from bn_lightning.inspect_checkpoint import inspect_checkpoint
    from bn_lightning.landscape import landscape
    from bn_lightning.train import train

    tasks = {
        "train": train,
        "evaluate": evaluate,
        "landscape": landscape,
        "inspect": inspect_checkpoint,
    }
    _import()
    _with_limits()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="bad-configs-") as name:
        folder = Path(name)
        os.chdir(folder)
        _write_data()
        _write_checkpoint(train)
        print(json.dumps(all_fields()), flush=True)
        for line in sys.stdin:
            command, base, field, value = json.loads(line)
            config = composed(command, base).copy()
            if field:
                OmegaConf.update(config, field, value, merge=False)
            (folder / "run").mkdir()  # as Hydra makes it
            answer = _run(lambda c=command, config=config: tasks[c](config), folder)
            for path in ("run", "logs"):
                shutil.rmtree(folder / path, ignore_errors=True)
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve()
