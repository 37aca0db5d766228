"""The watchdog of a run of several processes: a killed, hung or cut-off rank ends the whole run, and is named.

A collective waits for every rank, and no backend says for whom: gloo names a connection, NCCL nothing at all. So each
process says once a second on the store of the rendezvous how far it is (trainers/heartbeats.py). When this process
has not moved for a while, a second thread, which never touches the network, judges from what was last heard.
"""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import NoReturn, TypeVar

from torch.distributed import DistError, PrefixStore, Store

from .heartbeats import Beat, Heartbeats, Peer, State
from .rendezvous import endpoint, meet
from .verdict import Limits, dead, late

# EX_TEMPFAIL of <sysexits.h>: the run itself is in order, and goes on from its last checkpoint when started again.
EXIT_LOST_RANK = 75
LONGEST_PERIOD = 1.0  # seconds between two heartbeats
# How gloo says that a connection is gone, in a plain RuntimeError.
CONNECTION_ERRORS = ("closed by peer", "reset by peer", "Broken pipe", "Timed out waiting", "Connection refused")

Item = TypeVar("Item")


class Unwatched:
    """One process: there is nobody to wait for, so nothing is watched and no thread is started."""

    def arrive(self, place: str) -> None:
        """Note that the main thread has come to a place that all ranks pass in the same order."""

    def tick(self) -> None:
        """Note that the main thread moves."""

    def each(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yield the items, ticking at each."""
        for item in items:
            self.tick()
            yield item

    @contextmanager
    def guarding(self) -> Iterator[None]:
        """A block in which the loss of another rank ends this process with `EXIT_LOST_RANK`, naming the rank."""
        yield

    @contextmanager
    def watching(self) -> Iterator[None]:
        """`guarding()` around the last thing that this process does with the others."""
        with self.guarding():
            yield


class Watchdog(Unwatched):
    """Watches from the start on; `guarding()` also turns errors of connections into the names of ranks.

    `timeout` is in seconds: once no rank has moved for so long, all of them end.
    """

    def __init__(self, store: Store, rank: int, num_processes: int, timeout: float) -> None:
        self._rank, self._limits = rank, Limits.of(timeout)
        self._period = min(LONGEST_PERIOD, timeout / 10)
        self._position, self._place, self._moved = 0, "the start", time.monotonic()
        self._state: State = "here"
        self._words = ""
        self._main = threading.main_thread().ident or 0
        self._over, self._ending, self._calling_the_roll = threading.Event(), threading.Lock(), False
        self._heartbeats = Heartbeats(store, rank, num_processes, self._period, self._beat)
        self._heartbeats.start()
        threading.Thread(target=self._judge, name="watchdog", daemon=True).start()

    def arrive(self, place: str) -> None:
        self._place, self._position = place, self._position + 1
        self.tick()

    def tick(self) -> None:
        self._moved = time.monotonic()

    @contextmanager
    def guarding(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            if is_connection_error(error):
                self._call_the_roll(error)
            self._leave("failed", f"{type(error).__name__}: {error}")
            raise

    @contextmanager
    def watching(self) -> Iterator[None]:
        with self.guarding():
            yield
        self._leave("left", "")

    def _beat(self, number: int) -> Beat:
        idle = time.monotonic() - self._moved
        place = self._position, self._place
        return Beat(
            *(number, socket.gethostname(), os.getpid()), *place, idle, _line(self._main), self._state, self._words
        )

    def _leave(self, state: State, words: str) -> None:
        """Tell the others, and watch no more."""
        self._over.set()
        self._words, self._state = words, state
        self._heartbeats.tell(state, seconds=2)
        self._heartbeats.stop(seconds=2)

    def _judge(self) -> None:
        """Look at this process and at what was heard of the others, until the run is over; runs in a thread."""
        looked = time.monotonic()
        while not self._over.wait(self._period / 2):
            now = time.monotonic()
            if now - looked > self._limits.silent:  # this process itself was stopped, and the clock went on
                self._moved = now
                self._heartbeats.forget()
            looked = now
            idle = now - self._moved
            self._heartbeats.observing = self._calling_the_roll or idle > 2 * self._period
            if idle >= self._limits.roll_call and (verdict := self._verdict(idle, now)) is not None:
                self._end(verdict)

    def _verdict(self, idle: float, now: float) -> str | None:
        peers, limits = self._heartbeats.peers, self._limits
        if (since := now - self._heartbeats.answered) > 3 * self._period:  # nobody can be heard
            return self._no_rendezvous(now) if min(idle, since) >= limits.silent else None
        if (found := dead(peers, now, limits.silent)) is not None:
            return found
        if idle >= limits.still and peers and all(_stands(peer, limits.still, now) for peer in peers):
            limit = f"nothing has moved for {limits.still:g} s (--train.timeout_seconds)"
            return f"{late(self._own(now), peers, now)}\n{limit}"
        return None

    def _call_the_roll(self, error: BaseException) -> NoReturn:
        """Find out in a few seconds who is not there any more, and end."""
        # The launcher stops all ranks as soon as it sees one end; this one is about to end anyway.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        self._calling_the_roll = self._heartbeats.observing = True
        end = time.monotonic() + self._limits.roll_call + 2 * self._period
        verdict = None
        while verdict is None and (now := time.monotonic()) < end:
            time.sleep(self._period / 4)
            if (since := now - self._heartbeats.answered) <= 3 * self._period:
                verdict = dead(self._heartbeats.peers, now, self._limits.roll_call)
            elif since >= self._limits.roll_call:
                verdict = self._no_rendezvous(now)
        if verdict is None:
            answers = late(self._own(now), self._heartbeats.peers, now)
            verdict = f"a connection between the ranks failed, while all of them answer the rendezvous:\n{answers}"
        self._end(f"{verdict}\nnoticed by: {str(error).splitlines()[0]}")

    def _no_rendezvous(self, now: float) -> str:
        return (
            f"the rendezvous at {endpoint()} has not answered for {now - self._heartbeats.answered:.0f} s: has rank 0 "
            f"or its host ended, or is the network cut? ({self._heartbeats.trouble or 'no answer at all'})"
        )

    def _own(self, now: float) -> Peer:
        return Peer(self._rank, self._beat(0), now)

    def _end(self, verdict: str) -> NoReturn:
        """Say why, to the user and to the other ranks, and end at once: the main thread may be stuck for ever."""
        self._ending.acquire()  # never released: whichever thread comes first speaks
        self._words, self._state = verdict, "lost"
        self._heartbeats.tell("lost", seconds=1)
        print(f"error: rank {self._rank} ends, since it waits in vain:\n{verdict}", file=sys.stderr)
        print("Started again, the same command goes on from the last checkpoint.", file=sys.stderr, flush=True)
        os._exit(EXIT_LOST_RANK)


def join(timeout: float) -> Unwatched:
    """Meet the other processes that the launcher has started, within `timeout` seconds, and watch over them.

    Ends the process with `EXIT_LOST_RANK` and a message when they do not all come.
    """
    rank, num_processes = os.environ.get("RANK"), int(os.environ.get("WORLD_SIZE", "1"))
    if rank is None or num_processes == 1:
        return Unwatched()
    try:
        store = meet(timeout)
    except DistError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        os._exit(EXIT_LOST_RANK)
    # A launcher that starts the processes anew keeps its store.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return Watchdog(PrefixStore(f"shardrec/watchdog/{attempt}", store), int(rank), num_processes, timeout)


def collective_timeout(timeout: float) -> timedelta:
    """Return how long the backend waits in a collective: a little longer, so that the watchdog speaks first."""
    return timedelta(seconds=timeout + max(10.0, 0.1 * timeout))


def is_connection_error(error: BaseException) -> bool:
    """Whether a collective failed because of another rank, rather than this process by itself."""
    return isinstance(error, DistError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in CONNECTION_ERRORS)
    )


def _stands(peer: Peer, seconds: float, now: float) -> bool:
    return peer.beat is None or peer.beat.state != "here" or peer.idle(now) >= seconds


def _line(thread: int) -> str:
    """Return where a thread is: "loop.py:104 _train_step"."""
    frame = sys._current_frames().get(thread)
    if frame is None:
        return "no line at all"
    return f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno} {frame.f_code.co_name}"
