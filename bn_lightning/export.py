"""Export a checkpoint's network: `python -m bn_lightning.export ckpt_path=PATH format=onnx`.

The exported program maps inputs (N, ...) to logits (N, K) for any N, in evaluation mode. It runs
without this package, and an ONNX file also without PyTorch.
"""

import copy
import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from bn_lightning.cli.checkpoint_path import checkpoint_path
from bn_lightning.cli.command import hydra_command, quiet_lightning
from bn_lightning.cli.install_hint import install_command
from bn_lightning.conversion.fold import FoldError, fold_with_report
from bn_lightning.runs.checkpoint import TrainedCheckpoint

FORMAT_SUFFIXES = {"torch": ".pt2", "onnx": ".onnx"}
"""The suffix of the file of each format."""

_ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")

# These packages log each rewrite of a graph, or that torchvision is absent.
_QUIET = {"onnx_ir": logging.WARNING, "onnxscript": logging.WARNING, "torch.onnx": logging.ERROR}

# Batch sizes. The program is checked with others than it is traced with.
_TRACED, _CHECKED = 2, (1, 63)


class ExportError(ValueError):
    """The network cannot be exported, or the program computes other logits."""


def export(config: DictConfig) -> Path:
    """Export a checkpoint's network and return the path of the file.

    The file gets its name only after the program was compared with the network of the checkpoint,
    without folding: no logit may differ by more than `tolerance` times the largest absolute logit.

    Args:
        config: composed from `conf/export.yaml`.

    Raises:
        CheckpointError: the file is not a checkpoint of `bn_lightning.train`.
        UntrustedError: its configuration would build something that it may not build.
        ExportError: the network cannot be exported, or the program's logits differ.
        ValueError: a value of the configuration cannot be used, or a package is absent.
    """
    from bn_lightning.data.protocol import ShapedData, check_data_module
    from bn_lightning.models.protocol import network_of

    if config.format not in FORMAT_SUFFIXES:
        raise ValueError(f"expected `format` to be torch or onnx, got {config.format!r}")
    tolerance = config.tolerance[config.format]
    if not tolerance > 0:
        raise ValueError(
            f"expected `tolerance.{config.format}` to be a positive number, got {tolerance}"
        )
    name = f"network{FORMAT_SUFFIXES[config.format]}"
    output = Path(config.output or Path(config.paths.output_dir) / name)
    if output.is_dir():
        raise ValueError(f"expected `output` to be the name of a file, got the folder {output}")
    if config.format == "onnx":
        _check_onnx()
    shape = config.input_shape
    is_shape = OmegaConf.is_list(shape) and all(type(size) is int and size > 0 for size in shape)
    if shape is not None and not is_shape:
        raise ValueError(
            f"expected `input_shape` to be a list of sizes above 0, got {shape}; give [3,32,32],"
            " for example"
        )
    quiet_lightning()
    checkpoint = TrainedCheckpoint.read(checkpoint_path(config), config.trusted)
    datamodule = checkpoint.build_data()
    check_data_module(datamodule)
    # Compiling the network would take longer than exporting it.
    checkpoint.config["model"].pop("compile", None)
    network = network_of(checkpoint.build_model()).eval()
    if not shape and isinstance(datamodule, ShapedData):
        shape = datamodule.input_shape
    if shape is None:
        raise ValueError(
            "expected `input_shape` to be the shape of one input, because the data of this"
            " checkpoint do not have it, got null; give input_shape=[3,32,32], or what"
            f" {checkpoint.path} takes"
        )
    program = network
    if config.fold:
        program = _fold(network, sample_inputs(datamodule, (_TRACED, *shape)))
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as folder:
        path = Path(folder) / name
        _write(program, sample_inputs(datamodule, (_TRACED, *shape)), path)
        inputs = [sample_inputs(datamodule, (size, *shape)) for size in _CHECKED]
        difference = largest_difference(read_program(path), network, inputs)
        print(f"largest difference {difference:.1e} of the largest logit ({sum(_CHECKED)} inputs)")
        if not difference <= tolerance:  # also refuses NaN
            raise ExportError(
                f"expected logits within `tolerance.{config.format}`={tolerance} of the"
                f" checkpoint's, relative to the largest, got {difference:.1e}; no file was"
                " written: try fold=false, or a larger tolerance"
            )
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        os.replace(path, output)
    print(output)
    return output


def _check_onnx() -> None:
    absent = [name for name in _ONNX_PACKAGES if find_spec(name) is None]
    if absent:
        raise ValueError(
            f"expected {', '.join(_ONNX_PACKAGES)} for `format=onnx` to be installed, got no"
            f" {' and no '.join(absent)}; {install_command('export')}, or use format=torch"
        )


def sample_inputs(datamodule: Any, shape: Sequence[int]) -> Float[Tensor, "N ..."]:
    """Return random inputs, the same in each call.

    They are the data module's `sample_inputs` if it has any of this shape, else standard normal.

    Args:
        datamodule: of the checkpoint, with its state.
        shape: (N, ...).
    """
    from bn_lightning.data.protocol import SampledData

    samples, *input_shape = shape
    if isinstance(datamodule, SampledData) and tuple(input_shape) == datamodule.input_shape:
        return datamodule.sample_inputs(samples)
    return torch.from_numpy(np.random.default_rng(0).standard_normal(shape)).float()


def read_program(path: Path) -> Callable[[Tensor], Tensor]:
    """Return the program in a file as a function from inputs to logits, on the CPU.

    Args:
        path: of a file that `export` wrote, with its suffix.
    """
    if path.suffix == FORMAT_SUFFIXES["torch"]:
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
    """Return max |program(x) - network(x)| / max |network(x)| over all batches.

    Raises:
        ExportError: outputs of `network` are not finite, or all are zero.
    """
    expected = torch.cat([network(x) for x in inputs])
    largest = expected.abs().max().item()
    if not 0 < largest < float("inf"):
        raise ExportError(
            "expected the network to have logits that are finite and not all zero, got a largest"
            f" one of {largest}; export the checkpoint of a run that did not diverge"
        )
    found = torch.cat([program(x) for x in inputs])
    return (found - expected).abs().max().item() / largest


def _fold(network: nn.Module, x: Tensor) -> nn.Module:
    try:
        folded, folding = fold_with_report(network, x)
    except FoldError as error:
        raise ExportError(
            f"expected a network that can be folded, for inputs {tuple(x.shape)}, got: {error}; set"
            " `input_shape` to what the network takes, or use fold=false"
        ) from error
    print(folding)
    return folded


def _write(network: nn.Module, x: Tensor, path: Path) -> None:
    network = copy.deepcopy(network).eval()  # exporting may change attributes of a module
    batch = torch.export.Dim("batch")
    try:
        if path.suffix == FORMAT_SUFFIXES["torch"]:
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
        what = "torch.export" if path.suffix == FORMAT_SUFFIXES["torch"] else "torch.onnx.export"
        lines = str(error).strip().splitlines() or ["no message"]
        raise ExportError(
            f"expected a network that {what} takes, for inputs {tuple(x.shape)}, got"
            f" {type(error).__name__}: {lines[0]}; set `input_shape` to what the network takes, or"
            " use the other `format`"
        ) from error


main = hydra_command(export, "export")

if __name__ == "__main__":
    main()
