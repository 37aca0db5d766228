"""SIGTERM, SIGINT and SIGUSR1: a run that is asked to stop saves what it has, and says so."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self

# SIGUSR1 is what Slurm is asked to send some time before a job's end: see launch/slurm.sbatch.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Interrupted(BaseException):
    """A signal asked the run to stop. Not an `Exception`, so that nobody's `except Exception` swallows it."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_code = 128 + number  # as a shell reports it: 143 for SIGTERM, 138 for SIGUSR1


class Stop:
    """Turns the first signal into `Interrupted`: at once, or inside `deferred()` when the code there asks for it."""

    def __init__(self) -> None:
        self.number: int | None = None
        self._deferring = False

    def __enter__(self) -> Self:
        self._previous = {n: signal.signal(n, self._receive) for n in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Only note a signal in this block; one that nobody asked for is raised at its end."""
        with self._set(deferring=True):
            yield
        self.raise_if_requested()

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """A block inside `deferred()` that a signal may leave anywhere; one that was noted before it does so too."""
        with self._set(deferring=False):
            self.raise_if_requested()
            yield

    def raise_if_requested(self) -> None:
        if self.number is not None:
            raise Interrupted(self.number)

    @contextmanager
    def _set(self, deferring: bool) -> Iterator[None]:
        before, self._deferring = self._deferring, deferring
        try:
            yield
        finally:
            self._deferring = before

    def _receive(self, number: int, _frame: object) -> None:
        if self.number is None:  # a launcher may send it twice: what the first one started is left to finish
            self.number = number
            if not self._deferring:
                raise Interrupted(number)
