"""An interrupt that a library swallows is raised again."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from fedlab.run import interrupt


@pytest.fixture
def installed() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in interrupt.NUMBERS}
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whoever runs the tests may have it ignored, as nohup does
    interrupt.install()
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    interrupt._requested = interrupt._installed = False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_swallowed_interrupt_is_raised_at_the_next_check(number: int, installed: None):
    interrupt.check()
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), number)
    with pytest.raises(KeyboardInterrupt):
        interrupt.check()
    interrupt.install()
    interrupt.check()


def test_while_an_end_is_written_down_a_signal_waits(installed: None):
    with interrupt.deferred():
        os.kill(os.getpid(), signal.SIGTERM)
        interrupt.check()
    with pytest.raises(KeyboardInterrupt):
        interrupt.check()


def test_handlers_that_a_library_took_are_taken_back(installed: None):
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    interrupt.reinstall()
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGTERM)


def test_nothing_is_taken_that_was_not_installed():
    before = signal.getsignal(signal.SIGTERM)
    interrupt.reinstall()
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_hangup_that_is_ignored_stays_ignored(installed: None):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    interrupt.install()
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
