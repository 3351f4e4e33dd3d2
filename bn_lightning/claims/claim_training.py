"""Compose the trainings of a claim, and train them: as stacks where they can be, else singly."""

import contextlib
import copy
import io
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra_plugins.bn_optuna import register
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from bn_lightning.callbacks.running_statistics import batch_norms
from bn_lightning.claims.design import Claim, Overrides
from bn_lightning.claims.measured_network import MeasuredNetwork
from bn_lightning.claims.result_table import TrialKey
from bn_lightning.cli.config_check import check_config
from bn_lightning.runs.record import read_run
from bn_lightning.stack.memory import StackSizeError
from bn_lightning.stack.same_architecture import NotStackableError
from bn_lightning.stack.stackable import stack_key
from bn_lightning.stack.training import train_stack

MOST_MEMBERS = 36
"""Of a stack; more of them cost as much each, and a kill loses the stack that is training."""

_TIMED_STEPS = 10

# No validation but the last, no pictures, and no checkpoint but the last.
_SPARE: Overrides = (
    "data.test_curve=false",
    "extras.figures=false",
    "extras.num_threads=1",
    "trainer.val_check_interval=${trainer.max_steps}",
    "trainer.log_every_n_steps=0",
    "~callbacks.activation_percentiles",
    "~callbacks.step_progress",
)

_ALONE = "alone: "

Configurations = dict[TrialKey, dict[str, Any]]


class Part(NamedTuple):
    """Networks that one process trains and measures.

    Attributes:
        configurations: of one claim.
        alone: why they are no stack, "" if they can be one.
        is_trained: whether they are trained before they are measured.
    """

    configurations: Configurations
    alone: str = ""
    is_trained: bool = True


def compose_trials(
    claim: Claim, budget: str, seeds: Sequence[int], typed: Sequence[str], folder: Path
) -> Configurations:
    """Compose the configuration of each network of a claim, and check it.

    Args:
        claim: the claim.
        budget: a name of `BUDGETS`.
        seeds: of weights and batches.
        typed: overrides of the user, which count most.
        folder: of the runs.

    Raises:
        ValueError: an override or a value cannot be used, or is of what the claim varies, the
            budget is too short, the claim is about another network, or an arm has not the
            BatchNorms that its name promises.
    """
    register()
    _check_typed(claim, budget, typed)
    found: Configurations = {}
    with hydra_configurations():
        for arm, own in claim.arms.items():
            try:
                of_arm = compose("train", [*_SPARE, *claim.base, *own, *typed])
            except HydraException as error:
                reason = first_line(error).rstrip(".")
                raise ValueError(
                    f"expected overrides that the claim {claim.name} can use beside its own, got "
                    f"{' '.join(typed)}: {reason}; leave out the override or the claim"
                ) from error
            for label, setting in claim.settings_of(budget, arm).items():
                config = _with_values(of_arm, setting.overrides, typed)
                for seed in seeds:
                    key = TrialKey(claim.name, arm, label, seed)
                    found[key] = _resolved(config, seed, folder / "-".join(map(_in_path, key)))
                check_config(found[key])
                steps = found[key]["trainer"]["max_steps"]
                if setting.is_trained and steps < claim.least_steps:
                    raise ValueError(
                        f"expected `trainer.max_steps` to be at least {claim.least_steps} for the "
                        f"claim {claim.name}, got {steps}, too few for its measure; train longer"
                    )
            _check_arm(claim, arm, found[key])
    return found


def parts_of(configurations: Configurations) -> list[Part]:
    """Return what can be trained as one stack as one part, and each other network alone.

    Parts of the same data are in a row, because data are read anew where they differ.

    Args:
        configurations: as `compose_trials` returns them.
    """
    groups: dict[str, list[TrialKey]] = {}
    for key, config in configurations.items():
        try:
            groups.setdefault(stack_key(config), []).append(key)
        except NotStackableError as error:
            groups.setdefault(_ALONE + error.reason, []).append(key)
    parts = []
    for name, keys in sorted(groups.items(), key=lambda group: _data_of(configurations, group[1])):
        alone = name.removeprefix(_ALONE) if name.startswith(_ALONE) else ""
        keys.sort(key=lambda key: key.seed)  # members of one seed share batches and a layer's GEMM
        size = 1 if alone else MOST_MEMBERS
        for start in range(0, len(keys), size):
            part = {key: configurations[key] for key in keys[start : start + size]}
            parts.append(Part(part, alone))
    return parts


def networks_of(part: Part) -> Iterator[dict[TrialKey, MeasuredNetwork]]:
    """Yield the networks of a part: as they begin, or trained, those of a stack or one.

    The folder of the runs of a stack is removed when the next one is asked for.

    Args:
        part: networks of one claim, see `parts_of`.
    """
    configurations, alone = part.configurations, part.alone
    if not part.is_trained:
        yield {key: MeasuredNetwork(config) for key, config in configurations.items()}
        return
    keys, most = list(configurations), len(configurations)
    while keys and not alone:
        members = keys[:most]
        try:
            train_stack([configurations[key] for key in members])
        except StackSizeError as error:
            if error.fits > 1:
                most = error.fits
                continue
            alone = error.reason
        except NotStackableError as error:
            alone = error.reason
        else:
            yield from _finished(members, configurations)
            keys = keys[most:]
    if keys and not part.alone:
        announce_alone({key: configurations[key] for key in keys}, alone)
    for key in keys:
        _train_alone(configurations[key])
        yield from _finished([key], configurations)


def announce_alone(configurations: Configurations, reason: str) -> None:
    """Print how long networks take that are trained one by one.

    Args:
        configurations: of one claim.
        reason: why they are not a stack.
    """
    claim = next(iter(configurations)).claim
    seconds = len(configurations) * seconds_of_training(next(iter(configurations.values())))
    print(
        f"{claim}: {len(configurations)} trainings one by one, about {seconds:,.0f} seconds: "
        f"{reason}",
        flush=True,
    )


def seconds_of_training(config: dict[str, Any]) -> float:
    """Return about how many seconds a training takes, from a few of its steps.

    Args:
        config: of the run, resolved.
    """
    network = MeasuredNetwork(config)
    model = network.model()
    x, target = network.batch(config["data"]["batch_size"])
    parameters = [p for p in model.network.parameters() if p.requires_grad]
    for step in range(_TIMED_STEPS + 1):
        if step == 1:  # the first one also allocates
            begin = time.perf_counter()
        torch.autograd.grad(model.loss(model.network(x), target), parameters)
    return (time.perf_counter() - begin) / _TIMED_STEPS * config["trainer"]["max_steps"]


def _check_typed(claim: Claim, budget: str, typed: Sequence[str]) -> None:
    """Raise a ValueError if an override would make equal what the claim compares."""
    points = [
        _by_key((*own, *setting.overrides))
        for arm, own in claim.arms.items()
        for setting in claim.settings_of(budget, arm).values()
    ]
    for key, override in _by_key(typed).items():
        if key == "seed":
            raise ValueError(
                f"expected `seed` to be left to the claim {claim.name}, got {override}; ask for a "
                "number of seeds by seeds=N"
            )
        varies = len({point.get(key) for point in points}) > 1
        if key == "trainer.max_steps":  # often a budget, of which points differ otherwise, too
            others = {frozenset({**point, key: ""}.values()) for point in points}
            varies = len(others) < len(points)
        if varies:
            raise ValueError(
                f"expected `{key}` to be left to the claim {claim.name}, which varies it, got "
                f"{override}; leave out the override or the claim"
            )


def _by_key(overrides: Sequence[str]) -> dict[str, str]:
    """Return the overrides by the key or group that each changes."""
    return {text.lstrip("+~").partition("=")[0].partition("@")[0]: text for text in overrides}


def _with_values(config: DictConfig, overrides: Sequence[str], typed: Sequence[str]) -> DictConfig:
    """Return a copy with values of keys that there are; a key that is typed keeps its value.

    Composing anew would take thirty times as long.
    """
    changed = copy.deepcopy(config)
    keys = _by_key(typed)
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        key = override.key_or_group
        if key not in keys:
            try:
                OmegaConf.update(changed, key, override.value())
            except OmegaConfBaseException as error:
                raise ValueError(
                    f"expected `{key}`, which the claim varies, to be a key of the configuration, "
                    f"got none with {' '.join(typed)}; leave out the override or the claim"
                ) from error
    return changed


def _resolved(config: DictConfig, seed: int, directory: Path) -> dict[str, Any]:
    OmegaConf.update(config, "seed", seed)
    OmegaConf.update(config, "paths.output_dir", str(directory))
    content: Any = OmegaConf.to_container(config, resolve=True)
    return content


def _check_arm(claim: Claim, arm: str, config: dict[str, Any]) -> None:
    network = MeasuredNetwork(config).model().network
    if not isinstance(network, claim.network):
        raise ValueError(
            f"expected `model.network` to be of {claim.network.__name__} for the claim "
            f"{claim.name}, which is about it, got {type(network).__name__}; leave out the "
            "override or the claim"
        )
    has, expected = bool(batch_norms(network)), config["norm"] is not None
    if has != expected:
        raise ValueError(
            f"expected `model.network` to have {'a' if expected else 'no'} BatchNorm in the arm "
            f"{arm!r} of the claim {claim.name}, got {type(network).__name__} "
            f"{'with' if has else 'without'} one; let the network follow `norm`"
        )


def _train_alone(config: dict[str, Any]) -> None:
    from bn_lightning.train import train

    with contextlib.redirect_stdout(io.StringIO()):
        train(OmegaConf.create(config))


def _finished(
    keys: Sequence[TrialKey], configurations: Configurations
) -> Iterator[dict[TrialKey, MeasuredNetwork]]:
    found = {}
    for key in keys:
        config = configurations[key]
        directory = Path(config["paths"]["output_dir"])
        found[key] = MeasuredNetwork(config, directory, read_run(directory)["metrics"])
    yield found
    for network in found.values():
        if network.directory is not None:
            shutil.rmtree(network.directory)


def _data_of(configurations: Configurations, keys: Sequence[TrialKey]) -> str:
    data = configurations[keys[0]]["data"]
    return repr({name: value for name, value in data.items() if name != "seed"})


def _in_path(part: object) -> str:
    return "".join(letter if letter.isalnum() or letter in "._" else "_" for letter in str(part))


def first_line(error: Exception) -> str:
    """Return the first line of a message; Hydra's tell in further lines where they come from."""
    return next(iter(str(error).splitlines()), type(error).__name__)


@contextlib.contextmanager
def hydra_configurations() -> Iterator[None]:
    """Let `compose` find this package's configurations inside the block."""
    if GlobalHydra.instance().is_initialized():
        yield
        return
    with initialize_config_module("bn_lightning.conf", version_base="1.3"):
        yield
