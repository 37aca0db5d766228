"""Signals: noted where work must not be torn, obeyed at once elsewhere, and handlers are given back."""

import signal

import pytest

from trainers.signals import SIGNALS, Interrupted, Stop


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 138)])
def test_a_signal_interrupts_at_once(number: signal.Signals, exit_code: int) -> None:
    with pytest.raises(Interrupted, match=number.name) as interruption, Stop():
        signal.raise_signal(number)
        pytest.fail("the line after the signal ran")
    assert interruption.value.exit_code == exit_code


def test_a_deferred_signal_lets_the_block_finish_and_then_interrupts() -> None:
    done = []
    with pytest.raises(Interrupted), Stop() as stop, stop.deferred():
        signal.raise_signal(signal.SIGTERM)
        done.append("work")
        assert stop.number == signal.SIGTERM
        signal.raise_signal(signal.SIGTERM)  # launchers send it twice
        done.append("more work")
    assert done == ["work", "more work"]


def test_a_block_that_may_be_left_inside_a_deferring_one() -> None:
    done = []
    with pytest.raises(Interrupted), Stop() as stop, stop.deferred():
        with stop.at_once():
            done.append("before")
            signal.raise_signal(signal.SIGTERM)
            done.append("after")
        done.append("outside")
    assert done == ["before"]


def test_a_signal_that_came_before_such_a_block_keeps_it_from_starting() -> None:
    done = []
    with pytest.raises(Interrupted), Stop() as stop, stop.deferred():
        signal.raise_signal(signal.SIGTERM)
        done.append("saved")
        with stop.at_once():
            done.append("validated")
    assert done == ["saved"]


def test_deferring_resumes_after_such_a_block() -> None:
    done = []
    with pytest.raises(Interrupted), Stop() as stop, stop.deferred():
        with stop.at_once():
            pass
        signal.raise_signal(signal.SIGTERM)
        done.append("saved")
    assert done == ["saved"]


def test_nobodys_except_exception_swallows_it() -> None:
    with pytest.raises(Interrupted), Stop():
        try:
            signal.raise_signal(signal.SIGTERM)
        except Exception:
            pytest.fail("swallowed")


def test_a_second_signal_does_not_cut_the_clean_up_short() -> None:
    done = []
    with pytest.raises(Interrupted), Stop():
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            signal.raise_signal(signal.SIGTERM)
            done.append("cleaned up")
    assert done == ["cleaned up"]


def test_handlers_are_given_back() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with Stop():
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert [signal.getsignal(number) for number in SIGNALS] == before
