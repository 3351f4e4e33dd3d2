"""Compose the configurations of a sweep's jobs: in full once, then by setting the values.

Hydra takes 0.2 s of a processor to compose a job. The jobs of a sweep differ in a few values, so
the configuration of one becomes that of another by the same `OmegaConf.update` that Hydra calls.
"""

import copy
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra_plugins.bn_optuna._composed_job import ComposedJob
from omegaconf import MISSING, DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

# Configurations that are kept, one for each combination of config groups.
_MOST_KEPT = 16
# Keys of Hydra's own whose value changes nothing else.
_PLAIN_OF_HYDRA = ("hydra.sweep.", "hydra.job.env_set.")
_ADDED = (OverrideType.ADD, OverrideType.FORCE_ADD)


class JobComposer:
    """Composes the configurations of jobs, equal to those of Hydra's `load_sweep_config`.

    Args:
        loader: Hydra's.
        sweep: the configuration of the sweep.
    """

    def __init__(self, loader: ConfigLoader, sweep: DictConfig) -> None:
        self._loader = loader
        self._sweep = sweep
        self._parser = OverridesParser.create()
        self._parsed: dict[str, Override] = {}
        self._is_group: dict[str, bool] = {}
        self._kept: dict[tuple[object, ...], ComposedJob] = {}

    def compose(self, overrides: Sequence[str], number: int) -> DictConfig:
        """Return the configuration of a job.

        Args:
            overrides: of the job.
            number: of the job.

        Raises:
            HydraException: an override names no key, or no option.
        """
        return copy.deepcopy(self._composed(overrides, number).config)

    @contextmanager
    def composed(self, overrides: Sequence[str], number: int) -> Iterator[ComposedJob]:
        """Compose a job, which is the current one of Hydra inside the block, but does not run.

        Args:
            overrides: of the job.
            number: of the job.

        Raises:
            HydraException: an override names no key, or no option.
        """
        kept = self._composed(overrides, number)
        hydra, state = kept.config.hydra, HydraConfig.instance()
        before = state.cfg
        try:
            # Not `set_config`, which copies everything.
            state.cfg = kept.config  # type: ignore[assignment]  # as Hydra does
            directory = os.path.join(str(hydra.sweep.dir), str(hydra.sweep.subdir))
            with open_dict(hydra.runtime):
                hydra.runtime.output_dir = os.path.abspath(directory)
            yield kept
        finally:
            state.cfg = before

    def _composed(self, overrides: Sequence[str], number: int) -> ComposedJob:
        parsed = [self._parse(text) for text in overrides]
        is_plain = [self._is_plain(override, parsed[i + 1 :]) for i, override in enumerate(parsed)]
        plain = [override for override, yes in zip(parsed, is_plain, strict=True) if yes]
        group = tuple(
            (override.type, override.key_or_group) if yes else override.input_line
            for override, yes in zip(parsed, is_plain, strict=True)
        )
        kept = self._kept.pop(group, None)
        if kept is not None:
            try:
                self._set(kept, parsed, is_plain)
            except OmegaConfBaseException:
                kept = None  # Hydra says what is wrong
        if kept is None:
            config = self._loader.load_sweep_config(self._sweep, list(overrides))
            kept = ComposedJob(config, {o.key_or_group: o.input_line for o in plain})
            if any(_is_reference(config, key) for key in kept.lines):
                group = ()  # setting the key changes another one
        if group:
            self._kept[group] = kept
            if len(self._kept) > _MOST_KEPT:
                del self._kept[next(iter(self._kept))]
        with read_write(kept.config.hydra), open_dict(kept.config.hydra):
            kept.config.hydra.job.id = kept.config.hydra.job.num = number
            kept.config.hydra.runtime.output_dir = MISSING
        return kept

    def _set(self, kept: ComposedJob, parsed: Sequence[Override], is_plain: Sequence[bool]) -> None:
        """Give a kept configuration the values and the overrides of another job."""
        config, hydra = kept.config, kept.config.hydra
        OmegaConf.copy_cache(from_config=self._sweep, to_config=config)
        given = len(self._sweep.hydra.overrides.hydra)
        places = {"hydra": count(given), "task": count()}
        for override, may_differ in zip(parsed, is_plain, strict=True):
            part = "hydra" if override.is_hydra_override() else "task"
            place, key, line = next(places[part]), override.key_or_group, override.input_line
            if may_differ and kept.lines[key] != line:
                is_added = override.type in _ADDED
                OmegaConf.update(config, key, override.value(), force_add=is_added)
                hydra.overrides[part][place] = kept.overrides[part][place] = line
                kept.lines[key] = line
        naming = hydra.job.config.override_dirname
        left_out = naming.exclude_keys
        lines = [
            override.input_line
            for override in parsed
            if not override.is_hydra_override() and override.key_or_group not in left_out
        ]
        name = naming.item_sep.join(sorted(str(line) for line in lines))
        hydra.job.override_dirname = re.sub("=", naming.kv_sep, name)

    def _parse(self, text: str) -> Override:
        if text not in self._parsed:
            self._parsed[text] = self._parser.parse_override(text)
        return self._parsed[text]

    def _is_plain(self, override: Override, later: Sequence[Override]) -> bool:
        """Return whether an override does nothing but set the value of one key."""
        key = override.key_or_group
        if override.type not in (OverrideType.CHANGE, *_ADDED) or override.is_sweep_override():
            return False
        if override.package is not None or "[" in key or self._names_group(key):
            return False
        if override.is_hydra_override() and not key.startswith(_PLAIN_OF_HYDRA):
            return False
        value = override.value()
        if isinstance(value, str) and ("${" in value or value == MISSING):
            return False
        if not isinstance(value, str | int | float | None):
            return False
        others = (f"{other.key_or_group}.".replace("[", ".") for other in later)
        return not any(o.startswith(f"{key}.") or f"{key}.".startswith(o) for o in others)

    def _names_group(self, key: str) -> bool:
        if key not in self._is_group:
            texts: Any = OmegaConf.to_container(self._sweep.hydra.overrides.hydra)
            name = self._sweep.hydra.job.config_name
            options = self._loader.get_group_options(key, None, name, texts)
            self._is_group[key] = bool(options)
        return self._is_group[key]


def _is_reference(config: DictConfig, key: str) -> bool:
    """Return whether a parent of a key is an interpolation of another node."""
    parts = key.split(".")
    for depth in range(1, len(parts)):
        parent = OmegaConf.select(config, ".".join(parts[: depth - 1])) if depth > 1 else config
        if OmegaConf.is_interpolation(parent, parts[depth - 1]):
            return True
    return False
