"""Who is to blame: whoever has ended, else whoever is silent, else whoever is behind, else nobody by name."""

from dataclasses import replace

import pytest

from trainers.heartbeats import Beat, Peer
from trainers.verdict import Limits, dead, late

NOW = 1000.0
BEAT = Beat(9, "b", 123, 7, "step 7", 60.0, "loop.py:104 _train_step", "here", "")


def peer(rank: int, silent: float = 0.5, **changes: object) -> Peer:
    return Peer(rank, replace(BEAT, **changes), NOW - silent)


def test_nobody_is_dead_while_all_are_heard() -> None:
    assert dead([peer(1), peer(2)], NOW, 30) is None


def test_a_silent_rank_is_dead_and_the_others_are_not() -> None:
    found = dead([peer(1), peer(2, silent=45)], NOW, 30)
    assert found is not None
    assert found.startswith("rank 2 (host b, pid 123) has not been heard of for 45 s, last at step 7")
    assert "rank 1" not in found


def test_a_rank_that_was_never_heard_of_is_named_too() -> None:
    assert (dead([Peer(3, None, NOW - 31)], NOW, 30) or "").startswith("rank 3 has not been heard of for 31 s:")


def test_a_rank_that_failed_is_quoted_at_once() -> None:
    ranks = [peer(1, silent=45), peer(2, state="failed", words="ValueError: NaN")]
    assert dead(ranks, NOW, 30) == "rank 2 (host b, pid 123) ended: ValueError: NaN"


def test_a_rank_that_has_done_its_part_may_be_silent() -> None:
    assert dead([peer(1, silent=4000, state="left")], NOW, 30) is None


def test_a_rank_that_ended_because_of_another_is_believed_and_not_blamed() -> None:
    """Whoever judges last finds most of the others gone, for they judged before."""
    assert dead([peer(1, silent=45, state="lost", words="rank 2 is dead")], NOW, 30) == "rank 2 is dead"


def test_the_rank_behind_is_named_alone() -> None:
    found = late(peer(0, position=8), [peer(1, line="sasrec.py:9 forward"), peer(2, position=8)], NOW)
    assert found == "rank 1 (host b, pid 123) has not come past step 7 for 60 s: it is in sasrec.py:9 forward"


def test_a_rank_names_itself_when_it_is_behind() -> None:
    assert late(peer(0), [peer(1, position=8)], NOW).startswith("rank 0 (host b, pid 123) has not come past step 7")


def test_where_all_are_equal_all_lines_are_shown() -> None:
    lines = late(peer(1), [peer(0)], NOW).splitlines()
    assert lines[0].startswith("no process moves")
    assert [line[:6] for line in lines[1:]] == ["rank 0", "rank 1"]


@pytest.mark.parametrize(("timeout", "silent", "roll_call"), [(1800, 60, 10), (60, 30, 10), (6, 3, 3)])
def test_the_dead_are_found_sooner_than_the_late(timeout: float, silent: float, roll_call: float) -> None:
    assert Limits.of(timeout) == Limits(timeout, silent, roll_call)
