"""LlamaRec: logits and losses against whole passes, orders, vectors for letters, cosines, and fusion by hand."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaForCausalLM, RobertaConfig, RobertaModel

from data.batches import NO_LABEL
from data.candidate_store import CandidateStore
from data.config import DataConfig
from data.identifiers import LETTERS, Identifiers, resolve
from data.ranking_batches import EvaluationRankings, RankingBatch, TrainingRankings
from data.ranking_prompts import RankingSettings, ranking_prompt, shown_titles
from data.ranking_tokens import RankingEncoder
from data.sources import read
from data.splits import Split, split
from data.title_tokens import TokenTable, encode
from models.backbone import BackboneConfig, causal_model, load_backbone, load_tokenizer
from models.item_embeddings import mean_token_embeddings
from models.llamarec import ItemHead, LlamaRec, LlamaRecConfig, VectorHead, best_weight, z_scores
from models.tiny import TinyConfig, llama_config

SAMPLE = DataConfig(source="sample", sample_users=30, sample_series=12)
K, USERS = 5, 6


class Parts:
    """A split, its tokenizer, and what makes models and batches of them."""

    def __init__(self) -> None:
        interactions = read(SAMPLE)
        self.split: Split = split(interactions, SAMPLE)
        self.settings = RankingSettings(num_candidates=K, history_length=6)
        raw = ["", *interactions.catalog.titles[1:]]
        self.tokenizer = load_tokenizer(BackboneConfig(), [*raw, ranking_prompt(raw[1:3], [("A", raw[4])])])
        self.titles = shown_titles(self.tokenizer, interactions.catalog, self.settings)
        ids = resolve(self.tokenizer, ranking_prompt(["a"], [("A", "b")]), LETTERS[:K])
        self.letters = Identifiers(LETTERS[:K], ids)
        random, n = np.random.default_rng(0), len(self.split.test)
        items = np.stack([random.permutation(self.split.num_items)[:K] + 1 for _ in range(n)]).astype(np.int32)
        self.store = CandidateStore(items, -np.sort(random.random((n, K)).astype(np.float32)))

    def encoder(self, identifiers: Identifiers | None) -> RankingEncoder:
        return RankingEncoder(self.tokenizer, self.titles, self.settings.history_length, identifiers)

    def model(self, identifiers: Identifiers | None = None, backbone: Any = None, **settings: Any) -> LlamaRec:
        """A model in float64 with random weights, not in training; `backbone` holds settings of it."""
        backbone = load_backbone(
            BackboneConfig(tiny=TinyConfig(hidden_size=32, layers=2), **(backbone or {})),
            self.tokenizer,
            seed=0,
            device="cpu",
            trainable=True,
            head=settings.get("scoring") != "dot",
        )
        torch.manual_seed(0)
        for parameter in backbone.parameters():
            nn.init.normal_(parameter, std=0.3)
        ids = self.letters.token_ids if identifiers is None else identifiers.token_ids
        table = mean_token_embeddings(backbone, TokenTable.of([[], *encode(self.tokenizer, self.titles[1:])]))
        config = LlamaRecConfig(prompts=self.settings, **settings)
        options = {"end_id": self.tokenizer.eos_token_id, "item_table": table}
        return LlamaRec(config, backbone, self.split.num_items, ids, **options).double().eval()

    def evaluation(self, identifiers: Identifiers | None, permutations: int = 1) -> RankingBatch:
        examples = EvaluationRankings(
            *(self.split, "test", self.encoder(identifiers), self.settings, 0, self.store), permutations=permutations
        )
        return examples.collate(np.arange(USERS))

    def training(self, identifiers: Identifiers | None, **options: Any) -> RankingBatch:
        return TrainingRankings(self.split, self.encoder(identifiers), self.settings, 0, **options).collate(
            np.arange(USERS), 0
        )


@pytest.fixture(scope="module")
def parts() -> Parts:
    return Parts()


def whole_logits(model: LlamaRec, batch: RankingBatch) -> list[Tensor]:
    """The logits of all positions of each prompt, run alone and without padding."""
    causal = causal_model(model.backbone)
    rows = zip(batch.input_ids, batch.attention_mask, strict=True)
    with torch.no_grad():
        return [causal(input_ids=ids[mask.bool()][None]).logits[0] for ids, mask in rows]


def test_scores_are_the_logits_of_letters_behind_the_prompt(parts: Parts) -> None:
    model, batch = parts.model(llm_weight=1.0), parts.evaluation(parts.letters)
    assert parts.letters.token_ids is not None
    found = model.candidate_scores(batch)
    for row, logits in enumerate(whole_logits(model, batch)):
        torch.testing.assert_close(found[row], logits[-1, parts.letters.token_ids].float(), rtol=1e-5, atol=1e-5)


def test_only_candidates_have_scores(parts: Parts) -> None:
    model, batch = parts.model(llm_weight=0.3), parts.evaluation(parts.letters)
    assert batch.retriever_scores is not None
    with torch.no_grad():
        scores = model(batch)
    assert scores.shape == (USERS, parts.split.num_items + 1)
    assert (scores > -torch.inf).sum(1).tolist() == [K] * USERS
    mixed = 0.3 * z_scores(model.candidate_scores(batch)) + 0.7 * z_scores(batch.retriever_scores)
    torch.testing.assert_close(scores.gather(1, batch.candidates), mixed)


def test_the_retriever_alone_keeps_its_order(parts: Parts) -> None:
    with torch.no_grad():
        scores = parts.model(llm_weight=0.0)(batch := parts.evaluation(parts.letters))
    assert torch.equal(scores.argsort(1, descending=True)[:, :K], batch.candidates)


def test_the_loss_is_cross_entropy_over_the_identifiers_alone(parts: Parts) -> None:
    model, batch = parts.model(), parts.training(parts.letters)
    assert batch.answers is not None
    assert parts.letters.token_ids is not None
    loss = model(batch)
    logits = torch.stack([logits[-1, parts.letters.token_ids] for logits in whole_logits(model, batch)])
    expected = F.cross_entropy(logits, batch.answers, reduction="sum")
    torch.testing.assert_close(loss.total, expected.float(), rtol=1e-5, atol=1e-5)
    assert loss.count == USERS


def test_the_published_loss_is_that_of_letter_and_end(parts: Parts) -> None:
    model = parts.model(objective="published")
    batch = parts.training(parts.letters, answer_ids=parts.letters.token_ids)
    assert batch.answers is not None
    assert parts.letters.token_ids is not None
    expected = 0.0
    for answer, logits in zip(batch.answers, whole_logits(model, batch), strict=True):
        labels = torch.tensor([parts.letters.token_ids[answer], parts.tokenizer.eos_token_id])
        expected += F.cross_entropy(logits[-2:], labels, reduction="sum").item()
    loss = model(batch)
    assert loss.total.item() == pytest.approx(expected, rel=1e-6)
    assert loss.count == 2 * USERS


@pytest.mark.parametrize("published", [False, True])
def test_a_muted_batch_has_no_loss_and_a_gradient(parts: Parts, published: bool) -> None:
    model = parts.model(objective="published" if published else "candidates").train()
    options = {"answer_ids": parts.letters.token_ids} if published else {}
    loss = model(parts.training(parts.letters, **options).muted())
    assert loss.total.item() == 0
    loss.total.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name}: DDP waits for a gradient of every weight"
        assert not parameter.grad.any()


def test_orders_are_put_back_and_averaged(parts: Parts) -> None:
    model = parts.model()
    one, three = parts.evaluation(parts.letters), parts.evaluation(parts.letters, permutations=3)
    assert parts.letters.token_ids is not None
    logits = torch.stack([logits[-1, parts.letters.token_ids] for logits in whole_logits(model, three)])
    expected = torch.zeros(USERS, K, dtype=torch.float64)
    for prompt, order in enumerate(three.order.tolist()):
        for letter, place in enumerate(order):
            expected[prompt // 3, place] += logits[prompt, letter] / 3
    torch.testing.assert_close(model.candidate_scores(three), expected.float(), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(model.candidate_scores(one), expected.float(), atol=1e-3)


def test_a_scorer_that_looks_only_at_titles_ranks_alike_in_every_order(parts: Parts) -> None:
    """What the letters get is then a function of what they name; permutations change nothing."""
    model = parts.model()

    class ByTitle(nn.Module):
        def forward(self, decoder: object, states: Tensor, candidates: Tensor) -> Tensor:
            shown = candidates.repeat_interleave(len(states) // len(candidates), 0).gather(1, current.order)
            return torch.sin(shown.float())

    model.head = ByTitle()  # type: ignore[assignment]
    current = parts.evaluation(parts.letters)
    once = model.candidate_scores(current)
    current = parts.evaluation(parts.letters, permutations=4)
    torch.testing.assert_close(model.candidate_scores(current), once)


@pytest.mark.parametrize("vectors", [False, True])
def test_training_learns_which_identifier_is_right(parts: Parts, vectors: bool) -> None:
    """A few prompts by heart: K equal guesses have a loss of log 5 = 1.61."""
    identifiers = Identifiers(tuple(map(str, range(1, K + 1))), None) if vectors else parts.letters
    backbone = load_backbone(
        BackboneConfig(tiny=TinyConfig(hidden_size=64, layers=2)),
        parts.tokenizer,
        seed=0,
        device="cpu",
        trainable=True,
    )
    torch.manual_seed(0)
    config = LlamaRecConfig(prompts=parts.settings)
    model = LlamaRec(config, backbone, parts.split.num_items, identifiers.token_ids).train()
    optimizer, batch = torch.optim.AdamW(model.parameters(), lr=3e-3), parts.training(identifiers)
    for _ in range(60):
        loss = model(batch)
        optimizer.zero_grad()
        (loss.total / loss.count).backward()
        optimizer.step()
    assert model(batch).total.item() / USERS < 0.1


def test_vectors_stand_for_letters_in_prompt_and_answer(parts: Parts) -> None:
    vectors = Identifiers(tuple(map(str, range(1, K + 1))), None)
    model, batch = parts.model(vectors), parts.training(vectors)
    assert isinstance(model.head, VectorHead)
    assert batch.index_slots is not None
    assert batch.answers is not None
    causal, expected = causal_model(model.backbone), []
    for row, (ids, mask) in enumerate(zip(batch.input_ids, batch.attention_mask, strict=True)):
        embeds = causal.get_input_embeddings()(ids)[None].clone()
        for index in range(K):
            embeds[0, batch.index_slots[row * K + index] - row * len(ids)] = model.head.shown[index]
        length = int(mask.sum())
        state = causal.base_model(inputs_embeds=embeds[:, :length]).last_hidden_state[0, -1]
        expected.append(state @ model.head.named.T)
    total = F.cross_entropy(torch.stack(expected), batch.answers, reduction="sum")
    loss = model(batch)
    torch.testing.assert_close(loss.total, total.float(), rtol=1e-5, atol=1e-5)
    loss.total.backward()
    for vectors_of in (model.head.shown, model.head.named):
        assert vectors_of.grad is not None
        assert (vectors_of.grad.abs().sum(1) > 0).all(), "every identifier is learned"


@pytest.mark.parametrize("causal", [True, False])
def test_dot_scores_are_scaled_cosines_with_a_candidates_own_vector(parts: Parts, causal: bool) -> None:
    """Whether or not a state sees what follows it: pads on either side are never seen."""
    model, batch = parts.model(scoring="dot", backbone={"causal": causal}), parts.training(None)
    assert isinstance(model.head, ItemHead)
    assert batch.answers is not None

    def expected(batch: RankingBatch) -> Tensor:
        rows = []
        for ids, mask, candidates in zip(batch.input_ids, batch.attention_mask, batch.candidates, strict=True):
            assert "Candidate pool" not in parts.tokenizer.decode(ids)
            state = causal_model(model.backbone)(input_ids=ids[mask.bool()][None]).last_hidden_state[0, -1]
            rows.append(20 * F.cosine_similarity(model.head.projection(state)[None], model.head.table[candidates]))
        return torch.stack(rows)

    total = F.cross_entropy(expected(batch), batch.answers, reduction="sum")
    torch.testing.assert_close(model(batch).total, total.float(), rtol=1e-5, atol=1e-5)
    asked = parts.evaluation(None)
    assert not asked.attention_mask.all(), "no row is padded"
    torch.testing.assert_close(model.candidate_scores(asked), expected(asked).float(), rtol=1e-5, atol=1e-5)


def test_an_encoder_that_counts_places_ranks_what_it_has_learned(parts: Parts) -> None:
    """RoBERTa's places begin behind that of padding, and depend on the side of pads."""
    shape = RobertaConfig(
        vocab_size=len(parts.tokenizer),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
    )
    torch.manual_seed(0)
    backbone = RobertaModel(shape, add_pooling_layer=False).eval()
    config = LlamaRecConfig(prompts=parts.settings, scoring="dot")
    table = torch.randn(parts.split.num_items + 1, 8)
    model = LlamaRec(config, backbone, parts.split.num_items, item_table=table).eval()
    asked = parts.evaluation(None)
    with torch.no_grad():
        found = model.candidate_scores(asked)
        for row, (ids, mask) in enumerate(zip(asked.input_ids, asked.attention_mask, strict=True)):
            state = backbone(input_ids=ids[mask.bool()][None]).last_hidden_state[:, -1]
            alone = model.head(None, state, asked.candidates[row, None])
            torch.testing.assert_close(found[row, None], alone, rtol=1e-4, atol=1e-4)


def test_a_head_of_its_own_that_nothing_reads_is_not_trained(parts: Parts) -> None:
    """DDP waits for a gradient of every trained weight."""
    vectors = Identifiers(tuple(map(str, range(1, K + 1))), None)
    shape = llama_config(TinyConfig(hidden_size=32, layers=1), len(parts.tokenizer))
    shape.tie_word_embeddings = False
    config = LlamaRecConfig(prompts=parts.settings)
    model = LlamaRec(config, LlamaForCausalLM(shape), parts.split.num_items, None)
    model(parts.training(vectors)).total.backward()
    missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["backbone.lm_head.weight"]


def test_checkpointing_changes_no_gradient(parts: Parts) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = parts.model(backbone={"gradient_checkpointing": checkpointing}).train()
        model(parts.training(parts.letters)).total.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, plain in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], plain)


def test_z_scores() -> None:
    scores = z_scores(torch.tensor([[1.0, 2.0, 3.0], [5.0, 5.0, 5.0]]))
    assert scores[0].tolist() == pytest.approx([-(1.5**0.5), 0, 1.5**0.5])
    assert scores[1].tolist() == [0, 0, 0]


def test_the_weight_is_the_one_with_the_best_ndcg_on_validation() -> None:
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(0, 12, (400,), generator=generator)
    is_target = F.one_hot(target, 12).bool()
    good = torch.randn(400, 12, generator=generator) + 2.0 * is_target
    noise = torch.randn(400, 12, generator=generator)
    missed = torch.zeros(400, 12, dtype=torch.bool)  # users whose target was not retrieved
    assert best_weight(good, noise, is_target) > 0.8
    assert best_weight(noise, good, is_target) < 0.2
    other = torch.randn(400, 12, generator=generator) + 2.0 * is_target
    assert 0.3 < best_weight(good, other, is_target) < 0.7, "two that err differently are better together"
    with_missed = (torch.cat([first, second]) for first, second in ((good, noise), (noise, good), (is_target, missed)))
    assert best_weight(*with_missed) == best_weight(good, noise, is_target)
    assert best_weight(good, noise, missed) == 1.0


def test_labels_that_are_muted_are_none(parts: Parts) -> None:
    answers = parts.training(parts.letters).muted().answers
    assert answers is not None
    assert (answers == NO_LABEL).all()


@pytest.mark.parametrize(
    ("settings", "flag"),
    [
        ({"llm_weight": 1.5}, "--method.llm_weight"),
        ({"permutations": 0}, "--method.permutations"),
        ({"cuts": 0}, "--method.cuts"),
        ({"scoring": "dot", "objective": "published"}, "--method.scoring dot"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, Any], flag: str) -> None:
    with pytest.raises(ValueError, match=flag):
        LlamaRecConfig(**settings)
