"""The configuration of one job, which becomes that of the next: what its task and its files get.

Of two such jobs few values differ, so what cannot differ is resolved and written as YAML once.
"""

import copy
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf

KeyPath = tuple[Any, ...]
"""Keys and indices from the root of a configuration."""

# Parts of Hydra's node that each job has of its own.
_OF_JOB = {"hydra.job.override_dirname", "hydra.job.id", "hydra.job.num"}
_OF_JOB |= {"hydra.overrides.hydra", "hydra.overrides.task", "hydra.runtime.output_dir"}

_REFERENCE = re.compile(r"\$\{([A-Za-z_]\w*(?:\.\w+)*)\}")
# Texts that are kept, of the values of one key after another.
_MOST_TEXTS = 10_000


class ComposedJob:
    """The configuration of a job, until it becomes that of another one.

    Args:
        config: of the job and of Hydra, as composed.
        lines: the override of each key that jobs set to a plain value.

    Attributes:
        config: of the job and of Hydra.
        lines: key -> the override that has set it.
    """

    def __init__(self, config: DictConfig, lines: Mapping[str, str | None]) -> None:
        self.config = config
        self.lines = dict(lines)
        second = {".".join(key.split(".")[:3]) for key in lines if key.startswith("hydra.")}
        self._of_job = _OF_JOB | second
        self._parts_of_job = {key.split(".")[1] for key in self._of_job}
        self._texts: dict[tuple[str | None, ...], str] = {}
        self._resolved: dict[str, Any] | None = None
        self._differing: list[KeyPath] | None = None  # None: anything may differ

    def resolved(self) -> dict[str, Any]:
        """Return the task's part of the configuration, as plain dictionaries and lists."""
        if self._resolved is None or self._differing is None:
            plain: dict[str, Any] = {}
            for key in self.config:
                if key != "hydra":
                    missing = OmegaConf.is_missing(self.config, key)
                    plain[str(key)] = MISSING if missing else _plain(self.config[key])
            if self._resolved is None:
                self._differing = _differing_paths(self.config, self.lines)
            self._resolved = plain
        resolved = copy.deepcopy(self._resolved)
        for path in self._differing or ():
            node: Any = self.config
            place: Any = resolved
            for key in path[:-1]:
                node, place = node[key], place[key]
            place[path[-1]] = _plain(node[path[-1]])
        return resolved

    def files(self) -> dict[str, str]:
        """Return the files that Hydra writes for a job: name -> content."""
        task = [self._text_of(str(key)) for key in self.config if key != "hydra"]
        parts = [self._text_of_hydra(str(key)) for key in self.config.hydra]
        return {
            "config.yaml": "".join(task) or OmegaConf.to_yaml({}),
            "hydra.yaml": "hydra:\n" + "".join(parts),
            "overrides.yaml": OmegaConf.to_yaml(self.config.hydra.overrides.task),
        }

    def _text_of(self, key: str) -> str:
        """Return the YAML of a key of the task, which the overrides below it determine."""
        lines = [line for name, line in self.lines.items() if name.partition(".")[0] == key]
        return self._kept_text((key, *lines), (), [key])

    def _text_of_hydra(self, part: str) -> str:
        if part not in self._parts_of_job:
            return self._kept_text(("hydra", part), ("hydra",), [part])
        texts = [f"  {part}:\n"]
        parents = ("hydra", part)
        names = [str(name) for name in self.config.hydra[part]]
        for is_own, some in groupby(names, lambda name: f"hydra.{part}.{name}" in self._of_job):
            run = list(some)
            own = self._text(parents, run) if is_own else None
            texts.append(own or self._kept_text((*parents, *run), parents, run))
        return "".join(texts)

    def _kept_text(self, name: tuple[str | None, ...], parents: KeyPath, keys: list[str]) -> str:
        if name not in self._texts:
            if len(self._texts) == _MOST_TEXTS:
                self._texts.clear()
            self._texts[name] = self._text(parents, keys)
        return self._texts[name]

    def _text(self, parents: KeyPath, keys: list[str]) -> str:
        """Return the YAML of some keys of a node, as a part of that of the whole configuration."""
        node = self.config
        for name in parents:
            node = node[name]
        content = OmegaConf.masked_copy(node, keys)
        for name in reversed(parents):
            whole = DictConfig({}, flags={"no_deepcopy_set_nodes": True})
            whole[name] = content
            content = whole
        return OmegaConf.to_yaml(content).split("\n", len(parents))[-1]


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def _differing_paths(config: DictConfig, keys: Iterable[str]) -> list[KeyPath] | None:
    """Return where the resolved configurations of jobs may differ; None if it is not known.

    Args:
        config: of a job.
        keys: whose values differ.
    """
    content: Any = OmegaConf.to_container(config)
    hydra = content.pop("hydra", None)
    references: dict[KeyPath, list[KeyPath] | None] = {}
    for path, text in _interpolations(content, ()):
        # A resolver may return something else for each job.
        is_known = "${" not in _REFERENCE.sub("", text) and "\\" not in text
        found = [tuple(name.split(".")) for name in _REFERENCE.findall(text)]
        references[path] = found if is_known else None
    differing: set[KeyPath] = {("hydra",)} if hydra is not None else set()
    for key in keys:
        path = tuple(key.split("."))
        if path[0] != "hydra":
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
    return [path for path in differing if path[0] != "hydra"]


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


def _has(content: Any, path: Sequence[str]) -> bool:
    for name in path:
        if not isinstance(content, dict) or name not in content:
            return False
        content = content[name]
    return True


def _meet(a: KeyPath, b: KeyPath) -> bool:
    """Return whether one path is the other one or leads to it."""
    return all(str(x) == str(y) for x, y in zip(a, b, strict=False))
