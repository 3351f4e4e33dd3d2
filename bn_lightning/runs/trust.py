"""Which names a configuration may build: a `_target_` runs code, whoever wrote it.

Hydra finds a `_target_` through any attribute, so that `bn_lightning.train.Path` is `pathlib.Path`,
and a module that imports `os` leads to `os.system`. What counts is therefore where the object that
was found is defined. It also resolves interpolations while it builds, and one of them,
`${oc.create:...}`, makes new nodes: what a checkpoint says has none.
"""

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

OF_CONFIGURATIONS = ("bn_lightning.", "torch.", "lightning.", "optuna.", "torchmetrics.")
"""Of what one types or writes: beginnings of the names that it may build."""

OF_CHECKPOINTS = (
    *(f"bn_lightning.{part}." for part in ("data", "models", "modules")),
    *("torch.nn.", "torch.optim."),
)
"""Of what somebody else's file says: what networks and data are made of."""

# Classes below these that run what they are given as soon as they are built.
_RUNNING = (
    *("torch.utils.benchmark.", "torch.package.", "torch.distributed.elastic."),
    "lightning.pytorch.cli.",
)

# Functions elsewhere do something; those of this package build parts of networks.
_FUNCTIONS = ("bn_lightning.models.",)


class UntrustedError(ValueError):
    """A configuration that would build what it may not."""


def check_trusted(
    config: Any, beginnings: Sequence[str], trusted: Sequence[str], source: str
) -> None:
    """Refuse a configuration that would build something else than it may.

    It may build classes defined under `beginnings` that do not run what they are given, functions
    of `bn_lightning.models`, and whatever is defined under `trusted`.

    Args:
        config: plain dictionaries, lists and values.
        beginnings: `OF_CONFIGURATIONS` or `OF_CHECKPOINTS`.
        trusted: the user's own beginnings of names, such as "my_package.".
        source: where the configuration comes from, for messages.

    Raises:
        UntrustedError: naming the first that it may not build.
    """
    from hydra.utils import get_object

    for key, value in _leaves(config):
        if key.rpartition(".")[2] != "_target_" or value is None:
            continue
        name = own_name = str(value)
        reason = ""
        # Looked up, and so imported, only if its name is trusted. This package may be.
        if name.startswith((*beginnings, *trusted, "bn_lightning.")):
            try:
                found = get_object(name)
            except Exception as error:
                text = " ".join(str(error).split())
                raise UntrustedError(
                    f"`{key}` in {source} expected a name that can be found, got {name}: {text}"
                ) from error
            own_name = f"{getattr(found, '__module__', None)}.{getattr(found, '__qualname__', '')}"
            if own_name.startswith((*_FUNCTIONS, *trusted)):
                continue
            runs = own_name.startswith(_RUNNING)
            if inspect.isclass(found) and own_name.startswith(tuple(beginnings)) and not runs:
                continue
            if runs:
                reason = ", which runs what it is given"
            elif own_name != name:
                reason = f", which is {own_name}"
            elif not inspect.isclass(found):
                reason = ", which is no class"
        raise UntrustedError(
            f"`{key}` in {source} expected a class of {', '.join(beginnings)} or what `trusted` "
            f"names, got {name}{reason}; if you trust it, add the beginning of its name: "
            f"'trusted=[{own_name.partition('.')[0]}.]'"
        )


def check_plain(config: Any, source: str) -> None:
    """Refuse a configuration with interpolations, which building it would evaluate.

    Args:
        config: as for `check_trusted`, which sees no node that an interpolation makes.
        source: where the configuration comes from, for messages.

    Raises:
        UntrustedError: naming the first.
    """
    for key, value in _leaves(config):
        if isinstance(value, str) and "${" in value:
            raise UntrustedError(
                f"`{key}` in {source} expected a plain value, got {value}, which would be evaluated"
            )


def _leaves(config: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every `_target_`, and every value that is no container, with its key; depth first."""
    if isinstance(config, dict):
        if "_target_" in config:
            yield f"{path}_target_", config["_target_"]
        for key, value in config.items():
            if key != "_target_":
                yield from _leaves(value, f"{path}{key}.")
    elif isinstance(config, list | tuple):
        for i, value in enumerate(config):
            yield from _leaves(value, f"{path}{i}.")
    else:
        yield path.removesuffix("."), config
