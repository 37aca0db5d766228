"""The Accelerator: the one place that knows how many processes there are and on what hardware."""

import ctypes
import os
import signal
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import NoReturn

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, ProjectConfiguration
from torch import Tensor, nn

from data.loaders import Share
from models.devices import runs_on_cpu

from .checkpoint import CannotSave
from .optimizer import clipped_parts
from .state import TrainingState, optimizer_state_of, share_buffers, weights_of
from .watchdog import collective_timeout, join
from .zero import Zero, compile_for_cpu


class HostCopy:
    """Small integers on their way from the device: reading waits for them, not for work that was queued since."""

    def __init__(self, values: Tensor) -> None:
        self.values = values.to("cpu", non_blocking=True)
        self.arrived = torch.Event(values.device) if values.device.type != "cpu" else None
        if self.arrived is not None:
            self.arrived.record()

    def read(self) -> list[int]:
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.values.tolist()


class Runtime:
    """A thin layer over Accelerate whose rules are ours: see `backward` for the one that matters."""

    def __init__(
        self,
        precision: str = "auto",
        trackers: list[str] | None = None,
        folder: Path | None = None,
        timeout_seconds: float = 1800.0,
    ):
        self.watchdog = join(timeout_seconds)
        # Without this, a multi-process launch on a machine without accelerator trains one copy a process.
        on_cpu = runs_on_cpu()
        if on_cpu:
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or deepspeed, when a library imports it, looks and warns
        if "LOCAL_SIZE" in os.environ:  # the `deepspeed` launcher's name for it
            os.environ.setdefault("LOCAL_WORLD_SIZE", os.environ["LOCAL_SIZE"])
        uses_deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
        with self.watchdog.guarding():
            if uses_deepspeed and on_cpu:
                compile_for_cpu()
            state = PartialState(cpu=on_cpu, timeout=collective_timeout(timeout_seconds))
        self.precision = best_precision(state.device, uses_deepspeed) if precision == "auto" else precision
        if "CROSS_SIZE" in os.environ and "ACCELERATE_USE_DEEPSPEED" not in os.environ:
            raise RuntimeError(
                "the `deepspeed` launcher started this process without saying which ZeRO to use: export "
                "ACCELERATE_USE_DEEPSPEED=true and ACCELERATE_DEEPSPEED_CONFIG_FILE=ds_configs/zero2.json, for other "
                "hosts in .deepspeed_env (launch/hostfile.example)"
            )
        self.accelerator = Accelerator(
            # DeepSpeed would turn trained weights into bf16: see trainers/zero.py for what is done instead.
            mixed_precision="no" if self.precision == "fp32" or uses_deepspeed else self.precision,
            log_with=trackers or None,
            project_config=ProjectConfiguration(logging_dir=str(folder)) if folder else None,
            step_scheduler_with_optimizer=False,
            # Buffers are alike on all processes, or made alike when they are saved (`share_buffers`): none need be sent
            # in every pass. Gradients that are sent lie in DDP's buckets, not beside them.
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)],
        )
        if uses_deepspeed and self.accelerator.distributed_type != DistributedType.DEEPSPEED:
            raise RuntimeError(
                f"the launcher asks for DeepSpeed, but Accelerate runs {self.accelerator.distributed_type.value}: take "
                "use_cpu (or --cpu) out of the Accelerate configuration, which turns DeepSpeed off without a word"
            )
        self.zero = Zero(self.accelerator, self.precision) if uses_deepspeed else None
        self.device = self.accelerator.device
        self.is_main = self.accelerator.is_main_process
        self.share = Share(self.accelerator.process_index, self.accelerator.num_processes)
        # What a script for several hosts asked for; without one, what this host's launcher was told.
        asked = int(os.environ.get("SHARDREC_WORLD_SIZE") or os.environ.get("WORLD_SIZE", "1"))
        if asked != self.share.num_processes:
            raise RuntimeError(
                f"{asked} processes were asked for, but {self.share.num_processes} joined: each group would train "
                "alone. Check --num_processes and the Accelerate configuration (launch/accelerate/), which needs "
                "deepspeed_multinode_launcher: standard on several hosts; SHARDREC_WORLD_SIZE, where set, is the number"
            )
        if "ACCELERATE_MIXED_PRECISION" in os.environ or "LOCAL_WORLD_SIZE" in os.environ:  # started by a launcher
            self._use_all_cores()
            _end_with_launcher()

    @property
    def strategy_name(self) -> str:
        """The strategy as launch/accelerate/ names its files."""
        return self.zero.name if self.zero is not None else "ddp"

    @property
    def strategy(self) -> str:
        """What the processes share, in words: "1 process", "DDP, 2 processes", "ZeRO-3, 2 processes"."""
        count = self.share.num_processes
        processes = f"{count} process{'es' if count > 1 else ''}"
        if self.zero is not None:
            return f"ZeRO-{self.zero.stage}, {processes}"
        return f"DDP, {processes}" if count > 1 else processes

    def _use_all_cores(self) -> None:
        """Undo launchers' single thread a process: the processes here share the cores evenly.

        With GPUs, too: an optimizer that waits in host memory computes there.
        """
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))

    def place(self, model: nn.Module) -> nn.Module:
        """Return the model on this process's device; under ZeRO-3 `prepare` moves it, a slice at a time."""
        if self.zero is not None and self.zero.stage == 3:
            return model
        return model.to(self.device)

    def prepare(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        micro_batch_size: int = 1,
        max_grad_norm: float = 0.0,
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Wrap model and optimizer for this launch (DDP or ZeRO, autocast, loss scaling)."""
        self.max_grad_norm, self.parts = max_grad_norm, clipped_parts(optimizer)
        if self.zero is not None:
            if not isinstance(optimizer, torch.optim.AdamW):
                raise ValueError(
                    "--train.optimizer adamw-8bit-paged keeps moments in blocks, which ZeRO cannot cut: pass "
                    "--train.optimizer adamw (with launch/accelerate/zero2_offload.yaml its moments wait in host "
                    "memory), or use launch/accelerate/ddp.yaml"
                )
            self.zero.configure(micro_batch_size, self.share.num_processes, max_grad_norm, self.parts)
            if self.zero.stage == 3:
                self.zero.spread(model, self.device)
        return self.accelerator.prepare(model, optimizer)

    def unwrap(self, model: nn.Module) -> nn.Module:
        """Return the module inside DDP or DeepSpeed's engine; its forward keeps autocast."""
        return self.accelerator.unwrap_model(model, keep_fp32_wrapper=True)

    def backward(self, total: Tensor, global_count: Tensor) -> None:
        """Add the gradient of `total / global_count`.

        `total` is a sum over this process's micro-batch and `global_count` the labels of the whole step. DDP and ZeRO
        average gradients over processes, so the sum is scaled up by their number first; the result is the exact mean
        over all labels, however they are spread. Under DeepSpeed the last one of a step also makes the step.
        """
        loss = total * (self.share.num_processes / global_count)
        if self.zero is not None:
            self.zero.backward(loss)
        else:
            self.accelerator.backward(loss)

    def clip_grad_norm(self, model: nn.Module) -> Tensor:
        """Return the global gradient norm, and scale the gradients, or each part's, down to the norm that was asked."""
        if self.zero is not None:  # it has clipped and stepped already
            return self.zero.grad_norm(self.device)
        whole = torch.inf if self.parts else self.max_grad_norm or torch.inf
        norm = self.accelerator.clip_grad_norm_(model.parameters(), whole)
        for part in self.parts:
            if part.max_norm:
                nn.utils.clip_grad_norm_(part.parameters, part.max_norm)
        return norm

    def settle(self) -> None:
        """Let no pass leave anything behind that is in the way of reading or writing whole weights. Collective."""
        if self.zero is not None:
            self.zero.settle()

    def state(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> TrainingState:
        """Return what a checkpoint holds of a prepared model, to the main process, and nothing of size to the others.

        Every process must ask, for it may be collective.
        """
        inner = self.unwrap(model)
        share_buffers(inner)
        scaler = self.scaler.state_dict() if self.scaler else {}
        keep = self.is_main  # who alone writes them
        return TrainingState(weights_of(inner, keep), optimizer_state_of(inner, optimizer, self.zero, keep), scaler)

    @property
    def scaler(self) -> torch.amp.GradScaler | None:
        """What keeps fp16 gradients in range; none for other types."""
        return self.accelerator.scaler

    def accumulating(self, model: nn.Module, is_last: bool) -> AbstractContextManager:
        """Return a context that leaves gradients unreduced until the step's last micro-batch."""
        if self.zero is not None:
            self.accelerator.sync_gradients = is_last
            return nullcontext()
        return nullcontext() if is_last else self.accelerator.no_sync(model)

    def sum(self, values: Tensor) -> Tensor:
        """Return the element-wise sum of a small tensor over all processes."""
        if self.share.num_processes == 1:
            return values
        return self.accelerator.reduce(values, reduction="sum")

    def on_main(self, write: Callable[[], None]) -> None:
        """Let the main process write while the others wait; raise OSError on all of them where it could not."""
        error: OSError | None = None
        if self.is_main:
            try:
                write()
            except OSError as raised:
                error = raised
        failed = int(self.sum(torch.tensor(int(error is not None), device=self.device)))
        if error is not None:
            raise error
        if failed:
            raise CannotSave("the main process could not write; its own message says what and why")

    def close(self) -> None:
        """Finish trackers and leave the process group."""
        self.accelerator.end_training()

    def wait(self) -> None:
        """Wait until every process is here."""
        self.accelerator.wait_for_everyone()


def best_precision(device: torch.device, uses_deepspeed: bool = False) -> str:
    """Return the autocast type whose matrix products are fastest there and safe: "bf16", "fp16" or "fp32".

    Under DeepSpeed fp16 is not to be had (see trainers/zero.py).
    """
    if device.type == "cuda":
        without_bf16 = "fp32" if uses_deepspeed else "fp16"
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else without_bf16
    fast_bf16 = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return "bf16" if device.type == "cpu" and fast_bf16 else "fp32"


def leave(exit_code: int) -> NoReturn:
    """End this process; call it last, with nothing left to write.

    One of several processes ends without taking Python apart: a thread of gloo may still hold a tensor, and giving
    it back to an interpreter that is going away aborts the process (pytorch/pytorch#179291), and so the whole job.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)
    sys.exit(exit_code)


def _end_with_launcher() -> None:
    """Ask Linux for SIGTERM when the launcher dies: `accelerate launch` passes no signal on to a single process."""
    if sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG in <linux/prctl.h>
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)
