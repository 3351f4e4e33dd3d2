"""What the commands say of themselves: one screen, and nothing that does not work."""

import contextlib
import re
import shlex
import subprocess
import sys
import tomllib
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from hydra.core.hydra_config import HydraConfig
from hydra_plugins.bn_optuna import register
from omegaconf import OmegaConf

import bn_lightning

register()  # before Hydra looks for configurations

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Module -> console script.
HYDRA_COMMANDS = {
    "train": "bn-train",
    "evaluate": "bn-eval",
    "predict": "bn-predict",
    "export": "bn-export",
    "landscape": "bn-landscape",
    "inspect_checkpoint": "bn-inspect",
}
SCREEN = 50, 100  # rows, and characters of one


def help_of(command, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [command, "--help"])
    with contextlib.suppress(SystemExit):
        import_module(f"bn_lightning.{command}").main()
    return capsys.readouterr().out


def examples(text):
    lines = re.search(r"[Ee]xamples:\n((?:  .*\n)+)", text)[1].splitlines()
    return [shlex.split(line) for line in lines]


@pytest.mark.parametrize("command", [*HYDRA_COMMANDS, "report", "claims.__main__"])
def test_help_is_one_screen_with_three_examples(command, capsys, monkeypatch):
    text = help_of(command, capsys, monkeypatch)
    lines = text.strip().splitlines()
    assert sum(max(1, -(-len(line) // SCREEN[1])) for line in lines) <= SCREEN[0]
    assert len(examples(text)) == 3
    assert "_target_" not in text


@pytest.mark.parametrize("command", HYDRA_COMMANDS)
def test_examples_and_keys_are_of_the_configuration(command, capsys, monkeypatch):
    text = help_of(command, capsys, monkeypatch)
    name = HYDRA_COMMANDS[command]
    keys = re.findall(r"^  ([a-z_][a-z_.]+)", text[: text.index("Examples")], re.MULTILINE)
    with initialize_config_module("bn_lightning.conf", version_base="1.3"):
        for example in examples(text):
            assert example[0] == name and name in PROJECT["scripts"]
            overrides = [part for part in example[1:] if part != "-m"]
            config = compose(command.partition("_")[0], overrides, return_hydra_config=True)
        HydraConfig.instance().set_config(config)
        unknown = [key for key in keys if OmegaConf.select(config, key, default="no") == "no"]
    # Without data=OPTION, these take the checkpoint's.
    assert keys and set(unknown) <= (set() if command == "train" else {"data", "data.root"})


def test_console_scripts_are_the_commands():
    for name, place in PROJECT["scripts"].items():
        module, function = place.split(":")
        assert callable(getattr(import_module(module), function))
        assert name.startswith("bn-")


@pytest.mark.parametrize("command", ["train", "report"])
def test_help_loads_nothing_large(command):
    code = (
        f"import sys, bn_lightning.{command}; print({{'torch', 'lightning'}} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


# The others import what these two do.
@pytest.mark.parametrize("command", ["train", pytest.param("report", marks=pytest.mark.slow)])
def test_a_command_runs_as_a_file(command, tmp_path):
    """The package's folder is then the first on sys.path, where it must hide no other module."""
    script = ROOT / "bn_lightning" / f"{command}.py"
    for name, folder in ((script.relative_to(ROOT), ROOT), (script, tmp_path)):
        done = subprocess.run(
            [sys.executable, name, "--help"], cwd=folder, capture_output=True, text=True
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert "Usage:" in done.stdout or "usage:" in done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", [*HYDRA_COMMANDS, "report"])
def test_versions(command, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [command, "--version"])
    with contextlib.suppress(SystemExit):  # argparse ends the process
        import_module(f"bn_lightning.{command}").main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"bn-lightning {bn_lightning.__version__}"
    for name in ("torch", "lightning", "hydra-core", "optuna"):
        assert f"{name} {version(name)}" in lines
