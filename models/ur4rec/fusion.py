"""Fusion of UR4Rec V2: SASRec's scores and the retriever's, on one scale, by a weight or a network."""

import torch
from torch import Tensor, nn

from ..dropout import Dropout
from .v2_config import FusionConfig

PUBLISHED_WEIGHT = 0.4  # of SASRec
STATISTICS = 6  # that a network reads of a pair of rankings
TOP = 10  # items that count as the top of a ranking
GRID = 20  # steps of the weight between 0 and 1


def standardised(scores_RN: Tensor) -> Tensor:
    """Return scores with mean 0 and deviation 1 over a row's items; column 0, padding, becomes 0."""
    items = scores_RN[:, 1:].float()
    z = (items - items.mean(1, keepdim=True)) / items.std(1, keepdim=True, correction=0).clamp(min=1e-6)
    return nn.functional.pad(z, (1, 0))


def statistics(z_sasrec: Tensor, z_retriever: Tensor) -> Tensor:
    """Return how sure each ranking is (its best item, and how far the top stands out), how alike the two are, and
    how alike their best items are; [R, N + 1] twice -> [R, STATISTICS]."""
    tops = [z.topk(TOP, dim=1) for z in (z_sasrec, z_retriever)]
    best = [top.values[:, 0] for top in tops]
    ahead = [top.values[:, 0] - top.values.mean(1) for top in tops]
    alike = (z_sasrec * z_retriever)[:, 1:].mean(1)
    shared = (tops[0].indices[:, :, None] == tops[1].indices[:, None]).any(2).float().mean(1)
    return torch.stack([*best, *ahead, alike, shared], dim=1)


class Fusion(nn.Module):
    """w z_sasrec + (1 - w) z_retriever with w = sigmoid(network + shift), or sigmoid(shift) without a network.

    `shift` is chosen on validation among values that reach from the retriever alone to SASRec alone, so the result is
    nowhere below its better part there.
    """

    shift: Tensor  # [1]

    def __init__(self, config: FusionConfig, user_width: int) -> None:
        super().__init__()
        self.config, self.network = config, None
        weight = PUBLISHED_WEIGHT if config.sasrec_weight is None else config.sasrec_weight
        if config.kind != "fixed":
            width = STATISTICS + (user_width if config.kind == "user" else 0)
            self.norm = nn.LayerNorm(width)
            self.network = nn.Sequential(
                nn.Linear(width, config.hidden_size),
                nn.GELU(),
                Dropout(config.dropout),
                nn.Linear(config.hidden_size, 1),
            )
            self.log_scale = nn.Parameter(torch.zeros(1))  # of the fused scores as logits
        self.register_buffer("shift", torch.logit(torch.tensor([weight])))

    def weight(self, z_sasrec: Tensor, z_retriever: Tensor, user_RF: Tensor, shift: Tensor | None = None) -> Tensor:
        """Return SASRec's weight for each row, [R, 1]."""
        shift = self.shift if shift is None else shift
        if self.network is None:
            return shift.sigmoid().expand(len(z_sasrec), 1)
        features = statistics(z_sasrec, z_retriever)
        if self.config.kind == "user":
            features = torch.cat([features, user_RF.float()], dim=1)
        with torch.autocast(features.device.type, enabled=False):
            return (self.network(self.norm(features)) + shift).sigmoid()

    def forward(self, z_sasrec: Tensor, z_retriever: Tensor, user_RF: Tensor) -> Tensor:
        return mixed(self.weight(z_sasrec, z_retriever, user_RF), z_sasrec, z_retriever)

    def logits(self, z_sasrec: Tensor, z_retriever: Tensor, user_RF: Tensor, progress: float) -> Tensor:
        """Return the fused scores as logits for the network's own loss, early in a curriculum more of SASRec's."""
        w = self.weight(z_sasrec, z_retriever, user_RF)
        if self.config.curriculum_epochs:
            w = 1 - (1 - w) * min(1.0, progress / self.config.curriculum_epochs)
        return self.log_scale.exp() * mixed(w, z_sasrec, z_retriever)

    def choices(self) -> Tensor:
        """Return the shifts that validation chooses among, [G]: the first is the retriever alone, the last SASRec."""
        return torch.logit(torch.linspace(0, 1, GRID + 1, device=self.shift.device))


def mixed(weight_R1: Tensor, z_sasrec: Tensor, z_retriever: Tensor) -> Tensor:
    return weight_R1 * z_sasrec + (1 - weight_R1) * z_retriever
