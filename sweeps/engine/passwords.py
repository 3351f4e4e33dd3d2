"""The storage's password: it comes from the environment, and is never written or shown."""

import re
from urllib.parse import unquote

from bn_lightning.sweeps.engine.errors import SweepError

_PASSWORD = re.compile(r"^[^:/@]+://[^/@:]*:(?P<password>.*)@[^@]*$")

# Without a default, which would stand in the configuration.
_VARIABLE = re.compile(r"\$\{oc\.env:[^{},]+\}")


def refuse_password(setting: str) -> None:
    """Refuse a password that stands in the configuration or the command: Hydra writes both to disk.

    Args:
        setting: what the configuration says, with its interpolations as they stand.

    Raises:
        SweepError: there is a password in it.
    """
    match = _PASSWORD.match(_VARIABLE.sub("$", setting))
    if match and match["password"] not in ("", "$"):
        raise SweepError(
            "`storage` expected its password from the environment, got it in the address, which is "
            "written to every run's .hydra folder. Leave it out (libpq reads PGPASSWORD and "
            "~/.pgpass), or write ${oc.env:NAME} in its place, quoted so that the shell leaves it"
        )


def redacted(text: str, url: str) -> str:
    """The text without the password of `url`, for everything that is shown or written."""
    match = _PASSWORD.match(url)
    for password in {match["password"], unquote(match["password"])} if match else ():
        if password:
            text = text.replace(password, "***")
    return text
