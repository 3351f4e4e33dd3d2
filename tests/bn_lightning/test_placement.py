"""`experiment=placement`: it trains, goes on, is tested again, and is as good as its bars."""

from pathlib import Path

import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from bn_lightning import evaluate, landscape, train
from bn_lightning.data.tabular import generate
from bn_lightning.runs.metrics_csv import read_metrics
from bn_lightning.runs.record import read_run

# Lightning 2.6 calls what torch 2.13 calls deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*")

SHORT = (
    "+experiment=placement",
    "data.samples=400",
    "trainer.max_steps=20",
    "trainer.val_check_interval=10",
    "scheduler.T_max=20",  # whatever trainer.max_steps is where a run is cut short
    "extras.figures=false",
)


@pytest.mark.parametrize(
    ("norm", "position"),
    [("batch", "before"), ("batch", "after"), ("torch", "before"), ("none", "before")],
)
def test_every_arm_runs(command, norm, position) -> None:
    result = command(train.main, *SHORT, f"norm={norm}", f"model.network.norm_position={position}")
    assert result.code == 0, result.err
    assert "test/auroc" in result.out
    assert ("running variance" in result.out) == (norm != "none")
    record = read_run(result.directory)
    assert record["data"]["classes"] == 2
    assert {"test/loss", "test/accuracy", "test/auroc", "val/auroc"} <= record["metrics"].keys()


@pytest.mark.slow
def test_it_goes_on_and_is_tested_again(command) -> None:
    whole = command(train.main, *SHORT).directory
    part = command(train.main, *SHORT, "trainer.max_steps=13", "paths.log_dir=part").directory
    resumed = command(train.main, *SHORT, "paths.log_dir=part", "ckpt_path=last")
    assert resumed.code == 0, resumed.err
    assert resumed.directory == part
    one, other = read_metrics(whole), read_metrics(part)
    assert one["val/auroc"] == other["val/auroc"]
    assert one["test/auroc"][-1] == other["test/auroc"][-1]
    checkpoint = part / "checkpoints/last.ckpt"
    tested = command(evaluate.main, f"ckpt_path={checkpoint}")
    assert tested.code == 0, tested.err
    assert read_run(tested.directory)["metrics"]["test/auroc"] == one["test/auroc"][-1][1]
    result = command(landscape.main, f"ckpt_path={checkpoint}", "batches=1", "points=3")
    assert result.code == 0, result.err


def test_a_file_of_ones_own(command) -> None:
    inputs, targets = generate("linear", 200, 0.5)
    lines = [f"{c},{i},{'yes' if y else 'no'}" for (c, i), y in zip(inputs, targets, strict=True)]
    Path("mine.csv").write_text("\n".join(["grade,score,hired", *lines]))
    columns = ("data.path=mine.csv", "data.features=[grade,score]", "data.target=hired")
    result = command(train.main, *SHORT, *columns)
    assert result.code == 0, result.err
    data = read_run(result.directory)["data"]
    assert (data["source"], data["positive"], data["test"]) == ("mine.csv", "yes", 40)
    result = command(train.main, *SHORT, "data.path=mine.csv")
    assert result.code == 1
    assert "got grade, score, hired" in result.err and "`data.features`" in result.err


@pytest.mark.slow
@pytest.mark.parametrize("law", ["linear", "nonlinear"])
def test_auroc_beside_logistic_regression(command, law) -> None:
    """Within .01 of it on its own law, and far above on the other.

    In 3,000 steps seeds 1 to 5 reach .8555-.8557 where it has .8556, .9087-.9104 where it has
    .7678; in these 600, seeds 3 and 4 do not come to the end of the second law.
    """
    from hydra import compose, initialize_config_module
    from hydra.utils import instantiate

    result = command(
        train.main,
        "+experiment=placement",
        f"data.law={law}",
        "trainer.max_steps=600",
        "trainer.val_check_interval=600",
        "callbacks=[]",
        "extras.figures=false",
    )
    assert result.code == 0, result.err
    with initialize_config_module("bn_lightning.conf", version_base="1.3"):
        data = compose("train", ["+experiment=placement", f"data.law={law}", "paths.output_dir=."])
    module = instantiate(data.data)
    module.setup("fit")
    train_set, test_set = module.train_dataloader(), module.test_dataloader()
    reference = LogisticRegression().fit(train_set.inputs.numpy(), train_set.targets.numpy())
    scores = reference.decision_function(test_set.inputs.numpy())
    expected = roc_auc_score(test_set.targets.numpy(), scores)
    found = read_run(result.directory)["metrics"]["test/auroc"]
    assert found > expected + 0.1 if law == "nonlinear" else abs(found - expected) < 0.01
