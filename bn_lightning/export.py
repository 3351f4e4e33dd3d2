"""A checkpoint's network as a program: `python -m bn_lightning.export ckpt_path=PATH format=onnx`.

The program maps inputs (N, ...) to logits (N, K), for any N, in evaluation. What wrote it is not
needed to run it: neither this package nor, of an ONNX file, PyTorch.
"""

import copy
import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from omegaconf import DictConfig
from torch import Tensor, nn

from bn_lightning.cli.command import hydra_command, quiet_lightning
from bn_lightning.conversion.fold import find_foldable, fold_batchnorm
from bn_lightning.runs.checkpoint import check_data, load_checkpoint, trained_model, trusted_config

ENDINGS = {"torch": ".pt2", "onnx": ".onnx"}
"""The formats, and what the names of their files end in."""

_ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")

# What optimisers log of each graph, and what torchvision has where that is absent.
_QUIET = {"onnx_ir": logging.WARNING, "onnxscript": logging.WARNING, "torch.onnx": logging.ERROR}

# Two batch sizes, neither of them the one that is traced.
_TRACED, _CHECKED = 2, (1, 63)


class ExportError(ValueError):
    """A network that cannot be exported, or whose program computes something else."""


def export(config: DictConfig) -> Path:
    """Write a checkpoint's network as a program, and return its path.

    The file takes its name after its program has been run beside the network of the checkpoint, as
    it was trained, without anything folded: no logit differs by more than `tolerance` times the
    largest of them, both in absolute value.

    Args:
        config: composed from `conf/export.yaml`.

    Raises:
        CheckpointError: the file is no checkpoint of `bn_lightning.train`.
        UntrustedError: its configuration would build what it may not.
        ExportError: the network cannot be exported, or the program's logits are others.
        ValueError: a value of the configuration cannot be used, or a package is absent.
    """
    from hydra.utils import instantiate

    if config.format not in ENDINGS:
        raise ValueError(f"`format` expected torch or onnx, got {config.format!r}")
    tolerance = config.tolerance[config.format]
    if not tolerance > 0:
        raise ValueError(f"`tolerance.{config.format}` expected a positive number, got {tolerance}")
    name = f"network{ENDINGS[config.format]}"
    output = Path(config.output or Path(config.paths.output_dir) / name)
    if output.is_dir():
        raise ValueError(f"`output` expected the name of a file, got the folder {output}")
    if config.format == "onnx":
        check_onnx()
    quiet_lightning()
    checkpoint = load_checkpoint(config.ckpt_path)
    run_config = trusted_config(checkpoint, config.trusted, config.ckpt_path)
    datamodule = instantiate(run_config["data"])
    check_data(checkpoint, datamodule)
    # Compiled, the network would take longer to compare with than to export.
    run_config["model"].pop("compile", None)
    network = trained_model(checkpoint, run_config, config.ckpt_path).network.eval()
    shape = config.input_shape or getattr(datamodule, "input_shape", None)
    if shape is None:
        raise ValueError(
            "`input_shape` expected the shape of one input, as the data of this checkpoint do not"
            f" say it, got null; give input_shape=[3,32,32], or what {config.ckpt_path} takes"
        )
    program = network
    if config.fold:
        plan = find_foldable(network)
        if plan.folded:
            program = fold_batchnorm(network)  # logs the plan
        else:
            print(plan)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as folder:
        path = Path(folder) / name
        _write(program, sample_inputs(datamodule, (_TRACED, *shape)), path)
        inputs = [sample_inputs(datamodule, (size, *shape)) for size in _CHECKED]
        difference = largest_difference(read_program(path), network, inputs)
        print(f"largest difference {difference:.1e} of the largest logit ({sum(_CHECKED)} inputs)")
        if not difference <= tolerance:  # a NaN neither
            raise ExportError(
                f"expected logits that differ by at most {tolerance} of the largest one from those"
                f" of the checkpoint's network, got {difference:.1e}; no file is left: try"
                f" fold=false, or a larger `tolerance.{config.format}`"
            )
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        os.replace(path, output)
    print(output)
    return output


def check_onnx() -> None:
    """Refuse to go on without the packages that `format=onnx` needs.

    Raises:
        ValueError: naming those that are absent.
    """
    absent = []
    for name in _ONNX_PACKAGES:
        try:
            import_module(name)
        except ImportError:
            absent.append(name)
    if absent:
        raise ValueError(
            f"`format=onnx` expected {', '.join(_ONNX_PACKAGES)} to be installed, got no"
            f' {" and no ".join(absent)}; pip install -c constraints.txt -e ".[export]", or use'
            " format=torch"
        )


def sample_inputs(datamodule: Any, shape: Sequence[int]) -> Float[Tensor, "N ..."]:
    """Random inputs, the same in every call: normal, of mean 0 and deviation 1.

    Of a table, rows as far from the features' means as normal ones are.

    Args:
        datamodule: of the checkpoint, with its state.
        shape: (N, ...).
    """
    from bn_lightning.data.tabular import TabularDataModule

    values = np.random.default_rng(0).standard_normal(shape)
    if isinstance(datamodule, TabularDataModule) and values.shape[1:] == datamodule.input_shape:
        return datamodule.evaluated(datamodule.around_mean(values))
    return torch.from_numpy(values).float()


def read_program(path: Path) -> Callable[[Tensor], Tensor]:
    """Loads what `export` wrote: a function from inputs to logits, on the CPU.

    Args:
        path: a file that ends in one of `ENDINGS`.
    """
    if path.suffix == ENDINGS["torch"]:
        return torch.export.load(path).module()
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"input": x.numpy()})[0])


@torch.no_grad()
def largest_difference(
    program: Callable[[Tensor], Tensor],
    network: Callable[[Tensor], Tensor],
    inputs: Sequence[Float[Tensor, "N ..."]],
) -> float:
    """The largest difference of two networks' outputs over the second's largest output.

    Both in absolute value, over all batches.

    Raises:
        ExportError: the second's outputs are not finite, or all of them zero.
    """
    expected = torch.cat([network(x) for x in inputs])
    largest = expected.abs().max().item()
    if not 0 < largest < float("inf"):
        raise ExportError(
            "expected a network whose logits are finite and not all zero, got a largest one of"
            f" {largest}; export the checkpoint of a run that did not diverge"
        )
    found = torch.cat([program(x) for x in inputs])
    return (found - expected).abs().max().item() / largest


def _write(network: nn.Module, x: Tensor, path: Path) -> None:
    network = copy.deepcopy(network).eval()  # exporting may leave marks on a module
    batch = torch.export.Dim("batch")
    try:
        if path.suffix == ENDINGS["torch"]:
            program = torch.export.export(network, (x,), dynamic_shapes=({0: batch},))
            torch.export.save(program, path)
            return
        for name, level in _QUIET.items():
            logging.getLogger(name).setLevel(level)
        torch.onnx.export(
            network,
            (x,),
            path,
            dynamo=True,
            dynamic_shapes=({0: batch},),
            input_names=["input"],
            output_names=["logits"],
            external_data=False,
            verbose=False,
        )
    except OSError:
        raise
    except Exception as error:
        what = "torch.export" if path.suffix == ENDINGS["torch"] else "torch.onnx.export"
        lines = str(error).strip().splitlines() or ["no message"]
        raise ExportError(
            f"expected a network that {what} takes, for inputs {tuple(x.shape)}, got"
            f" {type(error).__name__}: {lines[0]}"
        ) from error


main = hydra_command("export")(export)

if __name__ == "__main__":
    main()
