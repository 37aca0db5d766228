"""Prompts, parsing and windows of castorini/rank_llm: every string, order and window equal."""

import pytest
import torch

from data.listwise_templates import TEMPLATES, published_passage, published_query
from data.permutations import parse, parse_as_published, published_cleaned
from models.sliding_windows import best_first, slide, window_spans

CLASSES = {"ok": "ok", "wrong_format": "wrong_format", "missing_documents": "missing", "repetition": "repetition"}


@pytest.fixture
def published(golden):
    return golden("rankllm")


def test_prompts(published) -> None:
    meta, _ = published
    compared = 0
    for prompt in meta["prompts"]:
        if prompt["needs_text_fixer"]:  # the published code mends curly quotes there, which is not done here
            continue
        template = TEMPLATES["passages-letters" if prompt["alpha"] else "passages-numbers"]
        shown = prompt["docs"][prompt["rank_start"] : prompt["rank_end"]]
        passages = [published_passage(document, prompt["max_words"]) for document in shown]
        system, user = template.messages(published_query(prompt["query"]), passages)
        assert prompt["messages"] == [{"role": "system", "content": system}, {"role": "user", "content": user}]
        compared += 1
    assert compared >= 12


def test_published_parser(published) -> None:
    meta, _ = published
    assert len(meta["parsing"]) >= 50
    for case in meta["parsing"]:
        identifiers = "letters" if case["alpha"] else "numbers"
        assert published_cleaned(case["response"], identifiers) == case["cleaned"]
        parsed = parse_as_published(case["response"], case["num_candidates"], identifiers)
        assert parsed.order == case["order"], case["response"]


def test_strict_parser_has_the_published_classes_and_repairs_nothing(published) -> None:
    meta, _ = published
    accepted = 0
    for case in meta["parsing"]:
        number = case["num_candidates"]
        order, status = parse(case["response"], number, "letters" if case["alpha"] else "numbers")
        assert status == CLASSES[case["error_class"]], case["response"]
        assert order == (case["order"] if status == "ok" else list(range(number))), case["response"]
        accepted += status == "ok"
    assert accepted >= 4


def listed(comparator: str, relevance: list[float], members: list[int], start: int) -> list[int]:
    best = sorted(members, key=lambda member: -relevance[member])
    if comparator == "top3":
        best = best[:3]
    if comparator == "noisy":
        best = [member for member in best if (7 * member + start) % 5]
    return best + [member for member in members if member not in best]


def test_sliding_windows(published) -> None:
    meta, _ = published
    assert len(meta["sliding"]) >= 27
    for case in meta["sliding"]:
        window = min(case["window"], case["top_k_retrieve"])
        spans = window_spans(case["num_candidates"], window, case["stride"], case["rank_start"], case["rank_end"])
        assert [[span.start, span.stop] for span in spans] == case["windows"]
        starts = iter(spans)

        def rank(items_BW: torch.Tensor, case=case, starts=starts) -> torch.Tensor:
            members, start = items_BW[0].tolist(), next(starts).start
            order = listed(case["comparator"], case["relevance"], members, start)
            return torch.tensor([[members.index(member) for member in order]])

        order = slide(torch.arange(case["num_candidates"])[None], spans, rank)
        assert order[0].tolist() == case["final_order"]


def test_first_token_order(published) -> None:
    _, tensors = published
    assert best_first(tensors["first_logits"]).equal(tensors["first_order"])
