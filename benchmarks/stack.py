"""What a member of a stack costs beside a run alone.

    python benchmarks/stack.py step [--rounds 5] [--steps 60]
    python benchmarks/stack.py gpu [--rounds 5] [--steps 300]
    BN_LIGHTNING_DATA=DIR python benchmarks/stack.py sweep [--rounds 1]
    python benchmarks/stack.py overhead [--rounds 3]

`step` trains the paper's network on random images by a bare PyTorch loop and as stacks of K
members, on one thread, 60 examples a step, in turn. It prints the medians over rounds of
milliseconds a step and member, of those of the loop, and of their ratios within a round. `gpu`
does the same on a GPU, in fp32, TF32 and under autocast to bf16, started kernel by kernel and as
CUDA graphs, the loop too; the batches are on the GPU, and the time is that of the clock. `sweep`
runs a part of `+sweep=lr_init`, 33 trials of one arm, by the command that people type, one by one
and as a stack. `overhead` runs 33 and 99 trials of one step each on the digits. It prints what each
of the 66 further trials takes, with its step, its three evaluations and its files.
The other times are of the processor; on a shared machine only ratios mean something. The process
keeps freed memory, as those of the commands do (`bn_lightning.runs.freed_memory`). Rows are
appended to results/stack_step.csv, stack_gpu.csv, stack_sweep.csv and stack_overhead.csv.
"""

import argparse
import itertools
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from rows import append_rows, provenance
from torch import Tensor, nn
from torch.nn import functional as F

from bn_lightning.models.classifier import Classifier
from bn_lightning.models.initialization import initialize, normal
from bn_lightning.models.mlp import MLP
from bn_lightning.models.normalization import batch_norm
from bn_lightning.runs.freed_memory import keep_freed_memory
from bn_lightning.stack.context import Placed
from bn_lightning.stack.member_losses import member_losses
from bn_lightning.stack.network import StackedNetwork
from bn_lightning.stack.optimizers import StackedOptimizer
from bn_lightning.stack.step_graph import WARM_UP, StepGraph, recordable

RESULTS = Path(__file__).parent / "results"
SIZES = (2, 4, 8, 33, 99)
GPU_SIZES = (1, 8, 33, 99, 297)
PRECISIONS = ("fp32", "tf32", "bf16")
ARMS = {"batch": partial(batch_norm, eps=1e-5, momentum=0.1, backend="auto"), "none": None}


Step = Callable[..., Tensor]
"""Trains on a batch and returns the loss."""


def network(arm: str, seed: int) -> nn.Module:
    """The paper's network."""
    made = MLP(784, [100, 100, 100], 10, "sigmoid", ARMS[arm], "before")
    initialize(made, partial(normal, std=0.05), seed)
    return made


def plain_loop(arm: str, device: str = "cpu") -> Step:
    """A step of one network, with torch's BatchNorm."""
    layers: list[nn.Module] = []
    for fan_in in (784, 100, 100):
        norm = [nn.BatchNorm1d(100)] if arm == "batch" else []
        layers += [nn.Linear(fan_in, 100), *norm, nn.Sigmoid()]
    model = nn.Sequential(*layers, nn.Linear(100, 10)).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step(x: Tensor, target: Tensor, mixed: bool = False) -> Tensor:
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=mixed):
            loss = F.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def stacked_loop(arm: str, size: int, device: str = "cpu") -> Step:
    """A step of K members that share the batch, each with its own rate."""
    networks = [network(arm, seed).to(device) for seed in range(size)]
    stack = StackedNetwork(networks)
    rates = [0.1 / (k + 1) for k in range(size)]
    pairs = zip(networks, rates, strict=True)
    optimizers = [torch.optim.SGD(made.parameters(), lr=rate) for made, rate in pairs]
    optimizer = StackedOptimizer(stack.network.parameters(), optimizers)
    model = Classifier(networks[0], torch.optim.SGD, num_classes=10)

    def step(x: Tensor, target: Tensor, mixed: bool = False) -> Tensor:
        stack.context.update = None if mixed else optimizer.update
        with torch.autocast(device, torch.bfloat16, enabled=mixed):
            batch = Placed(x, None), Placed(target, None)
            losses, _ = member_losses(stack, model, *batch, measures=False)
        losses.backward(torch.ones_like(losses))
        optimizer.step()
        return losses.detach()

    return step


def measure_on_gpu(rounds: int, steps: int) -> None:
    """Measure all arms, precisions and sizes on a GPU, with and without CUDA graphs."""
    inputs = torch.rand(55_000, 784, device="cuda")
    targets = torch.randint(0, 10, (55_000,), device="cuda")
    batches = [*zip(inputs.split(60)[:-1], targets.split(60)[:-1], strict=True)]

    def milliseconds(step: Step) -> float:
        torch.cuda.synchronize()
        started = time.perf_counter()
        for number in range(steps):
            step(*batches[number % len(batches)])
        torch.cuda.synchronize()
        return 1000 * (time.perf_counter() - started) / steps

    for arm, precision in itertools.product(ARMS, PRECISIONS):
        rows = []
        torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
        mixed = precision == "bf16"
        loops: dict[tuple[int, bool], Step] = {}
        with recordable(torch.device("cuda")):
            for size in (0, *GPU_SIZES):
                for is_graph in (False, True):
                    made = stacked_loop(arm, size, "cuda") if size else plain_loop(arm, "cuda")
                    loops[size, is_graph] = _recorded(partial(made, mixed=mixed), is_graph)
            for step in loops.values():
                for _ in range(WARM_UP + 2):
                    step(*batches[0])
            times = [
                {key: milliseconds(step) for key, step in loops.items()} for _ in range(rounds)
            ]
        for size, is_graph in itertools.product(GPU_SIZES, (False, True)):
            found = [(of[size, is_graph] / size, of[0, False], of[0, True]) for of in times]
            member, plain, plain_graph = map(statistics.median, zip(*found, strict=True))
            rows.append(
                {
                    "arm": arm,
                    "precision": precision,
                    "size": size,
                    "graph": is_graph,
                    "member_ms": round(member, 5),
                    "plain_ms": round(plain, 4),
                    "plain_graph_ms": round(plain_graph, 4),
                    "member/plain": round(statistics.median(m / p for m, p, _ in found), 5),
                    "member/plain_graph": round(statistics.median(m / g for m, _, g in found), 5),
                    "device": torch.cuda.get_device_name(),
                    **provenance(),
                }
            )
            print(*[*rows[-1].values()][:9], flush=True)
        append_rows(RESULTS / "stack_gpu.csv", rows)


def _recorded(step: Step, is_graph: bool) -> Step:
    """Return a step of tensors on the GPU, recorded or not."""
    if not is_graph:
        return step
    graph = StepGraph(lambda x, target: step(x.value, target.value))
    return lambda x, target: graph(Placed(x, None), Placed(target, None))


def measure_steps(rounds: int, steps: int) -> None:
    """Measure all arms and sizes in turn."""
    inputs, targets = torch.rand(55_000, 784), torch.randint(0, 10, (55_000,))

    def milliseconds(step: Step, count: int) -> float:
        indices = torch.randint(0, len(inputs), (count, 60))
        started = time.process_time()
        for index in indices:
            step(inputs[index], targets[index])
        return 1000 * (time.process_time() - started) / count

    rows = []
    for arm in ARMS:
        loops = {size: stacked_loop(arm, size) for size in SIZES}
        plain = plain_loop(arm)
        milliseconds(plain, 50)
        for loop in loops.values():
            milliseconds(loop, 2)
        for _ in range(rounds):
            for size, loop in loops.items():
                count = max(1, steps * 33 // (33 if size < 33 else size))
                beside = milliseconds(plain, 5 * steps)
                member = milliseconds(loop, count) / size
                rows.append(
                    {
                        "arm": arm,
                        "size": size,
                        "member_ms": round(member, 4),
                        "plain_ms": round(beside, 4),
                        "member/plain": round(member / beside, 3),
                        **provenance(),
                    }
                )
    append_rows(RESULTS / "stack_step.csv", rows)
    for arm in ARMS:
        for size in SIZES:
            mine = [row for row in rows if (row["arm"], row["size"]) == (arm, size)]
            columns = ("member_ms", "plain_ms", "member/plain")
            medians = [statistics.median(row[name] for row in mine) for name in columns]
            print(f"{arm:6} K={size:3} " + " ".join(f"{value:.3f}" for value in medians))


def measure_sweeps(rounds: int) -> None:
    """Measure the processor time of the same sweep with both launchers."""
    rows = []
    for _ in range(rounds):
        for arm in ARMS:
            seconds = {}
            for launcher in ("basic", "bn_stack"):
                seconds[launcher] = sweep_seconds(
                    *("data.fallback=null", f"norm={arm}", "seed=1", "init.std=0.01,0.1,1"),
                    f"hydra/launcher={launcher}",
                )
            rows.append(
                {
                    "arm": arm,
                    "trials": 33,
                    "basic_s": round(seconds["basic"], 1),
                    "stack_s": round(seconds["bn_stack"], 1),
                    "stack/basic": round(seconds["bn_stack"] / seconds["basic"], 3),
                    **provenance(),
                }
            )
            print(rows[-1], flush=True)
    append_rows(RESULTS / "stack_sweep.csv", rows)


def measure_overhead(rounds: int) -> None:
    """Measure what a trial of a stacked sweep takes beside its training."""
    rows = []
    for _ in range(rounds):
        seconds = {}
        for seeds in (3, 9):
            seconds[11 * seeds] = sweep_seconds(
                *("data=digits", "norm=batch", "init.std=0.1", "trainer.max_steps=1"),
                *(
                    "trainer.val_check_interval=1",
                    f"seed={','.join(map(str, range(1, seeds + 1)))}",
                ),
            )
        milliseconds = 1000 * (seconds[99] - seconds[33]) / 66
        rows.append({"trial_ms": round(milliseconds, 1), **provenance()})
        print(rows[-1], flush=True)
    append_rows(RESULTS / "stack_overhead.csv", rows)
    print(f"{statistics.median(row['trial_ms'] for row in rows):.1f} ms a trial")


def sweep_seconds(*overrides: str) -> float:
    """Return the processor time of `+sweep=lr_init` with overrides, in seconds."""
    with tempfile.TemporaryDirectory() as folder:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(
            [
                *(sys.executable, "-m", "bn_lightning.train", "-m"),
                *("+experiment=mnist_bn", "+sweep=lr_init", *overrides),
                f"hydra.sweep.dir={folder}",
            ],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["step", "gpu", "sweep", "overhead"])
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--steps", type=int)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    if arguments.what == "step":
        measure_steps(arguments.rounds or 5, arguments.steps or 60)
    elif arguments.what == "gpu":
        measure_on_gpu(arguments.rounds or 5, arguments.steps or 300)
    elif arguments.what == "sweep":
        measure_sweeps(arguments.rounds or 1)
    else:
        measure_overhead(arguments.rounds or 3)


if __name__ == "__main__":
    main()
