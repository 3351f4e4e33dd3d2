"""A job that is composed from another one equals the one that Hydra composes."""

import copy
import random
from dataclasses import dataclass

import pytest
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import create_config_search_path
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import run_job, setup_globals
from hydra.errors import HydraException
from hydra.types import HydraContext, RunMode
from hydra_plugins.bn_optuna import register
from hydra_plugins.bn_optuna._job_composer import JobComposer
from hydra_plugins.bn_optuna._kept_resolution import KeptResolution
from omegaconf import II, OmegaConf, open_dict

TREE = {
    "config.yaml": """
defaults: [{norm: none}, {optimizer: sgd}, _self_]
name: ${norm.kind}-${seed}
seed: 1
data: {seed: "${seed}", root: "${oc.env:HOME}"}
network: {widths: [1, 2], dropout: 0.0, norm: null}
alias: ${network}
paths: {output: "${hydra:runtime.output_dir}", number: "${hydra:job.num}"}
near: {a: "${.b}", b: "${seed}", c: '\\${seed}'}
several: ["${optimizer.lr}", {norm: "${norm}", fixed: "${name}"}, "${data.seed}/${optimizer.lr}"]
far: {node: "${data}", seed: "${far.node.seed}", item: "${several[0]}", over: "${alias}"}
fixed:
  of: "${constant}"
  text: "a ${constant.a}, and so many words after it that YAML breaks the line of this text"
constant: {a: 1, 2: two}
hydra: {sweep: {subdir: "${hydra.job.num}"}}
""",
    "norm/none.yaml": "kind: none\n",
    "norm/batch.yaml": "kind: batch\neps: 1e-5\n",
    "optimizer/sgd.yaml": "lr: 0.1\n",
    "optimizer/adam.yaml": "lr: 0.001\nbetas: [0.9, 0.999]\n",
}


@pytest.fixture(scope="module")
def loader(tmp_path_factory):
    folder = tmp_path_factory.mktemp("conf")
    for name, text in TREE.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    setup_globals()
    return ConfigLoaderImpl(create_config_search_path(f"file://{folder}"))


@pytest.fixture(scope="module")
def sweep(loader, tmp_path_factory):
    typed = ["hydra.mode=MULTIRUN", f"hydra.sweep.dir='{tmp_path_factory.mktemp('sweep')}'"]
    typed.append("+hydra.job.env_set.SECRET='${oc.env:HOME}'")  # stays as it is written
    return loader.load_configuration("config", typed, RunMode.MULTIRUN)


def full(loader, sweep, overrides, number):
    config = loader.load_sweep_config(sweep, overrides)
    with open_dict(config):
        config.hydra.job.id = config.hydra.job.num = number
    return config


def number_of(loader):
    """Count the full compositions of a loader."""
    count = [0]
    compose = loader.load_sweep_config

    class Counting:
        get_group_options = staticmethod(loader.get_group_options)

        @staticmethod
        def load_sweep_config(*arguments):
            count[0] += 1
            return compose(*arguments)

    return Counting, count


def files_and_content(config, directory):
    """What Hydra writes for a configuration, and what its task resolves."""
    state = HydraConfig.instance()
    before = state.cfg
    try:
        state.cfg = config
        config.hydra.runtime.output_dir = directory
        task = OmegaConf.masked_copy(config, [key for key in config if key != "hydra"])
        files = {
            "config.yaml": OmegaConf.to_yaml(task),
            "hydra.yaml": OmegaConf.to_yaml(OmegaConf.masked_copy(config, "hydra")),
            "overrides.yaml": OmegaConf.to_yaml(config.hydra.overrides.task),
        }
        resolved = OmegaConf.to_container(config, resolve=True)
        return files, {key: value for key, value in resolved.items() if key != "hydra"}
    finally:
        state.cfg = before


def assert_same(composed, expected):
    contents = []
    state = HydraConfig.instance()
    before = state.cfg
    try:
        for config in (composed, expected):
            text = OmegaConf.to_yaml(config)
            state.cfg = config
            config.hydra.runtime.output_dir = "/tmp/a job"
            config.hydra.runtime.config_sources = config.hydra.job.env_copy = []
            contents.append((text, OmegaConf.to_container(config, resolve=True)))
        assert contents[0] == contents[1]
    finally:
        state.cfg = before


PLAIN = {
    "seed": ["1", "2", "1_000"],
    "norm.eps": ["0.1", "1e-3", "inf", "null", "'0.1'"],
    "optimizer.lr": ["1", "3.16", "true", "a text", r"'it\'s = 1, and'"],
    "++network.dropout": ["0", "0.5"],
    "network.norm": ["0", "null"],
    "alias.dropout": ["0.1", "0.2"],
    "+mark": ["a", "''", "7", "null", f"'{'many words ' * 20}'"],
    "hydra.sweep.subdir": ["'7'", "'x/y=1'"],
    "++hydra.job.env_set.MARK": ["'1'", "2"],
}
OTHER = {
    "norm": ["none", "batch"],
    "network.widths": ["[3,4]", "[5]"],
    "network": ["{dropout:0.3}", "null"],
    "name": ["${seed}", "x${hydra:job.num}", "plain"],
    "optimizer": ["sgd", "adam", "{lr:0.5}"],
    "~data.root": [None],
    "hydra.job.name": ["a", "b"],
    "hydra/output": ["default", "none"],
}


def drawn(random_numbers):
    """Overrides of a job, in any order, and at times the same key twice or one above another."""
    chosen = []
    for keys, share in ((PLAIN, 0.6), (OTHER, 0.1)):
        for key, values in keys.items():
            if random_numbers.random() < share:
                value = random_numbers.choice(values)
                chosen.append(key if value is None else f"{key}={value}")
    if random_numbers.random() < 0.1:
        chosen.append("seed=5")
    random_numbers.shuffle(chosen)
    return chosen


@pytest.mark.parametrize("lists", [4, pytest.param(40, marks=pytest.mark.soak)])
def test_jobs_equal_those_that_hydra_composes(loader, sweep, lists):
    """Each list of overrides is composed twice more with other values, from what is kept."""
    random_numbers = random.Random(lists)
    composer = JobComposer(loader, sweep)
    for number in range(lists):
        given = drawn(random_numbers)
        jobs = [given]
        for _ in range(2):
            keys = [text.partition("=")[0] for text in given]
            jobs.append(
                [
                    f"{key}={random_numbers.choice(PLAIN[key])}" if key in PLAIN else text
                    for key, text in zip(keys, given, strict=True)
                ]
            )
        for overrides in jobs:
            try:
                expected = full(loader, sweep, overrides, number)
            except HydraException as error:
                with pytest.raises(type(error)):
                    composer.compose(overrides, number)
            else:
                with composer.composed(overrides, number) as job:
                    directory = job.config.hydra.runtime.output_dir
                    found = job.files(), job.resolved()
                assert found == files_and_content(copy.deepcopy(expected), directory)
                assert_same(composer.compose(overrides, number), expected)


@pytest.mark.parametrize(
    ("first", "second", "full_ones"),
    [
        (["seed=1", "optimizer.lr=0.1"], ["seed=2", "optimizer.lr=1e-5"], 1),
        (["seed=1", "+x='1,2'"], ["seed=1", "+x=b"], 1),
        (["norm=none", "seed=1"], ["norm=batch", "seed=1"], 2),
        (["name=a", "seed=1"], ["name=${seed}", "seed=1"], 2),
        (["seed=1", "seed=2"], ["seed=3", "seed=4"], 2),
        (["optimizer.lr=1", "optimizer={lr:2}"], ["optimizer.lr=3", "optimizer={lr:2}"], 2),
        (["network.widths=[3]"], ["network.widths=[4]"], 2),
        (["hydra.job.name=a"], ["hydra.job.name=b"], 2),
        (["seed=1"], ["optimizer.lr=1"], 2),
    ],
    ids=[
        "numbers",
        "texts",
        "groups",
        "interpolations",
        "a_key_twice",
        "a_key_above",
        "lists",
        "hydra",
        "other_keys",
    ],
)
def test_what_is_not_a_plain_value_is_composed_in_full(loader, sweep, first, second, full_ones):
    counting, count = number_of(loader)
    composer = JobComposer(counting, sweep)
    composer.compose(first, 0)
    assert_same(composer.compose(second, 1), full(loader, sweep, second, 1))
    assert count[0] == full_ones


def test_a_value_that_its_key_refuses_is_refused_as_hydra_does(loader, sweep):
    composer = JobComposer(loader, sweep)
    assert composer.compose(["++hydra.job.env_set.A=1"], 0).hydra.job.env_set.A == "1"
    with pytest.raises(HydraException, match="no_such_key"):
        composer.compose(["no_such_key=1"], 0)


def test_a_composed_job_writes_the_files_of_a_run(tmp_path):
    """With the project's configuration; `resolved` is what the task of a single run resolves."""
    import bn_lightning.train  # noqa: F401  registers the resolvers of its configuration

    register()
    setup_globals()
    loader = ConfigLoaderImpl(create_config_search_path("pkg://bn_lightning.conf"))
    shared = ["+experiment=mnist_bn", "+sweep=lr_init", "data=digits"]
    typed = [*shared, "hydra.mode=MULTIRUN", f"hydra.sweep.dir='{tmp_path}'"]
    sweep = loader.load_configuration("train", typed, RunMode.MULTIRUN)
    composer = JobComposer(loader, sweep)
    context = HydraContext(config_loader=loader, callbacks=Callbacks())
    for number, values in enumerate((["1", "0.1"], ["2", "null"], ["3", "'a: b'"])):
        overrides = [
            *shared,
            *(f"seed={values[0]}", f"init.std={values[1]}", "norm=none"),
            f"hydra.sweep.dir='{tmp_path}'",
            f"++hydra.job.env_set.MARK='{number}'",
        ]
        with composer.composed(overrides, number) as job:
            files, resolved = job.files(), job.resolved()
        seen = []
        run_job(
            hydra_context=context,
            task_function=lambda config: seen.append(OmegaConf.to_container(config, resolve=True)),  # noqa: B023
            config=full(loader, sweep, overrides, number),
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
            configure_logging=False,
        )
        assert seen == [resolved]
        folder = tmp_path / str(number) / ".hydra"
        assert files == {path.name: path.read_text(encoding="utf-8") for path in folder.iterdir()}


@dataclass
class Typed:
    number: float = II("a")
    text: str = II("a")


def test_typed_nodes_convert_the_values_of_references():
    config = OmegaConf.create({"a": 1, "typed": OmegaConf.structured(Typed), "b": "${a}-${a}"})
    kept = KeptResolution(config, ["a"])
    for value in (1, 2.5, 3):
        config.a = value
        resolved = {key: kept.value((key,)) for key in config}
        expected = OmegaConf.to_container(config, resolve=True)
        assert resolved == expected
        assert type(resolved["typed"]["number"]) is float
        assert type(resolved["typed"]["text"]) is str


class Callbacks:
    """Hydra's, of a program without any."""

    def on_job_start(self, **given):
        pass

    def on_job_end(self, **given):
        pass
