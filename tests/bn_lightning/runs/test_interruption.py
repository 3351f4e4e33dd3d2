"""SIGINT and SIGTERM as an exception."""

import signal
from collections.abc import Iterator

import pytest

from bn_lightning.runs.interruption import SIGNALS, Interrupted, handle_signals, raise_interrupted

signums = pytest.mark.parametrize("signum", SIGNALS, ids=[signum.name for signum in SIGNALS])


@pytest.fixture(autouse=True)
def restore() -> Iterator[None]:
    before = {signum: signal.getsignal(signum) for signum in SIGNALS}
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


@pytest.mark.parametrize(
    ("signum", "name", "code"),
    [(signal.SIGINT, "SIGINT", 130), (signal.SIGTERM, "SIGTERM", 143)],
    ids=["SIGINT", "SIGTERM"],
)
def test_it_says_which_it_was(signum: int, name: str, code: int) -> None:
    interrupted = Interrupted(signum)
    assert str(interrupted) == name
    assert interrupted.signum == signum
    assert interrupted.exit_code == code


@signums
def test_a_signal_inside_the_block_is_raised_where_it_arrives(signum: int) -> None:
    reached = []
    with pytest.raises(Interrupted) as caught, handle_signals(raise_interrupted):
        try:
            signal.raise_signal(signum)
            reached.append("after")
        except Exception:
            reached.append("mended")
    assert caught.value.signum == signum
    assert not reached


@signums
def test_a_handler_of_ones_own(signum: int) -> None:
    seen: list[int] = []
    with handle_signals(lambda number, frame: seen.append(number)):
        signal.raise_signal(signum)
        signal.raise_signal(signum)
    assert seen == [signum, signum]


@pytest.mark.parametrize("ending", ["end", "error", "interruption"])
def test_what_was_before_is_restored(ending: str) -> None:
    def mine(signum: int, frame: object) -> None:
        pass

    previous = {signal.SIGINT: mine, signal.SIGTERM: signal.SIG_IGN}
    for signum, handler in previous.items():
        signal.signal(signum, handler)
    try:
        with handle_signals(raise_interrupted):
            if ending == "error":
                raise ValueError
            if ending == "interruption":
                signal.raise_signal(signal.SIGTERM)
    except (ValueError, Interrupted):
        pass
    assert {signum: signal.getsignal(signum) for signum in SIGNALS} == previous


def test_blocks_nest() -> None:
    seen: list[str] = []
    with handle_signals(lambda *_: seen.append("outer")):
        with handle_signals(lambda *_: seen.append("inner")):
            signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
    assert seen == ["inner", "outer"]
