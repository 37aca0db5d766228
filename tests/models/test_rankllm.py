"""RankLLM: losses against loops, scores against plain passes over whole prompts, answers that fail, orders combined."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from data.candidate_store import CandidateStore, training_cuts
from data.config import DataConfig
from data.listwise_batches import ListBatch, ListedHistories, TrainingLists
from data.listwise_prompts import ListwiseEncoder, ListwiseSettings
from data.permutations import Status
from data.prompts import title_texts
from data.sources import read
from data.splits import split
from models import listwise_modes
from models.backbone import BackboneConfig, causal_model, load_backbone, load_tokenizer
from models.decoder import decoder_of
from models.listwise_losses import first_choice, weighted_ranknet
from models.rankllm import Judgement, RankLLM, RankLLMConfig, TooManyFailures
from models.tiny import TinyConfig

SAMPLE = DataConfig(source="sample", sample_users=30, sample_series=12)
CANDIDATES, USERS = 6, 5
RANKS = torch.tensor([[2, 1, 4, 3], [1, 2, 0, 0], [0, 0, 0, 0]])


@pytest.fixture(scope="module")
def sample() -> tuple[Any, Any, list[str]]:
    interactions = read(SAMPLE)
    titles = title_texts(interactions.catalog)
    return split(interactions, SAMPLE), load_tokenizer(BackboneConfig(), titles), titles


def make(sample: Any, settings: ListwiseSettings | None = None, **options: Any) -> RankLLM:
    """A model in float64 with random weights."""
    _, tokenizer, titles = sample
    config = RankLLMConfig(**{"num_candidates": CANDIDATES, "window": CANDIDATES, "stride": 2, **options})
    shape = BackboneConfig(tiny=TinyConfig(hidden_size=32, layers=2))
    backbone = load_backbone(shape, tokenizer, seed=0, device="cpu", trainable=True)
    torch.manual_seed(0)
    for parameter in backbone.parameters():
        nn.init.normal_(parameter, std=0.3)
    encoder = ListwiseEncoder(tokenizer, titles, settings or config.prompts)
    return RankLLM(config, backbone, encoder, seed=0).double().eval()


def candidates_of(parts: Any, rows: int, number: int = CANDIDATES) -> np.ndarray:
    random = np.random.default_rng(0)
    return np.stack([random.permutation(parts.num_items)[:number] + 1 for _ in range(rows)])


def lists(sample: Any, model: RankLLM, number: int = CANDIDATES) -> ListBatch:
    """Histories of different lengths, so that prompts are padded."""
    parts = sample[0]
    made = ListedHistories(
        parts, "test", model.encoder, candidates_of(parts, len(parts.test), number), model.config.window
    )
    rows = np.argsort(made.lengths, kind="stable")[:: len(made.lengths) // USERS][:USERS]
    assert len(set(made.lengths[rows].tolist())) > 2
    return made.collate(rows)


def training(sample: Any, model: RankLLM, writes: bool = True) -> TrainingLists:
    parts = sample[0]
    found = candidates_of(parts, len(training_cuts(parts))).astype(np.int32)
    store = CandidateStore(found, np.zeros(found.shape, np.float32))
    return TrainingLists(parts, model.encoder, store, None, CANDIDATES, 0, writes=writes)


def last_logits(model: RankLLM, prompt: list[int]) -> torch.Tensor:
    """The vocabulary's logits behind a prompt: one row, no padding, no cache."""
    decoder = decoder_of(model.backbone)
    with torch.no_grad():
        return decoder.head(decoder.body(input_ids=torch.tensor([prompt]), use_cache=False).last_hidden_state)[0, -1]


def test_ranknet_is_the_mean_of_a_loop_over_pairs() -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, 4, dtype=torch.float64)
    expected = []
    for z, ranks in zip(logits.tolist(), RANKS.tolist(), strict=True):
        terms = [
            float(F.softplus(torch.tensor(z[j] - z[i], dtype=torch.float64))) / (ranks[i] + ranks[j])
            for i in range(4)
            for j in range(4)
            if 0 < ranks[i] < ranks[j]
        ]
        expected.append(sum(terms) / len(terms) if terms else 0.0)
    assert weighted_ranknet(logits, RANKS).tolist() == pytest.approx(expected, abs=1e-12)
    assert expected[0] > 0 == expected[2]


def test_first_choice_is_cross_entropy_over_the_candidates_alone() -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, 4, dtype=torch.float64)
    expected = [F.cross_entropy(logits[0], torch.tensor(1)), F.cross_entropy(logits[1, :2], torch.tensor(0)), 0.0]
    assert first_choice(logits, RANKS).tolist() == pytest.approx([float(loss) for loss in expected], abs=1e-12)


def test_logits_rank_as_the_whole_vocabulary_with_all_but_the_identifiers_masked(sample: Any) -> None:
    model = make(sample)
    batch = lists(sample, model)
    scores = model.judge(batch, batch.candidates).scores
    names = model.encoder.single_names(CANDIDATES)
    for i, row in enumerate(batch.candidates.numpy()):
        history = batch.history.items[i, : batch.history.lengths[i]].numpy()
        logits = last_logits(model, model.encoder.prompt(history, row) + model.encoder.open)
        torch.testing.assert_close(scores[i].double(), logits[names], rtol=1e-5, atol=1e-5)
        masked = torch.full_like(logits, -torch.inf)
        masked[names] = logits[names]
        assert names[int(scores[i].argmax())] == int(masked.argmax())
    catalogue = model(batch)
    assert catalogue.shape == (USERS, model.num_items + 1)
    assert catalogue.gather(1, batch.candidates).equal(scores)
    assert (catalogue > -torch.inf).sum() == USERS * CANDIDATES


@pytest.mark.parametrize("objective", ["listwise", "ranknet", "generation", "combined"])
def test_losses_are_those_of_each_prompt_alone(sample: Any, objective: Any) -> None:
    model = make(sample, objective=objective)
    writes = objective in ("generation", "combined")
    examples = training(sample, model, writes)
    indices = np.array([3, 40, 77, 200])
    batch = examples.collate(indices, epoch=1)
    expected = 0.0
    for i in range(len(indices)):
        row = batch.input_ids[i][batch.attention_mask[i].bool()].tolist()
        opened = int(batch.opened[i]) - i * batch.input_ids.shape[1]
        z = last_logits(model, row[: opened + 1])[model.encoder.single_names(CANDIDATES)][None]
        if objective in ("ranknet", "combined"):
            expected += (10 if objective == "combined" else 1) * float(weighted_ranknet(z, batch.ranks[i : i + 1]))
        if objective == "listwise":
            expected += float(first_choice(z, batch.ranks[i : i + 1]))
        if writes:
            answer = row[opened:]
            steps = [
                F.cross_entropy(last_logits(model, row[:end]), torch.tensor(row[end]))
                for end in range(opened, len(row))
            ]
            assert len(steps) == len(answer) == len(batch.labelled) / len(indices)
            expected += float(torch.stack(steps).mean())
    loss = model(batch)
    assert loss.count == len(indices)
    assert float(loss.total.detach()) == pytest.approx(expected, rel=1e-5)


def test_a_muted_batch_adds_nothing(sample: Any) -> None:
    model = make(sample)
    loss = model(training(sample, model).collate(np.array([3, 40]), 0).muted())
    loss.total.backward()
    assert float(loss.total.detach()) == 0 == loss.count
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_training_lists_are_shuffled_and_keep_the_wanted_order(sample: Any) -> None:
    parts, tokenizer, titles = sample
    model = make(sample)
    examples = training(sample, model)
    indices = np.arange(24)
    batch = examples.collate(indices, 0)
    assert not batch.ranks.equal(examples.collate(indices, 1).ranks)
    assert len({tuple(row) for row in batch.ranks.tolist()}) > 12
    cuts = training_cuts(parts)
    for i in indices:
        wanted = examples.candidates[i]
        target = parts.items[parts.offsets[cuts.user[i]] + cuts.position[i]]
        assert wanted[0] == target
        assert len(set(wanted.tolist())) == CANDIDATES
        text = tokenizer.decode(batch.input_ids[i][batch.attention_mask[i].bool()].tolist(), skip_special_tokens=True)
        lines, answer = text.splitlines(), text.splitlines()[-1]
        listed = [line[4:] for line in lines if line[:1] == "[" and line[2:4] == "] "][:CANDIDATES]
        order = [listed["ABCDEF".index(name[1])] for name in answer.split(" > ")]
        assert order == [titles[item] for item in wanted]
        assert listed == [titles[wanted[rank - 1]] for rank in batch.ranks[i]]


def test_pointwise_continues_one_prefix_like_a_whole_prompt(sample: Any) -> None:
    model = make(sample, mode="pointwise")
    batch = lists(sample, model)
    scores = model.judge(batch, batch.candidates).scores
    yes, no = model.encoder.verdicts()
    for i in range(USERS):
        prompt = model.encoder.one_prompt(batch.history.items[i, : batch.history.lengths[i]].numpy())
        for j, item in enumerate(batch.candidates[i].tolist()):
            logits = last_logits(model, prompt + model.encoder.one_ending(item))
            assert float(scores[i, j]) == pytest.approx(float(logits[yes] - logits[no]), abs=1e-4)


def test_pairwise_counts_wins_over_both_orders(sample: Any) -> None:
    model = make(sample, mode="pairwise")
    batch = lists(sample, model, number=4)
    scores = model.judge(batch, batch.candidates).scores
    a, b = model.encoder.single_names(2)
    history, row = batch.history.items[0, : batch.history.lengths[0]].numpy(), batch.candidates[0].numpy()
    wins = np.zeros(4)
    for i in range(4):
        for j in range(4):
            if i != j:
                z = last_logits(model, model.encoder.prompt(history, row[[i, j]]) + model.encoder.open)
                wins[i] += 0.5 * float(torch.sigmoid(z[a] - z[b]))
                wins[j] += 0.5 * float(torch.sigmoid(z[b] - z[a]))
    assert scores[0].tolist() == pytest.approx(wins.tolist(), abs=1e-4)
    assert model.take_counts()["calls"] == USERS * 12


def last_history(batch: ListBatch) -> Any:
    """The history of the last row alone."""
    return replace(batch.history, items=batch.history.items[-1:], lengths=batch.history.lengths[-1:])


def look_at_items(model: RankLLM, monkeypatch: pytest.MonkeyPatch, bias: float = 0.0) -> list[np.ndarray]:
    """Let a model prefer high item numbers, and by `bias` what stands in front; return what it is shown."""
    shown = []

    def look(history: Any, items_BW: np.ndarray) -> Judgement:
        shown.append(items_BW.copy())
        scores = torch.from_numpy(items_BW - bias * np.arange(items_BW.shape[1]))
        return Judgement(scores.float(), ["ok"] * len(items_BW))

    monkeypatch.setattr(model, "look", look)
    return shown


def test_a_ranker_that_is_blind_to_places_ranks_alike_in_any_order(sample, monkeypatch) -> None:
    model = make(sample, permutations=4)
    batch = lists(sample, model)
    shown = look_at_items(model, monkeypatch)
    scores, _ = model.judged(batch)
    assert scores.argsort(1, descending=True).equal(batch.candidates.argsort(1, descending=True))
    assert shown[0].tolist() == batch.candidates.tolist()
    assert len({look.tobytes() for look in shown}) == 4
    # the orders of a list do not depend on the batch that it is in
    again = look_at_items(model, monkeypatch)
    last = replace(batch, candidates=batch.candidates[-1:], row=batch.row[:1], history=last_history(batch))
    model.judged(last)
    assert [look.tolist() for look in again] == [look[-1:].tolist() for look in shown]
    # one that looks at places alone is all but averaged away
    blind = make(sample, permutations=200)
    look_at_items(blind, monkeypatch, bias=1e6)
    ranks = -blind.judge(batch, batch.candidates).scores
    assert (ranks - (CANDIDATES - 1) / 2).abs().max() < 0.8


def test_windows_of_all_users_go_together_and_places_are_the_scores(sample, monkeypatch) -> None:
    model = make(sample, window=4, stride=2)
    batch = lists(sample, model, number=30)  # more than there are letters
    shown = look_at_items(model, monkeypatch)
    scores, statuses = model.judged(batch)
    assert [look.shape for look in shown] == [(USERS, 4)] * 14
    assert scores.sort(1).values.equal(torch.arange(1.0, 31.0).expand(USERS, -1))
    best = batch.candidates.gather(1, scores.argsort(1, descending=True))[:, :2]
    assert best.equal(batch.candidates.sort(1, descending=True).values[:, :2])
    assert statuses == ["ok"] * USERS
    assert model.take_counts() == {"users": USERS, "windows": 14 * USERS, "ok": 14 * USERS}


def write(monkeypatch: pytest.MonkeyPatch, answers: list[list[int]]) -> None:
    monkeypatch.setattr(listwise_modes, "greedy_answers", lambda *_: answers)


def test_written_permutations_are_read_and_failures_keep_the_order(sample, monkeypatch) -> None:
    model = make(sample, mode="generate")
    encoder, batch = model.encoder, lists(sample, make(sample))
    order = [2, 0, 1, 5, 4, 3]
    texts = ["[B] > [A]", "Top 3: [C] > [A]", "[A] > [A] > [B] > [C] > [D] > [E]", ""]
    tokens = [encoder.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    write(monkeypatch, [encoder.answer(order), *tokens])
    scores, statuses = model.judged(batch)
    assert statuses == ["ok", "missing", "wrong_format", "repetition", "wrong_format"]
    assert scores.argsort(1, descending=True).tolist() == [order] + [list(range(CANDIDATES))] * 4
    with pytest.raises(TooManyFailures, match=r"16 of 20 answers .*4 repetition.*--method\.max_failures 0\.1"):
        for _ in range(3):
            model.judged(batch)
    patient = make(sample, mode="generate", max_failures=1.0)
    for _ in range(10):
        patient.judged(batch)


def test_greedy_generation_goes_on_from_the_prompt_without_a_bracket(sample: Any) -> None:
    model = make(sample, mode="generate", max_failures=1.0, max_new_tokens=3)
    batch = lists(sample, model)
    seen: list[Status] = model.judged(batch)[1]
    assert set(seen) <= {"wrong_format", "missing"}
    history = batch.history.items[0, : batch.history.lengths[0]].numpy()
    prompt = model.encoder.prompt(history, batch.candidates[0].numpy())
    for _ in range(3):
        prompt.append(int(last_logits(model, prompt).argmax()))
    padded = listwise_modes.left_padded([prompt[:-3]], torch.device("cpu"))
    found = listwise_modes.greedy_answers(decoder_of(model.backbone), *padded, -1, 3)
    assert found == [prompt[-3:]]


def test_identifiers_that_are_not_tokens_are_refused_unless_they_are_written(sample: Any) -> None:
    numbers = replace(ListwiseSettings(), template="items-numbers")
    with pytest.raises(ValueError, match=r"pass items-letters or a smaller --method\.window"):
        make(sample, numbers, num_candidates=20, window=20, stride=10)
    make(sample, numbers, num_candidates=20, window=20, stride=10, mode="generate")
    with pytest.raises(ValueError, match="candidate 27 has no letter"):
        make(sample, num_candidates=27, window=27, stride=10)


def test_a_bf16_pass_still_tells_close_candidates_apart(sample: Any) -> None:
    model = make(sample).float()
    batch = lists(sample, model)
    with torch.autocast("cpu", torch.bfloat16):
        scores = model.judge(batch, batch.candidates).scores
    assert scores.dtype == torch.float32
    assert not scores.bfloat16().float().equal(scores)
    assert causal_model(model.backbone).dtype == torch.float32
