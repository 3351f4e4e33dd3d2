"""What a trial finds in its environment, in whatever process it runs.

BN_OPTUNA_STORAGE   the address of the study's storage, which may hold a password
BN_OPTUNA_STUDY     the name of the study
BN_OPTUNA_TRIAL     the number of the trial
BN_OPTUNA_WORKER    in a worker process of a sweep: the sweep's directory
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

STORAGE = "BN_OPTUNA_STORAGE"
STUDY = "BN_OPTUNA_STUDY"
TRIAL = "BN_OPTUNA_TRIAL"
WORKER = "BN_OPTUNA_WORKER"


def in_trial() -> bool:
    """Whether this process is running a trial of a sweep."""
    return TRIAL in os.environ


@contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables, and give them back as they were."""
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
