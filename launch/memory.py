"""From one rehearsed micro-batch to the memory of every strategy: what is whole, sharded, or on the host."""

import json
from dataclasses import dataclass, fields
from pathlib import Path

from .rehearsal import Rehearsal

GiB = 2**30
# CUDA's context, cuBLAS and NCCL workspaces and the allocator's gaps: an allowance, not a measurement.
RESERVED = GiB
# Bytes of both moments a trainable parameter; bitsandbytes adds two float32 scales a block of 256.
MOMENTS = {"adamw": 8.0, "adamw-8bit-paged": 2 + 2 * 4 / 256}
FLOAT32 = 4

DS_CONFIGS = Path(__file__).resolve().parents[1] / "ds_configs"


@dataclass(frozen=True)
class ZeroBuffers:
    """Sizes that a DeepSpeed configuration sets, in numbers (not bytes), with DeepSpeed's defaults."""

    reduce_bucket_size: int = 500_000_000
    stage3_prefetch_bucket_size: int = 50_000_000
    stage3_max_reuse_distance: int = 1_000_000_000
    overlap_comm: bool | None = None  # None: at stage 3 only


@dataclass(frozen=True)
class Strategy:
    """What the GPUs share, and what the host holds for them."""

    name: str  # of its Accelerate configuration, launch/accelerate/<name>.yaml
    title: str
    stage: int = 0
    offloads_optimizer: bool = False
    offloads_parameters: bool = False

    def title_for(self, gpus: int) -> str:
        """Return its name in words; one GPU needs no DDP."""
        return "1 process" if self.stage == 0 and gpus == 1 else self.title

    def buffers(self) -> ZeroBuffers:
        """Return what its DeepSpeed configuration, ds_configs/<name>.json, says about buffers."""
        file = DS_CONFIGS / f"{self.name}.json"
        settings = json.loads(file.read_text())["zero_optimization"] if file.is_file() else {}
        known = {field.name for field in fields(ZeroBuffers)}
        return ZeroBuffers(**{key: value for key, value in settings.items() if key in known and value != "auto"})


# Fastest first: each later one communicates more.
STRATEGIES = (
    Strategy("ddp", "DDP"),
    Strategy("zero1", "ZeRO-1", stage=1),
    Strategy("zero2", "ZeRO-2", stage=2),
    Strategy("zero2_offload", "ZeRO-2 + host", stage=2, offloads_optimizer=True),
    Strategy("zero3", "ZeRO-3", stage=3),
    Strategy("zero3_offload", "ZeRO-3 + host", stage=3, offloads_optimizer=True, offloads_parameters=True),
)


@dataclass(frozen=True)
class Forecast:
    """Bytes on each GPU at the fullest moment of a step, and on the host for all processes of one machine."""

    strategy: Strategy
    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    buffers: int  # recomputation, gathered weights, communication buckets
    host: int

    @property
    def total(self) -> int:
        """Bytes on a GPU, with what CUDA itself takes."""
        parts = (self.weights, self.gradients, self.optimizer, self.activations, self.logits, self.buffers)
        return sum(parts) + RESERVED


def forecast(
    rehearsal: Rehearsal,
    strategy: Strategy,
    gpus: int,
    optimizer: str = "adamw",
    accumulates: bool = False,
) -> Forecast:
    """Return the memory of a training step on `gpus` GPUs of one machine.

    `accumulates` says that a step has several micro-batches, so that gradients are there from the start. Raises
    ValueError for an unknown optimizer.
    """
    if optimizer not in MOMENTS:
        raise ValueError(f"--train.optimizer {optimizer}: expected one of {', '.join(MOMENTS)}")
    zero = strategy.buffers()
    count, trainable = rehearsal.trainable_parameters, rehearsal.trainable_bytes
    state = int(count * (MOMENTS[optimizer] + (FLOAT32 if strategy.stage else 0)))  # ZeRO's own float32 copy
    state_here = -(-state // gpus) if strategy.stage else state
    peak = rehearsal.peak_bytes
    gradients = _gradients(rehearsal, strategy, gpus, accumulates)
    buffers = peak - rehearsal.activation_bytes - rehearsal.logits_bytes
    host = 0
    if strategy.stage:
        # stages 1 and 2 fill one bucket while the other is sent
        buckets = 2 if zero.overlap_comm and strategy.stage < 3 else 1
        buffers += buckets * zero.reduce_bucket_size * FLOAT32
    if strategy.offloads_optimizer:
        host += state + trainable
        state_here = 0
    weights = rehearsal.weight_bytes
    if strategy.stage == 3:
        weights = _sharded(rehearsal, gpus)
        buffers += _gathered(rehearsal, zero)
    if strategy.offloads_parameters:
        host += rehearsal.weight_bytes - rehearsal.unsharded_bytes
        weights = rehearsal.persistent_bytes + rehearsal.unsharded_bytes + rehearsal.uncut_bytes
    # What is alive when the forward pass ends and what the logits take need not be alive at the same moment.
    logits = min(rehearsal.logits_bytes, max(0, peak - rehearsal.activation_bytes))
    buffers += rehearsal.logits_bytes - logits
    return Forecast(strategy, weights, gradients, state_here, rehearsal.activation_bytes, logits, buffers, host)


def _gradients(rehearsal: Rehearsal, strategy: Strategy, gpus: int, accumulates: bool) -> int:
    """Bytes of accumulated gradients at the fullest moment."""
    whole = rehearsal.trainable_bytes
    if strategy.offloads_optimizer:
        return 0
    if strategy.stage >= 2:
        return -(-whole // gpus)
    if strategy.stage == 0 and gpus > 1:
        # In the buckets that DDP sends, which are there from the start; those of micro-batches before the last one
        # stand beside them.
        return 2 * whole if accumulates else whole
    return whole if accumulates else max(rehearsal.peak_with_gradients, whole) - rehearsal.peak_bytes


def _sharded(rehearsal: Rehearsal, gpus: int) -> int:
    """Bytes of weights that ZeRO-3 leaves on a GPU between uses."""
    shared = rehearsal.weight_bytes - rehearsal.persistent_bytes - rehearsal.unsharded_bytes
    return -(-shared // gpus) + rehearsal.persistent_bytes + rehearsal.unsharded_bytes + rehearsal.uncut_bytes


def _gathered(rehearsal: Rehearsal, zero: ZeroBuffers) -> int:
    """Bytes of weights that ZeRO-3 holds whole at once: one module, what is prefetched, and what is used again soon.

    In the middle of a step the backward pass uses the last weights of the forward pass again: those within half the
    reuse distance of the end stay.
    """
    stored = rehearsal.weight_bytes - rehearsal.unsharded_bytes
    bytes_each = stored / rehearsal.stored_elements
    numbers = zero.stage3_max_reuse_distance // 2 + zero.stage3_prefetch_bucket_size
    held = int(numbers * bytes_each) + rehearsal.largest_module_bytes
    return min(stored - rehearsal.persistent_bytes, held)
