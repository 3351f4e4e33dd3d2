"""The structure of the source, read from it: imports, names, sizes of files and argument lists."""

import ast
import functools
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
MOST_LINES = 450
MOST_PARAMETERS = 10
MOST_POSITIONAL = 8

# A part may import itself and parts of a lower number.
ORDER = {
    "kernels": 0,
    "modules": 1,
    "conversion": 2,
    "runs": 3,  # what a run leaves on disk
    "plugins": 4,
    "sweeps": 5,  # reads what runs leave, never the code that trains
    "callbacks": 6,
    "models": 6,
    "data": 6,
    "stack": 7,  # many runs as one
    "cli": 8,
    "train": 9,
    "evaluate": 9,
    "report": 9,
    "landscape": 9,
    "inspect_checkpoint": 9,
    "predict": 9,
    "export": 9,
    "experiments": 10,  # the same from Python
    "claims": 10,  # trains by `train` what cannot be stacked
}
# The same inside sweeps/.
SWEEPS_ORDER = {"engine": 0, "hydra_plugins": 1, "analysis": 1, "report": 2}

# Functions with more parameters than MOST_PARAMETERS, and what their signatures mirror.
LONG_SIGNATURES = {
    "bn_lightning.data.cifar10.CIFAR10DataModule.__init__": "conf/data/cifar10.yaml",
    "bn_lightning.data.image_folder.ImageFolderDataModule.__init__": "conf/data/image_folder.yaml",
    "bn_lightning.data.tabular.TabularDataModule.__init__": "conf/data/tabular.yaml",
    "bn_lightning.kernels.ops.batch_norm": "torch.nn.functional.batch_norm",
    "bn_lightning.kernels.sync_autograd.sync_batch_norm": "torch.nn.functional.batch_norm",
    "bn_lightning.modules.batch_norm._BackendMixin.__init__": "torch.nn.BatchNorm2d",
}

# Public names that are defined more than once, and why each has one meaning all the same. A module
# may have the name of its one function or class, which needs no entry.
SAME_NAMES = {
    "batch_norm": "the same function as a definition, an op, a module and an option of `norm`",
    "cost": "what a call of a kernel costs, and what BatchNorm is said to cost",
    "ghost_batch_norm": "the same function as a module and an option of `norm`",
    "sync_batch_norm": "the same function as an op, a module and an option of `norm`",
    "initialization": "of weights: how it is done, and what is claimed about it",
    "main": "the entry point of a command",
    "protocol": "the contract of what a folder holds: of data modules, of models",
    "run_sweep": "the same sweep from Python and in Hydra's plugin",
}


def sources() -> list[Path]:
    folders = (ROOT / "bn_lightning", ROOT / "kernels", ROOT / "sweeps")
    files = {path for folder in folders for path in folder.rglob("*.py")}
    # bn_lightning/conf, kernels and sweeps are links where git makes links.
    links = {ROOT / "bn_lightning" / name for name in ("conf", "kernels", "sweeps")}
    return sorted(path for path in files if not links & {*path.parents})


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def module_of(path: Path) -> str:
    parts = [*path.relative_to(ROOT).with_suffix("").parts]
    if "hydra_plugins" in parts:
        parts = parts[parts.index("hydra_plugins") :]
    elif parts[0] != "bn_lightning":
        parts.insert(0, "bn_lightning")
    return ".".join(parts).removesuffix(".__init__")


def part_of(path: Path) -> str:
    parts = path.relative_to(ROOT).parts
    return parts[1 if parts[0] == "bn_lightning" else 0].removesuffix(".py")


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported_names(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


MODULES = {module_of(path): path for path in sources()}
# bn_lightning/__init__.py names its exports as strings, so that they are imported when first used.
PLACED = [path for path in sources() if path != ROOT / "bn_lightning" / "__init__.py"]


def test_every_part_has_its_place():
    assert {part_of(path) for path in PLACED} == set(ORDER)


def test_imports_run_one_way():
    for path in PLACED:
        part = part_of(path)
        for name in imported_names(path):
            if name.startswith("bn_lightning."):
                other = name.split(".")[1]
                assert other == part or ORDER[other] < ORDER[part], f"{path} imports {name}"


def test_imports_in_sweeps_run_one_way():
    for path in PLACED:
        # sweeps/__init__.py imports nothing.
        if part_of(path) != "sweeps" or path.parent == ROOT / "sweeps":
            continue
        part = path.relative_to(ROOT / "sweeps").parts[0]
        for name in imported_names(path):
            if name.startswith("bn_lightning.sweeps."):
                other = name.split(".")[2]
                is_earlier = other == part or SWEEPS_ORDER[other] < SWEEPS_ORDER[part]
                assert is_earlier, f"{path} imports {name}"


def test_no_module_imports_itself_by_way_of_others():
    imports = {
        module: {
            found
            for name in imported_names(path)
            if (found := name if name in MODULES else name.rpartition(".")[0]) in MODULES
            and found != module
        }
        for module, path in MODULES.items()
        if path in PLACED
    }
    done: set[str] = set()

    def follow(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " -> ".join([*way[way.index(module) :], module])
        if module not in done:
            for other in sorted(imports.get(module, ())):
                follow(other, (*way, module))
            done.add(module)

    for module in sorted(imports):
        follow(module, ())


def test_no_module_has_a_name_of_the_standard_library():
    """If a module is run as a script, its folder comes first on `sys.path`."""
    names = {path.stem for path in PLACED} - {"__init__"}
    assert not names & sys.stdlib_module_names


def test_files_are_short():
    long = {
        name_of(path): lines
        for path in sources()
        if (lines := path.read_text(encoding="utf-8").count("\n")) > MOST_LINES
    }
    assert not long


def functions(path: Path) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    def within(node: ast.AST, prefix: str) -> Iterator[tuple[str, ast.FunctionDef]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef):
                yield f"{prefix}{child.name}", child
                yield from within(child, f"{prefix}{child.name}.")
            elif isinstance(child, ast.ClassDef):
                yield from within(child, f"{prefix}{child.name}.")
            else:
                yield from within(child, prefix)

    yield from within(tree_of(path), "")


def is_kernel(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any("triton.jit" in ast.unparse(decorator) for decorator in function.decorator_list)


def test_argument_lists_are_short():
    long = set()
    for path in sources():
        for name, function in functions(path):
            arguments = function.args
            given = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
            count = sum(argument.arg not in ("self", "cls", "ctx") for argument in given)
            if count > MOST_PARAMETERS and not is_kernel(function):
                long.add(f"{module_of(path)}.{name}")
    assert long == set(LONG_SIGNATURES)


def test_calls_pass_few_arguments_by_position():
    long = [
        f"{name_of(path)}:{node.lineno}"
        for path in sources()
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Call) and len(node.args) > MOST_POSITIONAL
    ]
    assert not long


def public_names(path: Path) -> Iterator[str]:
    for node in tree_of(path).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign):
            yield from (target.id for target in node.targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id


def test_a_public_name_has_one_meaning():
    places = defaultdict(set)
    for module, path in MODULES.items():
        names = {name for name in public_names(path) if not name.startswith("_")}
        if path.stem != "__init__":
            names.add(path.stem)
        for name in names:
            places[name].add(module)
    twice = {name: sorted(found) for name, found in places.items() if len(found) > 1}
    unknown = {name: found for name, found in twice.items() if name not in SAME_NAMES}
    assert not unknown, unknown
    assert set(SAME_NAMES) <= set(twice), "names that are no longer defined twice"


def test_the_docstring_of_kernels_lists_its_files():
    listed = (ROOT / "kernels" / "__init__.py").read_text(encoding="utf-8").split()
    files = {path.name for path in (ROOT / "kernels").glob("*.py")} - {"__init__.py"}
    assert files and files <= set(listed)


def test_the_sweeper_is_of_use_to_any_program():
    """It knows neither PyTorch, Lightning nor the rest of this project."""
    libraries = {"hydra", "hydra_plugins", "numpy", "omegaconf", "optuna", "rich", "sqlalchemy"}
    allowed = libraries | sys.stdlib_module_names | {"__main__"}
    folders = {ROOT / "sweeps" / "engine", ROOT / "sweeps" / "hydra_plugins"}
    sweeper = [path for path in sources() if folders & {*path.parents}]
    assert ROOT / "sweeps" / "engine" / "study.py" in sweeper
    for path in sweeper:
        for name in imported_names(path):
            own = name.startswith("bn_lightning.sweeps.engine.")
            assert own or name.split(".")[0] in allowed, f"{path} imports {name}"


def test_kernels_need_torch_and_triton_alone():
    allowed = {"torch", "triton", "bn_lightning"}
    for path in sources():
        if part_of(path) == "kernels":
            roots = {name.split(".")[0] for name in imported_names(path)}
            foreign = {root for root in roots - allowed if root not in sys.stdlib_module_names}
            assert not foreign, f"{path} imports {foreign}"


def test_kernels_are_launched_by_one_function():
    """A plan repeats only the launches that it recorded."""
    for path in sources():
        launched = [
            ast.unparse(node)
            for node in ast.walk(tree_of(path))
            if isinstance(node, ast.Subscript) and ast.unparse(node.value).endswith("kernel")
        ]
        own = {"launch_plan": 1, "triton_launcher": 1}
        assert len(launched) == (own.get(path.stem, 0) if part_of(path) == "kernels" else 0), path
