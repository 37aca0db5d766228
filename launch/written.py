"""What a model writes after candidate prompts, scored as text: exactly, and by the rule of the papers' code."""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import nn

from data.batches import Batch, PromptBatch
from evaluation.text_hits import TextHit, exact_hit, published_hit, summary
from models.devices import gather_object

from .setting import Built

RULES = {"exact": exact_hit, "published": published_hit}


@torch.no_grad()
def score_written(
    built: Built, model: nn.Module, batches: Iterable[Batch], target_items: np.ndarray
) -> dict[str, dict[str, float]]:
    """Return ValidRatio and HitRatio@1 under each rule, of this process's batches and those of all others. Collective.

    `target_items` [n] are those of all rows of the phase.
    """
    assert built.tokenizer is not None
    assert built.titles is not None
    hits: dict[int, dict[str, TextHit]] = {}
    for batch in batches:
        answers = built.tokenizer.batch_decode(model(batch, method="answers"), skip_special_tokens=True)
        assert isinstance(batch, PromptBatch)
        assert batch.row is not None
        assert batch.candidates is not None
        for row, text, candidates in zip(batch.row.tolist(), answers, batch.candidates.tolist(), strict=True):
            titles, target = [built.titles[item] for item in candidates], built.titles[target_items[row]]
            hits[row] = {name: rule(text, titles, target) for name, rule in RULES.items()}
    everyone: dict[int, dict[str, TextHit]] = {}
    for share in gather_object([hits]):  # a loader may repeat rows
        everyone |= share
    return {name: summary([hits[name] for hits in everyone.values()]) for name in RULES}


def mean_over_draws(draws: Sequence[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Return each figure's mean; a reason that a draw does not have counts 0 there."""
    names = {rule: {name for draw in draws for name in draw[rule]} for rule in RULES}
    return {
        rule: {name: sum(draw[rule].get(name, 0.0) for draw in draws) / len(draws) for name in sorted(names[rule])}
        for rule in RULES
    }
