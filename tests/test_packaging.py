"""What is installed: every package of the checkout, with its data files."""

import tomllib
from pathlib import Path

import yaml

import bn_lightning

ROOT = Path(__file__).parents[1]
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def folder_of(package: str) -> Path:
    """The folder of the checkout that is installed as `package`."""
    moved = SETUPTOOLS["package-dir"]
    for name in sorted(moved, key=len, reverse=True):
        if package == name or package.startswith(f"{name}."):
            return ROOT / moved[name] / package[len(name) + 1 :].replace(".", "/")
    return ROOT / package.replace(".", "/")


def test_every_package_is_listed():
    installed = {folder_of(package) for package in SETUPTOOLS["packages"]}
    found = {
        path.parent
        for top in ("bn_lightning", "kernels", "sweeps", "conf")
        for path in (ROOT / top).rglob("*.py")
        if not any(part.is_symlink() for part in path.parents)
    }
    assert installed == found


def test_every_data_file_is_listed():
    listed = {
        path
        for package, patterns in SETUPTOOLS["package-data"].items()
        for pattern in patterns
        for path in folder_of(package).glob(pattern)
    }
    found = {
        path
        for top in ("bn_lightning", "kernels", "sweeps", "conf")
        for path in (ROOT / top).rglob("*")
        if path.is_file()
        and path.suffix not in (".py", ".pyc")
        and not any(part.is_symlink() for part in path.parents)
    }
    assert found <= listed


def test_the_source_distribution_has_the_pins():
    assert "constraints.txt" in (ROOT / "MANIFEST.in").read_text(encoding="utf-8")


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == bn_lightning.__version__
