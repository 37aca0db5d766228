"""The contrastive loss of dual encoders (InfoNCE), with negatives from every process.

B queries of this process, N candidates (columns) of all processes, D width.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed


def info_nce(
    logits_BN: Tensor,
    label_B: Tensor,
    masked_BN: Tensor | None = None,
    log_q_N: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Sum over rows of -log softmax(logits)[label], among the candidates that are not masked; at least float32.

    A row's label is never masked. Smoothing gives this part of the target to all candidates of a row alike, the label
    included. `log_q_N` corrects for how candidates were drawn, see `corrected_for_sampling`.
    Source: van den Oord, Li and Vinyals, "Representation Learning with Contrastive Predictive Coding",
    arXiv 1807.03748, eq. 4; the batch's other positives are the negatives, as in Contriever, arXiv 2112.09118.
    """
    logits_BN = logits_BN.to(torch.promote_types(logits_BN.dtype, torch.float32))
    is_label_BN = torch.zeros_like(logits_BN, dtype=torch.bool).scatter_(1, label_B[:, None], True)
    kept_BN = torch.ones_like(is_label_BN) if masked_BN is None else is_label_BN | ~masked_BN
    if log_q_N is not None:
        logits_BN = corrected_for_sampling(logits_BN, is_label_BN, kept_BN, log_q_N)
    log_p_BN = logits_BN.masked_fill(~kept_BN, -torch.inf).log_softmax(1)
    loss_B = -log_p_BN.gather(1, label_B[:, None])[:, 0]
    if label_smoothing:
        even_B = -log_p_BN.masked_fill(~kept_BN, 0).sum(1) / kept_BN.sum(1)
        loss_B = (1 - label_smoothing) * loss_B + label_smoothing * even_B
    return loss_B.sum()


def corrected_for_sampling(logits_BN: Tensor, is_label_BN: Tensor, kept_BN: Tensor, log_q_N: Tensor) -> Tensor:
    """Weigh negatives so that a row's sum of exponentials estimates the one over the whole catalogue (logQ).

    Negatives were drawn with probability Q, and those that are the row's own item were thrown away, so each of the n
    that are left stands for (1 - Q(label)) / (n Q) items. The label is there for certain and stands for itself.
    A log Q of +inf marks a candidate that was not drawn: it stands for itself, too.
    Source: arXiv 2507.09331, which shows that correcting the positive alike is a bias.
    """
    drawn_BN = kept_BN & ~is_label_BN & log_q_N.isfinite()
    log_q_label_B1 = log_q_N.masked_fill(~log_q_N.isfinite(), 0).where(is_label_BN, 0).sum(1, keepdim=True)
    drawn_B1 = drawn_BN.sum(1, keepdim=True).to(logits_BN.dtype)
    log_stands_for_BN = torch.log1p(-log_q_label_B1.exp()) - drawn_B1.log() - log_q_N
    return logits_BN + log_stands_for_BN.where(drawn_BN, 0)


class Gathered(NamedTuple):
    """Rows of every process, one process behind the other."""

    rows: Tensor  # [N, ...]
    first: int  # where this process's own begin


def gather_rows(rows: Tensor) -> Gathered:
    """Gather rows [n, ...] of every process; their numbers may differ. Gradients reach the rows of their owners.

    Each process gets the sum of all processes' gradients of its rows: with losses that are summed over processes,
    which DDP and ZeRO do to weights, the outcome is that of one process with all rows. Collective, backwards too.
    """
    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return Gathered(rows, 0)
    own = torch.tensor([len(rows)], device=rows.device)
    counts = [torch.empty_like(own) for _ in range(distributed.get_world_size())]
    distributed.all_gather(counts, own)
    sizes = torch.cat(counts).tolist()
    return Gathered(_Gather.apply(rows, sizes), sum(sizes[: distributed.get_rank()]))


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes: list[int]) -> Tensor:
        ctx.sizes = sizes
        padded = rows.new_zeros(max(sizes), *rows.shape[1:])  # collectives want equal shapes
        padded[: len(rows)] = rows
        everyone = [torch.empty_like(padded) for _ in sizes]
        distributed.all_gather(everyone, padded)
        return torch.cat([part[:size] for part, size in zip(everyone, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.contiguous()
        distributed.all_reduce(gradient)
        return gradient.split(ctx.sizes)[distributed.get_rank()], None
