"""The MLflow logger of a run: Lightning's, with a database of its own where no server is named."""

import os
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import MLFlowLogger

SERVER = "MLFLOW_TRACKING_URI"


class RunMLFlowLogger(MLFlowLogger):
    """Lightning's MLFlowLogger, to the server of `MLFLOW_TRACKING_URI`, else to an SQLite database.

    The address of a server may hold a password, so it is read here and is in no configuration.

    Args:
        database: of all runs where the environment names no server; it is made if it is absent.
        options: those of Lightning's MLFlowLogger but `tracking_uri`.
    """

    def __init__(self, database: str | os.PathLike[str], **options: Any) -> None:
        address = os.environ.get(SERVER)
        if not address:
            path = Path(database).absolute()
            path.parent.mkdir(parents=True, exist_ok=True)
            address = f"sqlite:///{path}"
        super().__init__(tracking_uri=address, **options)
