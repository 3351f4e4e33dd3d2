"""Settings that several claims share: learning rates, moments of training, depths."""

from collections.abc import Callable, Iterable, Mapping

from bn_lightning.claims.design import Overrides, Setting


def at_rates(
    label: str,
    panel: str,
    overrides: Overrides,
    rates: Iterable[float],
    steps: int,
    arms: tuple[str, ...] = (),
) -> dict[str, Setting]:
    """Return a trained setting for each learning rate, label -> setting.

    Args:
        label: of the settings, before the rate.
        panel: of the figure, over rates.
        overrides: of all of them.
        rates: learning rates.
        steps: of training.
        arms: that are trained; () for all.
    """
    return {
        f"{label}, rate {rate:g}": Setting(
            (*overrides, f"optimizer.lr={rate}", f"trainer.max_steps={steps}"),
            rate,
            panel,
            arms=arms,
        )
        for rate in rates
    }


def at_moments(rates: Mapping[str, float], moments: Iterable[int]) -> dict[str, Setting]:
    """Return settings at the start of training and at moments of it, label -> setting.

    Args:
        rates: activation -> learning rate; a panel of the figure each, over steps.
        moments: in steps.
    """
    found = {}
    for activation, rate in rates.items():
        common = (f"model.network.activation={activation}", f"optimizer.lr={rate}")
        found[f"{activation}, start"] = Setting(common, 0, activation, False)
        for step in moments:
            found[f"{activation}, step {step}"] = Setting(
                (*common, f"trainer.max_steps={step}"), step, activation
            )
    return found


def at_depths(
    override: Callable[[int], str],
    initial: Iterable[int],
    trained: Iterable[int],
    rates: Iterable[float],
    steps: int,
) -> dict[str, Setting]:
    """Return settings of networks of several depths, initial and trained, label -> setting.

    Args:
        override: takes a depth; returns the override that sets it.
        initial: depths of networks that are measured before training.
        trained: depths of networks that are trained at each rate.
        rates: learning rates.
        steps: of training.
    """
    found = {f"depth {depth}": Setting((override(depth),), depth, "", False) for depth in initial}
    for depth in trained:
        for rate in rates:
            found[f"depth {depth}, rate {rate:g}"] = Setting(
                (override(depth), f"optimizer.lr={rate}", f"trainer.max_steps={steps}"),
                depth,
                f"rate {rate:g}",
            )
    return found
