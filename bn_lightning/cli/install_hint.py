"""Say how to install an extra of this package where it is installed."""

from pathlib import Path

import bn_lightning


def install_command(extra: str) -> str:
    """Return the command that installs an extra: of the checkout, or of the installed wheel."""
    checkout = Path(bn_lightning.__file__).parents[1]
    if all((checkout / name).is_file() for name in ("pyproject.toml", "constraints.txt")):
        folder = "" if Path.cwd() == checkout else f"{checkout}/"
        return f'pip install -c {folder}constraints.txt -e "{folder or "."}[{extra}]"'
    return f'pip install "bn-lightning[{extra}]"'
