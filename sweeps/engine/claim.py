"""Claim a waiting trial, so that this process and no other runs it."""

import os
from typing import NamedTuple

from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.trial import TrialState

from bn_lightning.sweeps.engine.heartbeat import ProcessIdentity
from bn_lightning.sweeps.engine.space import Parameter
from bn_lightning.sweeps.engine.stored_names import WORKER


class ClaimedTrial(NamedTuple):
    """A trial that this process runs.

    Attributes:
        number: in the study.
        params: its parameters.
        subdirectory: of the sweep's directory, to which the trial writes.
    """

    number: int
    params: dict[str, Parameter]
    subdirectory: str


def claim_trial(storage: BaseStorage, trial_id: int) -> bool:
    """Set a waiting trial to running, and return whether this process did it.

    Each storage makes this change of state for one process only. A trial of this process is marked
    with its identity, by which others find that it has died.

    Args:
        storage: of the study.
        trial_id: the ID in the storage, which is not the number in the study.
    """
    try:
        is_claimed = storage.set_trial_state_values(trial_id, TrialState.RUNNING)
    except UpdateFinishedTrialError:
        return False
    if is_claimed:
        storage.set_trial_system_attr(trial_id, WORKER, str(ProcessIdentity.of(os.getpid())))
    return is_claimed
