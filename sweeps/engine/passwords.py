"""The storage's password: it comes from the environment, and is never written or shown."""

import re
from urllib.parse import unquote, unquote_plus

from bn_lightning.sweeps.engine.errors import SweepError

# Before the host, and among the options behind the address, which go to the database's driver.
_PASSWORDS = (
    re.compile(r"^[^:/@]+://[^/@:]*:(?P<password>.*)@[^@]*$"),
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


def redacted(text: str, url: str) -> str:
    """The text without the password of `url`, for everything that is shown or written."""
    found = {
        written
        for password in _passwords(url)
        for written in (password, unquote(password), unquote_plus(password))
    }
    for written in sorted(found, key=len, reverse=True):  # one may be a part of another
        text = text.replace(written, "***")
    return text


def _passwords(url: str) -> list[str]:
    found = (match["password"] for pattern in _PASSWORDS for match in pattern.finditer(url))
    return [password for password in found if password]
