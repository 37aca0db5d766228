"""LLaRA and iLoRA: likelihoods and texts against naive passes, item vectors, gates, and what is trained."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from data.batches import PromptBatch
from data.candidate_batches import EvaluationCandidates, TrainingCandidates
from data.candidate_prompts import MOVIE
from data.candidate_rows import CandidateSettings
from data.candidate_tokens import CandidateEncoder
from data.config import DataConfig
from data.prompts import title_texts
from data.sources import read
from data.splits import split
from models.backbone import BackboneConfig, causal_model, load_backbone, load_tokenizer
from models.candidate_scoring import greedy_answers
from models.decoder import decoder_of
from models.gru4rec import GRU4Rec, GRU4RecConfig
from models.llara import ILoRA, ILoRAConfig, LLaRA, LLaRAConfig, with_states
from models.lrurec import LRURec, LRURecConfig
from models.moe_lora import MoELoRALinear, add_moe_lora
from models.sasrec import SASRec, SASRecConfig
from models.sasrec_llara import SASRecLLaRA
from models.sequence_recommender import SequenceRecommender
from models.tiny import TinyConfig

SAMPLE = DataConfig(source="sample", sample_users=30, sample_series=12)
CANDIDATES, USERS, TWIN, OTHER_TWIN = 7, 6, 5, 40  # the twins share a title
Sample = tuple[Any, Any, CandidateEncoder]


@pytest.fixture(scope="module")
def sample() -> Sample:
    """The split, the tokenizer and the encoder of a catalogue in which two items have one title."""
    interactions = read(SAMPLE)
    titles = title_texts(interactions.catalog)
    titles[OTHER_TWIN] = titles[TWIN]
    tokenizer = load_tokenizer(BackboneConfig(), titles)
    return split(interactions, SAMPLE), tokenizer, CandidateEncoder(tokenizer, MOVIE, titles)


def make(sample: Sample, kind: type[LLaRA] = LLaRA, checkpointing: bool = False, **settings: Any) -> LLaRA:
    """A model in float64 whose weights, and adapter where it has one, are random, not in training."""
    parts, tokenizer, encoder = sample
    prompts = CandidateSettings(num_candidates=CANDIDATES, mode=settings.pop("mode", "hybrid"))
    config = (ILoRAConfig if kind is ILoRA else LLaRAConfig)(prompts=prompts, **settings)
    shape = TinyConfig(hidden_size=32, layers=2)
    backbone = load_backbone(
        BackboneConfig(tiny=shape, gradient_checkpointing=checkpointing),
        tokenizer,
        seed=0,
        device="cpu",
        trainable=True,
    )
    torch.manual_seed(0)
    for parameter in backbone.parameters():
        nn.init.normal_(parameter, std=0.3)
    if kind is ILoRA:
        add_moe_lora(causal_model(backbone), rank=8, experts=4, scale=2.0)
        for module in backbone.modules():
            if isinstance(module, MoELoRALinear):
                nn.init.normal_(module.lora_B, std=0.3)
    sasrec = SASRec(SASRecConfig(hidden_size=16, num_blocks=1, window=12, dropout=0.5), parts.num_items)
    nn.init.normal_(sasrec.item_embedding.weight)
    model = kind(config, backbone, encoder.responses, sasrec)  # type: ignore[arg-type]
    if kind is ILoRA:
        nn.init.normal_(model.gate.router.weight, std=2.0)
    return model.double().eval()


def examples(sample: Sample, model: LLaRA, candidates: np.ndarray | None = None) -> EvaluationCandidates:
    """Test users with the candidates given, else some of each user's own."""
    parts, _, encoder = sample
    if candidates is None:
        random = np.random.default_rng(0)
        rows = [random.permutation(parts.num_items)[:CANDIDATES] + 1 for _ in parts.test.user]
        candidates = np.stack(rows)
    return EvaluationCandidates(parts, "test", encoder, model.config.prompts, 0, candidates)


def training_batch(sample: Sample, model: LLaRA, progress: float = 9.0, curriculum: str = "none") -> PromptBatch:
    parts, _, encoder = sample
    settings = replace(model.config.prompts, curriculum=curriculum)  # type: ignore[arg-type]
    return TrainingCandidates(parts, encoder, settings, seed=0).collate(np.arange(8), 0, progress)


def lengthened(sample: Sample, model: LLaRA, candidates: np.ndarray | None = None) -> tuple[Any, np.ndarray]:
    """Examples, and rows among them whose prompts have different lengths, so that some of a batch are padded."""
    made = examples(sample, model, candidates)
    rows = np.argsort(made.lengths, kind="stable")[:: len(made.lengths) // USERS][:USERS]
    assert len(set(made.lengths[rows].tolist())) > 2
    return made, rows


def log_probabilities(model: LLaRA, batch: PromptBatch, tokens: list[int]) -> Tensor:
    """log p of what follows the prompt and each of `tokens`, [1 + tokens, V]: one row, without its pads, no cache."""
    real, length = batch.attention_mask[0].bool(), int(batch.attention_mask.sum())
    decoder = decoder_of(model.backbone)
    with model.adapted(batch), torch.no_grad():
        embeds = [model.embed(batch)[:, real]]
        if tokens:
            embeds.append(causal_model(model.backbone).get_input_embeddings()(torch.tensor([tokens])))
        states = decoder.body(inputs_embeds=torch.cat(embeds, dim=1), use_cache=False).last_hidden_state[0]
        return decoder.head(states[length - 1 :]).log_softmax(-1)


CASES = [
    (LLaRA, {"mode": "text"}),
    (LLaRA, {"mode": "id"}),
    (LLaRA, {"mode": "hybrid"}),
    (LLaRA, {"mode": "hybrid", "vectors": "states", "projector": "linear"}),
    (ILoRA, {"mode": "text"}),
    (ILoRA, {"mode": "hybrid", "vectors": "states"}),
]


@pytest.mark.parametrize(("kind", "settings"), CASES)
def test_scores_are_the_likelihoods_of_each_title_in_a_pass_of_its_own(
    sample: Sample, kind: type[LLaRA], settings: dict[str, Any]
) -> None:
    """Padding and the rows beside it therefore change nothing."""
    model = make(sample, kind, **settings)
    made, rows = lengthened(sample, model)
    scores = model(made.collate(rows))
    assert scores.dtype == torch.float32
    for place, row in enumerate(rows):
        alone = made.collate(np.array([row]))
        offered = made.candidates[row]
        for item in offered:
            response = model.responses[item].tolist()
            logs = log_probabilities(model, alone, response[:-1])
            expected = logs.gather(1, torch.tensor(response)[:, None]).sum()
            torch.testing.assert_close(scores[place, item], expected.float(), rtol=1e-6, atol=0)
        others = np.setdiff1d(np.arange(scores.shape[1]), offered)
        assert (scores[place, others] == -torch.inf).all()


def test_items_of_one_title_tie_whatever_a_kernel_rounds(sample: Sample) -> None:
    model = make(sample)
    parts = sample[0]
    fillers = np.setdiff1d(np.arange(1, parts.num_items + 1), [TWIN, OTHER_TWIN])[: CANDIDATES - 2]
    made, rows = lengthened(sample, model, np.tile([TWIN, *fillers, OTHER_TWIN], (len(parts.test.user), 1)))
    head = decoder_of(model.backbone).head
    head.register_forward_hook(lambda module, inputs, logits: logits + 1e-3 * torch.randn_like(logits))
    scores, again = model(made.collate(rows)), model(made.collate(rows))
    assert not torch.equal(scores, again)
    assert torch.equal(scores[:, TWIN], scores[:, OTHER_TWIN])
    assert len(scores[0, fillers].unique()) == len(fillers)


@pytest.mark.parametrize(("kind", "settings"), CASES[-2:] + CASES[2:3])
def test_written_tokens_are_the_most_likely_ones_step_by_step(
    sample: Sample, kind: type[LLaRA], settings: dict[str, Any]
) -> None:
    model = make(sample, kind, max_new_tokens=9, **settings)
    made, rows = lengthened(sample, model)
    batch = made.collate(rows)
    free = []
    for row in rows:
        alone, tokens = made.collate(np.array([row])), []
        for _ in range(9):
            tokens.append(int(log_probabilities(model, alone, tokens)[-1].argmax()))
        free.append(tokens)
    with model.adapted(batch):
        prompt = decoder_of(model.backbone), model.embed(batch), batch.attention_mask
        assert greedy_answers(*prompt, end=-1, max_new_tokens=9) == free
        for end in {free[0][0], free[1][4]}:  # one row ends at once, or amid the others
            cut = [tokens[: tokens.index(end) + 1] if end in tokens else tokens for tokens in free]
            assert greedy_answers(*prompt, end=end, max_new_tokens=9) == cut
    newline = sample[1].encode("\n", add_special_tokens=False)
    assert [int(model.responses[1][-1])] == newline
    assert model(batch, method="answers") == [
        tokens[: tokens.index(newline[0]) + 1] if newline[0] in tokens else tokens for tokens in free
    ]


def test_generation_ranks_what_is_written_first_and_ties_the_rest(sample: Sample, monkeypatch: Any) -> None:
    model = make(sample, scoring="generate")
    made, rows = lengthened(sample, model)
    batch = made.collate(rows)
    assert batch.candidates is not None
    candidates = batch.candidates.tolist()
    outside = next(item for item in range(1, 60) if item not in candidates[1] and item not in (TWIN, OTHER_TWIN))
    said = [model.responses[items[3]].tolist() for items in candidates]
    said[1], said[2] = model.responses[outside].tolist(), said[2][:-1]  # no candidate; a title without its end
    monkeypatch.setattr(model, "answers", lambda batch: said)
    scores = model(batch)
    for place, items in enumerate(candidates):
        of_candidates = scores[place, items].tolist()
        hit = [0.0 if place in (1, 2) else float(said[place] == model.responses[item].tolist()) for item in items]
        assert of_candidates == hit
        assert place in (1, 2) or hit[3] == 1


# --- Vectors ---


def test_states_take_the_place_of_the_historys_vectors() -> None:
    torch.manual_seed(0)
    histories, candidates, shows = [3, 1, 0, 4, 2], 2, [True, False, True, True, False]
    states, width = torch.randn(5, 4, 6), 6
    row = [i for i, count in enumerate(histories) if shows[i] for _ in range(count + candidates)]
    vectors = torch.randn(len(row), width)
    expected = vectors.clone()
    slot = 0
    for i, count in enumerate(histories):
        if shows[i]:
            for event in range(count):
                expected[slot + event] = states[i, event]
            slot += count + candidates
    found = with_states(vectors, torch.tensor(row), states, torch.tensor(histories))
    assert torch.equal(found, expected)
    nothing = with_states(vectors[:0], torch.tensor(row)[:0], states, torch.tensor(histories))
    assert nothing.shape == (0, width)


@pytest.mark.parametrize(("kind", "settings"), CASES)
@pytest.mark.parametrize("trained", [False, True])
def test_every_weight_that_is_trained_gets_a_gradient_in_every_step_and_no_other_one(
    sample: Sample, kind: type[LLaRA], settings: dict[str, Any], trained: bool
) -> None:
    """Also where the curriculum shows no vectors, and in a batch without labels: DDP waits for all of them."""
    if trained and kind is LLaRA and settings["mode"] == "text":
        with pytest.raises(ValueError, match=r"train_sasrec true.*mode text reads nothing"):
            make(sample, kind, train_sasrec=True, **settings)
        return
    model = make(sample, kind, train_sasrec=trained, **settings).train()
    of_sasrec = {name for name, p in model.named_parameters() if name.startswith("sasrec.") and p.requires_grad}
    if not trained:
        assert not of_sasrec
    elif model.reads_states:
        assert len(of_sasrec) == len([*model.sasrec.parameters()])  # type: ignore[union-attr]
    else:
        assert of_sasrec == {"sasrec.item_embedding.weight"}
    batches = [training_batch(sample, model), training_batch(sample, model).muted()]
    if settings["mode"] == "hybrid":
        batches.append(training_batch(sample, model, progress=0.0, curriculum="step"))
    for batch in batches:
        model.zero_grad()
        model(batch).total.backward()
        missing = [n for n, p in model.named_parameters() if (p.grad is not None) != p.requires_grad]
        assert not missing
    model.zero_grad()
    model(batches[0]).total.backward()
    learning = [n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0]
    assert (of_sasrec & {*learning} != set()) == trained
    assert settings["mode"] == "text" or any(name.startswith("projector.") for name in learning)


@pytest.mark.parametrize("inner", ["published", "lrurec", "gru4rec"])
def test_of_other_recommenders_all_but_what_only_scores_is_trained(sample: Sample, inner: str) -> None:
    parts, _, encoder = sample
    sasrec: SequenceRecommender = {
        "published": SASRecLLaRA(parts.num_items, hidden_size=16),
        "lrurec": LRURec(LRURecConfig(hidden_size=16), parts.num_items),
        "gru4rec": GRU4Rec(GRU4RecConfig(hidden_size=16), parts.num_items),
    }[inner]
    config = LLaRAConfig(CandidateSettings(num_candidates=CANDIDATES), vectors="states", train_sasrec=True)
    model = LLaRA(config, make(sample).backbone, encoder.responses, sasrec)
    model.double().train()
    model(training_batch(sample, model)).total.backward()
    trained = {name for name, p in sasrec.named_parameters() if p.requires_grad}
    assert trained == {name for name, p in sasrec.named_parameters() if p.grad is not None}
    scores = {"item_scores.weight", "item_scores.bias", "item_bias"}
    assert trained == {name for name, _ in sasrec.named_parameters()} - scores


def test_a_frozen_recommender_stays_as_it_is_evaluated_and_a_trained_one_drops_out(sample: Sample) -> None:
    frozen, trained = (make(sample, vectors="states", train_sasrec=train).train() for train in (False, True))
    assert frozen.training
    assert frozen.backbone.training
    assert not any(module.training for module in frozen.sasrec.modules())  # type: ignore[union-attr]
    assert all(module.training for module in trained.sasrec.modules())  # type: ignore[union-attr]
    batch = training_batch(sample, frozen)
    assert frozen(batch).total == frozen(batch).total
    assert trained(batch).total != trained(batch).total


# --- Gate ---


def test_two_users_with_one_prompt_get_different_updates(sample: Sample) -> None:
    model = make(sample, ILoRA, mode="text")
    batch = examples(sample, model).collate(np.array([0, 1]))
    twice = replace(
        batch,
        input_ids=batch.input_ids[:1].repeat(2, 1),
        attention_mask=batch.attention_mask[:1].repeat(2, 1),
        candidates=batch.candidates[:1].repeat(2, 1),  # type: ignore[index]
    )
    scores = model(twice)
    offered = scores[0] > -torch.inf
    assert (scores[0] - scores[1])[offered].abs().max() > 1e-2
    without = make(sample, LLaRA, mode="text")(twice)
    assert torch.equal(without[0], without[1])


def test_the_gates_use_is_logged_beside_the_loss(sample: Sample) -> None:
    model = make(sample, ILoRA).train()
    batch = training_batch(sample, model)
    loss = model(batch)
    shares = {name: float(value / loss.count) for name, value in loss.parts.items()}
    uses = [shares[f"expert_{expert}_use"] for expert in range(4)]
    assert sum(uses) == pytest.approx(1)
    assert max(uses) - min(uses) > 0.01
    assert 0 < shares["gate_entropy"] < np.log(4)
    assert make(sample)(training_batch(sample, model)).parts == {}


@pytest.mark.parametrize("kind", [LLaRA, ILoRA])
def test_gradient_checkpointing_changes_nothing(sample: Sample, kind: type[LLaRA]) -> None:
    results = []
    for checkpointing in (False, True):
        model = make(sample, kind, checkpointing, vectors="states").train()
        assert causal_model(model.backbone).is_activation_checkpointing == checkpointing
        loss = model(training_batch(sample, model))
        loss.total.backward()
        results.append((loss.total.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (plain, gradients), (recomputed, same) = results
    torch.testing.assert_close(recomputed, plain)
    assert gradients.keys() == same.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(same[name], gradient, msg=name)
