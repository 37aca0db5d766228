"""UR4Rec V2: a recommender of item ids and a retriever that reads texts, whose scores are fused.

The design is that of the notes known as "UR4Rec V2 with MoE"; docs/methods/ur4rec-v2.md says where this differs. Of
the paper (Zhang et al., "UR4Rec", COLING 2025) it keeps the texts and the proxies.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from data.preference_batches import PreferenceBatch
from data.texts import TextBatch
from data.title_tokens import TokenTable

from ..base import Loss, Recommender
from ..contrastive import gather_rows
from ..sequence_recommender import SequenceRecommender
from ..text_encoder import TextEncoder
from .fusion import Fusion, mixed, standardised
from .losses import Uncertainty, part_loss
from .memory import Memory
from .retriever import Candidates, Retriever, User
from .v2_config import UR4RecV2Config

AT_ONCE = 2048  # candidates of one pass through the experts
ITEMS_PER_PASS = 256  # texts are short


class Known(NamedTuple):
    """What the retriever knows of a batch's rows."""

    items: Candidates  # the catalogue, [N + 1, D]
    user: User
    newest: Candidates  # the last item of each history, [R, 1, D]
    memory: Tensor | None  # [R, D], with the news from before the cut


class UR4RecV2(Recommender):
    """SASRec, the retriever with its memory, and the fusion; R rows, N items, D width, H width of SASRec's states."""

    item_texts: Tensor  # [N + 1, Q, T] float16: what the encoder made of the items' texts, whole or by sentences
    saved_buffers: tuple[str, ...] = ("item_texts", "fusion.shift")

    def __init__(
        self,
        config: UR4RecV2Config,
        sasrec: SequenceRecommender,
        item_texts: Tensor,
        num_users: int,
        encoder: TextEncoder | None = None,
        item_tokens: TokenTable | None = None,
    ) -> None:
        """With an `encoder`, which end-to-end trains, sentences come as tokens, and so do the items' texts."""
        super().__init__()
        self.config, self.item_tokens = config, item_tokens
        self.sasrec, self.encoder = sasrec, encoder
        self.trains_sasrec = config.train != "retriever"
        sasrec.requires_grad_(self.trains_sasrec)
        draws_hard = config.num_negatives > 0 and config.hard_share > 0
        self.reads_sasrec = self.trains_sasrec or draws_hard or config.fusion.kind != "fixed"  # to be trained
        self.retriever = Retriever(config, sasrec.num_items, item_texts.shape[-1])
        self.memory: Memory | None = None
        if config.memory.enabled:
            self.memory = Memory(config.memory, num_users, config.hidden_size)
            self.saved_buffers += ("memory.state", "memory.until", "memory.written")
        self.fusion = Fusion(config.fusion, sasrec.config.hidden_size + config.hidden_size)
        names = [*(["sasrec"] if self.trains_sasrec else []), *(["fused"] if config.fusion.kind != "fixed" else [])]
        self.uncertainty = Uncertainty(["retriever", *names]) if config.balance == "uncertainty" else None
        self.register_buffer("item_texts", item_texts)
        self._encoded: Tensor | None = None

    def train(self, mode: bool = True) -> "UR4RecV2":
        """A frozen SASRec only ever scores; training ends the life of the texts that an evaluation has encoded."""
        super().train(mode)
        self.sasrec.train(mode and self.trains_sasrec)
        if mode:
            self._encoded = None
        return self

    # --- Training ---

    def loss(self, batch: PreferenceBatch) -> Loss:  # type: ignore[override]
        assert batch.targets is not None
        known, state, sasrec = self.read(batch, writes=batch.writes), None, None
        if self.reads_sasrec:
            with torch.set_grad_enabled(self.trains_sasrec and torch.is_grad_enabled()):
                state, sasrec = self.ask_sasrec(batch)
        masked, target = no_candidates(batch, len(self.item_texts)), batch.targets
        if self.config.num_negatives:
            drawn = self.draw(batch, sasrec, masked)
            scores = self.ask_retriever(known, known.items.chosen(drawn))
            masked = masked.gather(1, drawn) | (drawn == batch.targets[:, None])
            target = torch.zeros_like(batch.targets)
            sasrec = None if sasrec is None else sasrec.gather(1, drawn)
        else:
            scores = self.ask_retriever(known)
        is_label, published = batch.targets > 0, self.config.loss == "published"
        terms = {"retriever": part_loss(scores, target, masked, is_label, "bce" if published else "softmax")}
        if self.trains_sasrec:
            assert sasrec is not None
            terms["sasrec"] = part_loss(sasrec, target, masked, is_label, "bpr" if published else "softmax")
        if self.config.fusion.kind != "fixed":
            assert state is not None
            assert sasrec is not None
            z = standardised(sasrec.detach()), standardised(scores.detach())
            fused = self.fusion.logits(*z, self.user_features(state, known.user), batch.progress)
            terms["fused"] = part_loss(fused, target, masked, is_label, "softmax")
        parts = {name: term.detach() for name, term in terms.items()} if len(terms) > 1 else {}
        total = torch.stack(list(terms.values())).sum()
        if self.uncertainty is not None:
            total = self.uncertainty(terms, batch.count)
        return Loss(total, batch.count, parts)

    def draw(self, batch: PreferenceBatch, sasrec_RN: Tensor | None, masked_RN: Tensor) -> Tensor:
        """Return [R, 1 + K] items: the target, uniform negatives, hard ones, perhaps the targets of other rows."""
        assert batch.targets is not None
        assert batch.negatives is not None
        hard = round(self.config.hard_share * batch.negatives.shape[1])
        parts = [batch.targets[:, None], batch.negatives[:, hard:]]
        if hard:
            assert sasrec_RN is not None
            allowed = sasrec_RN.detach().masked_fill(masked_RN, -torch.inf)
            parts.append(allowed.scatter(1, batch.targets[:, None], -torch.inf).topk(hard, dim=1).indices)
        if self.config.in_batch:
            parts.append(batch.targets.expand(len(batch.targets), -1))
        return torch.cat(parts, dim=1)

    # --- What is known of a row ---

    def read(self, batch: PreferenceBatch, writes: Tensor | None = None) -> Known:
        """Return what is known of each row; rows of `writes` that a trigger fires for write the memory."""
        item_texts, vectors = self.encode(batch)
        items = self.retriever.catalogue(item_texts)
        history, lengths = batch.history.items, batch.history.lengths
        user = self.retriever.user(
            items, history, lengths, F.embedding(batch.sentences, vectors), real_RP=batch.sentences > 0
        )
        last = history.gather(1, (lengths[:, None] - 1).clamp(min=0))
        newest = items.chosen(last)
        if self.memory is None:
            return Known(items, user, newest, None)
        news = self.retriever.answer(user, newest)[:, 0]
        after = self.memory.advance(self.memory.read(batch.users, batch.cuts), news)
        if writes is not None:
            fires = self.memory.fires(batch.users, batch.cuts, news, batch.progress)
            self.memory.write(batch.users, batch.cuts, after, fires & writes, batch.progress)
        return Known(items, user, newest, after)

    def encode(self, batch: PreferenceBatch) -> tuple[Tensor, Tensor]:
        """Return the texts of all items [N + 1, Q, T] and those of the batch's sentences [M, T] as vectors."""
        if self.encoder is None:
            assert batch.vectors is not None
            return self.item_texts, batch.vectors
        assert batch.tokens is not None
        vectors = F.normalize(self.encoder.encode((batch.tokens,)), dim=1)
        if self.training:
            return self.encode_items(), vectors
        if self._encoded is None:
            self._encoded = self.encode_items()
        return self._encoded, vectors

    def encode_items(self) -> Tensor:
        """Return the items' texts as vectors, [N + 1, Q, T], each process encoding its share. Collective."""
        assert self.encoder is not None
        assert self.item_tokens is not None
        lengths = self.item_tokens.lengths  # 0 where there is nothing to encode
        by_length = np.argsort(lengths, kind="stable")[np.count_nonzero(lengths == 0) :]
        state = PartialState()
        own = by_length[state.process_index :: state.num_processes]
        pieces = tuple(
            TextBatch.of([self.item_tokens[item] for item in part]).to(self.item_texts.device)
            for part in np.split(own, range(ITEMS_PER_PASS, len(own), ITEMS_PER_PASS))
        )
        vectors = gather_rows(F.normalize(self.encoder.encode(pieces), dim=1)).rows
        places = gather_rows(torch.from_numpy(own).to(vectors.device)).rows
        table = torch.zeros(self.item_texts.shape, dtype=vectors.dtype, device=vectors.device)
        return table.flatten(0, 1).index_copy(0, places, vectors).view_as(table)

    # --- Scores ---

    def ask_sasrec(self, batch: PreferenceBatch) -> tuple[Tensor, Tensor]:
        """Return the state of each row, [R, H], and the scores of all items, [R, N + 1] float32, column 0 at 0."""
        state = self.sasrec.user_states(batch.history)
        with torch.autocast(state.device.type, enabled=False):
            query, table = self.sasrec.operands(state.float())
            scores = query @ table.float().T
        return state, scores * (torch.arange(scores.shape[1], device=scores.device) > 0)

    def ask_retriever(self, known: Known, candidates: Candidates | None = None) -> Tensor:
        """Return the retriever's scores of the candidates, or of the catalogue, [R, n] float32."""
        candidates = candidates or known.items.each(lambda table: table[None])
        answer = None
        if self.config.answers == "user":
            answer = self.retriever.answer(known.user, known.newest, known.memory)
            if not self.config.co_attention:
                return self.retriever.scores(known.user, answer, candidates)

        def some(part: Candidates) -> Tensor:
            own = self.retriever.answer(known.user, part, known.memory) if answer is None else answer
            return self.retriever.scores(known.user, own, part)

        starts = range(0, candidates.text.shape[1], AT_ONCE)
        parts = [candidates.each(lambda x, start=start: x[:, start : start + AT_ONCE]) for start in starts]  # type: ignore[misc]
        again = torch.is_grad_enabled() and len(parts) > 1  # or memory would grow with the catalogue
        # To the end, since ZeRO-3 gives weights back where a module ends.
        each = [
            checkpoint(some, part, use_reentrant=False, early_stop=False) if again else some(part) for part in parts
        ]
        return torch.cat(each, dim=1)

    def user_features(self, state_RH: Tensor, user: User) -> Tensor:
        """Return what both parts know of the user, for a network of its own weights."""
        return torch.cat([state_RH.detach().float(), user.text.detach().float()], dim=1)

    def both(self, batch: PreferenceBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Return the two parts' standardised scores, [R, N + 1], and the user's features."""
        known = self.read(batch)
        state, sasrec = self.ask_sasrec(batch)
        features = self.user_features(state, known.user)
        return standardised(sasrec), standardised(self.ask_retriever(known)), features

    def scores(self, batch: PreferenceBatch) -> Tensor:  # type: ignore[override]
        return without_padding(self.fusion(*self.both(batch)))

    def sasrec_scores(self, batch: PreferenceBatch) -> Tensor:
        """Return what SASRec alone says, [R, N + 1]."""
        return without_padding(self.both(batch)[0])

    def retriever_scores(self, batch: PreferenceBatch) -> Tensor:
        """Return what the retriever alone says, [R, N + 1]."""
        return without_padding(self.both(batch)[1])

    # --- After training ---

    @torch.no_grad()
    def keep_texts(self, batch: PreferenceBatch) -> None:
        """Keep the items' texts as the trained encoder has them, to be saved with the weights."""
        self.item_texts.copy_(self.encode(batch)[0])

    @torch.no_grad()
    def remember(self, batch: PreferenceBatch) -> None:
        """Bring the memory of the rows' users up to their cuts: the trigger `explicit`. Collective."""
        assert self.memory is not None
        after = self.read(batch).memory
        assert after is not None
        new = batch.cuts > self.memory.until[batch.users.clamp(min=0)]
        self.memory.write(batch.users, batch.cuts, after, new & (batch.users >= 0), batch.progress)

    @torch.no_grad()
    def choices(self, batch: PreferenceBatch) -> Tensor:
        """Return the fused scores under each choice of the fusion's shift, [G, R, N + 1]."""
        z_sasrec, z_retriever, user = self.both(batch)
        weights = [self.fusion.weight(z_sasrec, z_retriever, user, shift) for shift in self.fusion.choices()]
        return torch.stack([without_padding(mixed(w, z_sasrec, z_retriever)) for w in weights])

    def begin_with(self, earlier: "UR4RecV2") -> None:
        """Take the weights of the stage before; what it did not have (another fusion) stays as it is.

        Raises ValueError where the retriever has another shape.
        """
        for name, tensor in named_weights(earlier):
            own = dict(named_weights(self)).get(name)
            if own is None:
                continue
            if own.shape != tensor.shape:
                raise ValueError(
                    f"--method.init has {name} of shape {[*tensor.shape]}, and --method.* gives {[*own.shape]}: a "
                    "later stage needs the shape of the one before"
                )
            own.data.copy_(tensor)


def named_weights(model: UR4RecV2) -> Iterator[tuple[str, Tensor]]:
    """Parameters and saved buffers by name."""
    yield from model.named_parameters()
    yield from ((name, model.get_buffer(name)) for name in model.saved_buffers)


def no_candidates(batch: PreferenceBatch, width: int) -> Tensor:
    """Return [R, width] bool: padding, and what else each user took in training, before the cut or behind it."""
    assert batch.taken is not None
    mask = torch.zeros(len(batch.cuts), width, dtype=torch.bool, device=batch.cuts.device)
    mask[:, 0] = True
    mask[batch.taken[0], batch.taken[1]] = True
    return mask


def without_padding(scores_RN: Tensor) -> Tensor:
    scores_RN = scores_RN.clone()
    scores_RN[:, 0] = -torch.inf
    return scores_RN
