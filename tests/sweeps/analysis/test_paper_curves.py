"""The paper's curves, and which runs they stand beside."""

from typing import Any

import pytest

from bn_lightning.sweeps.analysis.paper_curves import is_paper_experiment, paper_accuracy


def test_points_of_the_table_in_the_paper() -> None:
    curves = {arm: dict(points) for arm, points in paper_accuracy().items()}
    assert curves.keys() == {"batch", "none"}
    assert curves["none"][8071] == 0.91 and curves["none"][44086] == 0.9723
    assert curves["batch"][4024] == 0.9529 and curves["batch"][49051] == 0.9816
    for points in paper_accuracy().values():
        steps = [step for step, _ in points]
        assert steps == sorted(steps) and len(steps) > 60


@pytest.mark.parametrize(
    ("change", "is_it"),
    [
        ({}, True),
        ({"source": "digits"}, False),
        ({"widths": [100, 100]}, False),
        ({"activation": "relu"}, False),
        ({"batch_size": 64}, False),
        ({"norm_position": "after"}, False),
        ({"max_steps": 1000}, False),
    ],
    ids=["it is", "digits", "two layers", "relu", "batches of 64", "after", "1,000 steps"],
)
def test_which_experiment_is_the_papers(change: dict[str, Any], is_it: bool) -> None:
    values: dict[str, Any] = {
        "source": "mnist",
        "widths": [100, 100, 100],
        "activation": "sigmoid",
        "batch_size": 60,
        "norm_position": "before",
        "max_steps": 50_000,
    } | change
    network = {key: values[key] for key in ("widths", "activation", "norm_position")}
    config = {
        "model": {"network": network},
        "data": {"batch_size": values["batch_size"]},
        "trainer": {"max_steps": values["max_steps"]},
    }
    record = {"data": {"source": values["source"]}, "config": config}
    assert is_paper_experiment(record) is is_it
    assert not is_paper_experiment({"config": {}, "data": None})
