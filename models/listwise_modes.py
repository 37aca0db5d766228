"""Four ways to ask a decoder about lists of candidates; each scores every candidate of every list, [B, W], as listed.

`history` holds the items of each row, oldest first; `items_BW` are the candidates that its prompt shows.
"""

import numpy as np
import torch
from torch import Tensor

from data.batches import to_device
from data.listwise_prompts import ListwiseEncoder
from data.permutations import Parser, Status

from .candidate_scoring import continued, greedy_answers
from .decoder import Decoder, product, run_prefix


def first_logits(decoder: Decoder, encoder: ListwiseEncoder, history: list[np.ndarray], items_BW: np.ndarray) -> Tensor:
    """The logits of the identifiers behind the "[" that opens the answer: one pass (FIRST, arXiv 2406.15657)."""
    prompts = [encoder.prompt(*row, 1) + encoder.open for row in zip(history, items_BW, strict=True)]
    prefix = run_prefix(decoder, *left_padded(prompts, decoder.body.device), use_cache=False)
    return logits_of(decoder, prefix.last_state, encoder.single_names(items_BW.shape[1]))


def logits_of(decoder: Decoder, states_BH: Tensor, tokens: list[int]) -> Tensor:
    """The logits of these tokens, [B, tokens] float32; no others are computed."""
    return product(states_BH, decoder.weight.index_select(0, to_device(torch.tensor(tokens), states_BH.device)))


def written_orders(
    decoder: Decoder,
    encoder: ListwiseEncoder,
    history: list[np.ndarray],
    items_BW: np.ndarray,
    parser: Parser,
    max_new_tokens: int | None,
) -> tuple[Tensor, list[Status]]:
    """Minus the places that a parser reads out of greedy answers, and how it could read each."""
    width = items_BW.shape[1]
    length = max_new_tokens or len(encoder.answer(range(width)))
    prompts = [encoder.prompt(*row, length) for row in zip(history, items_BW, strict=True)]
    end = encoder.end[0] if encoder.end else -1
    answers = greedy_answers(decoder, *left_padded(prompts, decoder.body.device), end, length)
    texts = encoder.tokenizer.batch_decode(answers, skip_special_tokens=True)
    parsed = [parser(text, width, encoder.template.identifiers) for text in texts]
    order_BW = torch.tensor([answer.order for answer in parsed])
    return -order_BW.argsort(1).float(), [answer.status for answer in parsed]


def verdicts(decoder: Decoder, encoder: ListwiseEncoder, history: list[np.ndarray], items_BW: np.ndarray) -> Tensor:
    """The log-odds of yes for each candidate alone; all of a row's continue one pass over its history."""
    device = decoder.body.device
    endings = [torch.tensor(encoder.one_ending(item)) for item in items_BW.flatten()]
    length = torch.tensor([len(ending) for ending in endings], device=device)
    tokens = torch.nn.utils.rnn.pad_sequence(endings, batch_first=True).to(device)
    prefix = run_prefix(decoder, *left_padded([encoder.one_prompt(row) for row in history], device))
    states = continued(decoder, prefix, tokens, items_BW.shape[1])
    last = states[torch.arange(len(states), device=device), length - 1]
    yes, no = logits_of(decoder, last, [*encoder.verdicts()]).T
    return (yes - no).view(items_BW.shape)


def duels(decoder: Decoder, encoder: ListwiseEncoder, history: list[np.ndarray], items_BW: np.ndarray) -> Tensor:
    """How many others a candidate beats, by the model's probabilities: each pair is shown in both orders."""
    width = items_BW.shape[1]
    wins = torch.zeros(items_BW.shape, device=decoder.body.device)
    for first in range(width):
        for second in range(width):
            if first != second:
                z = first_logits(decoder, encoder, history, items_BW[:, [first, second]])
                share = torch.sigmoid(z[:, 0] - z[:, 1]) / 2
                wins[:, first] += share
                wins[:, second] += 0.5 - share
    return wins


def left_padded(prompts: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return token ids and attention mask, [B, P] int64, pads on the left."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids.to(device), mask.to(device)
