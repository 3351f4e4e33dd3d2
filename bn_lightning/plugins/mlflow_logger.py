"""The MLflow logger of a run: Lightning's, with a database of its own where no server is named."""

import os
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import MLFlowLogger

SERVER = "MLFLOW_TRACKING_URI"


class RunMLFlowLogger(MLFlowLogger):
    """Lightning's MLFlowLogger, to the server of `MLFLOW_TRACKING_URI`, else to an SQLite database.

    The address of a server may hold a password, so it is read here and is in no configuration.

    Args:
        directory: the run's; its last two names are the run's name in MLflow, which would draw one
            by the seed, the same for all runs of a seed. The whole is the tag `directory`.
        database: of all runs where the environment names no server; it is made if it is absent.
        options: those of Lightning's MLFlowLogger but `tracking_uri`, `run_name` and `tags`.

    Raises:
        ValueError: `database` can be opened by no SQLite.
    """

    def __init__(
        self, directory: str | os.PathLike[str], database: str | os.PathLike[str], **options: Any
    ) -> None:
        address = os.environ.get(SERVER)
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
    # MLflow tries again and again for minutes, with ten lines each time.
    try:
        with closing(sqlite3.connect(path)) as connection:
            connection.execute("PRAGMA schema_version")
    except (sqlite3.Error, ValueError) as error:
        raise ValueError(
            f"`database` expected an SQLite file, which is made where there is none, got {path}: "
            f"{error}"
        ) from error
