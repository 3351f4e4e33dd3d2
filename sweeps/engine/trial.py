"""The trials that run in this process, for a task that reports values or is pruned."""

import os
from collections.abc import Sequence
from functools import cache

import optuna
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from optuna.samplers import RandomSampler
from optuna.trial import Trial

from bn_lightning.sweeps.engine.environment import (
    STORAGE_VARIABLE,
    STUDY_VARIABLE,
    TRIAL_VARIABLE,
    in_trial,
)
from bn_lightning.sweeps.engine.sampling import make_pruner
from bn_lightning.sweeps.engine.storage import open_storage

# A worker runs many trials, and reads a journal from its beginning only once.
_open_once = cache(open_storage)


def current_trial() -> Trial | None:
    """Return the trial that this process runs; None outside a sweep.

    `report(value, step)` and `should_prune()` use the study's storage and the sweep's pruner, in
    each process of the trial. If a trial has several processes, one of them reports. A task that
    is to be pruned raises `optuna.TrialPruned`.
    """
    if not in_trial():
        return None
    return running_trials(HydraConfig.get().sweeper, [int(os.environ[TRIAL_VARIABLE])])[0]


def running_trials(sweeper: DictConfig, numbers: Sequence[int]) -> list[Trial]:
    """Return trials of the sweep that this process works on.

    Args:
        sweeper: `hydra.sweeper`.
        numbers: of the trials.
    """
    storage = _open_once(os.environ[STORAGE_VARIABLE], sweeper.storage_patience)
    study = optuna.load_study(
        study_name=os.environ[STUDY_VARIABLE],
        storage=storage,
        sampler=RandomSampler(),
        pruner=make_pruner(sweeper.pruner),
    )
    study_id = storage.get_study_id_from_name(study.study_name)
    return [
        Trial(study, storage.get_trial_id_from_study_id_trial_number(study_id, number))
        for number in numbers
    ]
