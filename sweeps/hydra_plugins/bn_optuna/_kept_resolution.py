"""Resolve a configuration again after few of its values have changed."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf

KeyPath = tuple[Any, ...]
"""Keys and indices from the root of a configuration."""

_REFERENCE = re.compile(r"\$\{([A-Za-z_]\w*(?:\.\w+)*)\}")
# Of Hydra's configuration, whose other nodes convert their values: `Dict[str, Any]`.
_UNTYPED = ("hydra", "job_logging")


class KeptResolution:
    """Resolves what can change in a configuration, and keeps the rest.

    OmegaConf parses an interpolation each time that it is read, which takes 0.1 to 0.5 ms. Here an
    interpolation that names other keys only becomes their values.

    Args:
        config: whose values change.
        changing: the keys whose values change.
    """

    def __init__(self, config: DictConfig, changing: Iterable[str]) -> None:
        self._config = config
        self._kept: dict[KeyPath, Any] = {}
        self._changing: dict[KeyPath, list[KeyPath]] = {}
        # Where values differ, and from what each is computed; None for what OmegaConf resolves.
        self._rules: dict[KeyPath, list[str | KeyPath] | None] | None = _rules(config, changing)

    def value(self, path: KeyPath, computed: dict[KeyPath, Any] | None = None) -> Any:
        """Return the resolved value of a key, as plain dictionaries and lists.

        Args:
            path: of the key.
            computed: values of the configuration as it is now, which are read and added to.
        """
        computed = {} if computed is None else computed
        if self._rules is None or any(path[:n] in self._rules for n in range(1, len(path))):
            return _read(self._config, path)
        if path in self._rules:
            if path not in computed:
                computed[path] = self._computed(path, computed)
            return _copied(computed[path])
        if path not in self._kept:
            self._kept[path] = _read(self._config, path)
        value = _copied(self._kept[path])
        for other in self.changing(path):
            place = value
            for key in other[:-1]:
                place = place[key]
            place[other[-1]] = self.value((*path, *other), computed)
        return value

    def changing(self, path: KeyPath) -> list[KeyPath]:
        """Return the paths below a key, from it, at which values may differ."""
        if path not in self._changing:
            below = [other for other in self._rules or () if _is_below(other, path)]
            self._changing[path] = [other[len(path) :] for other in below]
        return self._changing[path]

    def _computed(self, path: KeyPath, computed: dict[KeyPath, Any]) -> Any:
        rule = (self._rules or {})[path]
        if rule is not None:
            parts = [p if isinstance(p, str) else self.value(p, computed) for p in rule]
            if len(parts) == 1:
                return parts[0]
            if all(type(part) in (str, int, float) for part in parts):
                return "".join(map(str, parts))
        return _read(self._config, path)


def _rules(
    config: DictConfig, changing: Iterable[str]
) -> dict[KeyPath, list[str | KeyPath] | None] | None:
    """Return where resolved values may differ, and from what each is computed.

    None: it is not known where.
    """
    content: Any = OmegaConf.to_container(config)
    texts = dict(_interpolations(content, ()))
    references: dict[KeyPath, list[KeyPath] | None] = {}
    for path, text in texts.items():
        # A resolver may return something else for each job.
        is_known = "${" not in _REFERENCE.sub("", text) and "\\" not in text
        found = [tuple(name.split(".")) for name in _REFERENCE.findall(text)]
        references[path] = found if is_known else None
    differing: set[KeyPath] = set()
    for key in changing:
        path = tuple(key.split("."))
        if not _has(content, path):
            return None
        differing.add(path)
    differing |= {path for path, found in references.items() if found is None}
    while new := {
        path
        for path, found in references.items()
        if path not in differing and any(_meet(a, b) for a in found or () for b in differing)
    }:
        differing |= new
    rules: dict[KeyPath, list[str | KeyPath] | None] = {}
    for path in differing:
        named = references.get(path)
        is_plain = named is not None and all(_has(content, other) for other in named)
        rules[path] = _parts(texts[path]) if is_plain and _is_untyped(config, path) else None
    # What is below another path is resolved with it.
    below = {path for path in rules if any(_is_below(path, other) for other in rules)}
    return {path: rule for path, rule in rules.items() if path not in below}


def _parts(text: str) -> list[str | KeyPath]:
    """Return the texts between interpolations, and the path that each of these names."""
    parts = _REFERENCE.split(text)  # a text and a name in turn
    named = [tuple(part.split(".")) if i % 2 else part for i, part in enumerate(parts)]
    return [part for part in named if part]


def _is_untyped(config: DictConfig, path: KeyPath) -> bool:
    """Return whether no node above a path converts the values that it gets."""
    if path[:2] == _UNTYPED:
        return True
    above = accumulate(path[:-1], lambda node, key: node[key], initial=config)
    return all(OmegaConf.get_type(node) in (dict, list) for node in above)


def _interpolations(content: Any, path: KeyPath) -> Iterator[tuple[KeyPath, str]]:
    """Yield the texts with an interpolation, and where they are."""
    if isinstance(content, str):
        if "${" in content:
            yield path, content
    elif isinstance(content, Mapping):
        for key, value in content.items():
            yield from _interpolations(value, (*path, key))
    elif isinstance(content, list):
        for index, value in enumerate(content):
            yield from _interpolations(value, (*path, index))


def _read(config: DictConfig, path: KeyPath) -> Any:
    """Return what OmegaConf resolves at a path, as plain dictionaries and lists."""
    node: Any = config
    for key in path[:-1]:
        node = node[key]
    if len(path) == 1 and OmegaConf.is_missing(node, path[0]):
        return MISSING
    value = node[path[-1]]
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def _copied(value: Any) -> Any:
    """Return a copy of plain dictionaries and lists of what cannot change."""
    if isinstance(value, dict):
        return {key: _copied(part) for key, part in value.items()}
    return [_copied(part) for part in value] if isinstance(value, list) else value


def _has(content: Any, path: Sequence[str]) -> bool:
    for name in path:
        if not isinstance(content, dict) or name not in content:
            return False
        content = content[name]
    return True


def _meet(a: KeyPath, b: KeyPath) -> bool:
    """Return whether one path is the other one or leads to it."""
    return all(str(x) == str(y) for x, y in zip(a, b, strict=False))


def _is_below(path: KeyPath, other: KeyPath) -> bool:
    return len(path) > len(other) and path[: len(other)] == other
