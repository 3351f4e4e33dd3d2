"""What the commands say of themselves: one screen, and nothing that does not work."""

import contextlib
import re
import shlex
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from hydra.core.hydra_config import HydraConfig
from hydra_plugins.bn_optuna import register
from omegaconf import OmegaConf

register()  # before Hydra looks for configurations

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
HYDRA_COMMANDS = ("train", "evaluate", "predict", "export", "landscape", "inspect")
SCREEN = 50, 100  # rows, and characters of one


def help_of(command, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [command, "--help"])
    with contextlib.suppress(SystemExit):
        import_module(f"bn_lightning.{command}").main()
    return capsys.readouterr().out


def examples(text):
    lines = re.search(r"[Ee]xamples:\n((?:  .*\n)+)", text)[1].splitlines()
    return [shlex.split(line) for line in lines]


@pytest.mark.parametrize("command", [*HYDRA_COMMANDS, "report"])
def test_help_is_one_screen_with_three_examples(command, capsys, monkeypatch):
    text = help_of(command, capsys, monkeypatch)
    lines = text.strip().splitlines()
    assert sum(max(1, -(-len(line) // SCREEN[1])) for line in lines) <= SCREEN[0]
    assert len(examples(text)) == 3
    assert "_target_" not in text


@pytest.mark.parametrize("command", HYDRA_COMMANDS)
def test_examples_and_keys_are_of_the_configuration(command, capsys, monkeypatch):
    text = help_of(command, capsys, monkeypatch)
    name = f"bn-{'eval' if command == 'evaluate' else command}"
    keys = re.findall(r"^  ([a-z_][a-z_.]+)", text[: text.index("Examples")], re.MULTILINE)
    with initialize_config_module("bn_lightning.conf", version_base="1.3"):
        for example in examples(text):
            assert example[0] == name and name in PROJECT["scripts"]
            overrides = [part for part in example[1:] if part != "-m"]
            config = compose(command, overrides, return_hydra_config=True)
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
