"""An ensemble: one ranking from the catalogue scores of finished runs, mixed alike for all users or by a gate.

Reciprocal rank fusion is that of Cormack, Clarke and Buettcher, SIGIR 2009. The gate is a mixture of experts (Jacobs
et al., 1991) whose experts are frozen.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, cast

import torch
from torch import Tensor, nn

from data.batches import SequenceBatch
from data.member_examples import NO_FOLD, MemberBatch

from .base import Loss, Recommender
from .sequence_recommender import SequenceRecommender


@dataclass
class EnsembleConfig:
    """Which runs are mixed, and how."""

    members: list[str] = field(default_factory=list)
    """Folders of finished runs on the same data and split; they are read again whenever this model is loaded."""
    fusion: Literal["gate", "weight", "reciprocal-rank"] = "gate"
    """gate: each user's weights, by a small network that sees how sure every member is. weight: the same weights for
    all users. reciprocal-rank: the sum of 1 / (rank_constant + rank), with nothing to train."""
    weights: list[float] | None = None
    """A weight a member for fusion weight; fitted on validation users when not given."""
    rank_constant: float = 60.0
    """k of reciprocal rank fusion, as published."""
    folds: int = 5
    """Parts of the validation users. Every gate is trained without one part and measured on it; a test user gets the
    mean of all gates."""
    hidden_size: int = 8
    """Width of the gate's hidden layer."""
    use_state: bool = False
    """Let the gate also read the state of the first sasrec, gru4rec or lrurec among the members. Needs more users than
    MovieLens 100K has: there it fits noise."""

    def __post_init__(self) -> None:
        if self.folds < 2:
            raise ValueError(f"--method.folds {self.folds}: expected at least 2")
        if self.rank_constant < 0 or self.hidden_size < 1:
            raise ValueError(
                f"--method.rank_constant {self.rank_constant} must not be negative, and --method.hidden_size "
                f"{self.hidden_size} must be at least 1"
            )
        if self.weights is not None and self.fusion != "weight":
            raise ValueError(f"--method.weights goes with --method.fusion weight, not with {self.fusion}")
        if self.weights is not None and (
            len(self.weights) != len(self.members) or min(self.weights, default=0) < 0 or sum(self.weights) <= 0
        ):
            raise ValueError(
                f"--method.weights {self.weights}: expected a weight of at least 0 for each of the "
                f"{len(self.members)} of --method.members, and not only zeros"
            )


class Ensemble(Recommender):
    """Mixes members' scores; only what chooses the weights is trained, on validation users.

    A member's scores mean what its own training made of them, so each becomes a distribution over the items that a
    user has not met, sharpened by a learned temperature, and the ensemble is the mixture of these. On validation users
    of MovieLens 100K that had a cross-entropy of 5.61; a weighted sum of log-probabilities had 5.62, of z-scores 5.65.
    """

    feature_mean: Tensor
    feature_std: Tensor

    def __init__(self, config: EnsembleConfig, members: Sequence[Recommender]) -> None:
        super().__init__()
        self.config = config
        self.members = nn.ModuleList(member.requires_grad_(False).eval() for member in members)
        stateful = (member for member in members if isinstance(member, SequenceRecommender))
        self.stateful = next(stateful, None) if config.use_state else None
        if config.use_state and self.stateful is None:
            raise ValueError("--method.use_state true needs a sasrec, gru4rec or lrurec run among --method.members")
        width = self.stateful.config.hidden_size if self.stateful is not None else 0
        self.gates: Gates | None = None
        if config.fusion != "reciprocal-rank" and config.weights is None:
            features = 2 * len(members) + 1 + width if config.fusion == "gate" else 0
            self.gates = Gates(config.folds, features, config.hidden_size, len(members))
        if self.gates is not None and self.gates.features:
            self.saved_buffers = ("feature_mean", "feature_std")
            self.register_buffer("feature_mean", torch.zeros(self.gates.features))
            self.register_buffer("feature_std", torch.ones(self.gates.features))

    def train(self, mode: bool = True) -> "Ensemble":
        """Members only ever score."""
        super().train(mode)
        self.members.eval()
        return self

    def loss(self, batch: MemberBatch) -> Loss:  # type: ignore[override]
        """Cross-entropy over the items that a user has not met, of every gate but the one of the user's fold."""
        assert self.gates is not None
        assert batch.targets is not None
        scores_BMN, state = batch.said()
        log_weights_KBM = self.log_weights(batch, scores_BMN, state)
        target_BM1 = batch.targets[:, None, None].expand(-1, len(self.members), 1)
        log_p_KBM = torch.stack(
            [
                log_softmax_unseen(scores_BMN, batch.seen, temperature, batch.targets).gather(2, target_BM1)[..., 0]
                for temperature in self.gates.log_temperature.exp()
            ]
        )
        # A label counts as one, whatever the number of gates that learn from it.
        share_KB = (self._learns_from(batch.fold) & (batch.targets > 0)) / (self.config.folds - 1)
        total = -(torch.logsumexp(log_p_KBM + log_weights_KBM, dim=2) * share_KB).sum()
        mean_M = (log_weights_KBM.detach().exp() * share_KB[..., None]).sum((0, 1))
        return Loss(total, batch.count, {f"weight_{i}": weight for i, weight in enumerate(mean_M)})

    def _learns_from(self, fold_B: Tensor) -> Tensor:
        """Return [K, B]: whether each gate is trained on each user."""
        return torch.arange(self.config.folds, device=fold_B.device)[:, None] != fold_B

    def scores(self, batch: MemberBatch) -> Tensor:  # type: ignore[override]
        """Return the mixture's log-probabilities (or fused ranks), [B, N + 1]; items of the history have theirs too."""
        scores_BMN, state = self.ask_members(batch) if batch.scores is None else batch.said()
        if self.config.fusion == "reciprocal-rank":
            fused = (1 / (self.config.rank_constant + ranks_among_unseen(scores_BMN, batch.seen))).sum(1)
        elif self.gates is None:
            weights = torch.tensor(self.config.weights, device=scores_BMN.device)
            log_p = log_softmax_unseen(scores_BMN, batch.seen, torch.ones_like(weights))
            fused = torch.logsumexp(log_p + (weights / weights.sum()).log()[:, None], dim=1)
        else:
            fused = self._mixed_by_gates(batch, scores_BMN, state)
        fused[:, 0] = -torch.inf
        return fused

    def _mixed_by_gates(self, batch: MemberBatch, scores_BMN: Tensor, state: Tensor | None) -> Tensor:
        """The gate of a validation user is the one that has not learned from it; others get the mean of all."""
        assert self.gates is not None
        log_weights_KBM = self.log_weights(batch, scores_BMN, state)
        folds = range(self.config.folds)
        uses_KB = torch.stack([(batch.fold == k) | (batch.fold == NO_FOLD) for k in folds])
        mixed = scores_BMN.new_full(scores_BMN.shape[::2], -torch.inf)
        for k, temperature in enumerate(self.gates.log_temperature.exp()):
            log_p = log_softmax_unseen(scores_BMN, batch.seen, temperature) + log_weights_KBM[k, :, :, None]
            one = torch.logsumexp(log_p, dim=1).masked_fill(~uses_KB[k, :, None], -torch.inf)
            mixed = torch.logaddexp(mixed, one)
        return mixed - uses_KB.sum(0).log()[:, None]

    def log_weights(self, batch: MemberBatch, scores_BMN: Tensor, state: Tensor | None) -> Tensor:
        """Return the log of the weights that each gate gives to each member, [K, B, M] float32."""
        assert self.gates is not None
        features = None
        if self.gates.features:
            features = (self.features(batch, scores_BMN, state) - self.feature_mean) / self.feature_std
        with torch.autocast(scores_BMN.device.type, enabled=False):
            return self.gates(features, len(scores_BMN))

    def features(self, batch: MemberBatch, scores_BMN: Tensor, state: Tensor | None) -> Tensor:
        """Return what a gate reads, [B, F]: how sure each member is, how long the history is, perhaps a state."""
        log_p = log_softmax_unseen(scores_BMN, batch.seen, scores_BMN.new_ones(scores_BMN.shape[1]))
        unseen = ~seen_mask(scores_BMN.shape[2], batch.seen)[:, None]
        entropy = -(log_p.exp() * log_p * unseen).sum(2)
        most = log_p.masked_fill(~unseen, -torch.inf).amax(2)
        parts = [most, entropy, batch.lengths.float().log1p()[:, None]]
        return torch.cat(parts if state is None else [*parts, state.float()], dim=1)

    @torch.no_grad()
    def ask_members(self, batch: MemberBatch) -> tuple[Tensor, Tensor | None]:
        """Return the members' scores [B, M, N + 1], finite in float32, and the state that the gate reads."""
        scores, state = [], None
        for member, own in zip(self.members, batch.members, strict=True):
            found = cast(Recommender, member).scores(own).float()
            # Beam search leaves items without a score: they get the worst one that there is.
            finite = found.isfinite()
            worst = found.masked_fill(~finite, torch.inf).amin(1, keepdim=True)
            scores.append(found.where(finite, worst))
            if member is self.stateful:
                assert isinstance(own, SequenceBatch)
                state = self.stateful.user_states(own).float()
        return torch.stack(scores, dim=1), state

    def measure_features(self, features_UF: Tensor) -> None:
        """Take the mean and spread of all validation users' features, so that a gate reads numbers around 0."""
        self.feature_mean.copy_(features_UF.mean(0))
        self.feature_std.copy_(features_UF.std(0, correction=0).clamp(min=1e-6))


class Gates(nn.Module):
    """One small network a fold, [B, F] -> log weights [K, B, M]; without features, one vector of weights a fold.

    All start with equal weights. `log_temperature` [K, M] multiplies the members' scores, as its exponential.
    """

    def __init__(self, folds: int, features: int, hidden_size: int, members: int) -> None:
        super().__init__()
        self.features = features
        self.log_temperature = nn.Parameter(torch.zeros(folds, members))
        self.bias = nn.Parameter(torch.zeros(folds, members))
        if features:
            self.inner = nn.Parameter(torch.randn(folds, features, hidden_size) / features**0.5)
            self.inner_bias = nn.Parameter(torch.zeros(folds, hidden_size))
            self.outer = nn.Parameter(torch.zeros(folds, hidden_size, members))

    def forward(self, features_BF: Tensor | None, rows: int) -> Tensor:
        if features_BF is None:
            return self.bias[:, None].expand(-1, rows, -1).log_softmax(2)
        hidden = nn.functional.gelu(features_BF @ self.inner + self.inner_bias[:, None])
        return (hidden @ self.outer + self.bias[:, None]).log_softmax(2)


def seen_mask(width: int, seen_BS: Tensor) -> Tensor:
    """Return [B, width] bool: padding and the items of each history."""
    mask = torch.zeros(len(seen_BS), width, dtype=torch.bool, device=seen_BS.device)
    mask[:, 0] = True
    return mask.scatter_(1, seen_BS, True)


def log_softmax_unseen(
    scores_BMN: Tensor, seen_BS: Tensor, sharpness_M: Tensor, target_B: Tensor | None = None
) -> Tensor:
    """Return log-probabilities [B, M, N + 1] that add up to 1 over the items that a user has not met.

    Items of the history get what they would have beside those. A target always counts as not met.
    """
    mask = seen_mask(scores_BMN.shape[2], seen_BS)
    if target_B is not None:
        mask = mask.scatter(1, target_B[:, None], False)
    logits = scores_BMN * sharpness_M[:, None]
    return logits - logits.masked_fill(mask[:, None], -torch.inf).logsumexp(2, keepdim=True)


def ranks_among_unseen(scores_BMN: Tensor, seen_BS: Tensor) -> Tensor:
    """Return [B, M, N + 1] float32: 1 + how many items that the user has not met score higher."""
    mask = seen_mask(scores_BMN.shape[2], seen_BS)[:, None]
    ascending = (-scores_BMN).masked_fill(mask, torch.inf).sort(dim=2).values
    return torch.searchsorted(ascending, (-scores_BMN).contiguous()).float() + 1
