"""Recommenders of item ids see the past and nothing else, however long a history is, and every loss teaches them."""

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
from launch.sequences import sequence_recommender
from models.gru4rec import GRU4RecConfig
from models.lrurec import LRURec, LRURecConfig
from models.sasrec import SASRecConfig
from models.sequence_recommender import SequenceConfig, SequenceRecommender

WINDOW, ITEMS = 6, 20
LOSSES = ("cross-entropy", "sampled-cross-entropy", "gbce", "bce")
CONFIGS: dict[str, SequenceConfig] = {
    "sasrec": SASRecConfig(hidden_size=8, num_heads=2, window=WINDOW, dropout=0.5),
    "sasrec-pre": SASRecConfig(hidden_size=8, num_heads=2, window=WINDOW, norm="pre", dropout=0.5),
    "sasrec-post": SASRecConfig(hidden_size=8, num_heads=2, window=WINDOW, norm="post", dropout=0.5),
    "gru4rec": GRU4RecConfig(hidden_size=8, num_layers=2, recurrent_size=12, window=WINDOW, dropout=0.5),
    "lrurec": LRURecConfig(hidden_size=8, window=WINDOW, dropout=0.5),
    "sasrec-untied": SASRecConfig(hidden_size=8, window=WINDOW, tied=False, dropout=0.5),
    "gru4rec-untied": GRU4RecConfig(hidden_size=8, window=WINDOW, tied=False, dropout=0.5),
    "lrurec-untied": LRURecConfig(hidden_size=8, window=WINDOW, tied=False, dropout=0.5),
}
VARIANTS = [pytest.param(config, id=name) for name, config in CONFIGS.items()]
ONE_EACH = [pytest.param(CONFIGS[name], id=name) for name in ("sasrec", "gru4rec", "lrurec", "lrurec-untied")]


def recommender(config: SequenceConfig, num_items: int = ITEMS) -> SequenceRecommender:
    torch.manual_seed(0)
    # Far larger weights than at the start of training: what leaks is not lost in rounding.
    model = sequence_recommender(replace(config, initializer_range=0.5), num_items)
    if isinstance(model, LRURec):
        torch.nn.init.normal_(model.item_bias)
    return model


def histories(*sequences: list[int]) -> SequenceBatch:
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    items = torch.zeros(len(sequences), max(1, int(lengths.max())), dtype=torch.int64)
    for row, sequence in zip(items, sequences, strict=True):
        row[: len(sequence)] = torch.tensor(sequence)
    return SequenceBatch(items, lengths, row=torch.arange(len(sequences)))


def scores(model: SequenceRecommender, *sequences: list[int]) -> Tensor:
    model.eval()
    with torch.inference_mode():
        return model(histories(*sequences))


@pytest.mark.parametrize("config", VARIANTS)
def test_scores_cover_the_catalogue_for_histories_of_every_length(config: SequenceConfig) -> None:
    model = recommender(config)
    sequences = [list(range(1, length + 1)) for length in range(WINDOW + 1)]
    together = scores(model, *sequences)
    assert together.shape == (len(sequences), ITEMS + 1)
    assert together.dtype == torch.float32
    assert (together[:, 0] == -torch.inf).all()
    assert together[:, 1:].isfinite().all()
    # Histories differ, so scores do: nobody reads a pad or somebody else's last event.
    assert len(together[:, 1:].unique(dim=0)) == len(sequences)


@pytest.mark.parametrize("config", VARIANTS)
def test_padding_changes_no_real_position(config: SequenceConfig) -> None:
    model = recommender(config)
    sequences: list[list[int]] = [[], [7], [3, 1], [2, 4, 6, 8], list(range(1, WINDOW + 1))]
    together = scores(model, *sequences)
    for row, sequence in enumerate(sequences):
        torch.testing.assert_close(scores(model, sequence)[0], together[row])
    short, padded = histories([3, 1]), histories([3, 1], list(range(1, WINDOW + 1)))
    torch.testing.assert_close(model.states(padded)[0, :2], model.states(short)[0])


@pytest.mark.parametrize("config", VARIANTS)
def test_the_future_never_leaks(config: SequenceConfig) -> None:
    model = recommender(config).eval()
    batch = histories([1, 2, 3, 4, 5, 6])
    before = model.states(batch)
    for changed in range(WINDOW):
        items = batch.items.clone()
        items[0, changed] = 19
        after = model.states(replace(batch, items=items))
        torch.testing.assert_close(after[:, :changed], before[:, :changed], rtol=0, atol=0)
        for later in range(changed, WINDOW):
            assert not torch.allclose(after[:, later], before[:, later]), "later states must see the change"


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
@pytest.mark.parametrize("config", ONE_EACH)
def test_a_long_history_is_cut_to_its_newest_events(config: SequenceConfig, length: int) -> None:
    model = recommender(config).eval()
    batch = EvaluationSequences(one_user(length), "test", WINDOW).collate(np.array([0]))
    newest = list(range(1, length + 1))[-WINDOW:]
    torch.testing.assert_close(model(batch), scores(model, newest))


@pytest.mark.parametrize("config", ONE_EACH)
def test_what_trains_is_what_ranks(config: SequenceConfig) -> None:
    """The loss of a label is the negative log of the share that its score has of all real items."""
    model = recommender(config).eval()
    trained = TrainingSequences(one_user(5), WINDOW).collate(np.array([0]), 0)
    assert trained.items.tolist() == [[1, 2, 3, 4]]
    assert trained.labelled is not None
    assert trained.targets is not None
    assert trained.targets.tolist() == [2, 3, 4, 5]
    last = replace(trained, labelled=trained.labelled[-1:], targets=trained.targets[-1:], count=1)
    share = scores(model, [1, 2, 3, 4])[0, 1:].softmax(0)[5 - 1]
    torch.testing.assert_close(model(last).total, -share.log())


@pytest.fixture(scope="module")
def sample() -> Split:
    config = DataConfig(source="sample", sample_users=64, sample_series=20)
    return split(read(config), config)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("config", ONE_EACH)
def test_every_loss_trains(sample: Split, config: SequenceConfig, loss: str) -> None:
    config = replace(config, hidden_size=16, window=20, dropout=0.0, loss=loss)  # type: ignore[arg-type]
    torch.manual_seed(0)
    model = sequence_recommender(config, sample.num_items)
    negatives = None if loss == "cross-entropy" else UniformNegatives(sample, 4, seed=0)
    examples = TrainingSequences(sample, config.window, negatives=negatives)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    means = []
    for epoch in range(50):
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
        optimizer.step()
        means.append(mean.item())
    assert means[-1] < 0.85 * means[0]
    assert not model.item_table[0].any(), "padding is not trained"


@pytest.mark.parametrize("loss", ["sampled-cross-entropy", "gbce", "bce"])
@pytest.mark.parametrize("config", ONE_EACH)
def test_negatives_belong_to_their_row(sample: Split, config: SequenceConfig, loss: str) -> None:
    """A batch's loss is the sum of its rows' losses: no row uses another's negatives."""
    model = recommender(replace(config, window=20, dropout=0.0, loss=loss), sample.num_items)  # type: ignore[arg-type]
    examples = TrainingSequences(sample, 20, negatives=UniformNegatives(sample, 4, seed=0))
    rows = [model(examples.collate(np.array([row]), 0)).total for row in range(4)]
    torch.testing.assert_close(model(examples.collate(np.arange(4), 0)).total, torch.stack(rows).sum())


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("config", ONE_EACH)
def test_a_muted_batch_runs_through_the_model_and_teaches_nothing(
    sample: Split, config: SequenceConfig, loss: str
) -> None:
    model = recommender(replace(config, window=20, loss=loss), sample.num_items)  # type: ignore[arg-type]
    negatives = None if loss == "cross-entropy" else UniformNegatives(sample, 4, seed=0)
    out = model(TrainingSequences(sample, 20, negatives=negatives).collate(np.arange(3), 0).muted())
    assert out.count == 0
    out.total.backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    # Every parameter takes part, or DistributedDataParallel would wait for its gradient.
    assert all(gradient is not None and not gradient.any() for gradient in gradients)


@pytest.mark.parametrize("config", ONE_EACH)
def test_states_read_all_but_what_only_scores(config: SequenceConfig) -> None:
    model = recommender(config)
    model.states(histories([1, 2, 3], [4, 5])).square().sum().backward()
    read = {id(parameter) for parameter in model.read_by_states()}
    assert read == {id(parameter) for parameter in model.parameters() if parameter.grad is not None}
    assert len(read) == len([*model.parameters()]) - isinstance(model, LRURec) - (not config.tied)


@pytest.mark.parametrize("config", ONE_EACH)
def test_bfloat16_rounds_and_does_not_change_the_model(sample: Split, config: SequenceConfig) -> None:
    torch.manual_seed(0)
    model = sequence_recommender(replace(config, hidden_size=16, window=20, dropout=0.0), sample.num_items)
    batch = TrainingSequences(sample, 20).collate(np.arange(8), 0)
    exact = model(batch).total
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(batch).total
    assert rounded.dtype == torch.float32
    assert rounded != exact
    torch.testing.assert_close(rounded, exact, rtol=2e-3, atol=0)


def test_channels_start_within_the_decays_that_were_asked_for() -> None:
    torch.manual_seed(0)
    model = LRURec(LRURecConfig(hidden_size=64, min_decay=0.6, max_decay=0.9), ITEMS)
    for block in model.blocks:
        unit = block.recurrence
        decay = (-unit.log_nu.exp()).exp()
        assert 0.6 <= decay.min() < 0.65
        assert 0.85 < decay.max() <= 0.9
        torch.testing.assert_close(unit.log_gamma.exp(), (1 - decay**2).sqrt())
    with pytest.raises(ValueError, match=r"--method\.max_decay 1\.0"):
        LRURecConfig(max_decay=1.0)
