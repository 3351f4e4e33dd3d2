"""Which names a configuration may build: a `_target_` runs code, whoever wrote it.

Hydra finds a `_target_` through any attribute, so that `bn_lightning.train.Path` is `pathlib.Path`,
and a module that imports `os` leads to `os.system`. What counts is therefore where the object that
was found is defined.
"""

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

OF_CONFIGURATIONS = ("bn_lightning.", "torch.", "lightning.", "optuna.", "torchmetrics.")
"""Of what one types or writes: beginnings of the names that it may build."""

OF_CHECKPOINTS = ("bn_lightning.", "torch.nn.", "torch.optim.")
"""Of what somebody else's file says."""

# Functions elsewhere do something; those of this package build parts of networks.
_FUNCTIONS = ("bn_lightning.models.",)


class UntrustedError(ValueError):
    """A configuration that would build what it may not."""


def check_trusted(
    config: Any, beginnings: Sequence[str], trusted: Sequence[str], source: str
) -> None:
    """Refuse a configuration that would build something else than it may.

    It may build classes defined under `beginnings`, functions of `bn_lightning.models`, and
    whatever is defined under `trusted`.

    Args:
        config: plain dictionaries, lists and values.
        beginnings: `OF_CONFIGURATIONS` or `OF_CHECKPOINTS`.
        trusted: the user's own beginnings of names, such as "my_package.".
        source: where the configuration comes from, for messages.

    Raises:
        UntrustedError: naming the first that it may not build.
    """
    from hydra.utils import get_object

    for key, target in _targets(config):
        name = own_name = str(target)
        reason = ""
        # Looked up, and so imported, only if its name is trusted.
        if name.startswith((*beginnings, *trusted)):
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
            if inspect.isclass(found) and own_name.startswith(tuple(beginnings)):
                continue
            reason = f", which is {own_name}" if own_name != name else ", which is no class"
        raise UntrustedError(
            f"`{key}` in {source} expected a class of {', '.join(beginnings)} or what `trusted` "
            f"names, got {name}{reason}; if you trust it, add the beginning of its name: "
            f"'trusted=[{own_name.partition('.')[0]}.]'"
        )


def _targets(config: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every `_target_` and its key, depth first."""
    if isinstance(config, dict):
        if config.get("_target_") is not None:
            yield f"{path}_target_", config["_target_"]
        for key, value in config.items():
            yield from _targets(value, f"{path}{key}.")
    elif isinstance(config, list):
        for i, value in enumerate(config):
            yield from _targets(value, f"{path}{i}.")
