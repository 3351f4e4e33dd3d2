"""Environment variables that every process of a trial can read."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

STORAGE_VARIABLE = "BN_OPTUNA_STORAGE"  # URL of the study's storage; may contain a password
STUDY_VARIABLE = "BN_OPTUNA_STUDY"  # name of the study
TRIAL_VARIABLE = "BN_OPTUNA_TRIAL"  # number of the trial
WORKER_VARIABLE = "BN_OPTUNA_WORKER"  # directory of the sweep; set in worker processes only


def in_trial() -> bool:
    """Return whether this process runs a trial of a sweep."""
    return TRIAL_VARIABLE in os.environ


@contextmanager
def environment_variables(variables: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables inside the block and restore their old values after it."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
