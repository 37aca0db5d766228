"""Losses over one list of candidates a row: which comes before which, and which is the next choice.

C candidates; `ranks` [B, C] are 1 for the best, and 0 where a row has no candidate (such places count for nothing).
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def weighted_ranknet(logits_BC: Tensor, ranks_BC: Tensor) -> Tensor:
    """The mean over pairs with rank i < rank j of softplus(-(z_i - z_j)) / (rank i + rank j), [B].

    RankNet (Burges et al., 2005) with the weights of FIRST (arXiv 2406.15657).
    """
    rank_i, rank_j = ranks_BC[:, :, None], ranks_BC[:, None, :]
    pair_BCC = (rank_i > 0) & (rank_i < rank_j)
    loss_BCC = F.softplus(logits_BC[:, None, :] - logits_BC[:, :, None]) / (rank_i + rank_j).clamp(min=1)
    return loss_BCC.where(pair_BCC, 0.0).sum((1, 2)) / pair_BCC.sum((1, 2)).clamp(min=1)


def first_choice(logits_BC: Tensor, ranks_BC: Tensor) -> Tensor:
    """-log of the share of softmax over the candidates that the first of them has, [B]."""
    log_share_BC = torch.log_softmax(logits_BC.masked_fill(ranks_BC == 0, -1e9), dim=1)
    return -log_share_BC.where(ranks_BC == 1, 0.0).sum(1)
