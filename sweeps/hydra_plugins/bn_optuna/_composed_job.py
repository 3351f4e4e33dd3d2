"""The configuration of one job, which becomes that of the next: what its task and its files get.

Of two such jobs few values differ, so what cannot differ is resolved and written as YAML once.
"""

from collections.abc import Mapping
from functools import cached_property
from itertools import groupby
from typing import Any

from hydra_plugins.bn_optuna._kept_resolution import KeptResolution, KeyPath
from hydra_plugins.bn_optuna._yaml_texts import YamlTexts
from omegaconf import DictConfig, OmegaConf

# Parts of Hydra's node that each job has of its own.
_OF_JOB = {"hydra.job.override_dirname", "hydra.job.id", "hydra.job.num"}
_OF_JOB |= {"hydra.overrides.hydra", "hydra.overrides.task", "hydra.runtime.output_dir"}
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
        overrides: of Hydra's configuration and of the task's, "hydra" and "task".
    """

    def __init__(self, config: DictConfig, lines: Mapping[str, str | None]) -> None:
        self.config = config
        self.lines = dict(lines)
        second = {".".join(key.split(".")[:3]) for key in lines if key.startswith("hydra.")}
        self._of_job = _OF_JOB | second
        self._parts_of_job = {key.split(".")[1] for key in self._of_job}
        self._texts: dict[tuple[str | None, ...], str] = {}
        self._yaml = YamlTexts()
        self.overrides: Any = OmegaConf.to_container(config.hydra.overrides)  # not resolved
        self._logging: Any = None

    def resolved(self) -> dict[str, Any]:
        """Return the task's part of the configuration, as plain dictionaries and lists."""
        keys = [str(key) for key in self.config if key != "hydra"]
        computed: dict[KeyPath, Any] = {}
        return {key: self._resolution.value((key,), computed) for key in keys}

    def of_hydra(self, *names: str) -> Any:
        """Return a resolved value of Hydra's part."""
        return self._resolution.value(("hydra", *names))

    def logging(self) -> Any:
        """Return the resolved `hydra.job_logging`, which becomes that of the next job."""
        path = ("hydra", "job_logging")
        resolved = self._resolution.value(path)
        if self._logging is None:
            self._logging = OmegaConf.create(resolved)
        for place in self._resolution.changing(path):
            node, value = self._logging, resolved
            for key in place[:-1]:
                node, value = node[key], value[key]
            node[place[-1]] = value[place[-1]]
        return self._logging

    @cached_property
    def _resolution(self) -> KeptResolution:
        return KeptResolution(self.config, {*self.lines, *self._of_job})

    def files(self) -> dict[str, str]:
        """Return the files that Hydra writes for a job: name -> content."""
        task = [self._text_of(str(key)) for key in self.config if key != "hydra"]
        parts = [self._text_of_hydra(str(key)) for key in self.config.hydra]
        return {
            "config.yaml": "".join(task) or OmegaConf.to_yaml({}),
            "hydra.yaml": "hydra:\n" + "".join(parts),
            "overrides.yaml": self._text_of_overrides(),
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
            if is_own:
                own = [self._yaml.node(name, self._written(part, name), indent=4) for name in run]
                texts.append("".join(filter(None, own)) if all(own) else self._text(parents, run))
            else:
                texts.append(self._kept_text((*parents, *run), parents, run))
        return "".join(texts)

    def _written(self, part: str, name: str) -> Any:
        """Return a value of Hydra's part as it is written, with its interpolations."""
        if part == "overrides":
            return self.overrides[name]
        node = self.config.hydra[part]
        if OmegaConf.is_missing(node, name) or OmegaConf.is_interpolation(node, name):
            content: Any = OmegaConf.to_container(node, enum_to_str=True)
            return content[name]
        value = node[name]
        return (
            OmegaConf.to_container(value, enum_to_str=True) if OmegaConf.is_config(value) else value
        )

    def _text_of_overrides(self) -> str:
        items = [self._yaml.item(line, indent=0) for line in self.overrides["task"]]
        if items and all(items):
            return "".join(filter(None, items))
        return OmegaConf.to_yaml(self.config.hydra.overrides.task)

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
