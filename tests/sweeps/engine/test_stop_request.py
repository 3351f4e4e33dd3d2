"""One Ctrl-C, two, and SIGTERM."""

import signal
import threading

import pytest

from bn_lightning.sweeps.engine.stop_request import StopRequest


@pytest.fixture(autouse=True)
def handlers():
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    yield before
    for signum, handler in before.items():
        signal.signal(signum, handler)


class Ended(BaseException):
    """Raised by the handler of the program."""


def end(signum, frame):
    raise Ended


def test_once_asks(capfd):
    signal.signal(signal.SIGINT, end)
    stop = StopRequest()
    with stop.on_signals():
        assert not stop.is_set()
        signal.raise_signal(signal.SIGINT)
        assert stop.is_set()
    assert "Ctrl-C again" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGINT) is end


@pytest.mark.parametrize(
    "signums",
    [(signal.SIGINT, signal.SIGINT), (signal.SIGTERM,), (signal.SIGINT, signal.SIGTERM)],
    ids=["twice", "TERM", "both"],
)
def test_twice_ends_as_the_program_does(signums):
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, end)
    stop = StopRequest()
    with pytest.raises(Ended), stop.on_signals():
        for signum in signums:
            signal.raise_signal(signum)
    assert stop.is_set()
    assert signal.getsignal(signal.SIGTERM) is end


@pytest.mark.parametrize("before", [signal.SIG_DFL, signal.SIG_IGN], ids=["default", "ignored"])
def test_without_a_handler_it_ends_in_order(before):
    """The default action would end the process before the study is updated."""
    signal.signal(signal.SIGTERM, before)
    with pytest.raises(SystemExit) as end, StopRequest().on_signals():
        signal.raise_signal(signal.SIGTERM)
    assert end.value.code == 143


def test_another_thread_handles_no_signals(handlers):
    def body():
        with StopRequest().on_signals():
            pass

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGINT) is handlers[signal.SIGINT]
