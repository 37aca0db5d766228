"""A disk that is full or may not be written: the run ends with the reason, and its last good checkpoint stays."""

import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from benchmarks.processes import Run, run, start_ranks
from tests.runs import SMALL, losses, results
from trainers.checkpoint import Checkpoints, verify

SIZE = "8m"  # a run writes a few hundred kB


def _mount(*arguments: str) -> None:
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small file system of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    _mount("-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder))
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(*SMALL, output=tmp_path_factory.mktemp("undisturbed") / "run").folder


class FullAt:
    """Fills the disk right before the n-th checkpoint is written."""

    def __init__(self, call: int) -> None:
        self.call = call

    def __call__(self, rank: int = 0) -> None:
        save, calls = Checkpoints.save, 0

        def fill_and_save(self_: Checkpoints, *arguments: object) -> None:
            nonlocal calls
            calls += 1
            if calls == self.call:
                _fill(self_.folder.parent)
            save(self_, *arguments)  # type: ignore[arg-type]

        Checkpoints.save = fill_and_save  # type: ignore[method-assign, assignment]


def _fill(folder: Path) -> None:
    with suppress(OSError), (folder / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def assert_goes_on(stopped: list[Run], undisturbed: Path) -> None:
    folder = stopped[0].folder
    assert "cannot be written" in stopped[0].text()
    assert "The last one there is whole" in stopped[0].text()
    assert not list((folder / "checkpoints").glob(".step-*")), "what was begun is gone, so the disk has its room back"
    newest = Checkpoints(folder / "checkpoints").latest()
    assert newest is not None
    assert verify(newest).step == 6
    (folder / "filler").unlink(missing_ok=True)
    again = run(*SMALL, output=folder)
    assert again.process.exitcode == 0, again.text()
    assert "resuming" in again.text()
    assert losses(folder) == losses(undisturbed)
    assert results(folder)["test"] == results(undisturbed)["test"]


def test_a_full_disk(disk: Path, undisturbed: Path) -> None:
    stopped = run(*SMALL, output=disk / "run", before=FullAt(4))
    assert stopped.process.exitcode == 1
    assert "No space left on device" in stopped.text()
    assert_goes_on([stopped], undisturbed)


@pytest.mark.slow
def test_a_full_disk_ends_every_process(disk: Path) -> None:
    ranks = start_ranks(*SMALL, output=disk, before=FullAt(4))  # their logs are beside it
    assert [rank.wait() for rank in ranks] == [1, 1]
    assert "No space left on device" in ranks[0].text()
    assert "the main process could not write" in ranks[1].text()


def _read_only_from_the_fourth_checkpoint() -> None:
    save, calls = Checkpoints.save, 0

    def save_or_lock(self: Checkpoints, *arguments: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 4:
            self.folder.rename(self.folder.with_name("was here"))
            self.folder.touch()  # a file where the folder has to be: nobody may write below it, root neither
        save(self, *arguments)  # type: ignore[arg-type]

    Checkpoints.save = save_or_lock  # type: ignore[method-assign, assignment]


def test_a_folder_that_cannot_be_written(tmp_path: Path, undisturbed: Path) -> None:
    stopped = run(*SMALL, output=tmp_path / "run", before=_read_only_from_the_fourth_checkpoint)
    assert stopped.process.exitcode == 1
    folder = stopped.folder
    (folder / "checkpoints").unlink()
    (folder / "was here").rename(folder / "checkpoints")
    assert_goes_on([stopped], undisturbed)


@pytest.mark.slow
def test_a_read_only_disk_from_the_start(disk: Path) -> None:
    _mount("-o", "remount,ro", str(disk))
    stopped = run(*SMALL, output=disk)
    assert stopped.process.exitcode == 1
    assert "Read-only file system" in stopped.text()
    assert "--output" in stopped.text()
