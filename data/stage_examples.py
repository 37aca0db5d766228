"""Examples of the stages of LLM2Vec: texts with masked tokens, and texts as they are."""

from dataclasses import dataclass, replace
from typing import Literal, Self

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .batches import on_device, pad
from .corpus import Corpus
from .draws import Draws
from .texts import TextBatch

PUBLISHED_MASK = "_"  # of decoders, which have no mask token
# Of the masked tokens so many become the mask token and so many a random one; the others stay (BERT, arXiv 1810.04805).
SHOWN_AS_MASK, SHOWN_AS_RANDOM = 0.8, 0.1


@dataclass
class MaskingSettings:
    """Which tokens are to be predicted, and what stands in their place."""

    rate: float = 0.2
    """Share of the tokens that are masked, drawn anew in each epoch; what every text begins or ends with never is."""
    shown: Literal["bert", "mask"] = "bert"
    """In place of a masked token: bert, the mask token (80 %), a random one (10 %) or itself (10 %); mask, always the
    mask token (LLM2Vec's recipe for Mistral, with a rate of 0.8)."""
    token: str | None = None
    """The mask token; by default the tokenizer's own, else "_", as published for decoders, else its unknown token."""

    def __post_init__(self) -> None:
        if not 0 < self.rate < 1:
            raise ValueError(f"--method.masking.rate is {self.rate}, but must be between 0 and 1")


@dataclass(frozen=True)
class MaskedBatch:
    """Texts padded on the right. Slots are indices into `input_ids.flatten()`."""

    input_ids: Tensor  # [B, L] int64, masked
    attention_mask: Tensor  # [B, L] int64: 1 for tokens
    labelled: Tensor  # [T] int64: the slots before the masked tokens, from whose states they are predicted
    targets: Tensor  # [T] int64: the masked tokens
    row: Tensor | None = None
    count: int = 0

    def to(self, device: torch.device) -> Self:
        """Return the same batch on `device`."""
        return on_device(self, device)

    def muted(self) -> Self:
        """Return the same batch without labels: it keeps a process in step and adds nothing to the loss."""
        return replace(self, labelled=self.labelled[:0], targets=self.targets[:0], count=0)


class MaskedTexts:
    """Some texts of a corpus; what is masked is a function of (seed, epoch, text)."""

    def __init__(
        self, corpus: Corpus, texts: np.ndarray, masking: MaskingSettings, tokenizer: PreTrainedTokenizerBase, seed: int
    ) -> None:
        self.corpus, self.texts, self.masking, self.seed = corpus, texts, masking, seed
        self.mask_id, self.num_tokens = mask_token_id(tokenizer, masking.token), len(tokenizer)
        self.longest = int(corpus.texts.lengths.max())
        self.lengths = corpus.texts.lengths[texts]

    def collate(self, indices: np.ndarray, epoch: int, progress: float = 0.0) -> MaskedBatch:
        texts = self.texts[indices]
        ids_BL, attention_mask = pad([self.corpus.texts[text] for text in texts], side="right")
        width = ids_BL.shape[1]
        # Each kind of draw has numbers of its own, as many as the longest text has tokens, whatever batch it is in.
        draws = Draws.of(self.seed, epoch, texts)
        chosen, shown = (draws.fractions(kind * self.longest, width) for kind in (0, 1))
        random_ids = draws.integers(2 * self.longest, width, self.num_tokens)
        slot = np.arange(width)
        last = self.lengths[indices] - self.corpus.after
        first = np.maximum(self.corpus.before[texts], 1)  # the very first token has no state before it
        masked = (slot >= first[:, None]) & (slot < last[:, None]) & (chosen < self.masking.rate)
        as_mask = masked & (shown < SHOWN_AS_MASK) if self.masking.shown == "bert" else masked
        as_random = masked & ~as_mask & (shown < SHOWN_AS_MASK + SHOWN_AS_RANDOM)
        visible = np.where(as_mask, self.mask_id, np.where(as_random, random_ids, ids_BL))
        return MaskedBatch(
            torch.from_numpy(visible),
            torch.from_numpy(attention_mask),
            torch.from_numpy(np.flatnonzero(masked) - 1),
            torch.from_numpy(ids_BL[masked]),
            count=int(masked.sum()),
        )


def mask_token_id(tokenizer: PreTrainedTokenizerBase, token: str | None) -> int:
    """Return the id of the mask token; raises ValueError where the tokenizer does not know it as one token."""
    vocabulary = tokenizer.get_vocab()
    candidates = (tokenizer.mask_token, PUBLISHED_MASK, tokenizer.unk_token) if token is None else (token,)
    for candidate in candidates:
        if candidate in vocabulary:
            return vocabulary[candidate]
    raise ValueError(f"--method.masking.token {token}: the backbone's tokenizer has none; name one of its tokens")


@dataclass(frozen=True)
class WholeTextBatch:
    """Texts as they are, each of which has a label."""

    texts: TextBatch  # B rows
    row: Tensor | None = None
    count: int = 0  # B, or 0 where it is muted

    def to(self, device: torch.device) -> Self:
        """Return the same batch on `device`."""
        return replace(self, texts=self.texts.to(device))

    def muted(self) -> Self:
        """Return the same batch without labels: it keeps a process in step and adds nothing to the loss."""
        return replace(self, count=0)


class WholeTexts:
    """Some texts of a corpus."""

    def __init__(self, corpus: Corpus, texts: np.ndarray, pool_prefix: bool) -> None:
        self.corpus, self.texts, self.pool_prefix = corpus, texts, pool_prefix
        self.lengths = corpus.texts.lengths[texts]

    def collate(self, indices: np.ndarray, epoch: int, progress: float = 0.0) -> WholeTextBatch:
        texts = self.texts[indices]
        ids_BL, mask_BL = pad([self.corpus.texts[text] for text in texts], side="right")
        skipped = 0 if self.pool_prefix else self.corpus.before[texts][:, None]
        pooled_BL = mask_BL * (np.arange(ids_BL.shape[1]) >= skipped)
        batch = TextBatch(*map(torch.from_numpy, (ids_BL, mask_BL, pooled_BL)))
        return WholeTextBatch(batch, count=len(texts))
