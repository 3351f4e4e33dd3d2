"""What BatchNorm costs in training: the time of a step, and the memory kept for its backward."""

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from bn_lightning.callbacks.running_statistics import batch_norms
from bn_lightning.claims.design import Claim, Condition, Curves, MeasuredPoint, Setting
from bn_lightning.claims.measured_network import MeasuredNetwork
from bn_lightning.claims.registry import register_claim
from bn_lightning.conversion.convert import convert_batchnorm

_SIZES = (60, 500)
_BLOCKS, _STEPS = 10, 10  # the fastest of so many blocks of so many steps
_MOST = 1.1
_FUSED = "fused with the activation"


def _settings(budget: str) -> Mapping[str, Setting]:
    return {
        f"batch {size}": Setting((f"data.batch_size={size}",), float(size), "", False)
        for size in _SIZES
    }


def _measure(network: MeasuredNetwork) -> Mapping[str, float]:
    if (threads := network.config["extras"]["num_threads"]) is not None:
        torch.set_num_threads(threads)
    found = _measured_on("cpu", network)
    if torch.cuda.is_available():
        found |= {f"GPU {name}": value for name, value in _measured_on("cuda", network).items()}
    return found


def _measured_on(device: str, network: MeasuredNetwork) -> dict[str, float]:
    model = network.model().to(device)
    plain = without_batch_norms(model.network)
    if "fused_batch_norm" in network.config["callbacks"]:
        convert_batchnorm(model.network, fuse=True)
    batch = network.batch(network.config["data"]["batch_size"])
    x, target = (tensor.to(device) for tensor in batch)
    seconds = seconds_of_step([model.network, plain], model.loss, x, target)
    saved = [saved_bytes(n, model.loss, x, target) for n in (model.network, plain)]
    return {
        "milliseconds": 1000 * seconds[0],
        "time": seconds[0] / seconds[1],
        "memory": saved[0] / saved[1],
    }


def without_batch_norms(network: nn.Module) -> nn.Module:
    """Return a copy of a network without its BatchNorms."""
    plain = copy.deepcopy(network)
    for name in batch_norms(plain):
        plain.set_submodule(name, nn.Identity())
    return plain


def seconds_of_step(
    networks: Sequence[nn.Module], loss: Callable[..., Tensor], x: Tensor, target: Tensor
) -> list[float]:
    """Return the time of a training step of each network, with plain SGD.

    Blocks of steps of the networks take turns, so that other work on the machine slows all of them
    down, and the fastest block of each counts.

    Args:
        networks: their parameters change.
        loss: takes the output and `target`.
        x: (N, ...).
        target: (N,).
    """
    optimizers = [torch.optim.SGD(network.train().parameters(), lr=1e-3) for network in networks]
    seconds: list[list[float]] = [[] for _ in networks]
    for _ in range(_BLOCKS):
        for network, optimizer, found in zip(networks, optimizers, seconds, strict=True):
            _wait_for(x)
            begin = time.perf_counter()
            for _ in range(_STEPS):
                optimizer.zero_grad()
                loss(network(x), target).backward()
                optimizer.step()
            _wait_for(x)
            found.append((time.perf_counter() - begin) / _STEPS)
    return [min(found) for found in seconds]


def _wait_for(x: Tensor) -> None:
    if x.is_cuda:  # its kernels run behind Python
        torch.cuda.synchronize(x.device)


def saved_bytes(network: nn.Module, loss: Callable[..., Tensor], x: Tensor, target: Tensor) -> int:
    """Return how much memory a forward in training mode keeps for its backward.

    Parameters and buffers do not count, the input does. A tensor that several operations keep
    counts once.

    Args:
        network: the network.
        loss: takes the output and `target`.
        x: (N, ...).
        target: (N,).
    """
    own = {tensor.data_ptr() for tensor in (*network.parameters(), *network.buffers())}
    saved: dict[int, Tensor] = {}  # kept, so that no address is used twice

    def keep(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in own:
            saved[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss(network.train()(x), target)
    return sum(tensor.numel() * tensor.element_size() for tensor in saved.values())


def _numbers(points: Sequence[MeasuredPoint]) -> Mapping[str, float]:
    return {
        f"{name}, batches of {point.setting.x:g}": point.measures.get(name, math.nan)
        for point in points
        for name in ("time", "memory", "GPU time", "GPU memory")
    }


register_claim(
    Claim(
        name="cost",
        sentence="BatchNorm is cheap: a training step takes hardly more time and memory.",
        source="Tutorials. Against: a notebook on Fashion-MNIST, in which an epoch takes 1.31 "
        "times as long with BatchNorm",
        base=(),
        arms={
            "batch": ("norm=batch", "norm.backend=native"),
            "none": ("norm=none",),
            "torch": ("norm=torch",),
            _FUSED: ("norm=batch", "callbacks=[default,fused_batch_norm]"),
        },
        settings=_settings,
        measure=_measure,
        numbers=_numbers,
        conditions=(
            *(
                Condition(
                    f"{name}, batches of {size}",
                    f"{name}, batches of {size}",
                    "batch",
                    kind="value",
                    most=_MOST,
                    unit="times that without BatchNorm",
                )
                for name in ("time", "memory")
                for size in _SIZES
            ),
            *(
                Condition(
                    f"as fast as torch's, batches of {size}",
                    f"time, batches of {size}",
                    "batch",
                    "torch",
                    kind="ratio",
                    most=_MOST,
                    unit="times torch's time",
                    is_control=True,
                )
                for size in _SIZES
            ),
            *(
                Condition(
                    f"{_FUSED}, time, batches of {size}",
                    f"time, batches of {size}",
                    _FUSED,
                    kind="value",
                    most=_MOST,
                    unit="times that without BatchNorm",
                    is_control=True,
                )
                for size in _SIZES
            ),
            *(
                Condition(
                    f"{how} on a GPU, {name}, batches of {size}",
                    f"GPU {name}, batches of {size}",
                    arm,
                    kind="value",
                    most=_MOST,
                    unit="times that without BatchNorm",
                    is_control=True,
                )
                for size in _SIZES[-1:]
                for how, arm in (("native", "batch"), (_FUSED, _FUSED))
                for name in ("time", "memory")
            ),
            *(
                Condition(
                    f"without BatchNorm, timed twice, batches of {size}",
                    f"time, batches of {size}",
                    "none",
                    kind="value",
                    least=1 / _MOST,
                    most=_MOST,
                    unit="times itself",
                    is_control=True,
                )
                for size in _SIZES
            ),
        ),
        curves=(
            Curves("milliseconds", "time of a step, ms", "batch size"),
            *(
                Curves(
                    measure,
                    f"{label}\n/ without BatchNorm",
                    "batch size",
                    threshold={f"the rule: at most {_MOST:g}": _MOST},
                )
                for measure, label in (
                    ("time", "time of a step"),
                    ("memory", "memory for the backward"),
                )
            ),
        ),
        not_varied="Three hidden layers of 100 units, one CPU thread, plain SGD, the fastest of "
        f"{_BLOCKS} times {_STEPS} steps, in turns with the same network without BatchNorms. The "
        'verdict is that of the CPU. Conditions on a GPU say "nothing measured" where there is '
        "none.",
        would_change="A GPU, whose fused kernels (Triton's) save memory traffic; "
        "wider layers or convolutions, in which the arithmetic of the layers takes most of the "
        "time; other work on the machine during the measurement.",
        arm_labels={_FUSED: f"BatchNorm {_FUSED}"},
    )
)
