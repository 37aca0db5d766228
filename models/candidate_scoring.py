"""What a decoder says of the candidates that a prompt offers: the likelihood of each title, or what it writes."""

import torch
from torch import Tensor

from data.title_tokens import TokenTable

from .decoder import Decoder, Prefix, largest_anywhere, log_softmax, run_prefix
from .moe_lora import holding_rows
from .title_scoring import additive_mask, require_free_mask, shared_cache

LOGITS_AT_ONCE = 2**26  # numbers of logits alive at once: 256 MB in float32


@torch.no_grad()
def candidate_log_likelihoods(
    decoder: Decoder, embeds_BPH: Tensor, mask_BP: Tensor, responses: TokenTable, candidate_BC: Tensor
) -> Tensor:
    """Return the log-likelihood of each candidate's whole response after its prompt, [B, C] float32.

    The prompt runs once and all its candidates continue it. Responses end alike, and none is the beginning of another
    one, so their likelihoods compare; equal responses tie exactly. The number of forward passes depends on the batch
    size and the longest response of any process: under ZeRO-3 all processes need the same number.
    """
    prefix = run_prefix(decoder, embeds_BPH, mask_BP)
    batch, num_candidates = candidate_BC.shape
    tokens, real = _padded(responses, candidate_BC)
    width = largest_anywhere(decoder.body, tokens.shape[1])
    tokens, real = (torch.nn.functional.pad(t, (0, width - t.shape[1])) for t in (tokens, real))
    first = log_softmax(decoder.head(prefix.last_state)).repeat_interleave(num_candidates, 0).gather(1, tokens[:, :1])
    total = torch.where(real[:, 0], first[:, 0], 0.0)
    if width > 1:
        states = continued(decoder, prefix, tokens[:, :-1], num_candidates)
        total = total + _of_tokens(decoder, states, tokens[:, 1:], real[:, 1:])
    # A kernel may add up equal rows in another order, and a tie must not be broken by that.
    rows_BCT = torch.where(real, tokens, -1).view(batch, num_candidates, -1)
    first_alike_BC = (rows_BCT[:, :, None] == rows_BCT[:, None]).all(-1).int().argmax(-1)
    return total.view(batch, num_candidates).gather(1, first_alike_BC).float()


def continued(decoder: Decoder, prefix: Prefix, tokens_RT: Tensor, rows_a_prompt: int) -> Tensor:
    """The states of texts that continue prompts which ran once, [R, T, H]: so many texts a prompt, padded on the right.

    The memory of the prompts is shared by their texts, and stays as it was.
    """
    steps = tokens_RT.shape[1]
    require_free_mask(decoder.body, prefix.mask.shape[1] + steps)
    causal = torch.ones(steps, steps, dtype=torch.bool, device=tokens_RT.device).tril()
    prompt = prefix.mask.bool().repeat_interleave(rows_a_prompt, 0)[:, None, None].expand(-1, -1, steps, -1)
    keep = torch.cat([prompt, causal.expand(len(tokens_RT), 1, -1, -1)], dim=-1)
    positions = prefix.length.repeat_interleave(rows_a_prompt)[:, None] + torch.arange(steps, device=tokens_RT.device)
    with holding_rows(decoder.body, slice(None), rows_a_prompt):
        output = decoder.body(
            input_ids=tokens_RT,
            attention_mask=additive_mask(keep, decoder.body),
            position_ids=positions,
            past_key_values=shared_cache(prefix.cache, slice(None), rows_a_prompt),
            use_cache=True,
        )
    return output.last_hidden_state


def _of_tokens(decoder: Decoder, states_RTH: Tensor, tokens_RT: Tensor, real_RT: Tensor) -> Tensor:
    """Return the sum over the real tokens of a row of the log-probability that the state before gives each, [R]."""
    vocabulary = decoder.body.config.get_text_config().vocab_size
    rows = max(1, LOGITS_AT_ONCE // (vocabulary * tokens_RT.shape[1]))
    parts = []
    for states, tokens, real in zip(*(t.split(rows) for t in (states_RTH, tokens_RT, real_RT)), strict=True):
        found = log_softmax(decoder.head(states)).gather(2, tokens[..., None])[..., 0]
        parts.append(found.where(real, 0.0).sum(1))
    return torch.cat(parts)


def _padded(responses: TokenTable, candidate_BC: Tensor) -> tuple[Tensor, Tensor]:
    """Return the responses' tokens [B * C, T], padded with 0, and which of them are real."""
    sequences = [torch.from_numpy(responses[item]).long() for item in candidate_BC.flatten().tolist()]
    tokens = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
    length = torch.tensor([len(sequence) for sequence in sequences])
    real = torch.arange(tokens.shape[1]) < length[:, None]
    return tokens.to(candidate_BC.device), real.to(candidate_BC.device)


@torch.no_grad()
def greedy_answers(
    decoder: Decoder, embeds_BPH: Tensor, mask_BP: Tensor, end: int, max_new_tokens: int
) -> list[list[int]]:
    """Return the most likely token after each prompt, and so on, up to and with the token `end`."""
    prefix = run_prefix(decoder, embeds_BPH, mask_BP)
    token_B = decoder.head(prefix.last_state).argmax(-1)
    written, mask = [token_B], mask_BP
    ended = token_B == end
    for step in range(1, max_new_tokens):
        # under ZeRO-3 a process that stopped early would leave the others waiting for its weights
        if not largest_anywhere(decoder.body, int((~ended).any())):
            break
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        state = decoder.body(
            input_ids=token_B[:, None],
            attention_mask=mask,
            position_ids=(prefix.length + step - 1)[:, None],
            past_key_values=prefix.cache,
            use_cache=True,
        ).last_hidden_state[:, -1]
        token_B = decoder.head(state).argmax(-1)
        written.append(token_B)
        ended |= token_B == end
    answers = torch.stack(written, dim=1).tolist()
    return [answer[: answer.index(end) + 1] if end in answer else answer for answer in answers]
