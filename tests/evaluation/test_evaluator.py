"""The evaluator on real splits: known floors, errors that name users, a header that says it all."""

import dataclasses
import json
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from data.config import DataConfig
from data.sources import read
from data.splits import Split, split
from evaluation.evaluator import Evaluator, evaluate_popularity
from evaluation.metrics import multi_relevant_metrics
from evaluation.protocols import Mask, Protocol
from evaluation.results import read_ranks, write_ranks


class Rows(NamedTuple):
    row: Tensor


def batches(evaluator: Evaluator, size: int = 64) -> list[Rows]:
    return [Rows(rows) for rows in torch.arange(len(evaluator.targets)).split(size)]


class FixedScores(nn.Module):
    """Looks up prepared scores [n, N + 1]."""

    def __init__(self, scores: Tensor) -> None:
        super().__init__()
        self.scores = scores
        self.was_training: list[bool] = []

    def forward(self, batch: Rows) -> Tensor:
        self.was_training.append(self.training)
        return self.scores[batch.row]


@pytest.fixture(scope="module")
def sample() -> Split:
    config = DataConfig(source="sample")
    return split(read(config), config)


def random_scores(sample: Split, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(sample.test.user), sample.num_items + 1, generator=generator)


@pytest.mark.parametrize("mask", ["none", "train", "full-history"])
def test_constant_scores_get_their_share_of_the_candidates(sample: Split, mask: Mask) -> None:
    evaluator = Evaluator(sample, "test", mask=mask)
    shape = (len(sample.test.user), sample.num_items + 1)
    evaluation = evaluator.run(FixedScores(torch.zeros(shape)), batches(evaluator))
    expected = np.mean(10 / evaluation.ranks.candidates)
    assert evaluation.metrics["HR@10"] == pytest.approx(expected, abs=1e-12)
    assert evaluation.header["constant_score_rows"] == shape[0]
    unmasked = {"none": sample.num_items}.get(mask)
    assert unmasked is None or (evaluation.ranks.candidates == unmasked).all()


def test_perfect_scores_get_one(sample: Split) -> None:
    evaluator = Evaluator(sample, "test")
    scores = torch.zeros(len(sample.test.user), sample.num_items + 1)
    scores[torch.arange(len(scores)), torch.from_numpy(sample.target_items("test"))] = 1
    evaluation = evaluator.run(FixedScores(scores), batches(evaluator))
    for name in ("HR@1", "NDCG@10", "MRR@20", "MAP@5", "Recall@10"):
        assert evaluation.metrics[name] == 1.0
        assert evaluation.intervals[name] == (1.0, 1.0)
    assert (evaluation.recommendations[:, 0] == sample.target_items("test")).all()
    assert evaluation.header["constant_score_rows"] == 0


def test_batch_size_and_order_and_duplicates_are_irrelevant(sample: Split) -> None:
    scores = random_scores(sample)
    evaluator = Evaluator(sample, "test")
    expected = evaluator.run(FixedScores(scores), batches(evaluator, 500))
    shuffled = torch.randperm(len(scores)).split(13)
    with_duplicates = [Rows(rows) for rows in shuffled] + [Rows(shuffled[0])]
    evaluation = evaluator.run(FixedScores(scores), with_duplicates)
    assert evaluation.metrics == expected.metrics
    assert evaluation.intervals == expected.intervals
    assert np.array_equal(evaluation.recommendations, expected.recommendations)
    assert np.array_equal(evaluation.ranks.row, np.arange(len(scores)))


def test_seen_items_are_not_recommended(sample: Split) -> None:
    evaluator = Evaluator(sample, "test", top_k=50)
    evaluation = evaluator.run(FixedScores(random_scores(sample)), batches(evaluator))
    for user, position, items in zip(sample.test.user, sample.test.position, evaluation.recommendations, strict=True):
        assert not set(sample.history(user, position).tolist()) & set(items.tolist())


def test_missing_targets_are_an_error(sample: Split) -> None:
    evaluator = Evaluator(sample, "test")
    rows = torch.arange(len(evaluator.targets) - 3)
    with pytest.raises(ValueError, match=f"3 of {len(evaluator.targets)} targets were not evaluated"):
        evaluator.run(FixedScores(random_scores(sample)), [Rows(rows)])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_invalid_scores_name_the_users(sample: Split, bad: float) -> None:
    scores = random_scores(sample)
    scores[71, 5] = bad
    evaluator = Evaluator(sample, "test")
    with pytest.raises(ValueError, match=rf"users \['{sample.raw_users[sample.test.user[71]]}'\]"):
        evaluator.run(FixedScores(scores), batches(evaluator))


def test_scores_of_another_catalogue_are_refused(sample: Split) -> None:
    wider = dataclasses.replace(sample, num_items=sample.num_items + 1)
    evaluator = Evaluator(wider, "test")
    with pytest.raises(ValueError, match=r"scores have shape \(64, 301\), expected \(64, 302\)"):
        evaluator.run(FixedScores(random_scores(sample)), batches(evaluator))


def test_training_batches_are_refused(sample: Split) -> None:
    with pytest.raises(ValueError, match="evaluation batches carry `row`"):
        Evaluator(sample, "test").run(FixedScores(random_scores(sample)), [Rows(None)])  # type: ignore[arg-type]


def test_the_model_is_in_evaluation_mode_and_given_back_as_it_was(sample: Split) -> None:
    model = FixedScores(random_scores(sample)).train()
    evaluator = Evaluator(sample, "test")
    evaluator.run(model, batches(evaluator))
    assert set(model.was_training) == {False}
    assert model.training


def test_sampled_metrics_cannot_be_mistaken_for_full_ones(sample: Split) -> None:
    evaluator = Evaluator(sample, "test", protocol="sampled-100", seed=3)
    evaluation = evaluator.run(FixedScores(random_scores(sample)), batches(evaluator))
    assert all(name.startswith("sampled-100/") for name in [*evaluation.metrics, *evaluation.intervals])
    assert (evaluation.ranks.candidates == 101).all()
    assert evaluation.header["protocol"] == "sampled-100"
    assert len(evaluation.header["candidates_hash"]) == 64
    assert evaluation.metrics["sampled-100/HR@10"] == pytest.approx(10 / 101, abs=0.05)


def test_header_and_results_are_complete_and_json(sample: Split) -> None:
    evaluator = Evaluator(sample, "valid", ties="pessimistic", mask="train", seed=5)
    evaluation = evaluator.run(FixedScores(random_scores(sample).bfloat16()), batches(evaluator))
    header = json.loads(json.dumps(evaluation.as_results()))["header"]
    seconds = header.pop("seconds")
    assert 0 < seconds < 60
    assert header == {
        "dataset": "sample",
        "split": "leave-one-out",
        "split_hash": sample.hash,
        "phase": "valid",
        "users_evaluated": sample.num_users,
        "users_skipped": 0,
        "catalog_size": sample.num_items,
        "cold_items": 0,
        "protocol": "full",
        "candidates_hash": None,
        "mask": "train",
        "ties": "pessimistic",
        "cutoffs": [1, 5, 10, 20],
        "seed": 5,
        "score_dtype": "bfloat16",
        "world_size": 1,
        "constant_score_rows": 0,
    }


def test_intervals_hold_the_mean_and_have_the_binomial_width(sample: Split) -> None:
    evaluation = evaluate_popularity(sample, "test")
    hit_rate, (low, high) = evaluation.metrics["HR@10"], evaluation.intervals["HR@10"]
    assert low < hit_rate < high
    standard_error = np.sqrt(hit_rate * (1 - hit_rate) / sample.num_users)
    assert high - low == pytest.approx(2 * 1.96 * standard_error, rel=0.15)


def test_ranks_survive_the_file(sample: Split, tmp_path) -> None:
    evaluation = evaluate_popularity(sample, "test")
    write_ranks(evaluation, tmp_path / "ranks" / "test.parquet")
    file = read_ranks(tmp_path / "ranks" / "test.parquet")
    assert file.header == evaluation.header
    assert file.raw_users == tuple(sample.raw_users[user] for user in sample.test.user)
    for name, column in vars(evaluation.ranks).items():
        assert np.array_equal(getattr(file.ranks, name), column)


@pytest.mark.parametrize(
    ("dataset", "filters"),
    [("ml-100k", {}), ("ml-latest-small", {"user_core": 5, "item_core": 5})],
)
@pytest.mark.parametrize(("mask", "masked"), [("full-history", "masked"), ("none", "unmasked")])
def test_popularity_floors(golden, data_root, dataset: str, filters: dict, mask: Mask, masked: str) -> None:
    """The published floors break ties by raw id, as our lists do; the expected rule may differ by a hair."""
    meta, _ = golden("splits")
    key = f"{dataset}.core{filters.get('user_core', 0)}.minrating0"
    if key not in meta["splits"]:
        pytest.skip(f"the golden splits have no {key}")
    floor = meta["splits"][key]["popularity_train_counts"][masked]
    config = DataConfig(source=dataset, root=data_root, **filters)
    real = split(read(config), config)
    evaluation = evaluate_popularity(real, "test", mask=mask)
    hits = evaluation.recommendations == real.target_items("test")[:, None]
    by_raw_id = multi_relevant_metrics(hits, np.ones(len(hits), dtype=np.int64), [10])
    assert by_raw_id["HR@10"].mean() == pytest.approx(floor["HR@10"], abs=1e-12)
    assert by_raw_id["NDCG@10"].mean() == pytest.approx(floor["NDCG@10"], abs=1e-12)
    assert evaluation.metrics["HR@10"] == pytest.approx(floor["HR@10"], abs=0.002)
    assert evaluation.metrics["NDCG@10"] == pytest.approx(floor["NDCG@10"], abs=0.001)


@pytest.mark.parametrize(
    ("protocol", "mask", "hit_rate", "ndcg"),
    [
        ("full", "full-history", 0.0368, 0.0179),
        ("full", "none", 0.0162, 0.0079),
        ("sampled-100", "full-history", 0.4387, 0.2404),
    ],
)
def test_popularity_floors_of_ml_1m(data_root, protocol: Protocol, mask: Mask, hit_rate: float, ndcg: float) -> None:
    """Measured elsewhere on the SASRec paper's ML-1M, with other tie and candidate draws."""
    config = DataConfig(source="ml-1m", root=data_root, item_core=5)
    ml_1m = split(read(config), config)
    metrics = evaluate_popularity(ml_1m, "test", protocol=protocol, mask=mask).metrics
    prefix = "" if protocol == "full" else "sampled-100/"
    tolerance = 0.0003 if protocol == "full" else 2 * np.sqrt(0.44 * 0.56 / 6040)
    assert metrics[f"{prefix}HR@10"] == pytest.approx(hit_rate, abs=tolerance)
    assert metrics[f"{prefix}NDCG@10"] == pytest.approx(ndcg, abs=tolerance)


def test_new_items_are_a_slice_of_their_own(sample: Split) -> None:
    """A model that finds only what is not new: all of the hits are in the warm slice, and the two make the whole."""
    targets = sample.target_items("test")
    parts = dataclasses.replace(sample, cold_items=np.unique(targets)[:20])
    is_cold = np.isin(targets, parts.cold_items)
    scores = torch.zeros(len(targets), sample.num_items + 1)
    scores[torch.arange(len(targets)), targets] = torch.from_numpy(np.where(is_cold, -1, 1)).float()
    evaluator = Evaluator(parts, "test")
    evaluation = evaluator.run(FixedScores(scores), batches(evaluator))
    results = json.loads(json.dumps(evaluation.as_results()))
    cold, warm = results["slices"]["cold"], results["slices"]["warm"]
    assert (cold["targets"], warm["targets"]) == (is_cold.sum(), (~is_cold).sum())
    assert (cold["HR@10"], warm["HR@10"]) == (0, 1)
    assert results["HR@10"] == pytest.approx(warm["targets"] / len(targets))
    assert warm["intervals"]["HR@10"] == [1, 1]
    only = results["slices"]["cold-only"]
    assert only["targets"] == cold["targets"]
    assert only["HR@10"] == 0, "below the other cold items"
    whole = Evaluator(sample, "test")
    assert "slices" not in whole.run(FixedScores(scores), batches(whole)).as_results()


def test_cold_items_are_ranked_among_each_other_too(sample: Split) -> None:
    """Against each row counted by hand; whatever known items score is without effect."""
    targets = sample.target_items("test")
    cold_items = np.unique(targets)[:20]
    parts = dataclasses.replace(sample, cold_items=cold_items)
    is_cold = np.isin(targets, cold_items)
    scores = random_scores(sample)
    evaluator = Evaluator(parts, "test", mask="none", cutoffs=(3,))
    found = evaluator.run(FixedScores(scores), batches(evaluator)).slices["cold-only"]
    rows = np.flatnonzero(is_cold)
    better = [(scores[row, cold_items] > scores[row, targets[row]]).sum().item() for row in rows]
    assert found.metrics["HR@3"] == pytest.approx(np.mean(np.array(better) < 3))
    warm = np.setdiff1d(np.arange(sample.num_items + 1), cold_items)
    scores[:, warm] += 100
    again = evaluator.run(FixedScores(scores), batches(evaluator)).slices
    assert again["cold-only"].metrics == found.metrics
    assert again["cold"].metrics["HR@3"] == 0
    sampled = Evaluator(parts, "test", protocol="candidates-20")
    assert "cold-only" not in sampled.run(FixedScores(scores), batches(sampled)).slices
