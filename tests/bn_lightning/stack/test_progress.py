"""What the progress of a stack shows, by a clock of its own."""

import io

import pytest

from bn_lightning.stack.progress import StackProgress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock():
    class Clock:
        now = 100.0

        def __call__(self):
            return self.now

    return Clock()


def trained(output, clock, is_live, seconds, steps=40):
    """A stack of 4 members of which 1 leaves after step 20."""
    progress = StackProgress(steps, is_live=is_live, clock=clock, output=output)
    for step in range(1, steps + 1):
        clock.now += seconds
        progress.update(step, 4 if step <= 20 else 3)
    progress.end()
    return output.getvalue()


def test_a_log_has_a_line_at_times(clock):
    assert trained(io.StringIO(), clock, True, 2.0).splitlines() == [
        "4 members at step 15 of 40, 2 steps/s together, 0:00:50 left",
        "3 members at step 30 of 40, 2 steps/s together, 0:00:20 left",
    ]


def test_a_short_training_has_none(clock):
    assert trained(io.StringIO(), clock, True, 0.125) == ""


def test_a_terminal_has_one_line_that_is_rewritten_and_removed(clock):
    text = trained(Terminal(), clock, True, 0.125)
    shown = text.split("\r")
    assert "\n" not in text
    assert shown[1] == "4 members at step 4 of 40, 32 steps/s together, 0:00:04 left\x1b[K"
    assert shown[-2].startswith("3 members at step 40 of 40, 24 steps/s together, 0:00:00 left")
    assert shown[-1] == "\x1b[K"


def test_a_terminal_with_another_display_has_lines(clock):
    assert len(trained(Terminal(), clock, False, 2.0).splitlines()) == 2
