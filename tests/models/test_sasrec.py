"""What is SASRec's own; what it shares with other recommenders of item ids is in test_sequence_recommenders.py."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from data.batches import TrainingSequences
from models.sasrec import SASRecConfig
from tests.models.test_sequence_recommenders import WINDOW, histories, one_user, recommender


def test_the_newest_event_always_has_the_last_position() -> None:
    model = recommender(SASRecConfig(window=WINDOW))
    batch = histories([5, 9], list(range(1, WINDOW + 1)), [])
    positions = model.positions(batch)
    assert positions[0].tolist() == [WINDOW - 1, WINDOW, 0, 0, 0, 0]
    assert positions[1].tolist() == list(range(1, WINDOW + 1))
    assert positions[2].tolist() == [0] * WINDOW


def test_training_and_evaluation_read_the_same_states() -> None:
    """The state that trains the last target is the one that ranks for it."""
    model = recommender(SASRecConfig(hidden_size=8, window=WINDOW)).eval()
    trained = TrainingSequences(one_user(5), WINDOW).collate(np.array([0]), 0)
    assert trained.items.tolist() == [[1, 2, 3, 4]]
    assert trained.labelled is not None
    assert trained.targets is not None
    assert trained.targets.tolist() == [2, 3, 4, 5]
    for slot, target in zip(trained.labelled.tolist(), trained.targets.tolist(), strict=True):
        # The same events at the same positions, as evaluation would see them in a window that ends later.
        states = model.encode(trained.items[:, : slot + 1], model.positions(trained)[:, : slot + 1])
        log_likelihood = (states[0, -1] @ model.item_embedding.weight[1:].T).log_softmax(0)[target - 1]
        single = replace(trained, labelled=torch.tensor([slot]), targets=torch.tensor([target]), count=1)
        torch.testing.assert_close(model(single).total, -log_likelihood)


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ValueError, match=r"--method\.num_heads"):
        SASRecConfig(hidden_size=10, num_heads=3)
