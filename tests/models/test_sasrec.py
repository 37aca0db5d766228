"""SASRec sees the past and nothing else, whatever the length of a history, and every loss teaches it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from data.batches import EvaluationSequences, SequenceBatch, TrainingSequences
from data.config import DataConfig
from data.negatives import UniformNegatives
from data.sources import read
from data.splits import Split, Targets, split
from models.sasrec import SASRec, SASRecConfig

WINDOW, ITEMS = 6, 20
VARIANTS = [
    pytest.param(SASRecConfig(hidden_size=8, num_heads=2, window=WINDOW, norm=norm, dropout=0.5), id=norm)
    for norm in ("original", "pre", "post")
]


def sasrec(config: SASRecConfig, num_items: int = ITEMS) -> SASRec:
    torch.manual_seed(0)
    # Far larger weights than at the start of training: what leaks is not lost in rounding.
    return SASRec(replace(config, initializer_range=0.5), num_items)


def histories(*sequences: list[int]) -> SequenceBatch:
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    items = torch.zeros(len(sequences), max(1, int(lengths.max())), dtype=torch.int64)
    for row, sequence in zip(items, sequences, strict=True):
        row[: len(sequence)] = torch.tensor(sequence)
    return SequenceBatch(items, lengths, row=torch.arange(len(sequences)))


def scores(model: SASRec, *sequences: list[int]) -> Tensor:
    model.eval()
    with torch.inference_mode():
        return model(histories(*sequences))


@pytest.mark.parametrize("config", VARIANTS)
def test_scores_cover_the_catalogue_for_histories_of_every_length(config: SASRecConfig) -> None:
    model = sasrec(config)
    sequences = [list(range(1, length + 1)) for length in range(WINDOW + 1)]
    together = scores(model, *sequences)
    assert together.shape == (len(sequences), ITEMS + 1)
    assert together.dtype == torch.float32
    assert (together[:, 0] == -torch.inf).all()
    assert together[:, 1:].isfinite().all()
    # Histories differ, so scores do: nobody reads a pad or somebody else's last event.
    assert len(together[:, 1:].unique(dim=0)) == len(sequences)


@pytest.mark.parametrize("config", VARIANTS)
def test_padding_changes_no_real_position(config: SASRecConfig) -> None:
    model = sasrec(config)
    sequences: list[list[int]] = [[], [7], [3, 1], [2, 4, 6, 8], list(range(1, WINDOW + 1))]
    together = scores(model, *sequences)
    for row, sequence in enumerate(sequences):
        torch.testing.assert_close(scores(model, sequence)[0], together[row])
    short, padded = histories([3, 1]), histories([3, 1], list(range(1, WINDOW + 1)))
    states = model.encode(padded.items, model.positions(padded))[0, :2]
    torch.testing.assert_close(states, model.encode(short.items, model.positions(short))[0])


@pytest.mark.parametrize("config", VARIANTS)
def test_the_future_never_leaks(config: SASRecConfig) -> None:
    model = sasrec(config).eval()
    batch = histories([1, 2, 3, 4, 5, 6])
    positions = model.positions(batch)
    before = model.encode(batch.items, positions)
    for changed in range(WINDOW):
        items = batch.items.clone()
        items[0, changed] = 19
        after = model.encode(items, positions)
        torch.testing.assert_close(after[:, :changed], before[:, :changed], rtol=0, atol=0)
        for later in range(changed, WINDOW):
            assert not torch.allclose(after[:, later], before[:, later]), "later states must see the change"


def test_the_newest_event_always_has_the_last_position() -> None:
    model = sasrec(SASRecConfig(window=WINDOW))
    batch = histories([5, 9], list(range(1, WINDOW + 1)), [])
    positions = model.positions(batch)
    assert positions[0].tolist() == [WINDOW - 1, WINDOW, 0, 0, 0, 0]
    assert positions[1].tolist() == list(range(1, WINDOW + 1))
    assert positions[2].tolist() == [0] * WINDOW


def one_user(length: int) -> Split:
    """A split with one user of `length` events before the test target."""
    return Split(
        name="one",
        kind="leave-one-out",
        offsets=np.array([0, length + 1]),
        items=np.arange(1, length + 2),
        train_end=np.array([length]),
        valid=Targets(np.array([0]), np.array([length])),
        test=Targets(np.array([0]), np.array([length])),
        num_items=ITEMS,
        hash="",
        raw_users=("u",),
    )


@pytest.mark.parametrize("length", [1, WINDOW - 1, WINDOW, WINDOW + 1])
def test_a_long_history_is_cut_to_its_newest_events(length: int) -> None:
    model = sasrec(SASRecConfig(hidden_size=8, window=WINDOW)).eval()
    batch = EvaluationSequences(one_user(length), "test", WINDOW).collate(np.array([0]))
    newest = list(range(1, length + 1))[-WINDOW:]
    torch.testing.assert_close(model(batch), scores(model, newest))


def test_training_and_evaluation_read_the_same_states() -> None:
    """The state that trains the last target is the one that ranks for it."""
    model = sasrec(SASRecConfig(hidden_size=8, window=WINDOW)).eval()
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


LOSSES = ("cross-entropy", "sampled-cross-entropy", "gbce", "bce")


@pytest.fixture(scope="module")
def sample() -> Split:
    config = DataConfig(source="sample", sample_users=64, sample_series=20)
    return split(read(config), config)


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_trains(sample: Split, loss: str) -> None:
    config = SASRecConfig(hidden_size=16, num_blocks=1, window=20, dropout=0.0, num_negatives=8, loss=loss)  # type: ignore[arg-type]
    torch.manual_seed(0)
    model = SASRec(config, sample.num_items)
    negatives = None if loss == "cross-entropy" else UniformNegatives(sample, 4, seed=0)
    examples = TrainingSequences(sample, config.window, negatives=negatives)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    means = []
    for epoch in range(15):
        batch = examples.collate(np.arange(len(examples.lengths)), epoch)
        out = model(batch)
        assert out.count == batch.count == len(batch.targets)
        mean = out.total / out.count
        optimizer.zero_grad()
        mean.backward()
        if epoch == 0:
            idle = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
            # A key's bias moves all logits of a softmax alike, so it has no gradient of its own, but shares a tensor.
            assert not idle
            assert not model.item_embedding.weight.grad[0].any(), "padding is not trained"
        optimizer.step()
        means.append(mean.item())
    assert means[-1] < 0.9 * means[0]


def test_the_full_softmax_leaves_padding_out(sample: Split) -> None:
    model = SASRec(SASRecConfig(hidden_size=16, window=20, dropout=0.0), sample.num_items)
    batch = TrainingSequences(sample, 20).collate(np.arange(3), 0)
    states = model.encode(batch.items, model.positions(batch))[batch.items > 0]
    expected = torch.nn.functional.cross_entropy(
        states @ model.item_embedding.weight[1:].T, batch.targets - 1, reduction="sum"
    )
    torch.testing.assert_close(model(batch).total, expected)


@pytest.mark.parametrize("loss", ["sampled-cross-entropy", "gbce", "bce"])
def test_negatives_belong_to_their_row(sample: Split, loss: str) -> None:
    """A batch's loss is the sum of its rows' losses: no row uses another's negatives."""
    config = SASRecConfig(hidden_size=16, window=20, dropout=0.0, loss=loss, num_negatives=4)  # type: ignore[arg-type]
    model = SASRec(replace(config, initializer_range=0.5), sample.num_items)
    examples = TrainingSequences(sample, 20, negatives=UniformNegatives(sample, 4, seed=0))
    rows = [model(examples.collate(np.array([row]), 0)).total for row in range(4)]
    torch.testing.assert_close(model(examples.collate(np.arange(4), 0)).total, torch.stack(rows).sum())


def test_a_muted_batch_runs_through_the_model_and_teaches_nothing(sample: Split) -> None:
    for loss in LOSSES:
        config = SASRecConfig(hidden_size=16, window=20, loss=loss, num_negatives=4)  # type: ignore[arg-type]
        model = SASRec(config, sample.num_items)
        negatives = None if loss == "cross-entropy" else UniformNegatives(sample, 4, seed=0)
        out = model(TrainingSequences(sample, 20, negatives=negatives).collate(np.arange(3), 0).muted())
        assert out.count == 0
        out.total.backward()
        gradients = [parameter.grad for parameter in model.parameters()]
        # Every parameter takes part, or DistributedDataParallel would wait for its gradient.
        assert all(gradient is not None and not gradient.any() for gradient in gradients)


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ValueError, match=r"--method\.num_heads"):
        SASRecConfig(hidden_size=10, num_heads=3)
