"""The command that installs an extra is one that can be typed where the package is installed."""

from pathlib import Path

import pytest

import bn_lightning
from bn_lightning.cli.error_line import format_error
from bn_lightning.cli.install_hint import install_command

WHEEL = 'pip install "bn-lightning[cluster]"'
CHECKOUT = 'pip install -c constraints.txt -e ".[cluster]"'


def test_in_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(bn_lightning.__file__).parents[1]
    monkeypatch.chdir(root)
    assert install_command("cluster") == CHECKOUT
    monkeypatch.chdir(tmp_path)
    elsewhere = f'pip install -c {root}/constraints.txt -e "{root}/[cluster]"'
    assert install_command("cluster") == elsewhere


def test_from_a_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = tmp_path / "site-packages" / "bn_lightning" / "__init__.py"
    monkeypatch.setattr(bn_lightning, "__file__", str(module))
    assert install_command("cluster") == WHEEL
    error = ValueError("Could not find 'hydra/launcher/joblib'")
    assert format_error(error).endswith(WHEEL)


def test_no_other_hint_names_an_extra() -> None:
    root = Path(bn_lightning.__file__).parents[1]
    places = [
        path
        for folder in ("bn_lightning", "kernels", "sweeps", "conf")
        for pattern in ("*.py", "*.yaml")
        for path in (root / folder).rglob(pattern)
        if "constraints.txt -e" in path.read_text(encoding="utf-8")
    ]
    assert [path.name for path in places] == ["install_hint.py"]
