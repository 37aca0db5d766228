"""Losses over a catalogue or a vocabulary. Each returns a float32 *sum* over its rows; the training loop normalises.

T labelled positions, H width, K negatives, N classes (items, or tokens of a vocabulary).
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from data.batches import padded_length

# Rows of logits alive at once, by device type: [256, 3417] float32 is 3.5 MB, which a CPU's core keeps near it.
CHUNK_ROWS = {"cpu": 256, "cuda": 1024}


# (logits [C, N], which it may overwrite, and their rows) -> their summed loss and the gradient of the logits.
LossOfLogits = Callable[[Tensor, slice], tuple[Tensor, Tensor]]
# (scores [C, N] and their rows) -> their summed loss.
LossOfScores = Callable[[Tensor, slice], Tensor]


class _Chunked(torch.autograd.Function):
    """A loss over a softmax whose [T, N] logits exist one chunk at a time.

    The gradient is known as soon as a chunk's softmax is, so the forward pass computes it there and the backward
    pass only scales it: three matrix products in all, no recomputation.
    """

    @staticmethod
    def forward(ctx: Any, hidden_TH: Tensor, table_NH: Tensor, loss_of_logits: LossOfLogits, chunk_rows: int) -> Tensor:
        total = hidden_TH.new_zeros((), dtype=_accumulation_dtype(hidden_TH))
        grad_hidden = torch.empty_like(hidden_TH) if hidden_TH.requires_grad else None
        grad_table = torch.zeros_like(table_NH, dtype=total.dtype) if table_NH.requires_grad else None
        for start in range(0, len(hidden_TH), chunk_rows):
            rows = slice(start, start + chunk_rows)
            hidden = hidden_TH[rows]
            count = len(hidden)
            if spare := padded_length(count, chunk_rows) - count:  # so that the last chunk has one of few shapes
                hidden = F.pad(hidden, (0, 0, 0, spare))
            loss, grad = loss_of_logits((hidden @ table_NH.T)[:count].to(total.dtype), rows)
            grad = F.pad(grad.to(hidden.dtype), (0, 0, 0, spare)) if spare else grad.to(hidden.dtype)
            total += loss
            if grad_hidden is not None and spare:
                grad_hidden[rows] = (grad @ table_NH)[:count]
            elif grad_hidden is not None:
                torch.mm(grad, table_NH, out=grad_hidden[rows])
            if grad_table is not None:
                grad_table += grad.T @ hidden
            del grad  # or the next chunk's logits would be made beside it
        ctx.save_for_backward(grad_hidden, None if grad_table is None else grad_table.to(table_NH.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        grads = (grad if grad is None else grad * grad_total for grad in ctx.saved_tensors)
        return *grads, None, None


def full_cross_entropy(hidden_TH: Tensor, table_NH: Tensor, target_T: Tensor, chunk_rows: int | None = None) -> Tensor:
    """Sum of -log softmax(h E^T)[target] over the rows of `table_NH`, [T, N] logits never existing at once.

    For a catalogue pass the table without its padding row, and targets counted from there: `table[1:]`, `item - 1`.
    """

    def target_of(logits: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        return target_T[rows, None], torch.ones_like(logits[:, :1])

    return soft_cross_entropy(hidden_TH, table_NH, target_of, chunk_rows=chunk_rows)


def soft_cross_entropy(
    hidden_TH: Tensor,
    table_NH: Tensor,
    labels_of: Callable[[Tensor, slice], tuple[Tensor, Tensor]],
    parts: list[Tensor] | None = None,
    chunk_rows: int | None = None,
) -> Tensor:
    """Sum of -w log softmax(h E^T)[c] over rows and their J labels c of weight w.

    `labels_of` gives both, [C, J], for logits [C, N] and their rows. `parts` is told each label's sum over the rows of
    a chunk, [J].
    """

    def loss_of_logits(logits: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        label, weight = labels_of(logits, rows)
        largest = logits.amax(dim=1, keepdim=True)
        of_labels = logits.gather(1, label) - largest
        exponentials = logits.sub_(largest).exp_()  # one exponential an entry serves the loss and the gradient
        normaliser = exponentials.sum(dim=1, keepdim=True)
        each = (weight * (normaliser.log() - of_labels)).sum(0)
        if parts is not None:
            parts.append(each)
        softmax = exponentials.div_(normaliser / weight.sum(1, keepdim=True))  # times the sum of the weights
        return each.sum(), softmax.scatter_add_(1, label, -weight)

    return _in_chunks(hidden_TH, table_NH, loss_of_logits, chunk_rows)


@torch.no_grad()
def count_first(hidden_TH: Tensor, table_NH: Tensor, target_T: Tensor, chunk_rows: int | None = None) -> Tensor:
    """In how many rows the target has the highest of all logits h E^T, [T, N] of them never existing at once."""
    found = torch.zeros((), device=hidden_TH.device)
    chunk_rows = chunk_rows or _chunk_rows(hidden_TH.device)
    for hidden, target in zip(hidden_TH.split(chunk_rows), target_T.split(chunk_rows), strict=True):
        found += ((hidden @ table_NH.T).argmax(1) == target).sum()
    return found


def in_chunks(
    hidden_TH: Tensor,
    table_NH: Tensor,
    loss_of_scores: LossOfScores,
    chunk_rows: int | None = None,
) -> Tensor:
    """Sum of any loss of the scores h E^T, a function of [C, N] scores and their rows that autograd can follow.

    What it says of some rows must not depend on which others stand in the chunk.
    """

    def loss_of_logits(logits: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            loss = loss_of_scores(logits.requires_grad_(), rows)
        (gradient,) = torch.autograd.grad(loss, logits)
        return loss.detach(), gradient

    return _in_chunks(hidden_TH, table_NH, loss_of_logits, chunk_rows)


def kl_divergence(
    hidden_TH: Tensor,
    table_NH: Tensor,
    teacher_TD: Tensor,
    teacher_ND: Tensor,
    temperature: float = 1.0,
    chunk_rows: int | None = None,
) -> Tensor:
    """Sum over rows of t^2 KL(softmax(u V^T / t) || softmax(h E^T / t)); the teacher u, V gets no gradient.

    Source: Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", arXiv 1503.02531; by t^2 the
    gradients keep their size at any temperature.
    """
    teacher_TD, teacher_ND = teacher_TD.detach(), teacher_ND.detach()

    def loss_of_logits(logits: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        wanted = ((teacher_TD[rows] @ teacher_ND.T).to(logits.dtype) / temperature).log_softmax(dim=1)
        found = logits.div_(temperature).log_softmax(dim=1)
        probability = wanted.exp()
        loss = temperature**2 * (probability * wanted.sub_(found)).sum()
        return loss, found.exp_().sub_(probability).mul_(temperature)

    return _in_chunks(hidden_TH, table_NH, loss_of_logits, chunk_rows)


def _in_chunks(hidden_TH: Tensor, table_NH: Tensor, loss_of_logits: LossOfLogits, chunk_rows: int | None) -> Tensor:
    if torch.is_autocast_enabled(hidden_TH.device.type):
        dtype = torch.get_autocast_dtype(hidden_TH.device.type)
        hidden_TH, table_NH = hidden_TH.to(dtype), table_NH.to(dtype)
    return _Chunked.apply(hidden_TH, table_NH, loss_of_logits, chunk_rows or _chunk_rows(hidden_TH.device))


def _chunk_rows(device: torch.device) -> int:
    return CHUNK_ROWS.get(device.type, CHUNK_ROWS["cuda"])


def binary_cross_entropy(positive_T: Tensor, negative_TK: Tensor) -> Tensor:
    """Sum over rows of (-log s(s+) - sum_k log(1 - s(s-_k))) / (K + 1)."""
    return gbce(positive_T, negative_TK, beta=1.0)


def gbce(positive_T: Tensor, negative_TK: Tensor, beta: float) -> Tensor:
    """Generalised binary cross-entropy of gSASRec: the positive's log-likelihood is weighted by `beta`.

    Source: Petrov and Macdonald, 2023, eq. 6; the closed form needs neither float64 nor clamps.
    """
    positive, negative = positive_T.to(_accumulation_dtype(positive_T)), negative_TK
    terms = beta * F.softplus(-positive) + F.softplus(negative.to(positive.dtype)).sum(dim=1)
    return terms.sum() / (negative_TK.shape[1] + 1)


def gbce_beta(num_negatives: int, num_items: int, t: float) -> float:
    """Return beta = 1 - t (1 - alpha), alpha = K / (N - 1); t = 0 is BCE, t = 1 gives calibrated probabilities."""
    alpha = num_negatives / (num_items - 1)
    return 1 - t * (1 - alpha)


def sampled_cross_entropy(
    positive_T: Tensor,
    negative_TK: Tensor,
    hits_TK: Tensor | None = None,
    log_q_TK: Tensor | None = None,
    log_q_positive_T: Tensor | None = None,
) -> Tensor:
    """Sum of -s+ + logsumexp(s+, s-_1 .. s-_K).

    `hits_TK` marks negatives that equal the positive: they leave the sum. `log_q_TK` is the log of how often each
    negative was expected (logQ correction; without the number of draws in it, as in some published code, negatives
    weigh as many times too much); the positive was not drawn, so it is corrected only where `log_q_positive_T` is
    given, as some published code does.
    """
    positive = positive_T.to(_accumulation_dtype(positive_T))
    negative = negative_TK.to(positive.dtype)
    if log_q_TK is not None:
        negative = negative - log_q_TK
    if log_q_positive_T is not None:
        positive = positive - log_q_positive_T
    if hits_TK is not None:
        negative = negative.masked_fill(hits_TK, -torch.inf)
    return (torch.cat([positive[:, None], negative], dim=1).logsumexp(dim=1) - positive).sum()


def _accumulation_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
