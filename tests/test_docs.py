"""The documentation names what exists: commands, options, keys, errors, files and modules."""

import ast
import re
import shlex
import sys
import tomllib
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra_plugins.bn_optuna import register

register()  # before Hydra looks for configurations

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
MODULES = {name: place.partition(":")[0] for name, place in SCRIPTS.items()}


def commands(text: str) -> list[list[str]]:
    """Return the commands of this project in a page, each as a module and its arguments."""
    found = []
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        for part in line.strip().split(" && "):
            if part.startswith("python -m bn_lightning."):
                words = shlex.split(part, comments=True)[2:]
            elif part.partition(" ")[0] in MODULES:
                words = shlex.split(part, comments=True)
                words[0] = MODULES[words[0]]
            else:
                continue
            if not {"--help", "-sc"} & set(words):
                found.append(words)
    return found


def check_overrides(config_name: str, arguments: list[str]) -> None:
    """Compose the first job that the arguments make."""
    typed = [argument for argument in arguments if argument != "-m"]
    for option in {"--config-dir", "--cfg"} & set(typed):
        at = typed.index(option)
        _, value = typed[at : at + 2]
        typed[at : at + 2] = []
        if option == "--config-dir":
            typed.append(f"hydra.searchpath=[file://{ROOT / value}]")
    overrides = OverridesParser.create().parse_overrides(typed)
    assert "-m" in arguments or not any(o.is_sweep_override() for o in overrides)
    first = [
        f"{o.get_key_element()}={next(o.sweep_string_iterator())}"
        if o.is_sweep_override()
        else o.input_line
        for o in overrides
    ]
    compose(config_name, first, return_hydra_config=True)


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if commands(page.read_text(encoding="utf-8"))],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_commands(page, monkeypatch):
    monkeypatch.setattr("bn_lightning.report.write_report", lambda sources, options: None)
    monkeypatch.setattr("bn_lightning.report.print_runs", lambda sources: None)
    monkeypatch.setattr("bn_lightning.claims.run_claims.run_claims", lambda options: None)
    with initialize_config_module("bn_lightning.conf", version_base="1.3"):
        for module, *arguments in commands(page.read_text(encoding="utf-8")):
            name = module.removeprefix("bn_lightning.").removesuffix("_checkpoint")
            if (ROOT / "conf" / f"{name}.yaml").exists():
                check_overrides(name, arguments)
            else:
                monkeypatch.setattr(sys, "argv", [module, *arguments])
                command = import_module(module)
                if hasattr(command, "__path__"):
                    command = import_module(f"{module}.__main__")
                command.main()


def test_commands_are_found_and_checked():
    readme = commands((ROOT / "README.md").read_text(encoding="utf-8"))
    assert ["bn_lightning.train", "+experiment=mnist_bn"] in readme
    arms = ["-m", "+experiment=mnist_bn", "norm=none,batch", "seed=1,2,3"]
    assert ["bn_lightning.train", *arms] in readme
    assert commands("    bn-train a=1 \\\n  b=2  # c") == [["bn_lightning.train", "a=1", "b=2"]]
    with initialize_config_module("bn_lightning.conf", version_base="1.3"):
        for wrong in ("+experiment=mnist", "optimizer.rate=1", "norm=none,batch"):
            with pytest.raises(Exception, match=r"mnist|rate|assert"):
                check_overrides("train", [wrong])


def names_in_messages() -> set[str]:
    """Return names of the code, words in its strings except docstrings, and configuration keys."""
    found = set()
    for folder in ("conf", "sweeps"):
        for path in (ROOT / folder).rglob("*.yaml"):
            found |= set(re.findall(r"\w+", path.read_text(encoding="utf-8")))
    for folder in ("bn_lightning", "kernels", "sweeps"):
        for path in (ROOT / folder).rglob("*.py"):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            docstrings = {
                id(node.body[0].value)
                for node in ast.walk(tree)
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
                and node.body
                and isinstance(node.body[0], ast.Expr)
            }
            for node in ast.walk(tree):
                if isinstance(node, ast.ClassDef | ast.FunctionDef):
                    found.add(node.name)
                elif isinstance(node, ast.Name):
                    found.add(node.id)
                elif (
                    isinstance(node, ast.Constant)
                    and isinstance(node.value, str)
                    and id(node) not in docstrings
                ):
                    found |= set(re.findall(r"[-\w]+(?:\.\w+)*", node.value))
    return found


def test_troubleshooting_names_errors_of_the_source():
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    keys = re.findall(r"^### .+ \(`([^`]+)`\)$", text, re.MULTILINE)
    assert len(keys) == text.count("\n### ") > 30
    known = names_in_messages()
    assert [key for key in keys if key not in known] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    links = re.findall(r"\]\((?!\w+:|#)([^)#\s]+)", text)
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_the_table_of_options_is_complete():
    text = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    table = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", text, re.M))
    for path in (ROOT / "conf").glob("*/*.yaml"):
        group = path.parent.name
        if group not in ("hydra", "paths") and (group, path.stem) != (
            "trainer",
            "default",
        ):
            assert f"`{path.stem}`" in table[group], f"{group}={path.stem}"


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 700


def test_the_readme_says_what_is_downloaded_and_how_to_leave_cuda_out():
    first_screen = (ROOT / "README.md").read_text(encoding="utf-8").partition("```")[0]
    assert re.search(r"downloads .*packages and MNIST, \d+ MB", first_screen)
    assert re.search(r"^    pip install .*torch --index-url \S+/cpu$", first_screen, re.MULTILINE)


@pytest.mark.parametrize("page", ["README.md", "docs/architecture.md"])
def test_the_tree_names_every_folder(page):
    trees = (ROOT / page).read_text(encoding="utf-8").split("```")[1::2]
    tree = next(text for text in trees if "\nkernels/" in text)
    named = set(re.findall(r"(\w+)/", tree))
    parts = [p for p in (ROOT / "bn_lightning").iterdir() if p.is_dir() and not p.is_symlink()]
    parts += [ROOT / "kernels", ROOT / "conf", *(ROOT / "sweeps").iterdir()]
    assert {p.name for p in parts if p.is_dir() and p.name != "__pycache__"} <= named


def test_the_files_named_exist():
    """Python files in backticks, by a path or by their name. CHANGELOG.md names old ones, too."""
    files = [path for path in ROOT.rglob("*.py") if ".venv" not in path.parts]
    known = {"/" + path.relative_to(ROOT).as_posix() for path in files}
    missing = [
        (page.name, name)
        for page in PAGES
        if page.name != "CHANGELOG.md"
        for name in re.findall(r"`((?:[\w-]+/)*[\w-]+\.py)\b", page.read_text(encoding="utf-8"))
        if "NAME" not in name
        and not any(path.endswith("/" + name.removeprefix("bn_lightning/")) for path in known)
    ]
    assert missing == []


def test_the_changelog_names_modules_that_exist():
    """In its tables of moved modules, the left column names old modules, the right one new ones."""
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`[a-z].*) \| (`.*) \|$", text, re.MULTILINE)
    old, new = (
        {name for cell in column for name in re.findall(r"`([a-z_.]+)`", cell)}
        for column in zip(*rows, strict=True)
    )
    assert {name for name in new if find_spec(f"bn_lightning.{name}") is None} == set()
    assert {name for name in old if (ROOT / "bn_lightning" / f"{name}.py").exists()} == set()


def test_the_tests_named_exist():
    tests = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py"))
    known = set(re.findall(r"(?:def|class) (test_\w+|Test\w+)", tests))
    known |= {"test_step", "test_dataloader"}  # methods of Lightning's
    for page in PAGES:
        named = re.findall(r"(?:`|::)(test_\w+|Test[A-Z]\w+)`", page.read_text(encoding="utf-8"))
        assert {name for name in named if name not in known} == set(), page


def test_every_decision_is_in_the_index():
    folder = ROOT / "docs" / "decisions"
    listed = re.findall(
        r"^- \[.+\]\((.+)\)$", (folder / "index.md").read_text("utf-8"), re.MULTILINE
    )
    assert listed == sorted(path.name for path in folder.glob("[0-9]*.md"))


def test_the_api_reference_has_every_public_name():
    import bn_lightning
    from bn_lightning import callbacks, data

    pages = {
        module
        for page in (ROOT / "docs" / "api").glob("*.md")
        for module in re.findall(r"^::: (\S+)", page.read_text(encoding="utf-8"), re.MULTILINE)
    }
    homes = {
        getattr(p, name).__module__ for p in (bn_lightning, callbacks, data) for name in p.__all__
    }
    assert homes - pages == set()
