"""Where a study is stored: a journal file, SQLite, PostgreSQL or another database, a gRPC proxy.

    journal                                    journal.log in the sweep's directory
    journal:///path/to/file                    another journal file
    sqlite:///path/to/file.db                  SQLite
    postgresql://user@host/database            PostgreSQL; other databases of Optuna likewise
    grpc://host:port                           `optuna storage` behind a gRPC proxy

If the storage cannot be reached, each call is repeated with growing pauses for a limited time.

SQLAlchemy is imported where a database is used: a journal does not need it.
"""

import logging
import random
import re
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.storages import BaseStorage, GrpcStorageProxy, RDBStorage, get_storage

from bn_lightning.sweeps.engine.journal_file import JournalFileStorage, open_journal
from bn_lightning.sweeps.engine.passwords import redacted, refuse_several_ats
from bn_lightning.sweeps.engine.stored_names import JOURNAL_FILE
from bn_lightning.sweeps.engine.sweep_error import SweepError

JOURNAL = "journal"

# Seconds that a command waits for its storage at the start, where a wrong address is most likely.
START_PATIENCE = 60.0
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 10.0

# Seconds that an SQLite connection waits for a lock.
SQLITE_TIMEOUT = 60

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


def storage_url(setting: str, directory: Path) -> str:
    """Return the URL of the study's storage, with absolute paths.

    Args:
        setting: the configured address, with its interpolations resolved.
        directory: of the sweep, for `journal`.

    Raises:
        SweepError: the setting is not an address of a storage.
    """
    if setting == JOURNAL:
        return f"journal://{(directory / JOURNAL_FILE).absolute()}"
    scheme, separator, rest = setting.partition("://")
    if scheme == JOURNAL and separator and rest:
        return f"journal://{Path(rest).absolute()}"
    if scheme == "grpc" and re.fullmatch(r"[^:/]+:\d+", rest):
        return setting
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        url = make_url(setting)
    except (ArgumentError, ValueError):  # ValueError: the port is not a number
        url = None
    if url is None or scheme in (JOURNAL, "grpc"):
        shown = "an address with @, not shown as it may contain a password"
        raise SweepError(
            "expected `storage` to be journal, journal:///PATH, sqlite:///PATH, "
            "postgresql://USER@HOST/DATABASE or grpc://HOST:PORT, got "
            f"{shown if '@' in setting else repr(setting)}"
        )
    if url.get_backend_name() == "sqlite" and url.database and url.database != ":memory:":
        path = Path(url.database).absolute()
        return url.set(database=str(path)).render_as_string(hide_password=False)
    refuse_several_ats(setting)
    return setting


def open_storage(url: str, patience: float) -> "RetryingStorage":
    """Open a storage; wait for it if it cannot be reached.

    Args:
        url: from `storage_url`.
        patience: seconds for which later calls are repeated if the storage cannot be reached.

    Raises:
        SweepError: the storage cannot be used, or was not reached within START_PATIENCE seconds.
    """
    try:
        inner, close = call_with_retries(lambda: _open(url), min(patience, START_PATIENCE), url)
    except ImportError as error:
        raise SweepError(
            f"expected `storage` {redacted(url, url)} to have its driver installed, got: "
            f"{error.__cause__ or error}; PostgreSQL: pip install 'psycopg[binary]'; a gRPC proxy: "
            "pip install grpcio protobuf"
        ) from error
    except ValueError as error:
        raise SweepError(
            f"expected `storage` to be a database of SQLAlchemy's, got {redacted(url, url)}: "
            f"{redacted(str(error), url)}"
        ) from None
    return RetryingStorage(inner, url, patience, close)  # type: ignore[abstract]  # see below


def call_with_retries(call: Callable[[], _T], patience: float, url: str) -> _T:
    """Call a function until the storage answers, and return its result.

    Args:
        call: uses the storage; called again only after an error for which `is_unreachable` is true.
        patience: seconds after its first failure after which to give up.
        url: of the storage, for messages, which never show its password.

    Raises:
        SweepError: the storage did not answer in time.
    """
    pause, first_failure = FIRST_PAUSE, None
    while True:
        try:
            return call()
        except Exception as error:
            if not is_unreachable(error):
                raise
            if first_failure is None:
                first_failure = time.monotonic()
            waited = time.monotonic() - first_failure
            reason = redacted(reason_of(error), url)
            if waited >= patience:
                raise SweepError(
                    f"expected `storage` {redacted(url, url)} to answer, got no answer for "
                    f"{waited:.0f} s: {reason}; finished trials are kept, and the same command "
                    "resumes the sweep when the storage is back"
                ) from None
            if pause == FIRST_PAUSE:
                _log.warning("waiting for the storage (%s)", reason)
            # Random, so that workers do not all call at the same time.
            time.sleep(min(pause * random.uniform(0.7, 1.3), patience - waited + FIRST_PAUSE))
            pause = min(2 * pause, LONGEST_PAUSE)


def is_unreachable(error: BaseException | None) -> bool:
    """Return whether a call failed because the storage was away, locked or full for a time."""
    if isinstance(error, StorageInternalError):
        return is_unreachable(error.__cause__)
    if isinstance(error, OSError):
        return not isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError)
    code = getattr(error, "code", None)
    if type(error).__module__.startswith("grpc") and callable(code):
        # The proxy returns UNKNOWN when its own database is away.
        return getattr(code(), "name", "") in ("UNAVAILABLE", "UNKNOWN", "DEADLINE_EXCEEDED")
    if "sqlalchemy" not in sys.modules:  # the error is no database's
        return False
    from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError, PendingRollbackError

    if isinstance(error, PendingRollbackError):
        return True  # Optuna continues a transaction that the server has just ended
    if isinstance(error, DBAPIError):
        return isinstance(error, OperationalError | InterfaceError) or error.connection_invalidated
    return False


class RetryingStorage(BaseStorage):
    """A storage that repeats each call until it is answered, and answers one thread at a time.

    Args:
        inner: the storage.
        url: of the storage, for messages, which never show its password.
        patience: seconds for which a call is repeated.
        close: closes the connections of the storage.
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
        self._one_thread = threading.RLock()
        self._is_together = False

    def together(self, call: Callable[[], _T], patience: float | None = None) -> _T:
        """Return what a call returns that uses this storage; write to a journal once, at its end.

        Other storages write as often as they are called: Optuna has no transaction for them. No
        other process can write to the journal until then, so the call must be short.

        Args:
            call: repeated, from what the journal holds, if the disk had no room.
            patience: seconds for which it is repeated; None is the storage's.

        Raises:
            SweepError: the storage did not answer in time.
        """

        def attempt() -> _T:
            if self._is_together or not isinstance(self.inner, JournalFileStorage):
                return call()
            self._is_together = True
            try:
                with self.inner.journal.together():
                    return call()
            except (OSError, SweepError):
                # The storage has read what the file lacks.
                self.inner = open_journal(self.inner.journal.path)
                raise
            finally:
                self._is_together = False

        with self._one_thread:
            return call_with_retries(
                attempt, self.patience if patience is None else patience, self.url
            )


def _retrying(name: str) -> Callable[..., Any]:
    def method(self: RetryingStorage, *args: Any, **kwargs: Any) -> Any:
        with self._one_thread:
            return call_with_retries(
                lambda: getattr(self.inner, name)(*args, **kwargs), self.patience, self.url
            )

    method.__name__ = name
    return method


for _name in vars(BaseStorage):
    if not _name.startswith("_"):
        setattr(RetryingStorage, _name, _retrying(_name))
RetryingStorage.__abstractmethods__ = frozenset()


def reason_of(error: Exception) -> str:
    """Return why a call failed, in one line, which may contain the storage's password."""
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
    from sqlalchemy.exc import ArgumentError

    try:
        database = _open_database(url)
    except ArgumentError as error:
        raise ValueError(str(error)) from None

    def close() -> None:
        database.remove_session()
        database.engine.dispose()

    return get_storage(database), close


def _open_database(url: str) -> RDBStorage:
    if not url.startswith("sqlite"):
        # Checks a connection before its use, in case that the server was restarted.
        return _with_tables(lambda: RDBStorage(url, engine_kwargs={"pool_pre_ping": True}))
    from sqlalchemy import event
    from sqlalchemy.engine import make_url

    if path := make_url(url).database:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    arguments = {"connect_args": {"timeout": SQLITE_TIMEOUT}}
    storage = _with_tables(lambda: RDBStorage(url, engine_kwargs=arguments))
    # Python's sqlite3 begins a transaction at the first write, when the rows that were read before
    # it may have changed: two workers could claim one trial. BEGIN IMMEDIATE takes the lock first.
    event.listen(storage.engine, "connect", _disable_begin)
    event.listen(storage.engine, "begin", _begin_immediate)
    storage.engine.dispose()
    return storage


def _with_tables(make: Callable[[], RDBStorage]) -> RDBStorage:
    """Open a database whose tables another process may be creating."""
    from sqlalchemy.exc import ArgumentError, SQLAlchemyError

    for _ in range(5):
        try:
            return make()
        except SQLAlchemyError as error:
            if is_unreachable(error) or isinstance(error, ArgumentError):
                raise
            time.sleep(random.uniform(0.2, 1.0))
    return make()


def _disable_begin(connection: Any, record: object) -> None:
    connection.isolation_level = None


def _begin_immediate(connection: Any) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")
