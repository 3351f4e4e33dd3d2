"""The storage's password: it comes from the environment, and is never written or shown."""

import re
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import unquote, unquote_plus

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from bn_lightning.sweeps.engine.errors import SweepError

# From the user's colon to the last @, however the address is mistyped; behind an interpolation
# that may hold scheme and user; and among the options, which go to the database's driver. A path
# holds none.
_PASSWORDS = (
    re.compile(r"^(?!(?:journal|sqlite[^:]*):///)[^:/]*:/*[^:]*:(?P<password>.*)@", re.S),
    re.compile(r"^\$[^:/]*:(?!//)(?P<password>.*)@", re.S),
    re.compile(r"[?&](?:password|passwd|sslpassword)=(?P<password>[^&]*)"),
)

# Without a default, which would stand in the configuration.
_VARIABLE = re.compile(r"\$\{oc\.env:[^{},]+\}")


def refuse_password(setting: str) -> None:
    """Refuse a password that stands in the configuration or the command: Hydra writes both to disk.

    Args:
        setting: what the configuration says, with its interpolations as they stand.

    Raises:
        SweepError: there is a password in it.
    """
    if set(_passwords(_VARIABLE.sub("$", setting))) - {"$"}:
        raise SweepError(
            "`storage` expected its password from the environment, got it in the address, which is "
            "written to every run's .hydra folder. Leave it out (libpq reads PGPASSWORD and "
            "~/.pgpass), or write ${oc.env:NAME} in its place, quoted so that the shell leaves it"
        )


def refuse_typed_password(overrides: Sequence[str]) -> None:
    """Refuse a password in the overrides of a command, before Hydra writes them to disk.

    Args:
        overrides: the command's arguments.

    Raises:
        SweepError: there is a password in one that sets the storage.
    """
    for override in overrides:
        key, _, setting = override.partition("=")
        if key.lstrip("+") == "hydra.sweeper.storage":
            refuse_password(setting)


def refuse_copied_password(url: str, config: DictConfig) -> None:
    """Refuse the configuration of a trial that holds the storage's password: run.json would, too.

    Args:
        url: the storage's address, with its interpolations resolved.
        config: the trial's; what in it is known only while it runs is passed over.

    Raises:
        SweepError: naming the key.
    """
    passwords = _as_written(url)
    for key, value in _resolved(config) if passwords else ():
        is_task_s = not key.startswith("hydra.")
        if is_task_s and any(password in str(value) for password in passwords):
            raise SweepError(
                f"`{key}` expected no password, got one that `storage` holds, and a trial's "
                "configuration is written to its run.json and its checkpoints. Refer to it in "
                "`hydra.sweeper.storage` alone, or leave it out (libpq reads PGPASSWORD)"
            )


def refuse_several_ats(url: str) -> None:
    """Refuse an address with more than one @, of whose password a part may be taken for the host.

    Raises:
        SweepError: it has; the message does not show it.
    """
    if url.count("@") > 1:
        raise SweepError(
            "`storage` expected one @ at most, before the host, got several; within a user, a "
            "password or an option, @ is written %40"
        )


def redacted(text: str, url: str) -> str:
    """The text without the password of `url`, for everything that is shown or written."""
    for written in sorted(_as_written(url), key=len, reverse=True):  # one may be part of another
        text = text.replace(written, "***")
    return text


def _as_written(url: str) -> set[str]:
    """The passwords in an address, encoded as they stand there and as they are."""
    return {
        written
        for password in _passwords(url)
        for written in (password, unquote(password), unquote_plus(password))
    }


def _passwords(url: str) -> list[str]:
    found = (match["password"] for pattern in _PASSWORDS for match in pattern.finditer(url))
    return [password for password in found if password]


def _resolved(config: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every value that is no container and can be resolved, with its key."""
    keys: Any = config if isinstance(config, DictConfig) else range(len(config))
    for key in keys:
        try:
            value = config[key]
        except OmegaConfBaseException:
            continue
        if OmegaConf.is_config(value):
            yield from _resolved(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value
