"""Build objects from configurations that differ in few values."""

import copy
import json
from collections.abc import Mapping
from functools import partial
from typing import Any

# Which change how the arguments of a target are built.
_SPECIAL = ("_args_", "_convert_", "_recursive_")


class Builder:
    """Builds what Hydra's `instantiate` builds, and reads equal parts of configurations once.

    Each constructor is called for each object, in the order in which `instantiate` calls it and
    with equal arguments, so it draws the same random numbers. Reading the configuration of a small
    network takes longer than its constructors.
    """

    def __init__(self) -> None:
        self._factories: dict[str, partial[Any]] = {}  # by the text of a node

    def build(self, node: Any) -> Any:
        """Return a new object.

        Args:
            node: of a resolved configuration, as plain dictionaries and lists.

        Raises:
            Exception: a constructor raises it. Hydra's InstantiationException may wrap it.
        """
        from hydra.utils import instantiate

        if not _is_node(node) or not _can_be_kept(node):
            return instantiate(node)
        is_partial = node.get("_partial_", False)
        arguments = {key: v for key, v in node.items() if key not in ("_target_", "_partial_")}
        containers = {
            key: v
            for key, v in arguments.items()
            if isinstance(v, Mapping | list) and (is_partial or not _is_node(v))
        }
        own = {"_target_": node["_target_"], "_partial_": True, **containers}
        text = json.dumps(own)
        if text not in self._factories:
            self._factories[text] = instantiate(own)
        # Hydra's own partial checks its target again at each call, which takes 0.2 ms.
        factory = self._factories[text]
        for key, value in factory.keywords.items():
            arguments[key] = copy.deepcopy(value)  # an object may change it
        if is_partial:
            return partial(factory.func, *factory.args, **arguments)
        parts = {key: self.build(v) for key, v in arguments.items() if _is_node(v)}
        return factory.func(*factory.args, **{**arguments, **parts})


def _is_node(value: Any) -> bool:
    return isinstance(value, Mapping) and "_target_" in value


def _can_be_kept(node: Mapping[str, Any]) -> bool:
    """Return whether all that `instantiate` builds for a node can be built part by part.

    An object below a list, a dictionary or a partial function cannot.
    """
    is_partial = node.get("_partial_", False)
    if type(node["_target_"]) is not str or type(is_partial) is not bool:
        return False
    for key, value in node.items():
        if key in _SPECIAL:
            return False
        if _is_node(value):
            if not _can_be_kept(value) or (is_partial and not value.get("_partial_", False)):
                return False
        elif not _is_value(value) or (is_partial and isinstance(value, Mapping | list)):
            return False
    return True


def _is_value(value: Any) -> bool:
    """Return whether a value is plain and complete, and builds no object."""
    if isinstance(value, Mapping):
        return "_target_" not in value and all(
            isinstance(key, str) and _is_value(part) for key, part in value.items()
        )
    if isinstance(value, list):
        return all(map(_is_value, value))
    if isinstance(value, str):
        return value != "???" and "${" not in value
    return value is None or type(value) in (bool, int, float)
