"""A `Builder` returns what Hydra's `instantiate` returns, from the same random numbers."""

import copy
import sys
from functools import partial

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import nn

from bn_lightning.stack.builder import Builder

HERE = "test_builder"
LINEAR = {"_target_": "torch.nn.Linear", "in_features": 3, "out_features": 2}
FACTORY = {**LINEAR, "_partial_": True}


class Net(nn.Module):
    """Keeps its arguments, changes one, and draws a weight after its parts were drawn."""

    def __init__(self, **arguments):
        super().__init__()
        if isinstance(arguments.get("widths"), list | ListConfig):
            arguments["widths"].append(7)
        self.arguments = arguments
        for name, value in arguments.items():
            if isinstance(value, nn.Module):
                self.add_module(name, value)
            elif isinstance(value, partial):
                self.add_module(name, value())
        self.weight = nn.Parameter(torch.rand(2))


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.setitem(sys.modules, HERE, sys.modules[__name__])


@pytest.fixture
def reads(monkeypatch):
    """The nodes that Hydra read for a Builder."""
    seen = []

    def counting(node):
        seen.append(node)
        return instantiate(node)

    monkeypatch.setattr("hydra.utils.instantiate", counting)
    return seen


def drawn(build, node):
    """An object that is built from the stream of a seed, and the next number of the stream."""
    torch.manual_seed(3)
    return build(copy.deepcopy(node)), torch.rand(1).item()


def content(value):
    """A value as plain data; functions by their name and arguments."""
    if isinstance(value, partial):
        return value.func, content(value.keywords)
    if isinstance(value, dict | DictConfig):
        return type(value), {key: content(part) for key, part in value.items()}
    if isinstance(value, list | ListConfig):
        return type(value), [content(part) for part in value]
    if isinstance(value, Net):
        return content(value.arguments)
    return (type(value), repr(value))


NODES = {
    "numbers": {"rate": 0.5, "flag": True, "none": None, "text": "a"},
    "network": {"inner": {"_target_": f"{HERE}.Net", "part": LINEAR}, "factory": FACTORY},
    "changed_list": {"widths": [1, 2], "options": {"a": {"b": [1]}}},
    "list_of_objects": {"layers": [LINEAR, LINEAR], "rate": 1},
    "objects_by_name": {"layers": {"first": LINEAR}},
    "factory_of_an_object": {"factory": {**FACTORY, "bias": LINEAR}},
    "factory_with_a_list": {"factory": {"_target_": f"{HERE}.Net", "_partial_": True, "w": [1]}},
    "converted": {"_convert_": "all", "widths": [1], "options": {}},
    "not_recursive": {"_recursive_": False, "part": LINEAR},
}
# What Hydra reads for each object.
EACH_TIME = set(NODES) - {"numbers", "network", "changed_list"}


@pytest.mark.parametrize("name", NODES)
def test_three_objects_are_those_of_hydra(name, reads):
    node = {"_target_": f"{HERE}.Net", **NODES[name]}
    builder = Builder()
    expected, following = drawn(instantiate, node)
    built = []
    for _ in range(3):
        found, number = drawn(builder.build, node)
        assert number == following
        built.append(found)
        torch.testing.assert_close(found.state_dict(), expected.state_dict(), rtol=0, atol=0)
        assert content(found) == content(expected)
    assert len({id(parameter) for net in built for parameter in net.parameters()}) == 3 * len(
        [*expected.parameters()]
    )
    once = len(reads)
    builder.build(node)
    assert (len(reads) > once) == (name in EACH_TIME)


def test_values_tell_configurations_apart():
    builder = Builder()
    values = [1, 1.0, True, "1", None, [1], [1.0], {"a": 1}]
    for value in values * 2:
        node = {"_target_": f"{HERE}.Net", "value": value}
        assert content(builder.build(node)) == content(instantiate(node))


def test_the_parts_of_a_run():
    """The configuration of an experiment, whose Classifier and scheme members are built from."""
    with initialize_config_module("bn_lightning.conf", version_base="1.3"):
        config = compose("train", ["+experiment=mnist_bn", "init=default", "paths.output_dir=x"])
    config = OmegaConf.to_container(config, resolve=True)
    builder = Builder()
    for rate in (0.1, 0.2, 0.2):
        config["model"]["optimizer"]["lr"] = rate
        for key in ("model", "init"):
            found, expected = (drawn(build, config[key]) for build in (builder.build, instantiate))
            assert found[1] == expected[1] and type(found[0]) is type(expected[0])
            if key == "model":
                state = expected[0].state_dict()
                torch.testing.assert_close(found[0].state_dict(), state, rtol=0, atol=0)
                assert found[0].configure_optimizers().defaults["lr"] == rate


def test_an_error_of_a_constructor_is_raised():
    node = {**LINEAR, "in_features": "many"}
    for _ in range(2):
        with pytest.raises(TypeError):
            Builder().build(node)


def test_a_missing_value_is_refused_as_by_hydra():
    with pytest.raises(Exception, match="out_features"):
        Builder().build({**LINEAR, "out_features": "???"})
