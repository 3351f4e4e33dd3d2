"""An arm keeps its name and its color, whatever it is compared with."""

from bn_lightning.sweeps.analysis.arms import label_of, ordered, style_of


def test_labels() -> None:
    assert label_of("batch") == "with BatchNorm"
    assert label_of("none") == "without BatchNorm"
    assert label_of("layer") == "layer"


def test_order_does_not_depend_on_the_arguments() -> None:
    assert ordered(["zeta", "none", "alpha", "batch", "none"]) == ["batch", "none", "alpha", "zeta"]
    assert ordered(["batch", "alpha", "zeta", "none"]) == ["batch", "none", "alpha", "zeta"]


def test_an_arm_has_its_colour_alone_and_in_company() -> None:
    assert style_of("none") == style_of("none", ["none", "batch"]) == style_of("none", ["x"])
    assert style_of("none").color != style_of("batch").color
    assert style_of("b", ["a", "b"]) == style_of("b", ["b", "a"])


def test_many_arms_are_told_apart() -> None:
    names = [f"{i:02}" for i in range(25)]
    styles = {(style_of(n, names).color, style_of(n, names).line) for n in names}
    assert len(styles) == 25


def test_the_second_run_of_an_arm_has_its_colour_and_another_line() -> None:
    first, second = style_of("batch"), style_of("batch", turn=1)
    assert first.color == second.color and first.line != second.line
