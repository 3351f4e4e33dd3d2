"""The MLflow logger of a run: Lightning's, with a local database if no server is named."""

import os
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import MLFlowLogger

_SERVER = "MLFLOW_TRACKING_URI"


class RunMLFlowLogger(MLFlowLogger):
    """Logs to the server in the environment's `MLFLOW_TRACKING_URI`, else to an SQLite database.

    The address of a server may contain a password, so no configuration holds it.

    Args:
        directory: of the run. Its last two names are the name of the run in MLflow, because MLflow
            draws the same name for all runs of a seed. The tag `directory` is the whole path.
        database: file for all runs without a server; made if absent.
        options: those of Lightning's MLFlowLogger except `tracking_uri`, `run_name` and `tags`.

    Raises:
        ValueError: SQLite cannot open `database`.
    """

    def __init__(
        self, directory: str | os.PathLike[str], database: str | os.PathLike[str], **options: Any
    ) -> None:
        address = os.environ.get(_SERVER)
        if not address:
            path = Path(database).absolute()
            path.parent.mkdir(parents=True, exist_ok=True)
            _check_database(path)
            address = f"sqlite:///{path}"
        super().__init__(
            tracking_uri=address,
            run_name="/".join(Path(directory).parts[-2:]),
            tags={"directory": str(directory)},
            **options,
        )


def _check_database(path: Path) -> None:
    # MLflow would retry for minutes, with ten lines each time.
    try:
        with closing(sqlite3.connect(path)) as connection:
            connection.execute("PRAGMA schema_version")
    except (sqlite3.Error, ValueError) as error:
        raise ValueError(
            f"expected `database` to be an SQLite file or absent, got {path}: {error}; choose"
            " another path"
        ) from error
