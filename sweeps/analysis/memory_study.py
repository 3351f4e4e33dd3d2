"""An Optuna study in memory."""

from collections.abc import Sequence
from typing import Literal

import optuna
from optuna.study import StudyDirection

Direction = StudyDirection | Literal["minimize", "maximize"]


def memory_study(directions: Sequence[Direction]) -> optuna.Study:
    """Create an empty study without Optuna's log message.

    Args:
        directions: one for each value of its trials.
    """
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        return optuna.create_study(directions=directions)
    finally:
        optuna.logging.set_verbosity(level)
