"""A study in memory is created without a log message, and Optuna's verbosity is restored."""

import optuna
import pytest

from bn_lightning.sweeps.analysis.memory_study import memory_study


@pytest.mark.parametrize("direction", ["maximize", "neither"])
def test_the_verbosity_is_given_back(direction: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.INFO)
    try:
        if direction == "maximize":
            assert memory_study([direction]).direction == optuna.study.StudyDirection.MAXIMIZE
        else:
            with pytest.raises(ValueError):
                memory_study([direction])  # type: ignore[list-item]
        assert optuna.logging.get_verbosity() == optuna.logging.INFO
    finally:
        optuna.logging.set_verbosity(before)
    assert capsys.readouterr().err == ""
