"""Heartbeats: what each process of a run says about itself, and when the others last heard it."""

import json
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Literal

from torch.distributed import DistError, DistNetworkError, Store

# "here" works or waits; "left" has done its part; "failed" ends by its own error; "lost" ends because of another rank.
State = Literal["here", "left", "failed", "lost"]


@dataclass(frozen=True)
class Beat:
    """One process at one moment, as it tells the others."""

    number: int  # counts the beats: a process whose number stands still is not heard
    host: str
    pid: int
    position: int  # points passed that all processes pass in the same order
    place: str  # the last of them, in words: "step 7"
    idle: float  # seconds since the main thread last moved
    line: str  # of the main thread: "sasrec.py:120 forward"
    state: State
    words: str  # why it ends


@dataclass(frozen=True)
class Peer:
    """Another process of the run, as it was last heard."""

    rank: int
    beat: Beat | None  # None: it has never been heard of
    heard: float  # time.monotonic() of the last new beat, or of the first look

    def silence(self, now: float) -> float:
        """Return the seconds since the last new beat."""
        return now - self.heard

    def idle(self, now: float) -> float:
        """Return the seconds since its main thread moved."""
        return now - self.heard + (self.beat.idle if self.beat else 0.0)

    def __str__(self) -> str:
        where = f" (host {self.beat.host}, pid {self.beat.pid})" if self.beat else ""
        return f"rank {self.rank}{where}"


class Heartbeats:
    """The thread that talks to the store, and the only one: on a cut network it may be stuck there for ever.

    Whoever judges reads its attributes, each replaced as a whole. The others are read only while `observing`, so that
    an undisturbed run costs the store one small write a process and period.
    """

    def __init__(
        self, store: Store, rank: int, num_processes: int, period: float, describe: Callable[[int], Beat]
    ) -> None:
        self._store, self._rank, self._period, self._describe = store, rank, period, describe
        self._others = [other for other in range(num_processes) if other != rank]
        self._wake, self._stopping, self._number = threading.Event(), False, 0
        self.observing = False
        self.peers: list[Peer] = []  # of this observation, in the order of ranks
        self.answered = time.monotonic()  # when the store last did
        self.trouble = ""  # why it does not, in its own words
        self.told: State | None = None  # the last state that the store has taken
        self._thread = threading.Thread(target=self._run, name="heartbeats", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def forget(self) -> None:
        """Observe anew: this process was stopped for a while, so it cannot know who was silent."""
        self.peers, self.answered = [], time.monotonic()

    def tell(self, state: State, seconds: float) -> None:
        """Publish now, and wait up to so long until the store has it."""
        end = time.monotonic() + seconds
        while self.told != state and self._thread.is_alive() and time.monotonic() < end:
            self._wake.set()
            time.sleep(0.01)

    def stop(self, seconds: float) -> None:
        self._stopping = True
        self._wake.set()
        self._thread.join(seconds)

    def _run(self) -> None:
        while not self._stopping:
            try:
                self._beat()
                self.peers = self._observe() if self.observing else []
                self.answered = time.monotonic()
            except DistError as error:  # from now on `answered` grows old
                self.trouble = str(error).splitlines()[0]
                if isinstance(error, DistNetworkError):
                    return  # such a connection does not come back, and each further try writes a page of warnings
            self._wake.wait(self._period)
            self._wake.clear()

    def _beat(self) -> None:
        self._number += 1
        beat = self._describe(self._number)
        self._store.set(str(self._rank), json.dumps(asdict(beat)))
        self.told = beat.state

    def _observe(self) -> list[Peer]:
        names = [str(rank) for rank in self._others]
        if self._store.check(names):
            texts: list[bytes | None] = [*self._store.multi_get(names)]
        else:  # a get would wait for the ones that were never heard of
            texts = [self._store.get(name) if self._store.check([name]) else None for name in names]
        beats = [Beat(**json.loads(text)) if text else None for text in texts]
        known, now = {peer.rank: peer for peer in self.peers}, time.monotonic()
        return [
            known[rank] if rank in known and known[rank].beat == beat else Peer(rank, beat, now)
            for rank, beat in zip(self._others, beats, strict=True)
        ]
