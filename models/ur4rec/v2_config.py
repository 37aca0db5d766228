"""Settings of UR4Rec V2."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Stage = Literal["retriever", "joint", "end-to-end"]


@dataclass
class MemoryConfig:
    """A vector for each user that outlives the steps of training."""

    enabled: bool = True
    """Keep one."""
    triggers: list[Literal["count", "drift", "time", "explicit"]] = field(default_factory=lambda: ["count"])
    """What makes a step of training write it, any of these. count: so many new events of the user; drift: what is new
    points elsewhere; time: so many epochs since it was written; explicit: nothing in training. All are brought up to
    date when training ends."""
    every: int = 1
    """Events for the trigger count."""
    drift: float = 0.3
    """The trigger drift fires where the cosine of memory and news is below 1 minus this."""
    epochs: float = 1.0
    """Epochs for the trigger time."""
    decay: float = 0.95
    """What a write leaves of the vector; the rest is a GRU cell's answer."""


@dataclass
class FusionConfig:
    """How the scores of SASRec and of the retriever become one; both are z-scores over the catalogue first."""

    kind: Literal["fixed", "learned", "user"] = "fixed"
    """fixed: one weight. learned: a network reads how sure both parts are of this ranking. user: it also reads the
    states that both have of the user."""
    sasrec_weight: float | None = None
    """SASRec's part of fixed, as in 0.4; when not given the best on validation, between 0 and 1."""
    hidden_size: int = 128
    """Width of the network."""
    dropout: float = 0.1
    """Dropout inside it."""
    curriculum_epochs: float = 0.0
    """Epochs in which SASRec's weight goes from 1 to what kind says, in training."""

    def __post_init__(self) -> None:
        if self.sasrec_weight is not None and not 0 <= self.sasrec_weight <= 1:
            raise ValueError(f"--method.fusion.sasrec_weight {self.sasrec_weight}: expected 0 to 1")


@dataclass
class UR4RecV2Config:
    """What the retriever reads, its shape, and the stage of training."""

    train: Stage = "retriever"
    """retriever: SASRec stays as it is; joint: both learn; end-to-end: so do the last layers of the text encoder."""
    sasrec: Path | None = None
    """Folder of a finished run of sasrec, gru4rec or lrurec."""
    init: Path | None = None
    """Folder of the finished run of the stage before, whose weights this one begins with."""
    descriptions: Path | None = None
    """Folder that launch/describe.py wrote; texts made of titles, categories and ratings when not given."""
    profile_every: int = 10
    """Without descriptions: events after which a user's text is written anew."""
    encoder: str = "minilm"
    """Text encoder: minilm, or a hub id or folder in Hugging Face format."""
    encoder_layers: int = 2
    """Last layers of the encoder that end-to-end trains."""
    profile_sentences: int = 8
    """Sentences of a user's text that are read, each as a vector."""
    answers: Literal["user", "candidate"] = "user"
    """user: the experts look once a user, for the newest event of the history, and candidates are compared with that
    answer. candidate: they look anew for each candidate, as published, which costs a hundred times as much."""
    co_attention: bool = False
    """Also compare the user's text and each item's sentence by sentence, each attending to the other. An item's text is
    then the mean of its sentences."""
    description_sentences: int = 2
    """Sentences of an item's text that co_attention reads, each as a vector."""
    history: int = 50
    """Newest events that the retriever's experts look at."""
    hidden_size: int = 64
    """Width of the retriever; published 256, 512 is proposed."""
    num_heads: int = 4
    """Attention heads; must divide hidden_size."""
    feed_forward_size: int | None = None
    """Inner width of the experts' feed-forward layers; twice hidden_size when not given."""
    residual: bool = True
    """Let what goes into the experts' feed-forward layers also pass by them; false: as published."""
    proxies: int = 4
    """Learned vectors that every answer is compared with."""
    dropout: float = 0.2
    """Dropout on projected texts and inside the layers."""
    normalize: bool = True
    """Give all vectors length 1 and compare by cosine; false: by dot product, whose losses begin near 100."""
    temperature: float = 0.07
    """The retriever's similarities are divided by it."""
    cuts: int = 8
    """Targets of each user in an epoch, each with what came before it."""
    loss: Literal["softmax", "published"] = "softmax"
    """softmax: cross-entropy of both parts over their candidates. published: BPR for SASRec and binary cross-entropy
    for the retriever."""
    num_negatives: int = 0
    """Items beside the target in the losses, drawn for each target; 0: the whole catalogue."""
    hard_share: float = 0.3
    """Part of the negatives that are those which SASRec ranks highest; the others are uniform."""
    in_batch: bool = False
    """Let the targets of the micro-batch be negatives of each other, too."""
    balance: Literal["equal", "uncertainty"] = "equal"
    """Add up the parts' losses as they are, or by learned uncertainties."""
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    """A vector for each user that outlives the steps."""
    fusion: FusionConfig = field(default_factory=FusionConfig)
    """How two scores become one."""

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"--method.hidden_size {self.hidden_size} is not a multiple of --method.num_heads {self.num_heads}"
            )
        if not 0 <= self.hard_share <= 1:
            raise ValueError(f"--method.hard_share {self.hard_share}: expected 0 to 1")
        if not self.num_negatives and (self.in_batch or self.loss == "published"):
            raise ValueError(
                "--method.in_batch and --method.loss published want drawn negatives: pass --method.num_negatives 20"
            )
        if self.num_negatives and self.fusion.kind != "fixed":
            raise ValueError(
                f"--method.fusion.kind {self.fusion.kind} learns from rankings of the whole catalogue: pass "
                "--method.num_negatives 0"
            )
        if (self.train == "retriever") != (self.init is None):
            raise ValueError(
                f"--method.train {self.train} with --method.init {self.init}: retriever begins with --method.sasrec "
                "RUN, joint and end-to-end with --method.init RUN, the run of the stage before"
            )
