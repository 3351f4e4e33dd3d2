"""The order of the parts, read from the source: imports run one way."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A part may import parts of a lower number only, besides itself. kernels, modules, conversion and
# plugins are what a user takes into a program of his own; runs is what a run leaves on disk.
ORDER = {
    "kernels": 0,
    "modules": 1,
    "conversion": 2,
    "runs": 3,
    "plugins": 4,
    "sweeps": 5,  # reads what runs leave, never what trains them
    "callbacks": 6,
    "models": 6,
    "data": 6,
    "cli": 7,
    "train": 8,
    "evaluate": 8,
    "report": 8,
    "landscape": 8,
    "inspect_checkpoint": 8,
    "predict": 8,
    "export": 8,
}


def part_of(path: Path) -> str:
    relative = path.relative_to(ROOT)
    parts = relative.parts[1:] if relative.parts[0] == "bn_lightning" else relative.parts
    return parts[0].removesuffix(".py")


def sources() -> list[Path]:
    folders = (ROOT / "bn_lightning", ROOT / "kernels", ROOT / "sweeps")
    files = {path for folder in folders for path in folder.rglob("*.py")}
    # bn_lightning/__init__.py names its exports as strings; conf holds no code.
    skipped = {ROOT / "bn_lightning" / "__init__.py", ROOT / "bn_lightning" / "conf"}
    return sorted(
        path
        for path in files
        if not (skipped & {path, *path.parents}) and not path.parent.is_symlink()
    )


def imported_modules(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_every_part_has_its_place():
    assert {part_of(path) for path in sources()} == set(ORDER)


@pytest.mark.parametrize("list_of_files", ["kernels/__init__.py", "docs/architecture.md"])
def test_every_kernel_file_is_in_the_lists(list_of_files):
    listed = (ROOT / list_of_files).read_text(encoding="utf-8").split()
    files = {path.name for path in (ROOT / "kernels").glob("*.py")} - {"__init__.py"}
    assert files and files <= set(listed)


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path):
    part = part_of(path)
    for name in imported_modules(path):
        if name.startswith("bn_lightning."):
            other = name.split(".")[1]
            assert other == part or ORDER[other] < ORDER[part], f"{part} imports {name}"


def test_the_sweeper_is_of_use_to_any_program():
    """It knows neither PyTorch, Lightning nor the rest of this project."""
    libraries = {"hydra", "hydra_plugins", "numpy", "omegaconf", "optuna", "rich", "sqlalchemy"}
    allowed = libraries | sys.stdlib_module_names | {"__main__"}
    folders = {ROOT / "sweeps" / "engine", ROOT / "sweeps" / "hydra_plugins"}
    sweeper = [path for path in sources() if folders & {*path.parents}]
    assert ROOT / "sweeps" / "engine" / "study.py" in sweeper
    for path in sweeper:
        for name in imported_modules(path):
            own = name.startswith("bn_lightning.sweeps.engine.")
            assert own or name.split(".")[0] in allowed, f"{path} imports {name}"


def test_kernels_need_torch_and_triton_alone():
    allowed = {"torch", "triton", "bn_lightning"}
    for path in sources():
        if part_of(path) == "kernels":
            roots = {name.split(".")[0] for name in imported_modules(path)}
            foreign = {root for root in roots - allowed if root not in sys.stdlib_module_names}
            assert not foreign, f"{path} imports {foreign}"
