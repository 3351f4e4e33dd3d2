"""Where a study is kept: a journal file, SQLite, PostgreSQL or another database, a gRPC proxy.

    journal                                    journal.log in the sweep's directory
    journal:///path/to/file                    another journal file
    sqlite:///path/to/file.db                  SQLite
    postgresql://user@host/database            PostgreSQL, likewise what else Optuna takes
    grpc://host:port                           `optuna storage` behind a gRPC proxy

A storage that is away for a while is waited for: every call is tried again, each time a little
later, until the patience is over.
"""

import logging
import random
import re
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.storages import BaseStorage, GrpcStorageProxy, RDBStorage, get_storage
from sqlalchemy import event
from sqlalchemy.engine import make_url
from sqlalchemy.exc import (
    ArgumentError,
    DBAPIError,
    InterfaceError,
    OperationalError,
    PendingRollbackError,
    SQLAlchemyError,
)

from bn_lightning.sweeps.engine.errors import SweepError
from bn_lightning.sweeps.engine.journal_file import open_journal
from bn_lightning.sweeps.engine.names import JOURNAL_FILE
from bn_lightning.sweeps.engine.passwords import redacted, refuse_several_ats

JOURNAL = "journal"

# Seconds that a command waits for its storage when it starts: most often the address is wrong.
START_PATIENCE = 60.0
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 10.0

# Seconds that an SQLite connection waits for its turn.
SQLITE_TIMEOUT = 60

log = logging.getLogger(__name__)
T = TypeVar("T")


def storage_url(setting: str, directory: Path) -> str:
    """The address of the study's storage, as every process of the sweep can use it.

    Args:
        setting: what the configuration says, with its interpolations resolved.
        directory: of the sweep, for `journal`.

    Raises:
        SweepError: it is no address.
    """
    if setting == JOURNAL:
        return f"journal://{(directory / JOURNAL_FILE).absolute()}"
    scheme, separator, rest = setting.partition("://")
    if scheme == JOURNAL and separator and rest:
        return f"journal://{Path(rest).absolute()}"
    if scheme == "grpc" and re.fullmatch(r"[^:/]+:\d+", rest):
        return setting
    try:
        url = make_url(setting)
    except (ArgumentError, ValueError):  # it parses a port as a number
        url = None
    if url is None or scheme in (JOURNAL, "grpc"):
        raise SweepError(
            "`storage` expected journal, journal:///PATH, sqlite:///PATH, postgresql://USER@HOST/"
            f"DATABASE or grpc://HOST:PORT, got {redacted(setting, setting)}"
        )
    if url.get_backend_name() == "sqlite" and url.database and url.database != ":memory:":
        path = Path(url.database).absolute()
        return url.set(database=str(path)).render_as_string(hide_password=False)
    refuse_several_ats(setting)
    return setting


def open_storage(url: str, patience: float) -> "PatientStorage":
    """Open a storage, waiting for it if it cannot be reached.

    Args:
        url: from `storage_url`.
        patience: seconds that a later call waits for a storage that went away.

    Raises:
        SweepError: it cannot be used, or not be reached within START_PATIENCE.
    """
    try:
        inner, close = patiently(lambda: _open(url), min(patience, START_PATIENCE), url)
    except ImportError as error:
        raise SweepError(
            f"`storage` expected the driver for {redacted(url, url)} to be installed, got: "
            f"{error.__cause__ or error}; PostgreSQL: pip install 'psycopg[binary]'; a gRPC proxy: "
            "pip install grpcio protobuf"
        ) from error
    except (ArgumentError, ValueError) as error:
        raise SweepError(
            f"`storage` cannot be {redacted(url, url)}: {redacted(str(error), url)}"
        ) from None
    return PatientStorage(inner, url, patience, close)  # type: ignore[abstract]  # see below


def patiently(call: Callable[[], T], patience: float, url: str) -> T:
    """Call until the storage answers.

    Args:
        call: asks the storage; called again only after an error for which `is_unreachable` holds.
        patience: seconds to try again for.
        url: the storage's address, for messages, which never show its password.

    Raises:
        SweepError: it did not answer in that time.
    """
    pause, started = FIRST_PAUSE, time.monotonic()
    while True:
        try:
            return call()
        except Exception as error:
            if not is_unreachable(error):
                raise
            waited = time.monotonic() - started
            reason = redacted(reason_of(error), url)
            if waited >= patience:
                raise SweepError(
                    f"the storage {redacted(url, url)} did not answer for {waited:.0f} s: {reason}"
                    ". What is finished is kept: the same command goes on when the storage is back"
                ) from None
            if pause == FIRST_PAUSE:
                log.warning("waiting for the storage (%s)", reason)
            # Not all workers at the same moment.
            time.sleep(min(pause * random.uniform(0.7, 1.3), patience - waited + FIRST_PAUSE))
            pause = min(2 * pause, LONGEST_PAUSE)


def is_unreachable(error: BaseException | None) -> bool:
    """Whether a call failed because the storage was away, locked or full, and may work later."""
    if isinstance(error, StorageInternalError):
        return is_unreachable(error.__cause__)
    if isinstance(error, OSError):
        return not isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError)
    if isinstance(error, PendingRollbackError):
        return True  # Optuna goes on in a transaction that the server has just broken off
    if isinstance(error, DBAPIError):
        return isinstance(error, OperationalError | InterfaceError) or error.connection_invalidated
    code = getattr(error, "code", None)
    if type(error).__module__.startswith("grpc") and callable(code):
        # The proxy says UNKNOWN when its own database is away.
        return getattr(code(), "name", "") in ("UNAVAILABLE", "UNKNOWN", "DEADLINE_EXCEEDED")
    return False


class PatientStorage(BaseStorage):
    """A storage whose every call is repeated until it answers.

    Args:
        inner: the storage.
        url: where it is, for messages, which never show its password.
        patience: seconds to try again for.
        close: lets the storage's connections go.
    """

    def __init__(
        self,
        inner: BaseStorage,
        url: str,
        patience: float,
        close: Callable[[], None] = lambda: None,
    ) -> None:
        self.inner = inner
        self.url = url
        self.patience = patience
        self.close = close


def _patient(name: str) -> Callable[..., Any]:
    def method(self: PatientStorage, *args: Any, **kwargs: Any) -> Any:
        call = getattr(self.inner, name)
        return patiently(lambda: call(*args, **kwargs), self.patience, self.url)

    method.__name__ = name
    return method


for _name in vars(BaseStorage):
    if not _name.startswith("_"):
        setattr(PatientStorage, _name, _patient(_name))
PatientStorage.__abstractmethods__ = frozenset()


def reason_of(error: Exception) -> str:
    """Why a call failed, in one line, which may hold the storage's password."""
    details = getattr(error, "details", None)  # of a gRPC error, whose text has many lines
    text = str(details() if callable(details) else error.__cause__ or error)
    return text.strip().partition("\n")[0].rstrip(".")


def _open(url: str) -> tuple[BaseStorage, Callable[[], None]]:
    scheme, _, rest = url.partition("://")
    if scheme == JOURNAL:
        return open_journal(Path(rest)), lambda: None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        if scheme == "grpc":
            host, port = rest.rsplit(":", 1)
            proxy = GrpcStorageProxy(host=host, port=int(port))
            proxy.get_all_studies()
            return proxy, proxy.close
    database = _open_database(url)

    def close() -> None:
        database.remove_session()
        database.engine.dispose()

    return get_storage(database), close


def _open_database(url: str) -> RDBStorage:
    if not url.startswith("sqlite"):
        # A connection that a restart of the server broke is found before it is used.
        return _tables_made(lambda: RDBStorage(url, engine_kwargs={"pool_pre_ping": True}))
    if path := make_url(url).database:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    arguments = {"connect_args": {"timeout": SQLITE_TIMEOUT}}
    storage = _tables_made(lambda: RDBStorage(url, engine_kwargs=arguments))
    # Python's sqlite3 begins a transaction with the first write: what was read before it may have
    # changed, and two workers would claim one trial. These transactions take their turn.
    event.listen(storage.engine, "connect", _leave_begin_to_us)
    event.listen(storage.engine, "begin", _begin_immediate)
    storage.engine.dispose()
    return storage


def _tables_made(make: Callable[[], RDBStorage]) -> RDBStorage:
    """Open a database that other processes may be opening for the first time, too."""
    for _ in range(5):
        try:
            return make()
        except SQLAlchemyError as error:
            if is_unreachable(error) or isinstance(error, ArgumentError):
                raise
            time.sleep(random.uniform(0.2, 1.0))
    return make()


def _leave_begin_to_us(connection: Any, record: object) -> None:
    connection.isolation_level = None


def _begin_immediate(connection: Any) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")
