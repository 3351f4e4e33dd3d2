"""The command `bn-claims`, with a claim on tiny networks that is in the ledger for these tests."""

import csv
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from bn_lightning.claims import registry
from bn_lightning.claims.__main__ import main
from bn_lightning.claims.claim_training import seconds_of_training
from bn_lightning.claims.design import BUDGETS, Claim, Condition, Curves, Setting
from bn_lightning.claims.ledger import __path__ as LEDGER
from bn_lightning.claims.registry import find_claims, register_claim
from bn_lightning.claims.result_table import ResultTable
from bn_lightning.claims.run_claims import LedgerOptions, run_claims
from bn_lightning.claims.verdict import verdict_of
from bn_lightning.models.mlp import MLP

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*")

TINY = ("data=digits", "model.network.widths=[8]", "trainer.max_steps=4")
CNN = (*TINY, "model=cnn", "model.network.channels=[2]")


def settings(budget):
    """One network that is not trained, and two rates, which are one stack with all seeds."""
    rates = {f"rate {lr}": Setting((f"optimizer.lr={lr}",), lr) for lr in (0.1, 1.0)}
    return {"start": Setting((), 1, "start", False), **rates}


def measure(network):
    seen.append((network.directory is not None, network.seed))
    return {
        "modules": len(list(network.model().network.modules())),
        "accuracy": network.metrics.get("test/accuracy", 0.0),
    }


seen = []  # what was measured

TINY_CLAIM = Claim(
    name="tiny",
    sentence="BatchNorm adds modules and <b>accuracy</b>.",
    source="made up",
    base=("model.network.activation=relu",),
    arms={"batch": ("norm=batch",), "none": ("norm=none",)},
    settings=settings,
    measure=measure,
    numbers=lambda points: {
        "modules": points[0].measures["modules"],
        "accuracy": max(point.measures["accuracy"] for point in points),
    },
    conditions=(
        Condition("modules", "modules", "batch", "none", least=1.0),
        Condition("accuracy", "accuracy", "batch", "none", least=2.0),
    ),
    curves=(Curves("accuracy", "test accuracy", "learning rate"),),
    not_varied="Everything.",
    would_change="Anything.",
    least_steps=2,
)


@pytest.fixture(autouse=True)
def ledger(folder, monkeypatch):
    """The claims by name, with the tiny one."""
    find_claims()
    monkeypatch.setattr(registry, "_claims", {**registry._claims, "tiny": TINY_CLAIM})
    monkeypatch.setattr("bn_lightning.claims.run_claims.save", lambda figure, path: None)
    seen.clear()
    return registry._claims


def options(output: Path, *overrides: str, **changes):
    given = {"names": ("tiny",), "seeds": 3, "output": output, "overrides": (*TINY, *overrides)}
    return LedgerOptions(**(given | {"n_jobs": 1} | changes))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A ledger of the tiny claim, with its figures."""
    find_claims()
    claims, registry._claims = registry._claims, {"tiny": TINY_CLAIM}
    output = tmp_path_factory.mktemp("claims") / "new"
    run_claims(options(output))
    registry._claims = claims
    return output


def key_of_line(line):
    claim, arm, setting, seed, _, _, name, _ = next(csv.reader([line]))
    return claim, arm, setting, seed, name


def copied(folder, tmp_path):
    for name in ("trials.csv", "setups.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    return tmp_path


def test_a_ledger_has_its_files(folder):
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert names == {
        *("trials.csv", "setups.json", "summary.json", "claims.md", "claims.html"),
        *(f"figures/{name}.{end}" for name in ("tiny", "overview") for end in ("png", "svg")),
    }
    rows = list(csv.DictReader((folder / "trials.csv").read_text(encoding="utf-8").splitlines()))
    assert len(rows) == 2 * 3 * 3 * 2  # arms, settings, seeds, measures
    page = (folder / "claims.html").read_text(encoding="utf-8")
    assert "&lt;b&gt;accuracy" in page and "<b>accuracy" not in page
    assert "data: digits" in (folder / "claims.md").read_text(encoding="utf-8")


def test_a_verdict_follows_from_the_summary(folder):
    entry = json.loads((folder / "summary.json").read_text(encoding="utf-8"))["claims"]["tiny"]
    verdict = verdict_of(entry["conditions"], entry["numbers"])
    assert (verdict.outcome, verdict.text) == (entry["verdict"], entry["text"])
    assert verdict.text == "holds if: modules"
    assert entry["conditions"][1]["outcome"] == "does not hold"
    assert entry["conditions"][0]["effect"]["value"] == 1.0


def test_a_ledger_goes_on(folder, tmp_path):
    """As after a kill: what is in the table is not measured again, and nothing is lost."""
    lines = (folder / "trials.csv").read_text(encoding="utf-8").splitlines(keepends=True)
    output = copied(folder, tmp_path)
    kept = [line for line in lines if not line.startswith("tiny,none,rate 1.0,2,")]
    (output / "trials.csv").write_text("".join(kept), encoding="utf-8")
    run_claims(options(output))
    assert seen == [(True, 2)]
    again = (output / "trials.csv").read_text(encoding="utf-8").splitlines(keepends=True)
    # Alone instead of in a stack, it differs by rounding, and in its time.
    assert sorted(map(key_of_line, again)) == sorted(map(key_of_line, lines))
    seen.clear()
    run_claims(options(output, seeds=1))
    assert seen == []
    assert "nothing is decided" not in (output / "claims.md").read_text(encoding="utf-8")
    entry = json.loads((output / "summary.json").read_text(encoding="utf-8"))["claims"]["tiny"]
    assert entry["text"] == "holds if: modules"


def test_few_seeds_of_one_claim_are_said(folder, tmp_path, ledger):
    output = copied(folder, tmp_path)
    ledger["other"] = dataclasses.replace(TINY_CLAIM, name="other")
    run_claims(options(output, names=("tiny", "other"), seeds=1))
    content = json.loads((output / "summary.json").read_text(encoding="utf-8"))
    assert any(note.startswith("1 seed:") for note in content["notes"])


def test_results_of_other_options_are_not_mixed(folder, tmp_path, capsys):
    output = copied(folder, tmp_path)
    other = options(output, "optimizer.momentum=0.5", seeds=4)
    with pytest.raises(ValueError, match=r"optimizer.momentum=0.5"):
        run_claims(other)
    assert seen == []
    run_claims(dataclasses.replace(other, allow_mixed=True))
    assert {seed for _, seed in seen} == {4}
    content = json.loads((output / "summary.json").read_text(encoding="utf-8"))
    assert any(note.startswith("MIXED") for note in content["notes"])
    assert len(content["setups"]) == 2


def test_options_that_nothing_was_measured_with_are_not_named(folder, tmp_path):
    output = copied(folder, tmp_path)
    run_claims(options(output, "optimizer.momentum=0.5", allow_mixed=True))
    assert seen == []
    content = json.loads((output / "summary.json").read_text(encoding="utf-8"))
    assert len(content["setups"]) == 1
    assert "momentum" not in (output / "claims.md").read_text(encoding="utf-8")


def test_a_table_of_something_else_is_refused(folder, tmp_path):
    output = copied(folder, tmp_path)
    (output / "trials.csv").write_text("number,state\n1,COMPLETE\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"trials.csv"):
        ResultTable(output, {}, False)


def test_what_cannot_be_stacked_is_trained_alone(tmp_path, capsys, monkeypatch, ledger):
    one = {"rate 0.1": settings("quick")["rate 0.1"]}
    claim = dataclasses.replace(
        TINY_CLAIM,
        arms={"batch": ("norm=batch",)},
        settings=lambda budget: one,
        conditions=(Condition("accuracy", "accuracy", "batch", kind="value", least=0.0),),
    )
    monkeypatch.setitem(ledger, "tiny", claim)
    run_claims(options(tmp_path, "+trainer.gradient_clip_algorithm=value", seeds=1))
    said = capsys.readouterr().out
    assert "1 trainings one by one, about" in said
    assert said.index("one by one") < said.index("1 of 1")
    assert seen == [(True, 1)]
    # A single seed decides nothing, and the output says so.
    assert "1 seed: there are no intervals" in said
    content = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    assert content["claims"]["tiny"]["text"] == "not decided by this: 1 seed, fewer than 3"
    assert content["claims"]["tiny"]["conditions"][0]["reason"] == "1 seed, fewer than 3"
    typed = " ".join((*TINY, "+trainer.gradient_clip_algorithm=value"))
    not_varied = f"Everything. Where {typed} differs from this, it was used."
    assert content["claims"]["tiny"]["not_varied"] == not_varied


class NormlessMLP(MLP):
    """Ignores `norm`."""

    def __init__(self, **options):
        super().__init__(**{**options, "norm": None})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"names": ("fastest",)}, "cost, .*scale_invariance, .*tiny"),
        ({"budget": "huge"}, "quick, full"),
        ({"seeds": 0}, "`seeds`"),
        ({"n_jobs": 0}, "`n_jobs`"),
        ({"overrides": (*TINY, "trainer.max_steps=1")}, "`trainer.max_steps`"),
        ({"overrides": (*TINY, "trainer.max_steps=none")}, "`trainer.max_steps`"),
        ({"overrides": (*TINY, "optimizer.lr=0.1")}, "`optimizer.lr` to be left to the claim tiny"),
        ({"overrides": (*TINY, "norm=none")}, "`norm` to be left to the claim tiny"),
        (
            {"names": ("smoothness",)},
            "`trainer.max_steps` to be left to the claim smoothness, which varies it",
        ),
        ({"overrides": (*TINY, "seed=5")}, "seeds=N"),
        (
            {"overrides": (*TINY, "model.network._target_=normless.NormlessMLP")},
            "a BatchNorm in the arm 'batch'",
        ),
    ],
    ids=[
        *("unknown", "budget", "seeds", "n_jobs", "short", "value"),
        *("varied_value", "varied_group", "varied_steps", "seed", "no_batch_norm"),
    ],
)
def test_refusals(tmp_path, monkeypatch, changes, message):
    # The import mode of the tests leaves their modules out.
    monkeypatch.setitem(sys.modules, "normless", SimpleNamespace(NormlessMLP=NormlessMLP))
    with pytest.raises(ValueError, match=message):
        run_claims(options(tmp_path / "new", **changes))
    assert seen == [] and not (tmp_path / "new").exists()


def test_claims_about_another_network_are_left_out(tmp_path, monkeypatch, ledger, capsys):
    """If no claim is named; those that are left are measured with the network."""
    claims = {name: ledger[name] for name in ("depth_plain", "depth_residual", "tiny")}
    monkeypatch.setattr(registry, "_claims", claims)
    run_claims(options(tmp_path, names=(), overrides=CNN, seeds=1, n_jobs=1))
    content = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    assert set(content["claims"]) == {"tiny"}
    said = capsys.readouterr().out
    for name in ("depth_plain", "depth_residual"):
        assert sum(note.startswith(f"{name} is left out") for note in content["notes"]) == 1
        assert said.index(f"{name} is left out") < said.index("tiny: 6 networks")
    # `initialization` varies init.std, which this initialization has not.
    monkeypatch.setattr(registry, "_claims", {"initialization": ledger["initialization"]} | claims)
    run_claims(options(tmp_path / "he", "init=he", names=(), seeds=1))
    said = capsys.readouterr().out
    assert "initialization is left out: expected `init.std`, which the claim varies" in said
    # What suits no claim is refused.
    with pytest.raises(ValueError, match=r"`optimizer.lr`"):
        run_claims(options(tmp_path / "new", "optimizer.lr=-1", names=()))
    assert not (tmp_path / "new").exists()


def test_data_with_one_class_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("bn_lightning.claims.run_claims.data_info", lambda data: {"classes": 1})
    with pytest.raises(ValueError, match="2 classes"):
        run_claims(options(tmp_path / "new"))
    assert not (tmp_path / "new").exists()


def test_the_command_sorts_its_arguments(monkeypatch, tmp_path, capsys):
    given = []
    monkeypatch.setattr("bn_lightning.claims.run_claims.run_claims", given.append)
    arguments = ["tiny", "seeds=4", "--output", str(tmp_path), "budget=full"]
    arguments += ["n_jobs=2", "model=cnn", "~init"]
    monkeypatch.setattr(sys, "argv", ["bn-claims", *arguments])
    main()
    expected = LedgerOptions(("tiny",), "full", 4, ("model=cnn", "~init"), tmp_path, False, 2)
    assert given == [expected]
    for typed, words in (("seeds=many", "`seeds`"), ("--lsit", "did you mean --list?")):
        monkeypatch.setattr(sys, "argv", ["bn-claims", typed])
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code == 1 and words in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["bn-claims", "--list"])
    main()
    assert f"tiny: {TINY_CLAIM.sentence}\n" in capsys.readouterr().out


@pytest.mark.slow
def test_two_claims_of_the_ledger(tmp_path):
    """The command in a process of its own, which starts two more."""
    budget = [text for text in TINY if "max_steps" not in text] + ["trainer.max_steps=50"]
    typed = [
        "placement",
        "scale_invariance",
        "seeds=3",
        "n_jobs=2",
        *budget,
        "--output",
        str(tmp_path),
    ]
    command = [sys.executable, "-m", "bn_lightning.claims", *typed, *budget]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    assert set(content["claims"]) == {"placement", "scale_invariance"}
    for entry in content["claims"].values():
        assert verdict_of(entry["conditions"], entry["numbers"]).text == entry["text"]
        assert all(c["effect"]["seeds"] == 3 for c in entry["conditions"])
    assert {path.stem for path in (tmp_path / "figures").iterdir()} == {
        "overview",
        "placement",
        "scale_invariance",
    }


def test_each_file_of_the_ledger_is_one_claim(ledger):
    names = {path.stem for path in Path(LEDGER[0]).glob("*.py")} - {"__init__"}
    assert names | {"tiny"} == set(ledger)
    for claim in find_claims():
        for budget in BUDGETS:
            labels = claim.settings(budget)
            assert labels and all(s.overrides is not None for s in labels.values())
        assert any(not condition.is_control for condition in claim.conditions)
        assert set(claim.arm_labels) <= set(claim.arms)
        names = [condition.name for condition in claim.conditions]
        statements = [condition.as_json()["statement"] for condition in claim.conditions]
        assert len(set(names)) == len(set(statements)) == len(names)
        for condition in claim.conditions:
            # "with" and "without" name what.
            for text in (condition.as_json()["statement"], condition.unit):
                assert not re.search(r"\b(with|without)\b(?=$|[,;:]| is\b)", text), text
            assert (condition.least, condition.most) != (None, None)
            assert bool(condition.against) == (condition.kind != "value")


def test_a_claim_is_registered_once(ledger):
    with pytest.raises(ValueError, match="'tiny' twice"):
        register_claim(TINY_CLAIM)
    wrong = dataclasses.replace(TINY_CLAIM, name="wrong", arms={"batch": ()})
    with pytest.raises(ValueError, match="'none'"):
        register_claim(wrong)


def test_the_time_of_a_training_is_known_before():
    from bn_lightning.claims.claim_training import compose_trials

    found = compose_trials(TINY_CLAIM, "quick", [1], TINY, Path("runs"))
    config = next(iter(found.values()))
    more = {**config, "trainer": {**config["trainer"], "max_steps": 40_000}}
    assert 0 < seconds_of_training(config) < seconds_of_training(more)


@pytest.mark.soak
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["term", "kill"])
def test_a_signal_ends_the_processes_and_keeps_what_is_measured(tmp_path, ledger, number):
    """Two processes train for hours once the networks that are not trained are measured."""
    claim = ledger["depth_plain"]
    initial = {
        (arm, label)
        for arm in claim.arms
        for label, setting in claim.settings_of("quick", arm).items()
        if not setting.is_trained
    }
    typed = ["depth_plain", "seeds=1", "n_jobs=2", TINY[0], "trainer.max_steps=10000000"]
    command = [sys.executable, "-m", "bn_lightning.claims", *typed, "--output", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while measured(tmp_path) != initial and time.monotonic() < deadline:
            time.sleep(0.1)
        assert measured(tmp_path) == initial
        process.send_signal(number)
        said, _ = process.communicate(timeout=30)
        if number == signal.SIGTERM:
            assert process.returncode == 143
            assert said.splitlines()[-1].startswith(f"interrupted by SIGTERM: {tmp_path}; the same")
        while group_exists(process.pid) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not group_exists(process.pid)
        assert measured(tmp_path) == initial
    finally:
        if group_exists(process.pid):
            os.killpg(process.pid, signal.SIGKILL)


def measured(folder):
    try:
        lines = (folder / "trials.csv").read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return set()
    return {(row["arm"], row["setting"]) for row in csv.DictReader(lines)}


def group_exists(leader):
    try:
        os.killpg(leader, 0)
    except ProcessLookupError:
        return False
    return True
