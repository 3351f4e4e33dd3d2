"""The ticket order of `persistent` in many schedules, on a memory that shows writes late.

The source of the kernels runs as it is (weak_memory.py), with every program a coroutine. A schedule
must give what one program alone gives, bit for bit. The same check must find every acquire, release
and barrier that is taken out of the source; one that another rule covers is named below.
"""

import functools
import re
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("triton")

from weak_memory import Buffer, OrderError, Pointer, Simulation, load_kernels

from bn_lightning.kernels.arguments import (
    BackwardTensors,
    ChannelTensors,
    ForwardTensors,
    Partials,
    RunningStatistics,
)
from bn_lightning.kernels.backward import Sums
from bn_lightning.kernels.persistent import Queue
from bn_lightning.kernels.walk import Tiling, cdiv

MODULE = "bn_lightning.kernels.persistent"
EPS = 1e-5
BATCHES = 5
RUNNING = ("running_mean", "running_var")
# Two channels for each group and two rows for each split: one element for each warp, and M >= 2.
BLOCK_C = 2
BLOCK_N = 2
# Most schedules need fewer than 2,000 steps.
MAX_STEPS = 20_000

# More than the 4 * 3 items of the largest case.
MANY_PROGRAMS = 15
# One of each launch: 10 tests run 320 schedules, 10,000 with `-m soak`.
SEEDS = 32
SOAK_SEEDS = 1000
MUTATION_SEEDS = 200

Kernels = dict[str, Any]
directions = pytest.mark.parametrize("direction", ["forward", "backward"])


class Case(NamedTuple):
    """A launch.

    Attributes:
        direction: "forward" or "backward".
        programs: how many.
        splits: of a channel.
        groups: blocks of channels.
        lag: groups between the two readings of a group.
        cumulative: whether the momentum is None.
        starved: a program that runs only while no other one can, or None.
    """

    direction: str
    programs: int
    splits: int
    groups: int
    lag: int
    cumulative: bool
    starved: int | None

    @property
    def alone(self) -> "Case":
        """The same work for one program."""
        return self._replace(programs=1, starved=None)


def _case(direction: str, programs: int, seed: int) -> Case:
    """Return one of the 32 launches of so many programs."""
    splits = (1, 3)[seed % 2]
    # That of the schedule, then the smallest.
    lag = (cdiv(programs, 2 * splits) + 1, 1)[seed // 2 % 2]
    starved = (None, seed % programs)[seed // 8 % 2]
    groups = (4, 1)[seed // 4 % 2]
    return Case(direction, programs, splits, groups, lag, seed // 16 % 2 == 0, starved)


@functools.cache
def _inputs(splits: int, groups: int) -> dict[str, np.ndarray]:
    """Return random tensors, (N, C) or (C,) fp32."""
    random = np.random.default_rng(0)
    N, C = BLOCK_N * splits, BLOCK_C * groups
    names = {"x": (N, C), "dy": (N, C), "weight": C, "bias": C, "mean": C, "running_mean": C}
    tensors = {name: random.normal(1.0, 2.0, shape) for name, shape in names.items()}
    tensors |= {name: random.uniform(0.5, 2.0, C) for name in ("rstd", "running_var")}
    return {name: values.astype(np.float32) for name, values in tensors.items()}


class Launch:
    """The tensors and the arguments of a launch; what the kernel must write is NaN before."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.inputs = _inputs(case.splits, case.groups)
        self.N, self.C = self.inputs["x"].shape
        self.written: dict[str, Buffer] = {}

    def _input(self, name: str) -> Pointer:
        return Pointer(Buffer(self.inputs[name], writable=False))

    def _updated(self, name: str, values: np.ndarray) -> Pointer:
        self.written[name] = Buffer(values)
        return Pointer(self.written[name])

    def _output(self, name: str, *shape: int) -> Pointer:
        return self._updated(name, np.full(shape, np.nan, np.float32))

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of the kernel."""
        case = self.case
        counters = self._updated("counters", np.zeros(2 + 2 * case.groups, np.int32))
        arguments = {
            "queue": Queue(counters, case.splits, case.lag, tiles_per_split=1),
            "tiling": Tiling(
                R=self.N,
                P=self.C,
                span=BLOCK_C,
                C=self.C,
                L=1,
                numel=self.N * self.C,
                BLOCK_R=BLOCK_N,
                BLOCK_P=BLOCK_C,
                GROUP=BLOCK_C,
                CHANNELS=BLOCK_C,
                ALIGN=1,
                STAGES=1,
                WRAPS=False,
                RAGGED=False,
                MASK_WIDTH=1,
                WIDE=False,
            ),
            "BLOCK_S": 1 << (case.splits - 1).bit_length(),
        }
        add = self._add_forward if case.direction == "forward" else self._add_backward
        add(arguments)
        return arguments

    def _add_forward(self, arguments: dict[str, Any]) -> None:
        C, S = self.C, self.case.splits
        x, y = self._input("x"), self._output("y", self.N, C)
        running = (self._updated(name, self.inputs[name]) for name in RUNNING)
        arguments |= {
            "tensors": ForwardTensors(x, None, y, None, 0.0, "identity"),
            "channels": ChannelTensors(
                self._output("mean", C),
                self._output("rstd", C),
                self._input("weight"),
                self._input("bias"),
            ),
            "running": RunningStatistics(
                *running,
                self._updated("num_batches_tracked", np.array(BATCHES)),
                None if self.case.cumulative else 0.1,
            ),
            "partials": Partials(*(self._output(f"partial {i}", S, C) for i in range(3))),
            "total": float(self.N),
            "eps": EPS,
        }

    def _add_backward(self, arguments: dict[str, Any]) -> None:
        C, S = self.C, self.case.splits
        arguments |= {
            "tensors": BackwardTensors(
                dy_ptr=self._input("dy"),
                x_ptr=self._input("x"),
                residual_ptr=None,
                y_ptr=None,
                mask_ptr=None,
                dx_ptr=self._output("dx", self.N, C),
                dresidual_ptr=self._output("dresidual", self.N, C),
                inverse_count=1.0 / self.N,
                negative_slope=0.0,
                ACTIVATION="identity",
                TRAINING=True,
            ),
            "channels": ChannelTensors(*map(self._input, ("mean", "rstd", "weight", "bias"))),
            "sums": Sums(self._output("dweight", C), self._output("dbias", C)),
            "partials": Sums(self._output("partial 0", S, C), self._output("partial 1", S, C)),
        }


def _simulate(kernels: Kernels, case: Case, seed: int) -> Launch:
    """Run one schedule of a launch."""
    launch = Launch(case)
    kernel = functools.partial(
        kernels[f"_bn_{case.direction}_persistent_kernel"], **launch.arguments()
    )
    simulation = Simulation(case.programs, seed, starved=case.starved)
    # Late values are NaN, and a tile without values divides by 0.
    with np.errstate(all="ignore"):
        simulation.run(kernel, MAX_STEPS)
    return launch


@functools.cache
def _original() -> Kernels:
    return load_kernels(MODULE)


@functools.cache
def _alone(case: Case) -> dict[str, list[Any]]:
    """Return what one program writes."""
    launch = _simulate(_original(), case, 0)
    return {name: buffer.final() for name, buffer in launch.written.items()}


def _check(launch: Launch) -> None:
    """Compare a launch with that of one program.

    The running statistics show which number of batches each group has read.

    Raises:
        OrderError: a value differs, or an element was written twice.
    """
    for name, expected in _alone(launch.case.alone).items():
        found = launch.written[name]
        for i, (value, correct) in enumerate(zip(found.final(), expected, strict=True)):
            if value != correct:
                raise OrderError(f"{name}[{i}] is {value}, and {correct} for one program")
        if name != "counters" and set(found.writes()) != {1}:
            raise OrderError(f"the elements of {name} were written {found.writes()} times")


def _run_schedules(kernels: Kernels, direction: str, programs: int, seeds: range) -> None:
    """Check one schedule for each seed.

    Raises:
        OrderError: a schedule shows a wrong result.
    """
    for seed in seeds:
        case = _case(direction, programs, seed)
        try:
            _check(_simulate(kernels, case, seed))
        except OrderError as error:
            raise OrderError(f"seed {seed}, {case}: {error}") from None


@directions
@pytest.mark.parametrize("programs", [1, 2, 3, 7, MANY_PROGRAMS])
def test_every_schedule_gives_what_one_program_gives(direction: str, programs: int) -> None:
    _run_schedules(_original(), direction, programs, range(SEEDS))


@pytest.mark.soak
@directions
@pytest.mark.parametrize("programs", [1, 2, 3, 7, MANY_PROGRAMS])
def test_thousands_of_schedules_give_what_one_program_gives(direction: str, programs: int) -> None:
    _run_schedules(_original(), direction, programs, range(SEEDS, SEEDS + SOAK_SEEDS))


def test_one_program_computes_batch_norm() -> None:
    forward = Case("forward", 1, 3, 4, 1, False, None)
    inputs = {name: torch.from_numpy(v) for name, v in _inputs(3, 4).items()}
    running = [inputs[name].clone() for name in RUNNING]
    expected = F.batch_norm(
        inputs["x"], *running, inputs["weight"], inputs["bias"], training=True, eps=EPS
    )
    found = _alone(forward)
    # fp32 and another order of the sums.
    close = functools.partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)
    close(torch.tensor(found["y"]), expected.flatten())
    for name, values in zip(RUNNING, running, strict=True):
        close(torch.tensor(found[name]), values)
    assert found["num_batches_tracked"] == [BATCHES + 1]
    assert set(found["counters"]) == {0}

    backward = _alone(forward._replace(direction="backward"))
    centred = (inputs["x"] - inputs["mean"]) * inputs["rstd"]
    close(torch.tensor(backward["dweight"]), (inputs["dy"] * centred).sum(0))
    close(torch.tensor(backward["dbias"]), inputs["dy"].sum(0))
    assert backward["dresidual"] == inputs["dy"].flatten().tolist()


class Change(NamedTuple):
    """A change of the source.

    Attributes:
        function: in which it is.
        old: text that occurs in the function.
        new: text in its place.
        place: which of several occurrences to change.
    """

    function: str
    old: str
    new: str
    place: int = 0


def _change(source: str, change: Change) -> str:
    """Change one function of the source."""
    match = re.search(rf"^def {change.function}\(.*?(?=^\S)", source, re.DOTALL | re.MULTILINE)
    assert match, f"{change.function} is not in the source"
    parts = match[0].split(change.old)
    assert len(parts) > change.place + 1, f"`{change.old}` is not in {change.function}"
    ends = change.place + 1
    changed = change.old.join(parts[:ends]) + change.new + change.old.join(parts[ends:])
    return source[: match.start()] + changed + source[match.end() :]


def _changed(change: Change) -> Kernels:
    """Compile the kernels after a change."""
    return load_kernels(MODULE, lambda source: _change(source, change))


BARRIER = "tl.debug_barrier()"
ACQUIRE, RELEASE, BOTH, RELAXED = (
    f'sem="{order}"' for order in ("acquire", "release", "acq_rel", "relaxed")
)
ADD_TICKET = 'return tl.atomic_add(counters_ptr + TICKET, 1, sem="relaxed")'
LOAD_AND_STORE_TICKET = """ticket = tl.load(counters_ptr + TICKET)
    tl.store(counters_ptr + TICKET, ticket + 1)
    return ticket"""

# The first barrier of `_leave` is missing here. Without it no result changes: what the last program
# writes conflicts only with atomics of warp 0, and with loads of num_batches_tracked, which the
# barrier of `_raise_flag` follows.
MUTATIONS = {
    "ticket_is_not_atomic": Change("_take_ticket", ADD_TICKET, LOAD_AND_STORE_TICKET),
    "arrive_without_barrier": Change("_arrive", BARRIER, "pass"),
    "arrive_without_later_barrier": Change("_arrive", BARRIER, "pass", place=1),
    "arrive_relaxed": Change("_arrive", BOTH, RELAXED),
    "arrive_without_acquire": Change("_arrive", BOTH, RELEASE),
    "arrive_without_release": Change("_arrive", BOTH, ACQUIRE),
    "flag_without_barrier": Change("_raise_flag", BARRIER, "pass"),
    "flag_without_release": Change("_raise_flag", RELEASE, RELAXED),
    "wait_without_barrier": Change("_wait_for_flag", BARRIER, "pass"),
    "wait_without_first_acquire": Change("_wait_for_flag", ACQUIRE, RELAXED),
    "wait_without_later_acquires": Change("_wait_for_flag", ACQUIRE, RELAXED, place=1),
    "leave_without_later_barrier": Change("_leave", BARRIER, "pass", place=1),
    "leave_relaxed": Change("_leave", BOTH, RELAXED),
    "leave_without_acquire": Change("_leave", BOTH, RELEASE),
    "leave_without_release": Change("_leave", BOTH, ACQUIRE),
    # That the check also finds errors of another kind.
    "first_to_arrive_finishes": Change("_arrive", "== S - 1", "== 0"),
    "nobody_raises_the_flag": Change("_raise_flag", "+ 1, 1,", "+ 1, 0,"),
    "nobody_waits": Change("_wait_for_flag", "raised == 0", "raised < 0"),
    "last_but_one_clears": Change("_leave", "num_programs(0) - 1", "num_programs(0) - 2"),
}


@directions
@pytest.mark.parametrize("mutation", MUTATIONS.values(), ids=MUTATIONS.keys())
def test_check_finds_what_is_taken_out(mutation: Change, direction: str) -> None:
    with pytest.raises(OrderError):
        _run_schedules(_changed(mutation), direction, 3, range(MUTATION_SEEDS))
