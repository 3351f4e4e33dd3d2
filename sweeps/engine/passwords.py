"""Keep the password of a storage out of configurations, run records and messages."""

import re
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import unquote, unquote_plus

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from bn_lightning.sweeps.engine.sweep_error import SweepError

# A password may be part of the URL's authority, or an option for the database's driver.
_IN_AUTHORITY = re.compile(r"://[^:]*:(.+)@", re.S)
_IN_OPTIONS = re.compile(r"[?&](?:password|passwd|sslpassword)=([^&]+)")
_FILES = ("journal:", "sqlite:", "sqlite+")  # may contain @ in their path, but no password

# An environment variable without a default value, which would be part of the configuration.
_VARIABLE = re.compile(r"\$\{oc\.env:[^{},]+\}")
# A typed address with @ but no password; $ stands for a variable.
_SAFE = re.compile(r"[^:@]+(://[^:@]*)?(:\$)?@[^@]*")


def refuse_password(setting: str) -> None:
    """Refuse a storage setting with a password, because Hydra writes settings to disk.

    Args:
        setting: the configured address, with its interpolations unresolved.

    Raises:
        SweepError: the setting contains a password, or an address whose user cannot be told from
            its password.
    """
    address = _VARIABLE.sub("$", setting.strip("'\""))
    if address.startswith(_FILES):
        return
    is_safe = "@" not in address or _SAFE.fullmatch(address)
    if not is_safe or any(value != "$" for value in _IN_OPTIONS.findall(address)):
        raise SweepError(
            "expected `storage` to take its password from the environment, got an address that may "
            "contain one, which Hydra writes to the .hydra folder of each run; leave the password "
            "out (libpq reads PGPASSWORD and ~/.pgpass), or write '${oc.env:NAME}' in its place, "
            "with quotes for the shell"
        )


def refuse_typed_password(overrides: Sequence[str]) -> None:
    """Refuse a password in the arguments of a command, before Hydra writes them to disk.

    Raises:
        SweepError: an override of the storage contains a password.
    """
    for override in overrides:
        key, _, setting = override.partition("=")
        if key.lstrip("+") == "hydra.sweeper.storage":
            refuse_password(setting)


def refuse_copied_password(url: str, config: DictConfig) -> None:
    """Refuse a task's configuration that contains the storage's password: run.json copies it.

    Args:
        url: the storage's URL, with its interpolations resolved.
        config: of the program. Values that cannot be resolved before a trial runs are ignored.

    Raises:
        SweepError: naming the key.
    """
    passwords = _spellings(url)
    for key, value in _resolved(config) if passwords else ():
        if not key.startswith("hydra.") and any(word in str(value) for word in passwords):
            raise SweepError(
                f"expected `{key}` to contain no password, got the one of `storage`, and a trial's "
                "configuration is written to its run.json and its checkpoints; refer to it in "
                "`hydra.sweeper.storage` only, or leave it out (libpq reads PGPASSWORD)"
            )


def refuse_several_ats(url: str) -> None:
    """Refuse a URL with more than one @: part of its password could be taken for the host.

    Raises:
        SweepError: the message does not show the URL.
    """
    if url.count("@") > 1:
        raise SweepError(
            "expected `storage` to contain at most one @, before the host, got several; write %40 "
            "for @ in a user, a password or an option"
        )


def redacted(text: str, url: str) -> str:
    """Return the text with `***` for the password of `url`, for all that is shown or written."""
    for spelling in sorted(_spellings(url), key=len, reverse=True):  # one may contain another
        text = text.replace(spelling, "***")
    return text


def _spellings(url: str) -> set[str]:
    """Return the passwords in a URL, both as they are written there and decoded."""
    if url.startswith(_FILES):
        return set()
    passwords = _IN_AUTHORITY.findall(url) + _IN_OPTIONS.findall(url)
    return {decode(p) for p in passwords for decode in (str, unquote, unquote_plus)}


def _resolved(config: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the key and the value of each leaf that can be resolved."""
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
