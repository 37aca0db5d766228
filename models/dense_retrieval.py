"""Dense retrieval: a text encoder reads a user's history and an item's title alike, and their vectors are compared.

The recipe of Contriever (Izacard et al., "Unsupervised Dense Information Retrieval with Contrastive Learning",
arXiv 2112.09118) moved from passages to items. A catalogue is small, so instead of a queue of stale passages there may
be the whole of it among the negatives, encoded anew every so often.
"""

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor, nn
from torch.nn import functional as F

from data.retrieval_examples import RetrievalBatch
from data.retrieval_texts import RetrievalTexts
from data.texts import TextBatch

from .base import Loss, Recommender
from .contrastive import gather_rows, info_nce
from .dense_retrieval_config import DenseRetrievalConfig
from .text_encoder import TextEncoder

NEVER, FOR_GOOD = -1, -2  # beside a number of refreshes: no index was made yet; it is the one of the final weights
ITEMS_PER_PASS = 256  # titles are short


class DenseRetrieval(Recommender):
    """Two text encoders, or one in both roles, and the catalogue as vectors.

    B users, T of them with a label, n distinct items, N catalogue, D width.
    """

    item_index: Tensor  # [N + 1, D]: vectors of the items' texts as they were last encoded
    known: Tensor  # [N + 1] bool: items that training has
    index_age: Tensor  # [] int64: which refresh that was, NEVER or FOR_GOOD
    saved_buffers = ("item_index", "index_age")

    def __init__(
        self,
        config: DenseRetrievalConfig,
        texts: RetrievalTexts,
        user_encoder: TextEncoder,
        item_encoder: TextEncoder,
        cold_items: np.ndarray,
    ) -> None:
        """`cold_items` are not there yet while the model is trained: they are no negatives."""
        super().__init__()
        self.config, self.texts = config, texts
        self.user_encoder, self.item_encoder = user_encoder, item_encoder
        log_scale = -torch.tensor([config.temperature]).log()  # [1], since ZeRO cannot send a number without a shape
        self.log_scale = nn.Parameter(log_scale) if config.learn_temperature else None
        self.ids = None
        if config.learn_ids:
            self.ids = nn.Embedding(texts.num_items + 1, item_encoder.width)
            nn.init.zeros_(self.ids.weight)
        known = torch.ones(texts.num_items + 1, dtype=torch.bool)
        known[[0, *cold_items]] = False
        self.register_buffer("known", known, persistent=False)
        self.register_buffer("item_index", torch.zeros(texts.num_items + 1, item_encoder.width))
        self.register_buffer("index_age", torch.tensor(NEVER))
        self._evaluated: Tensor | None = None
        self._age: int | None = None  # what index_age holds, as soon as a step has asked

    # --- Training ---

    def loss(self, batch: RetrievalBatch) -> Loss:  # type: ignore[override]
        assert batch.targets is not None
        users_TD = self.encode_users(batch)[: len(batch.targets)]
        terms = {}
        if self.config.loss != "catalogue":
            terms["in-batch"] = self.in_batch_loss(users_TD, batch)
        if self.config.loss != "in-batch":
            terms["catalogue"] = self.catalogue_loss(users_TD, batch)
        parts = {name: term.detach() for name, term in terms.items()} if len(terms) > 1 else {}
        return Loss(torch.stack(list(terms.values())).sum(), batch.count, parts)

    def in_batch_loss(self, users_TD: Tensor, batch: RetrievalBatch) -> Tensor:
        """Summed InfoNCE against the targets of all processes, then all their hard negatives."""
        assert batch.targets is not None
        assert batch.places is not None
        assert batch.log_q is not None
        live_nD = self.item_vectors(self.encode(self.item_encoder, batch.items), batch.item_ids)
        positives_ND, first = gather_rows(live_nD[batch.places])
        items_N, log_q_N = gather_rows(batch.targets).rows, gather_rows(batch.log_q).rows
        label_T = first + torch.arange(len(batch.targets), device=items_N.device)
        if self.config.hard_negatives:
            hard_ids = self.hard_negatives(users_TD.detach(), batch)
            vectors = self.item_vectors(self.encode_items(hard_ids), hard_ids)
            kept = self.config.hard_negatives * len(batch.targets)
            hard_ND, hard_items = gather_rows(vectors[:kept]).rows, gather_rows(hard_ids[:kept]).rows
            positives_ND, items_N = torch.cat([positives_ND, hard_ND]), torch.cat([items_N, hard_items])
            log_q_N = F.pad(log_q_N, (0, len(hard_items)), value=torch.inf)  # these were not drawn
        masked_TN = (items_N == batch.targets[:, None]) | self.masked(batch)[:, items_N]
        return info_nce(
            self.logits(users_TD, positives_ND),
            label_T,
            masked_TN,
            log_q_N if self.config.log_q else None,
            self.config.label_smoothing,
        )

    def catalogue_loss(self, users_TD: Tensor, batch: RetrievalBatch) -> Tensor:
        """Summed cross-entropy over the catalogue.

        Between two refreshes all items stand in the index alike. Were those of the batch brought up to date, it would
        pay to move whatever is encoded towards all users, for the others are left behind.
        """
        assert batch.targets is not None
        if self.config.refresh_epochs:
            self.refresh(batch.progress)
            table_ND = self.item_index
        else:
            own = self.own_share()
            table_ND = self.table_of(self.encode_items(own), own)
        vectors_ND = self.item_vectors(table_ND, torch.arange(len(table_ND), device=table_ND.device))
        logits_TN, masked_TN = self.logits(users_TD, vectors_ND), self.masked(batch)
        return info_nce(logits_TN, batch.targets, masked_TN, label_smoothing=self.config.label_smoothing)

    def logits(self, users_TD: Tensor, items_ND: Tensor) -> Tensor:
        """Scaled similarities [T, N], in float32: under a temperature of .05 bfloat16 would be off by a tenth."""
        with torch.autocast(users_TD.device.type, enabled=False):
            scale = 1 / self.config.temperature if self.log_scale is None else self.log_scale.exp()
            return users_TD @ items_ND.T * scale

    def masked(self, batch: RetrievalBatch) -> Tensor:
        """Return [T, N + 1] bool: what is no negative of a user, the padding among it."""
        return (self.taken(batch) | ~self.known) if self.config.mask_history else (~self.known).expand(batch.count, -1)

    def taken(self, batch: RetrievalBatch) -> Tensor:
        """Return [T, N + 1] bool: what each user took in training."""
        assert batch.targets is not None
        assert batch.seen is not None
        table = torch.zeros(len(batch.targets), len(self.known), dtype=torch.bool, device=batch.targets.device)
        if len(batch.targets):
            table[batch.seen[0], batch.seen[1]] = True
        return table

    @torch.no_grad()
    def hard_negatives(self, users_TD: Tensor, batch: RetrievalBatch) -> Tensor:
        """Return the items nearest to each user that the user did not take, [T * K]; one where T is 0."""
        self.refresh(batch.progress)
        assert batch.targets is not None
        items = torch.arange(len(self.item_index), device=users_TD.device)
        scores_TN = self.logits(users_TD, self.item_vectors(self.item_index, items))
        scores_TN[self.taken(batch) | ~self.known] = -torch.inf
        scores_TN.scatter_(1, batch.targets[:, None], -torch.inf)
        hard = scores_TN.topk(self.config.hard_negatives, dim=1).indices.flatten()
        return hard if len(hard) else items[1:2]

    def refresh(self, progress: float) -> None:
        """Encode the catalogue anew when a part of the epoch is over; all processes find out alike."""
        age = int(progress / self.config.refresh_epochs + 1e-9)
        if self._age is None:
            self._age = int(self.index_age)  # once: reading it waits for the device
        if age != self._age:
            self.item_index.copy_(self.encode_catalogue())
            self.index_age.fill_(age)
            self._age = age

    # --- Vectors ---

    def encode(self, encoder: TextEncoder, pieces: tuple[TextBatch, ...]) -> Tensor:
        return encoder.encode(pieces, again=self.config.grad_cache_rows is not None)

    def encode_users(self, batch: RetrievalBatch) -> Tensor:
        """Return users as vectors, [B, D]."""
        vectors = self.encode(self.user_encoder, batch.users)
        return F.normalize(vectors, dim=1) if self.config.normalize else vectors

    def item_vectors(self, texts_nD: Tensor, items_n: Tensor | None) -> Tensor:
        """Return what users are compared with, from the vectors of the items' texts, [n, D]."""
        if self.ids is not None:
            texts_nD = texts_nD + self.ids(items_n)
        return F.normalize(texts_nD, dim=1) if self.config.normalize else texts_nD

    def encode_items(self, items: Tensor, rows: int | None = None) -> Tensor:
        """Return the vectors of the texts of some items, [n, D]."""
        batches = self.texts.item_batches(items.cpu().numpy(), rows or self.config.grad_cache_rows)
        return self.encode(self.item_encoder, tuple(batch.to(items.device) for batch in batches))

    @torch.no_grad()
    def encode_catalogue(self) -> Tensor:
        """Return the vectors of the texts of all items, [N + 1, D], each process encoding its share. Collective."""
        was_training = self.training
        self.eval()
        own = self.own_share()
        table_ND = self.table_of(self.encode_items(own, ITEMS_PER_PASS), own)
        self.train(was_training)
        return table_ND

    def table_of(self, vectors: Tensor, items: Tensor) -> Tensor:
        """Return all items' vectors, [N + 1, D], from each process's share. Collective, backwards too."""
        return torch.zeros_like(self.item_index).index_copy(0, gather_rows(items).rows, gather_rows(vectors).rows)

    def own_share(self) -> Tensor:
        """Return this process's part of the items, those of similar length behind each other."""
        by_length = 1 + np.argsort(self.texts.items.lengths[1:], kind="stable")
        state = PartialState()
        return torch.from_numpy(by_length[state.process_index :: state.num_processes]).to(self.item_index.device)

    # --- Evaluation ---

    def train(self, mode: bool = True) -> "DenseRetrieval":
        """Training ends the life of the vectors that an evaluation has made."""
        if mode:
            self._evaluated = None
        return super().train(mode)

    def scores(self, batch: RetrievalBatch) -> Tensor:  # type: ignore[override]
        users_BD = self.encode_users(batch)
        with torch.autocast(users_BD.device.type, enabled=False):
            scores_BN = users_BD @ self.evaluated().T
        scores_BN[:, 0] = -torch.inf
        return scores_BN

    def evaluated(self) -> Tensor:
        """Return the catalogue as vectors of the current weights, [N + 1, D], made once an evaluation."""
        if self._evaluated is None:
            kept = int(self.index_age) == FOR_GOOD
            texts_ND = self.item_index if kept else self.encode_catalogue()
            items = torch.arange(len(texts_ND), device=texts_ND.device)
            self._evaluated = self.item_vectors(texts_ND, items)
        return self._evaluated

    @torch.no_grad()
    def catalogue_vectors(self) -> Tensor:
        """Return the items as users are compared with them."""
        return self.evaluated()

    @torch.no_grad()
    def keep_index(self, batch: RetrievalBatch) -> None:
        """Encode the catalogue with the final weights, to be saved with them. Collective; asks nothing of the batch."""
        self.item_index.copy_(self.encode_catalogue())
        self.index_age.fill_(FOR_GOOD)

    @torch.no_grad()
    def add_items(self, texts: RetrievalTexts) -> None:
        """Let a finished model rank what a longer catalogue adds, known by its texts alone; nothing is trained."""
        new = torch.arange(len(self.item_index), texts.num_items + 1, device=self.item_index.device)
        self.texts = texts
        self.item_index = torch.cat([self.item_index, self.encode_items(new, ITEMS_PER_PASS)])
        if self.ids is not None:
            own = F.pad(self.ids.weight, (0, 0, 0, len(new)))  # none of its own
            self.ids = nn.Embedding.from_pretrained(own)
        self._evaluated = None
