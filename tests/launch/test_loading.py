"""Loading a run: the same scores as after training, and a reason where there is nothing to load."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from launch.loading import histories_as_split, load_run, read_and_split, read_data_of


def test_a_folder_that_is_no_trained_run(trained: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    shutil.copytree(trained, runs / "good")
    (runs / "begun").mkdir()
    (runs / "begun" / "config.yaml").write_text("model: sasrec\n")
    for path, reason in [
        (runs / "absent", "does not exist"),
        (runs / "begun", f"is not finished: launch/train.py --config {runs / 'begun' / 'config.yaml'}"),
        (runs, "is not a run folder"),
    ]:
        with pytest.raises(SystemExit) as exit:
            load_run(path)
        message = str(exit.value.code)
        assert message.startswith(f"error: --run {path} {reason}")
        assert f"Trained runs: {runs / 'good'}" in message


def test_the_model_folder_says_what_was_trained(trained: Path, tmp_path: Path) -> None:
    """config.yaml may already be that of a longer training that goes on in this folder."""
    shutil.copytree(trained, tmp_path / "run")
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace("hidden_size: 16", "hidden_size: 32"))
    assert load_run(tmp_path / "run").config.method.hidden_size == 16


def test_data_that_has_changed_is_refused(trained: Path) -> None:
    run = load_run(trained)
    changed = dataclasses.replace(run.config, data=dataclasses.replace(run.config.data, sample_series=30))
    assert read_data_of(run).num_items == run.catalog.num_items
    with pytest.raises(SystemExit, match=rf"learned {run.catalog.num_items} items, and sample now has 180"):
        read_data_of(dataclasses.replace(run, config=changed))


def test_data_that_is_not_there_is_one_line(trained: Path, tmp_path: Path) -> None:
    data = dataclasses.replace(load_run(trained).config.data, source="no-such-set", root=tmp_path)
    with pytest.raises(SystemExit, match=r"^error: --data\.source no-such-set: no such file"):
        read_and_split(data)
    (tmp_path / "bad.csv").write_text("userId,movieId,rating,timestamp\n1,1,five,1\n")
    with pytest.raises(SystemExit, match=r"^error: Malformed rows: 1"):
        read_and_split(dataclasses.replace(data, source=str(tmp_path / "bad.csv")))


def test_a_history_is_scored_as_the_split_it_comes_from(trained: Path) -> None:
    run = load_run(trained)
    parts = read_data_of(run)
    targets = parts.test
    histories = [parts.history(int(u), int(p)) for u, p in zip(targets.user, targets.position, strict=True)]
    typed = histories_as_split(histories, run.catalog)
    rows = np.arange(len(histories))
    with torch.inference_mode():
        scores = [run.built.model(run.built.evaluation(s, "test").collate(rows, 0)) for s in (parts, typed)]
    torch.testing.assert_close(*scores)
