"""Settings of a training run."""

from dataclasses import dataclass, field
from typing import Literal

from data.loaders import LengthGroups

# Settings that count something; those that may be left out are None then.
COUNTS = (
    *("epochs", "max_steps", "batch_size", "micro_batch_size", "eval_batch_size", "eval_every_epochs"),
    *("eval_every_steps", "patience", "save_every_steps", "keep_checkpoints", "log_every_steps"),
)


@dataclass
class TrainConfig:
    """How the model is trained; the same words mean the same on one CPU and on many GPUs."""

    epochs: int = 10
    """Passes over the training examples (an upper bound when patience is set)."""
    max_steps: int | None = None
    """Stop after this many optimizer steps, whatever epochs says; 0 trains nothing and measures the model as it is."""
    batch_size: int = 128
    """Examples of one optimizer step over all processes; accumulation follows from micro_batch_size."""
    micro_batch_size: int | None = None
    """Examples of one forward pass on one process; all of a process's share of the step when not given."""
    eval_batch_size: int = 256
    """Examples of one evaluation pass on one process."""
    optimizer: Literal["adamw", "adamw-8bit-paged"] = "adamw"
    """AdamW with float32 moments, or bitsandbytes' with moments of 8 bits in memory that a full GPU pages out."""
    lr: float = 1e-3
    """Peak learning rate."""
    lr_multipliers: dict[str, float] = field(default_factory=dict)
    """Rates of parameters whose names begin so, as multiples of lr: {"backbone": 0.1}; the longest beginning counts."""
    frozen_epochs: dict[str, int] = field(default_factory=dict)
    """Parameters whose names begin so stay as they are for so many epochs: {"input.learned": 3}."""
    weight_decay: float = 0.0
    """Decoupled weight decay; norms, biases and embeddings are left out."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's moment decay rates."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Shape of the learning rate after warm-up; linear and cosine reach their end as the last step ends."""
    final_lr_ratio: float = 0.0
    """Where linear and cosine end, as a part of lr: 0.001 ends a rate of 0.001 at 1e-6."""
    warmup_steps: int = 0
    """Steps of linear warm-up from zero."""
    max_grad_norm: float = 0.0
    """Clip the global gradient norm to this value; 0 does not clip."""
    max_grad_norms: dict[str, float] = field(default_factory=dict)
    """Clip parameters whose names begin so to norms of their own, each beginning alone: {"sasrec": 1.0}; the longest
    one counts, 0 does not clip, and max_grad_norm is for all others together."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Autocast type; auto takes bf16 where the hardware multiplies it faster (CUDA, or a CPU with bf16 units)."""
    seed: int = 42
    """Seed of weights, order, dropout and negatives."""
    group_by_length: LengthGroups = "epoch"
    """What holds examples of similar length, so that little padding is computed: whole steps of an epoch, which pads
    least, or the micro-batches of a step whose examples are drawn at random (set micro_batch_size well below
    batch_size), which trains SASRec on MovieLens 1M in half the steps."""
    eval_every_epochs: int = 1
    """Evaluate on validation users every so many epochs (and at the end)."""
    eval_every_steps: int | None = None
    """Evaluate every so many steps instead of by epochs."""
    metric: str = "NDCG@10"
    """Validation metric that selects the best checkpoint and drives patience; of a stage that ranks nothing: loss."""
    patience: int | None = None
    """Stop after this many evaluations without a better metric; None trains to the end."""
    save_every_steps: int | None = None
    """Also checkpoint every so many steps, not only at each evaluation."""
    keep_checkpoints: int = 1
    """Recent checkpoints to keep besides the best."""
    timeout_seconds: float = 1800.0
    """Seconds that the processes of a run wait for each other, at the start and later, before they all end."""
    log_every_steps: int = 10
    """Write a line of metrics every so many steps."""
    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])
    """Accelerate trackers that also receive the metrics: tensorboard, wandb, mlflow, trackio; [] for none."""

    def __post_init__(self) -> None:
        for name in COUNTS:
            value = getattr(self, name)
            if value is not None and value < 1 and (name, value) != ("max_steps", 0):
                raise ValueError(f"--train.{name} is {value}, but must be at least 1")
        for prefix, multiplier in self.lr_multipliers.items():
            if multiplier <= 0:
                raise ValueError(f"--train.lr_multipliers has {prefix}: {multiplier}, but must be above 0")
        for prefix, epochs in self.frozen_epochs.items():
            if epochs < 1:
                raise ValueError(f"--train.frozen_epochs has {prefix}: {epochs}, but must be at least 1")
        for prefix, norm in self.max_grad_norms.items():
            if norm < 0:
                raise ValueError(f"--train.max_grad_norms has {prefix}: {norm}, but must not be negative")
        if not 0 <= self.final_lr_ratio <= 1:
            raise ValueError(f"--train.final_lr_ratio is {self.final_lr_ratio}, but must be 0 to 1")
        for name in ("lr", "timeout_seconds"):
            if getattr(self, name) <= 0:
                raise ValueError(f"--train.{name} is {getattr(self, name)}, but must be above 0")
        for name in ("weight_decay", "warmup_steps", "max_grad_norm"):
            if getattr(self, name) < 0:
                raise ValueError(f"--train.{name} is {getattr(self, name)}, but must not be negative")
