"""From Hydra's sweep syntax to Optuna's distributions, and back to overrides."""

import optuna
import pytest
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from optuna.distributions import CategoricalDistribution as Choice
from optuna.distributions import FloatDistribution as Float
from optuna.distributions import IntDistribution as Int

from bn_lightning.sweeps.engine.space import flat, parse_space, sweep_text, to_overrides
from bn_lightning.sweeps.engine.sweep_error import SweepError

SPACES = {
    "simple_choice": ("x=1,2,3", Choice([1, 2, 3])),
    "choice": ("x=choice(0.1,a,true)", Choice([0.1, "a", True])),
    "null": ("x=1,null", Choice([1, None])),
    "one_choice": ("x=choice(1)", Choice([1])),
    "lists": ("x=[1,2],[3]", Choice(["[1,2]", "[3]"])),
    "dicts": ("x=choice({a:1},{a:2})", Choice(["{a:1}", "{a:2}"])),
    "quoted": ("x='1',1", Choice(["'1'", 1])),
    "added_key": ("+x=1,2", Choice([1, 2])),
    "range": ("x=range(2,5)", Int(2, 4)),
    "range_from_0": ("x=range(3)", Int(0, 2)),
    "range_by_2": ("x=range(0,5,2)", Int(0, 4, step=2)),
    "range_downwards": ("x=range(5,0,-2)", Int(1, 5, step=2)),
    "real_range": ("x=range(0.1,0.5,0.1)", Float(0.1, 0.4, step=0.1)),
    "log_range": ("x=tag(log,range(1,9))", Int(1, 8, log=True)),
    "interval": ("x=interval(1,3)", Float(1, 3)),
    "negative_interval": ("x=interval(-1.5,-1)", Float(-1.5, -1)),
    "log_interval": ("x=tag(log,interval(1e-3,1))", Float(1e-3, 1, log=True)),
    "int_interval": ("x=int(interval(8,64))", Int(8, 64)),
    "log_int_interval": ("x=tag(log,int(interval(1,8)))", Int(1, 8, log=True)),
}

BAD = {
    "no_choice": ("norm=glob(nothing*)", "at least one choice"),
    "repeated_choice": ("x=1,2,1", "different choices, got 1 twice"),
    "choices_that_are_equal": ("x=1,1.0", "different choices"),
    "empty_range": ("x=range(3,3)", "got 3 to 3"),
    "range_the_wrong_way": ("x=range(3,0)", "at least one number"),
    "no_step": ("x=range(0,3,0)", "step other than 0"),
    "log_range_from_0": ("x=tag(log,range(0,3))", "limits above 0"),
    "log_range_by_2": ("x=tag(log,range(1,9,2))", "step of 1"),
    "interval_the_wrong_way": ("x=interval(3,1)", "lower limit first, got 3.0 to 1.0"),
    "negative_log_interval": ("x=tag(log,interval(-1,1))", "limits above 0 for tag"),
    "log_interval_from_0": ("x=tag(log,interval(0,1))", "limits above 0"),
    "infinite_interval": ("x=interval(0,inf)", "finite limits"),
    "grammar": ("x=choice(1,", "choice"),
}


@pytest.fixture
def loader():
    """The options of this project's groups."""
    with initialize_config_module("bn_lightning.conf", version_base="1.3"):
        yield GlobalHydra.instance().config_loader()


class TestParse:
    @pytest.mark.parametrize(("text", "expected"), SPACES.values(), ids=SPACES.keys())
    def test_distributions(self, text, expected):
        key = text.partition("=")[0]
        assert parse_space(None, [text]).distributions == {key: expected}

    @pytest.mark.parametrize(("text", "expected"), SPACES.values(), ids=SPACES.keys())
    def test_a_distribution_as_it_is_typed(self, text, expected):
        key = text.partition("=")[0]
        assert parse_space(None, [f"{key}={sweep_text(expected)}"]).distributions == {key: expected}

    def test_a_glob_is_a_choice_of_options(self, loader):
        space = parse_space({"norm": "glob(*,exclude=[g*,s*,t*])"}, [], loader)
        assert space.distributions == {"norm": Choice(["batch", "none"])}

    @pytest.mark.parametrize(("text", "words"), BAD.values(), ids=BAD.keys())
    def test_what_cannot_be_swept(self, loader, text, words):
        with pytest.raises(SweepError, match=words):
            parse_space(None, [text], loader)

    def test_the_rest_is_fixed(self):
        space = parse_space(None, ["a=1", "+b=[1,2]", "~c", "~d=2", "e='x y'", "x=1,2"])
        assert space.fixed == ("a=1", "+b=[1,2]", "~c", "~d=2", "e='x y'")

    @pytest.mark.parametrize("value", [0.5, True, None, [1, 2], {"a": "b"}, "text"], ids=str)
    def test_a_param_of_one_value_is_fixed(self, value):
        space = parse_space({"x": value}, [])
        assert not space.distributions
        assert len(space.fixed) == 1

    def test_the_command_line_goes_before_params(self):
        space = parse_space({"x": "1,2", "y": "1,2", "z": "1,2"}, ["+y=3,4", "x=5"])
        assert space.fixed == ("x=5",)
        assert list(space.distributions.items()) == [("+y", Choice([3, 4])), ("z", Choice([1, 2]))]


class TestPoints:
    def test_the_last_key_of_a_grid_changes_fastest(self):
        space = parse_space(None, ["a=x,y", "b=range(2)", "c=range(0.5,1.1,0.5)"])
        points = [tuple(point.values()) for point in space.grid()]
        assert points == [(a, b, c) for a in "xy" for b in (0, 1) for c in (0.5, 1.0)]

    def test_a_grid_has_no_interval(self):
        with pytest.raises(SweepError, match="`a` .* choices or a range"):
            parse_space(None, ["a=interval(0,1)"]).grid()

    @pytest.mark.parametrize(
        "text",
        [
            "extras.num_threads=1,null",
            "+new={a:1},{b:[2]}",
            "task_name='1','a b','a=b,c'",
            "seed=3,4",
        ],
        ids=["null", "dicts", "quoted", "numbers"],
    )
    def test_overrides_make_what_was_chosen(self, loader, text):
        """Each choice composes to the value that was typed."""
        key = text.partition("=")[0]
        typed = [o.value() for o in _parsed(text)]
        points = parse_space(None, [text], loader).grid()
        values = [
            compose("train", to_overrides(point))[key.lstrip("+").split(".")[0]] for point in points
        ]
        if "." in key:
            values = [value[key.split(".")[1]] for value in values]
        assert values == typed

    @pytest.mark.parametrize(
        ("params", "texts"),
        [
            ({"x": 1e-05}, ["x=1e-05"]),
            ({"x": True, "+y": None}, ["x=true", "+y=null"]),
            ({"x": "[1,2]"}, ["x=[1,2]"]),
        ],
        ids=["small", "words", "list"],
    )
    def test_texts(self, params, texts):
        assert [text.lower() for text in to_overrides(params)] == texts

    def test_custom_spaces_may_be_conditional(self):
        def custom(trial):
            if trial.params["kind"] == "deep":
                trial.suggest_int("depth", 1, 3)

        space = parse_space(None, ["kind=deep,flat", "fixed=1"], custom=custom)
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
        points = [space.suggest(study.ask()) for _ in range(20)]
        assert all(("depth" in point) == (point["kind"] == "deep") for point in points)
        assert {point["kind"] for point in points} == {"deep", "flat"}

    def test_custom_spaces_may_not_set_what_is_set(self):
        overrides = ["x=1,2", "+depth=3"]
        space = parse_space(None, overrides, custom=lambda trial: trial.suggest_int("depth", 1, 3))
        with pytest.raises(SweepError, match="`custom_search_space` .* depth"):
            space.suggest(optuna.create_study().ask())


def _parsed(text):
    from hydra.core.override_parser.overrides_parser import OverridesParser

    key, _, values = text.partition("=")
    sweep = OverridesParser.create().parse_override(text)
    texts = [f"{key}={value}" for value in sweep.sweep_string_iterator()]
    return OverridesParser.create().parse_overrides(texts)


def test_a_configuration_without_what_is_swept():
    config = {"norm": {"eps": 1}, "a": {"lr": 0.1, "b": {"c": "${x}", "d": [1, None]}, "e": {}}}
    assert flat(config, ["norm", "+a.lr"]) == {
        "a.b.c": '"${x}"',
        "a.b.d": "[1, null]",
        "a.e": "{}",
    }
