"""A task's way to its trial: what a pruning callback needs, in any process of a trial."""

import os

import optuna
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from optuna.samplers import RandomSampler
from optuna.trial import Trial

from bn_lightning.sweeps.engine.environment import STORAGE, STUDY, in_trial
from bn_lightning.sweeps.engine.environment import TRIAL as NUMBER
from bn_lightning.sweeps.engine.sampling import make_pruner
from bn_lightning.sweeps.engine.storage import PatientStorage, open_storage

_storages: dict[str, PatientStorage] = {}


def current_trial() -> Trial | None:
    """The trial that this process runs, None outside a sweep.

    `report(value, step)` and `should_prune()` work in every process of the trial, through the
    study's storage and the sweep's pruner; a task that is to be pruned raises `optuna.TrialPruned`.
    Of the processes of one trial, one reports.
    """
    if not in_trial():
        return None
    sweeper = HydraConfig.get().sweeper
    url = os.environ[STORAGE]
    if url not in _storages:
        # A worker runs many trials, and a journal is read from its beginning only once.
        _storages[url] = open_storage(url, sweeper.storage_patience)
    storage = _storages[url]
    study = optuna.load_study(
        study_name=os.environ[STUDY],
        storage=storage,
        sampler=RandomSampler(),
        pruner=make_pruner(
            None if sweeper.pruner is None else OmegaConf.to_container(sweeper.pruner)  # type: ignore[arg-type]
        ),
    )
    study_id = storage.get_study_id_from_name(study.study_name)
    return Trial(
        study,
        storage.get_trial_id_from_study_id_trial_number(study_id, int(os.environ[NUMBER])),
    )
