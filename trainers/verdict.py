"""Who is to blame when a run of several processes stands still: pure functions of the last heartbeats."""

from collections.abc import Sequence
from dataclasses import dataclass

from .heartbeats import Peer

LONGEST_SILENCE = 60.0  # seconds: a process whose interpreter is busy for that long is taken for dead
LONGEST_ROLL_CALL = 10.0  # seconds: how long a failed connection is looked into


@dataclass(frozen=True)
class Limits:
    """Seconds that the processes of a run may stand still, that one may be silent, and that a roll call takes."""

    still: float
    silent: float
    roll_call: float

    @classmethod
    def of(cls, timeout: float) -> "Limits":
        """Return the limits for `--train.timeout_seconds`: whoever is dead is found in half that time, or sooner."""
        return cls(timeout, min(LONGEST_SILENCE, timeout / 2), min(LONGEST_ROLL_CALL, timeout / 2))


def dead(peers: Sequence[Peer], now: float, limit: float) -> str | None:
    """Say which peers have ended, with their own words where they left any, or have been silent for `limit` s."""
    ended = [f"{peer} ended: {peer.beat.words}" for peer in peers if peer.beat and peer.beat.state == "failed"]
    if ended:
        return "\n".join(ended)
    silent = [peer for peer in peers if peer.silence(now) >= limit and (not peer.beat or peer.beat.state == "here")]
    if silent:
        return "\n".join(
            f"{peer} has not been heard of for {peer.silence(now):.0f} s"
            + (f", last at {peer.beat.place}" if peer.beat else "")
            + ": was it killed (out of memory?) or stopped, or is its host or network down?"
            for peer in silent
        )
    # Whoever has left because of another knows better than this process, which came later.
    reports = [peer.beat.words for peer in peers if peer.beat and peer.beat.state == "lost"]
    return reports[0] if reports else None


def late(own: Peer, peers: Sequence[Peer], now: float) -> str:
    """Say who holds the others up, once no process moves: those behind, or all where none is."""
    everyone = sorted([own, *(peer for peer in peers if peer.beat and peer.beat.state == "here")], key=lambda p: p.rank)
    positions = [peer.beat.position for peer in everyone if peer.beat]
    behind = [peer for peer in everyone if peer.beat and peer.beat.position < max(positions)]
    lines = [
        f"{peer} has not come past {peer.beat.place} for {peer.idle(now):.0f} s: it is in {peer.beat.line}"
        for peer in behind or everyone
        if peer.beat
    ]
    if not behind:
        lines.insert(0, "no process moves, and none is behind the others:")
    return "\n".join(lines)
