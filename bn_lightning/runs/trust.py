"""What the configuration in a checkpoint or run from elsewhere may build.

Building a configuration runs the code that each `_target_` names. Hydra follows any attribute to
find it: `bn_lightning.train.Path` is `pathlib.Path`, and a module that imports `os` leads to
`os.system`. The check therefore compares where the object is defined, not the name that leads to
it. Hydra also evaluates interpolations while it builds, and `${oc.create:...}` makes new nodes, so
a configuration from elsewhere may contain no interpolation.

A configuration that the user types is not checked, as in any Hydra program.
"""

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

from bn_lightning.runs.moved_names import moved_hint

# Where the classes of networks and of data are defined.
_CLASSES = (
    "bn_lightning.data.",
    "bn_lightning.models.",
    "bn_lightning.modules.",
    "torch.nn.",
    "torch.optim.",
)

# Functions below this build parts of networks. Functions elsewhere may do anything.
_FUNCTIONS = "bn_lightning.models."


class UntrustedError(ValueError):
    """A configuration from elsewhere would build something that it may not build."""


def check_trusted(config: Any, trusted: Sequence[str], source: str) -> None:
    """Refuse a configuration whose `_target_`s are not classes of networks or data.

    Args:
        config: plain dictionaries, lists and values, which `check_plain` accepted.
        trusted: beginnings of names that it may build as well, such as "my_package.".
        source: where the configuration comes from, for messages.

    Raises:
        UntrustedError: names the first `_target_` that it may not build.
    """
    from hydra.utils import get_object

    for key, value in _leaves(config):
        if key.rpartition(".")[2] != "_target_" or value is None:
            continue
        name = defined_as = str(value)
        reason = ""
        # get_object imports what it looks up, so only trusted names are looked up.
        if name.startswith((*_CLASSES, *trusted, "bn_lightning.")):
            try:
                found = get_object(name)
            except Exception as error:
                text = moved_hint(name) or f": {' '.join(str(error).split())}"
                raise UntrustedError(
                    f"expected `{key}` in {source} to be a name that can be found, got {name}{text}"
                ) from error
            module, qualified = (
                getattr(found, "__module__", None),
                getattr(found, "__qualname__", ""),
            )
            defined_as = f"{module}.{qualified}"
            if defined_as.startswith((_FUNCTIONS, *trusted)):
                continue
            if inspect.isclass(found) and defined_as.startswith(_CLASSES):
                continue
            if defined_as != name:
                reason = f", which is {defined_as}"
            elif not inspect.isclass(found):
                reason = ", which is no class"
        raise UntrustedError(
            f"expected `{key}` in {source} to be a class of {', '.join(_CLASSES)} or of what "
            f"`trusted` lists, got {name}{reason}; if you trust it, add the beginning of its name: "
            f"'trusted=[{defined_as.partition('.')[0]}.]', or in Python "
            f'`load_run(directory, trusted=["{defined_as.partition(".")[0]}."])`'
        )


def check_plain(config: Any, source: str) -> None:
    """Refuse a configuration with interpolations, which Hydra would evaluate.

    Args:
        config: plain dictionaries, lists and values.
        source: where the configuration comes from, for messages.

    Raises:
        UntrustedError: names the first interpolation.
    """
    for key, value in _leaves(config):
        if isinstance(value, str) and "${" in value:
            raise UntrustedError(
                f"expected `{key}` in {source} to be a plain value, got the interpolation {value};"
                " use a file that bn_lightning.train wrote"
            )


def _leaves(config: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the key and value of each `_target_` and of each value that is no container."""
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
