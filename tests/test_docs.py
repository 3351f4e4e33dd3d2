"""What the documentation names exists: commands with their options and keys, messages, files."""

import ast
import re
import shlex
import subprocess
import sys
import tomllib
from importlib import import_module
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
GAP = "…"  # stands for what differs in a message


def commands(text: str) -> list[list[str]]:
    """The commands of this project in a page's lines, each as a module and its arguments."""
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
    """Composes the first job that the arguments make."""
    overrides = OverridesParser.create().parse_overrides([a for a in arguments if a != "-m"])
    assert "-m" in arguments or not any(o.is_sweep_override() for o in overrides)
    first = [
        f"{o.get_key_element()}={next(o.sweep_string_iterator())}"
        if o.is_sweep_override()
        else o.input_line
        for o in overrides
    ]
    compose(config_name, first, return_hydra_config=True)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands(page, monkeypatch):
    monkeypatch.setattr("bn_lightning.report.report", lambda sources, options: None)
    with initialize_config_module("bn_lightning.conf", version_base="1.3"):
        for module, *arguments in commands(page.read_text(encoding="utf-8")):
            name = module.removeprefix("bn_lightning.")
            if (ROOT / "conf" / f"{name}.yaml").exists():
                check_overrides(name, arguments)
            else:
                monkeypatch.setattr(sys, "argv", [module, *arguments])
                import_module(module).main()


def test_commands_are_found_and_checked():
    readme = commands((ROOT / "README.md").read_text(encoding="utf-8"))
    assert ["bn_lightning.train", "+experiment=mnist_bn", "norm=none"] in readme
    assert commands("    bn-train a=1 \\\n  b=2  # c") == [["bn_lightning.train", "a=1", "b=2"]]
    with initialize_config_module("bn_lightning.conf", version_base="1.3"):
        for wrong in ("+experiment=mnist", "optimizer.rate=1", "norm=none,batch"):
            with pytest.raises(Exception, match=r"mnist|rate|assert"):
                check_overrides("train", [wrong])


def messages() -> set[str]:
    """Every string of the source, with a gap for each value put into it."""
    found = set()
    for folder in ("bn_lightning", "kernels", "sweeps"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    parts = [v.value if isinstance(v, ast.Constant) else GAP for v in node.values]
                    found.add("".join(map(str, parts)))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.add(re.sub(r"\{\d*\}", GAP, node.value))
    return found


def test_troubleshooting_has_messages_of_the_source():
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    headings = re.findall(r"^### ``\s?(.+?)\s?``$", text, re.MULTILINE)
    assert len(headings) == text.count("\n### ") > 30
    known = messages()
    missing = [h for h in headings if not any(m.startswith(h.removesuffix(GAP)) for m in known)]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    links = re.findall(r"\]\((?!\w+:|#)([^)#\s]+)", text)
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_the_readme_names_every_option():
    table = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", (ROOT / "README.md").read_text(), re.M))
    for path in (ROOT / "conf").glob("*/*.yaml"):
        group = path.parent.name
        if group not in ("extras", "hydra", "paths") and (group, path.stem) != (
            "trainer",
            "default",
        ):
            assert f"`{path.stem}`" in table[group], f"{group}={path.stem}"


def test_the_tree_names_every_source_file():
    tree = (ROOT / "docs/architecture.md").read_text(encoding="utf-8").split("```")[1]
    files = subprocess.check_output(["git", "ls-files", "*.py"], cwd=ROOT, text=True).split()
    sources = {
        Path(f).name for f in files if f.startswith(("bn_lightning/", "kernels/", "sweeps/"))
    }
    named = set(re.findall(r"\w+\.py", tree))
    assert not sources - named - {"__init__.py"}
    assert not named - {Path(f).name for f in files}


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
