"""Titles scored through a trie against the same titles run one by one."""

import copy
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    GPTNeoConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from models import title_generation, title_scoring
from models.backbone import Backbone, BackboneConfig, load_backbone, load_tokenizer
from models.decoder import last_token_embeddings
from models.tiny import TinyConfig
from models.title_generation import beam_scores, beam_search_titles, generate_free
from models.title_scoring import title_log_likelihoods
from models.title_trie import TitleTrie
from tests.toys import grouped_llama

VOCABULARY, EOS = 50, 2


def _trie(titles: Sequence[Sequence[int]]) -> TitleTrie:
    offsets = np.cumsum([0, *(len(title) for title in titles)])
    return TitleTrie.build(offsets, np.concatenate([np.asarray(title) for title in titles]))


@pytest.fixture(scope="module")
def titles() -> list[list[int]]:
    """60 titles that share beginnings, with a one-token title, an empty one (EOS alone) and duplicates."""
    numbers = np.random.default_rng(0)
    made = [[*numbers.integers(3, 6, numbers.integers(1, 7)).tolist(), EOS] for _ in range(56)]
    return [*made, [40, EOS], [EOS], made[0], made[7]]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return grouped_llama(VOCABULARY, EOS).eval()


@pytest.fixture(scope="module")
def prompts() -> tuple[Tensor, Tensor]:
    """Five left-padded prompts of different lengths: (input_ids, attention_mask)."""
    ids = torch.randint(3, VOCABULARY, (5, 11), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(11) >= torch.tensor([0, 4, 9, 10, 1])[:, None]).long()
    return ids * mask, mask


@torch.no_grad()
def _one_by_one(model: Backbone, prompts: tuple[Tensor, Tensor], titles: list[list[int]]) -> Tensor:
    """Teacher forcing, one prompt and one title a pass, no padding, no cache, no trie: [B, N + 1]."""
    scores = torch.full((len(prompts[0]), len(titles) + 1), -torch.inf, dtype=torch.float64)
    for user, (ids, mask) in enumerate(zip(*prompts, strict=True)):
        prompt = ids[mask.bool()]
        for item, title in enumerate(titles, start=1):
            text = torch.cat([prompt, torch.tensor(title)])
            log_probs = model(text[None]).logits[0].double().log_softmax(-1)
            steps = log_probs[len(prompt) - 1 : -1].gather(1, torch.tensor(title)[:, None])
            scores[user, item] = steps.sum()
    return scores


def test_trie_spells_every_title_and_shares_beginnings(titles: list[list[int]]) -> None:
    trie = _trie(titles)
    for item, title in enumerate(titles, start=1):
        node, spelled = int(trie.leaf_of_item[item]), list[int]()
        while node:
            spelled.insert(0, int(trie.token[node]))
            node = int(trie.parent[node])
        assert spelled == title
    beginnings = {tuple(title[:length]) for title in titles for length in range(len(title) + 1)}
    assert trie.num_nodes == len(beginnings)
    assert trie.max_depth == max(map(len, titles))
    assert trie.leaf_of_item[1] == trie.leaf_of_item[59]


def test_trie_children_are_what_may_follow(titles: list[list[int]]) -> None:
    trie = _trie(titles)
    tokens, children = trie.children(torch.tensor([0, int(trie.leaf_of_item[1])]))
    assert set(tokens[0].tolist()) == {title[0] for title in titles}
    assert (children[0] > 0).all()
    assert (children[1] == 0).all()
    assert trie.is_leaf(trie.leaf_of_item[1:]).all()
    assert not trie.is_leaf(trie.parent).any()


@pytest.mark.parametrize("size", [4, 16, 1000])
def test_blocks_own_every_inner_node_once_and_see_their_ancestors(titles: list[list[int]], size: int) -> None:
    trie = _trie(titles)
    blocks = trie.blocks(size)
    inner = [node for node in range(1, trie.num_nodes) if not trie.is_leaf(torch.tensor(node))]
    assert sorted(blocks.nodes.flatten()[blocks.slots].tolist()) == inner
    assert blocks.nodes.shape[1] <= max(size, 2 * trie.max_depth)
    for nodes, visible in zip(blocks.nodes.tolist(), blocks.visible, strict=True):
        for slot, node in enumerate(nodes):
            path = {node}
            while node := int(trie.parent[node]):
                path.add(node)
            if nodes[slot]:
                assert {nodes[seen] for seen in visible[slot].nonzero().flatten().tolist()} == path
    assert sorted(blocks.edge_children.tolist()) == list(range(trie.level_start[2], trie.num_nodes))


@pytest.mark.parametrize(
    ("sequences", "message"),
    [
        ([[5, EOS], []], "item needs at least one"),
        ([[5], [5, 6]], "item 1 is the beginning"),
        ([], "catalogue needs an item"),
    ],
)
def test_trie_refuses_titles_that_cannot_be_told_apart(sequences: list[list[int]], message: str) -> None:
    offsets = np.cumsum([0, *map(len, sequences)])
    with pytest.raises(ValueError, match=message):
        TitleTrie.build(offsets, np.array([token for title in sequences for token in title], np.int64))


@pytest.mark.parametrize(("block_size", "nodes_per_forward"), [(256, None), (16, 16), (16, 64)])
def test_scores_equal_teacher_forcing(
    model: PreTrainedModel,
    prompts: tuple[Tensor, Tensor],
    titles: list[list[int]],
    block_size: int,
    nodes_per_forward: int | None,
) -> None:
    expected = _one_by_one(model, prompts, titles)
    scores = title_log_likelihoods(
        model, *prompts, _trie(titles), block_size=block_size, nodes_per_forward=nodes_per_forward
    )
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-10)
    assert (scores[:, 0] == -torch.inf).all()
    distinct = sorted({tuple(title): item for item, title in enumerate(titles, start=1)}.values())
    assert (scores[:, distinct].exp().sum(1) <= 1).all()  # different titles are disjoint events


def test_scores_do_not_depend_on_batch_or_padding(
    model: PreTrainedModel, prompts: tuple[Tensor, Tensor], titles: list[list[int]]
) -> None:
    together = title_log_likelihoods(model, *prompts, _trie(titles))
    for user, (ids, mask) in enumerate(zip(*prompts, strict=True)):
        kept = mask.bool()
        alone = title_log_likelihoods(model, ids[kept][None], mask[kept][None], _trie(titles))
        torch.testing.assert_close(alone[0], together[user], rtol=0, atol=1e-10)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_scores_in_float32_and_bfloat16(
    model: PreTrainedModel, prompts: tuple[Tensor, Tensor], titles: list[list[int]], attention: str
) -> None:
    expected = _one_by_one(model, prompts, titles)
    single = copy.deepcopy(model).float()
    single.set_attn_implementation(attention)
    scores = title_log_likelihoods(single, *prompts, _trie(titles))
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), expected, rtol=0, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        scores = title_log_likelihoods(single, *prompts, _trie(titles))
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), expected, rtol=0.05, atol=0.3)


def test_scores_of_a_catalogue_that_the_first_token_tells_apart(
    model: PreTrainedModel, prompts: tuple[Tensor, Tensor]
) -> None:
    titles = [[5], [9], [7]]  # no inner node at all
    scores = title_log_likelihoods(model, *prompts, _trie(titles))
    torch.testing.assert_close(scores, _one_by_one(model, prompts, titles), rtol=0, atol=1e-10)


def test_scores_go_through_the_adapter(
    model: PreTrainedModel, prompts: tuple[Tensor, Tensor], titles: list[list[int]]
) -> None:
    torch.manual_seed(0)
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False)
    adapted = get_peft_model(copy.deepcopy(model), lora).double().eval()
    scores = title_log_likelihoods(adapted, *prompts, _trie(titles))
    torch.testing.assert_close(scores, _one_by_one(adapted, prompts, titles), rtol=0, atol=1e-10)
    assert (scores[:, 1:] - title_log_likelihoods(model, *prompts, _trie(titles))[:, 1:]).abs().min() > 0


def test_scoring_refuses_what_would_be_silently_wrong(
    model: PreTrainedModel, prompts: tuple[Tensor, Tensor], titles: list[list[int]]
) -> None:
    training = copy.deepcopy(model).train()
    with pytest.raises(ValueError, match=r"model\.eval"):
        title_log_likelihoods(training, *prompts, _trie(titles))
    capped = copy.deepcopy(model)
    capped.config.final_logit_softcapping = 30.0
    with pytest.raises(ValueError, match="final_logit_softcapping"):
        title_log_likelihoods(capped, *prompts, _trie(titles))
    windowed = copy.deepcopy(model)
    windowed.config.sliding_window = 8
    with pytest.raises(ValueError, match="attends to 8"):
        title_log_likelihoods(windowed, *prompts, _trie(titles))


@torch.no_grad()
def _one_by_one_among_titles(model: Backbone, prompt: Tensor, titles: list[list[int]]) -> Tensor:
    """Teacher forcing with a softmax over only those tokens that some title has at this place: [N]."""
    scores = torch.zeros(len(titles), dtype=torch.float64)
    for item, title in enumerate(titles):
        for length, token in enumerate(title):
            allowed = sorted({other[length] for other in titles if other[:length] == title[:length]})
            text = torch.cat([prompt, torch.tensor(title[:length], dtype=torch.long)])
            log_probs = model(text[None]).logits[0, -1, allowed].double().log_softmax(-1)
            scores[item] += log_probs[allowed.index(token)]
    return scores


@pytest.mark.parametrize(("block_size", "nodes_per_forward"), [(128, None), (16, 16)])
def test_constrained_scores_are_probabilities_over_the_catalogue(
    model: PreTrainedModel,
    prompts: tuple[Tensor, Tensor],
    titles: list[list[int]],
    block_size: int,
    nodes_per_forward: int | None,
) -> None:
    scores = title_log_likelihoods(
        model, *prompts, _trie(titles), constrained=True, block_size=block_size, nodes_per_forward=nodes_per_forward
    )
    assert (scores[:, 0] == -torch.inf).all()
    for user, (ids, mask) in enumerate(zip(*prompts, strict=True)):
        expected = _one_by_one_among_titles(model, ids[mask.bool()], titles)
        torch.testing.assert_close(scores[user, 1:], expected, rtol=0, atol=1e-10)
    distinct = sorted({tuple(title): item for item, title in enumerate(titles, start=1)}.values())
    torch.testing.assert_close(scores[:, distinct].exp().sum(1), torch.ones(5, dtype=torch.float64))


@pytest.mark.parametrize("numbers_at_once", [1, 2**21])
def test_constrained_scoring_runs_only_where_titles_part(
    model: PreTrainedModel, prompts: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch, numbers_at_once: int
) -> None:
    monkeypatch.setitem(title_scoring.NUMBERS_PER_CHOICE, "cpu", numbers_at_once)
    tokens: list[int] = []
    counted = copy.deepcopy(model)
    counted.lm_head.register_forward_hook(lambda *_: pytest.fail("logits of the whole vocabulary"))
    counted.model.register_forward_hook(lambda _, __, output: tokens.append(output.last_hidden_state.shape[:2].numel()))
    titles = [[3, 4, 5, *([6] * 20), EOS], [3, 4, 7, *([8] * 20), EOS], [9, *([6] * 20), EOS], [10, EOS]]
    scores = title_log_likelihoods(counted, *prompts, _trie(titles), constrained=True)
    assert tokens == [5 * 11, 5 * 2]  # prompts; then 3 and 4, behind which two titles part
    for user, (ids, mask) in enumerate(zip(*prompts, strict=True)):
        expected = _one_by_one_among_titles(model, ids[mask.bool()], titles)
        torch.testing.assert_close(scores[user, 1:], expected, rtol=0, atol=1e-10)


@pytest.fixture(params=["beams in a row", "a row a beam"])
def beams(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "a row a beam":
        monkeypatch.setattr(title_generation, "lacks_free_mask", lambda *_: "it has none")


@pytest.mark.usefixtures("beams")
@pytest.mark.parametrize("num_beams", [60, 80])
def test_beams_for_everyone_equal_exhaustive_scoring(
    model: PreTrainedModel, prompts: tuple[Tensor, Tensor], titles: list[list[int]], num_beams: int
) -> None:
    trie = _trie(titles)
    distinct = len(set(map(tuple, titles)))
    items, scores = beam_search_titles(model, *prompts, trie, num_beams)
    exhaustive = title_log_likelihoods(model, *prompts, trie, constrained=True)
    assert items.shape == scores.shape == (5, num_beams)
    assert (items[:, distinct:] == 0).all()
    assert (scores[:, distinct:] == -torch.inf).all()
    assert all(row.unique().numel() == distinct for row in items[:, :distinct])
    torch.testing.assert_close(scores[:, :distinct], exhaustive.gather(1, items[:, :distinct]), rtol=0, atol=1e-10)
    assert (scores[:, : distinct - 1] >= scores[:, 1:distinct]).all()
    torch.testing.assert_close(beam_scores(items, scores, trie), exhaustive, rtol=0, atol=1e-10)


@pytest.mark.usefixtures("beams")
@pytest.mark.parametrize("num_beams", [1, 2, 5, 20])
def test_every_beam_is_another_title_with_its_own_likelihood(
    model: PreTrainedModel, prompts: tuple[Tensor, Tensor], titles: list[list[int]], num_beams: int
) -> None:
    trie = _trie(titles)
    items, scores = beam_search_titles(model, *prompts, trie, num_beams)
    assert all(row.unique().numel() == num_beams for row in items)
    assert (items >= 1).all()
    exhaustive = title_log_likelihoods(model, *prompts, trie, constrained=True)
    torch.testing.assert_close(scores, exhaustive.gather(1, items), rtol=0, atol=1e-10)


def test_beams_in_a_row_leave_the_memory_of_the_prompt_where_it_is(
    model: PreTrainedModel, prompts: tuple[Tensor, Tensor], titles: list[list[int]]
) -> None:
    shapes: list[tuple[int, ...]] = []
    counted = copy.deepcopy(model)
    counted.model.register_forward_pre_hook(
        lambda _, __, inputs: shapes.append(inputs["input_ids"].shape), with_kwargs=True
    )
    beam_search_titles(counted, *prompts, _trie(titles), 20)
    assert shapes == [(5, 11), *[(5, 20)] * (len(shapes) - 1)]
    assert len(shapes) > 2


SHAPE = {"vocab_size": VOCABULARY, "hidden_size": 16, "initializer_range": 0.5}
TWO_LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 32}


@pytest.mark.parametrize(
    "config",
    [
        MistralConfig(**SHAPE, **TWO_LAYERS, sliding_window=6),
        BloomConfig(**SHAPE, n_layer=2, n_head=2),
    ],
    ids=lambda config: config.model_type,
)
def test_beams_of_decoders_that_cannot_share_a_row(
    config: PreTrainedConfig, prompts: tuple[Tensor, Tensor], titles: list[list[int]]
) -> None:
    """They look back only so far, or count distances themselves."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()  # in float64 Bloom's masks overflow
    items, scores = beam_search_titles(model, *prompts, _trie(titles), 5)
    for user, (ids, mask) in enumerate(zip(*prompts, strict=True)):
        expected = _one_by_one_among_titles(model, ids[mask.bool()], titles)[items[user] - 1]
        torch.testing.assert_close(scores[user].double(), expected, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match=r"attends to 6|free attention mask|does not go by"):
        title_log_likelihoods(model, *prompts, _trie(titles))


def test_local_layers_look_back_only_so_far() -> None:
    config = GPTNeoConfig(**SHAPE, num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]], window_size=6)
    body = AutoModelForCausalLM.from_config(config).base_model
    assert title_scoring.lacks_free_mask(body, 6) is None
    assert "attends to 6" in (title_scoring.lacks_free_mask(body, 7) or "")


@pytest.mark.usefixtures("beams")
def test_one_beam_is_greedy(model: PreTrainedModel, prompts: tuple[Tensor, Tensor], titles: list[list[int]]) -> None:
    trie = _trie(titles)
    items, _ = beam_search_titles(model, *prompts, trie, 1)
    for user, (ids, mask) in enumerate(zip(*prompts, strict=True)):
        said: list[int] = []
        while said not in titles:
            text = torch.cat([ids[mask.bool()], torch.tensor(said, dtype=torch.long)])
            allowed = {title[len(said)] for title in titles if title[: len(said)] == said}
            with torch.no_grad():
                logits = model(text[None]).logits[0, -1]
            said.append(max(allowed, key=lambda token: float(logits[token])))
        assert titles[int(items[user, 0]) - 1] == said


def test_beam_search_stops_when_every_beam_has_ended(model: PreTrainedModel, prompts: tuple[Tensor, Tensor]) -> None:
    passes: list[int] = []
    counted = copy.deepcopy(model)
    counted.model.register_forward_hook(lambda *_: passes.append(1))
    long_titles = [[30, *([4] * 20), last, EOS] for last in (5, 6)]
    with torch.no_grad():
        counted.lm_head.weight[30] = 0.0
    short_titles = [[token, last, EOS] for token in range(3, 30) for last in (5, 6)]
    beam_search_titles(counted, *prompts, _trie([*short_titles, *long_titles]), 1)
    assert len(passes) == 2  # the prompt and one token; behind it, 5 or 6 decides


def test_titles_that_were_not_found_tie_below_the_lowest(titles: list[list[int]]) -> None:
    trie = _trie(titles)
    items = torch.tensor([[3, 1], [4, 0]])
    scores = beam_scores(items, torch.tensor([[-1.0, -5.0], [-2.0, -torch.inf]]), trie)
    assert scores.shape == (2, 61)
    assert (scores[:, 0] == -torch.inf).all()
    assert scores[0, [3, 1, 59, 2, 60]].tolist() == [-1.0, -5.0, -5.0, -6.0, -6.0]  # 59 has the title of 1
    assert scores[1, [4, 1, 2]].tolist() == [-2.0, -3.0, -3.0]


@pytest.fixture(scope="module")
def stories(backbone_root: Path) -> tuple[Backbone, PreTrainedTokenizerFast]:
    config = BackboneConfig(name=str(backbone_root / "stories260k"))
    tokenizer = load_tokenizer(config)
    return load_backbone(config, tokenizer, seed=0, device="cpu", trainable=False), tokenizer


OPENING = "Once upon a time, there was a little girl named Lily."


def test_free_generation_ignores_sampling_settings_of_the_checkpoint(
    stories: tuple[Backbone, PreTrainedTokenizerFast],
) -> None:
    model, tokenizer = copy.deepcopy(stories[0]), stories[1]
    prompt = tokenizer([OPENING, "Tom"], return_tensors="pt", padding=True)
    batch = (prompt["input_ids"], prompt["attention_mask"])
    clean = generate_free(model, tokenizer, *batch, num_beams=3, max_new_tokens=12)
    model.generation_config.update(do_sample=True, temperature=5.0, repetition_penalty=9.0, no_repeat_ngram_size=1)
    assert generate_free(model, tokenizer, *batch, num_beams=3, max_new_tokens=12) == clean
    assert model.generation_config.do_sample
    assert [len(texts) for texts in clean] == [3, 3]
    assert len(set(clean[0])) == 3
    greedy = generate_free(model, tokenizer, *batch, num_beams=1, max_new_tokens=12)
    assert "She" in greedy[0][0]


def test_free_generation_stops_at_eos(stories: tuple[Backbone, PreTrainedTokenizerFast]) -> None:
    model, tokenizer = copy.deepcopy(stories[0]), stories[1]
    tokenizer = copy.deepcopy(tokenizer)
    prompt = tokenizer([OPENING], return_tensors="pt")
    batch = (prompt["input_ids"], prompt["attention_mask"])
    text = generate_free(model, tokenizer, *batch, num_beams=1, max_new_tokens=12)[0][0]
    third = tokenizer(text, add_special_tokens=False)["input_ids"][3]
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(third)
    stopped = generate_free(model, tokenizer, *batch, num_beams=1, max_new_tokens=12)[0][0]
    assert len(stopped) < len(text)


def test_embeddings_are_the_last_state_of_the_base_model(
    stories: tuple[Backbone, PreTrainedTokenizerFast],
) -> None:
    model, tokenizer = stories
    texts = ["Toy Story (1995)", "Heat", "Toy Story (1995)", "", "Misérables, Les (1995)"]
    embeddings = last_token_embeddings(model, tokenizer, texts, batch_size=2)
    for text, embedding in zip(texts, embeddings, strict=True):
        ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
        with torch.no_grad():
            states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1]
        torch.testing.assert_close(embedding, states[0, -1], rtol=1e-4, atol=1e-4)
    torch.manual_seed(0)
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False)
    adapted = get_peft_model(copy.deepcopy(model), lora).eval()
    torch.testing.assert_close(last_token_embeddings(adapted, tokenizer, texts, batch_size=2), embeddings)


def test_equal_texts_are_embedded_once(stories: tuple[Backbone, PreTrainedTokenizerFast]) -> None:
    model, tokenizer = copy.deepcopy(stories[0]), stories[1]
    rows: list[int] = []
    model.model.register_forward_hook(lambda _, __, output: rows.append(len(output.last_hidden_state)))
    assert last_token_embeddings(model, tokenizer, ["Heat", "Fargo", "Heat"] * 10).shape == (30, 64)
    assert sum(rows) == 2
    assert last_token_embeddings(model, tokenizer, []).shape == (0, 64)


def test_pretrained_scores_equal_teacher_forcing(
    stories: tuple[Backbone, PreTrainedTokenizerFast],
) -> None:
    model, tokenizer = stories
    texts = [" She loved to play.", " She loved to eat.", " The", " He", " She"]
    titles = [[*tokenizer(text, add_special_tokens=False)["input_ids"], EOS] for text in texts]
    prompt = tokenizer([OPENING, "One day"], return_tensors="pt", padding=True)
    batch = (prompt["input_ids"], prompt["attention_mask"])
    scores = title_log_likelihoods(model, *batch, _trie(titles))
    torch.testing.assert_close(scores.double(), _one_by_one(model, batch, titles), rtol=0, atol=1e-4)


def test_twenty_thousand_titles_make_a_trie_in_a_second() -> None:
    numbers = np.random.default_rng(0)
    lengths = numbers.integers(3, 12, 20_000)
    ids = numbers.zipf(1.3, lengths.sum()).clip(3, 4000)
    ids[np.cumsum(lengths) - 1] = EOS
    start = time.perf_counter()
    trie = TitleTrie.build(np.concatenate([[0], np.cumsum(lengths)]), ids)
    assert time.perf_counter() - start < 5  # measured: 0.05 s; room for a busy machine
    assert trie.num_items == 20_000


def test_tiny_scores_its_own_catalogue() -> None:
    config = BackboneConfig(tiny=TinyConfig(hidden_size=32, layers=1, heads=2, vocab_size=512))
    texts = ["Star Wars (1977)", "Star Trek (1979)", "Heat (1995)"]
    tokenizer = load_tokenizer(config, texts)
    model = load_backbone(config, tokenizer, seed=0, device="cpu", trainable=False)
    titles = [[*ids, tokenizer.eos_token_id] for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    prompt = tokenizer(["Heat (1995)", "Star Wars (1977)"], return_tensors="pt", padding=True)
    batch = (prompt["input_ids"], prompt["attention_mask"])
    scores = title_log_likelihoods(model, *batch, _trie(titles))
    torch.testing.assert_close(scores.double(), _one_by_one(model, batch, titles), rtol=0, atol=1e-4)
