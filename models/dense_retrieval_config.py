"""Settings of dense retrieval (models/dense_retrieval.py)."""

from dataclasses import dataclass, field
from typing import Literal

from data.retrieval_texts import RetrievalTextSettings

from .pooling import Pooling


@dataclass
class DenseRetrievalConfig:
    """Texts, encoders, and what a user's next item is told from."""

    texts: RetrievalTextSettings = field(default_factory=RetrievalTextSettings)
    """How users and items read."""
    two_encoders: bool = False
    """Give users and items an encoder each, from the same weights on; false: one for both."""
    pooling: Pooling = "mean"
    """What of a text's states is its vector: their mean, their mean with later tokens weighing more (for causal
    decoders), the last token's, or the first one's."""
    normalize: bool = True
    """Compare by cosine; false: by dot product."""
    temperature: float = 0.05
    """Similarities are divided by it."""
    learn_temperature: bool = False
    """Learn it from there on."""
    loss: Literal["in-batch", "catalogue", "both"] = "both"
    """in-batch: a softmax over the targets of the batch, of all processes, which moves users and items; catalogue: over
    all items as the index has them, which moves users (and items as far as they share an encoder); both: the sum."""
    cuts: int = 1
    """Targets of each user in an epoch, each with the history before it."""
    refresh_epochs: float = 0.25
    """Part of an epoch after which the index is encoded anew; 0: each step encodes every item, and moves it."""
    hard_negatives: int = 0
    """In-batch: for each user, so many items nearest in the index that the user did not take are negatives, too."""
    log_q: bool = False
    """In-batch: let each negative stand for the items that are drawn as seldom as it is."""
    mask_history: bool = True
    """What else a user took in training is no negative."""
    label_smoothing: float = 0.0
    """Part of the target that all candidates share."""
    learn_ids: bool = False
    """Add to the vector of each item's text one of its own, learned from zero on."""
    grad_cache_rows: int | None = None
    """Texts of a forward and backward pass: their activations are computed twice, so that a batch of any size takes the
    memory of so many (GradCache). By default all at once."""

    def __post_init__(self) -> None:
        if self.loss == "catalogue" and (self.hard_negatives or self.log_q):
            raise ValueError(
                "--method.loss catalogue has every item among its negatives, each once: --method.hard_negatives and "
                "--method.log_q belong to --method.loss in-batch or both"
            )
        if self.loss == "catalogue" and self.two_encoders and self.refresh_epochs:
            raise ValueError(
                "--method.loss catalogue moves no item while the index stands still, so the items' own encoder would "
                "learn nothing: pass --method.loss both, --method.refresh_epochs 0 or --method.two_encoders false"
            )
        if self.hard_negatives and not self.refresh_epochs:
            raise ValueError("--method.refresh_epochs 0 keeps no index, and --method.hard_negatives looks into it")
        for name in ("temperature", "cuts", "grad_cache_rows"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"--method.{name} {value}: expected more than 0")
