"""DeepSpeed ZeRO: its configuration, and the weights and optimizer state that it spreads over the processes.

Precision is torch's autocast here as everywhere else, so ZeRO trains the same numbers as one process does: trainable
weights, gradients and moments are float32, and a frozen base keeps the type it was loaded in.
"""

import hashlib
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from filelock import FileLock
from torch import Tensor, nn
from transformers.integrations import unset_hf_deepspeed_config

from .optimizer import ClippedPart

# Moments of AdamW by the names that torch gives them.
MOMENTS = ("exp_avg", "exp_avg_sq")
_linear = nn.functional.linear  # before DeepSpeed replaces it
# What ZeRO is told by the loop; a configuration may leave it open ("auto" or absent) or say the same.
Owned = dict[str, tuple[Any, str]]


def compile_for_cpu() -> None:
    """Compile the one operation that DeepSpeed wants on a CPU, once a machine (a minute), or load what is there.

    torch marks a compilation by a file that a killed process leaves behind, and then waits for it forever. Here the
    processes take turns by a lock that ends with its holder, in a folder of our own, so such a file is a leftover.
    """
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    # One folder an environment: it is compiled against the headers inside, and two would build it in turn forever.
    environment = hashlib.sha256(sys.prefix.encode()).hexdigest()[:8]
    own = Path.home() / ".cache" / "shardrec" / f"extensions-torch-{torch.__version__}-{environment}"
    folder = os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(own))
    builder = ShareMemCommBuilder()
    built = Path(folder, builder.name)
    built.mkdir(parents=True, exist_ok=True)
    path = os.environ["PATH"]
    # This environment's ninja comes first: another version would compile anew what this one has compiled.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), path])
    try:
        with FileLock(f"{built}.lock"):
            (built / "lock").unlink(missing_ok=True)
            builder.load(verbose=False)
    finally:
        os.environ["PATH"] = path


class Zero:
    """The DeepSpeed side of one Accelerator."""

    def __init__(self, accelerator: Accelerator, precision: str) -> None:
        self.accelerator, self.precision = accelerator, precision
        # Accelerate would have transformers cut weights while it loads them. `spread` does that, once what is asked of
        # whole ones has been answered: the norm of the token embeddings, and who sees whom.
        unset_hf_deepspeed_config()
        self.config: dict[str, Any] = accelerator.deepspeed_plugin.deepspeed_config
        self.stage = int(self.config.get("zero_optimization", {}).get("stage", 0))
        if precision == "fp16":
            raise ValueError(
                "--train.precision fp16 needs a loss scaler, which is not driven under DeepSpeed: pass "
                "--train.precision bf16 or fp32, or use launch/accelerate/ddp.yaml"
            )

    @property
    def name(self) -> str:
        """As ds_configs/ names its files: zero1, zero2, zero2_offload, zero3, zero3_offload."""
        offload = self.config["zero_optimization"].get("offload_optimizer", {}).get("device", "none") != "none"
        return f"zero{self.stage}{'_offload' if offload else ''}"

    def configure(
        self, micro_batch_size: int, num_processes: int, max_grad_norm: float, parts: Sequence[ClippedPart] = ()
    ) -> None:
        """Fill in what the loop decides; raise ValueError where the configuration asks for something else.

        DeepSpeed clips all gradients as one; where `parts` are clipped each alone, it is done here.
        """
        self.parts = parts
        owned: Owned = {
            "train_micro_batch_size_per_gpu": (micro_batch_size, "--train.micro_batch_size"),
            "train_batch_size": (micro_batch_size * num_processes, "--train.batch_size"),
            # The loop says itself which micro-batch ends a step, for steps may have different numbers of them.
            "gradient_accumulation_steps": (1, "--train.batch_size and --train.micro_batch_size"),
            "gradient_clipping": (0.0 if parts else max_grad_norm, "--train.max_grad_norm"),
        }
        for name, (value, flag) in owned.items():
            asked = self.config.get(name, "auto")
            if asked not in ("auto", value):
                raise ValueError(f'the DeepSpeed configuration has {name} {asked}: set it to "auto" and pass {flag}')
            self.config[name] = value
        for name, flag in (("bf16", "bf16"), ("fp16", "fp16")):
            if self.config.setdefault(name, {}).get("enabled", False) is True:
                raise ValueError(
                    f'the DeepSpeed configuration has {name}.enabled true: take "{name}" out of it and pass '
                    f"--train.precision {flag}"
                )
            self.config[name]["enabled"] = False
        autocast = self.config.setdefault("torch_autocast", {})
        autocast.update(enabled=self.precision == "bf16", dtype="bfloat16")
        # Gradients are added up in float32, as DDP does; Linear layers' would be added in bfloat16 by default.
        autocast.setdefault("lower_precision_safe_modules", [])

    def spread(self, model: nn.Module, device: torch.device) -> None:
        """Cut the weights into slices, one weight at a time: a model need not fit on one GPU. For stage 3.

        DeepSpeed would move the whole model to the device first, and cut then.
        """
        from deepspeed import comm
        from deepspeed.runtime.zero import Init

        if not comm.is_initialized():  # Accelerate has joined the processes; DeepSpeed has yet to find out
            comm.init_distributed(dist_backend=torch.distributed.get_backend(), auto_mpi_discovery=False)
        Init(module=model, config_dict_or_path=self.config)
        round_once_without_gradients()
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(device))

    @property
    def engine(self) -> Any:
        """The DeepSpeedEngine; there is one once the model is prepared."""
        return self.accelerator.deepspeed_engine_wrapped.engine

    def settle(self) -> None:
        """Give back what the last pass fetched ahead: weights on their way cannot be gathered. Collective.

        DeepSpeed does the same before its own checkpoints.
        """
        if self.stage == 3 and self.accelerator.deepspeed_engine_wrapped is not None:
            self._optimizer.checkpoint_event_prologue()
            self._optimizer.checkpoint_event_epilogue()

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss`; the last one of a step also clips and makes the step."""
        ends_step = self.accelerator.sync_gradients
        self.engine.set_gradient_accumulation_boundary(is_boundary=ends_step)
        self.engine.backward(loss)
        if ends_step:
            if self.parts:
                self._clip_parts()
            self.engine.step()

    def _clip_parts(self) -> None:
        """Scale each part's gradients down to its own norm, in the slices that this process holds. Collective."""
        part_of = {id(parameter): i for i, part in enumerate(self.parts) for parameter in part.parameters}
        slices: list[list[Tensor]] = [[] for _ in self.parts]
        if self.stage < 3:
            self._optimizer._wait_for_offload_copies()
        for group, (flat, parameters) in enumerate(self._flat_parameters()):
            # With offload they are in the flat slice already, which is on the CPU.
            gradients = self._optimizer.averaged_gradients.get(group) or [flat.grad]
            slices[part_of[id(parameters[0])]] += gradients
        norms = [torch.linalg.vector_norm(torch.stack(torch._foreach_norm(part))) for part in slices]
        squares = torch.stack(norms).float().square().to(self.accelerator.device)
        squares = self.accelerator.reduce(squares, reduction="sum")
        for part, gradients, norm in zip(self.parts, slices, squares.sqrt(), strict=True):
            if part.max_norm:
                scale = (part.max_norm / (norm + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grad_norm_ has it
                torch._foreach_mul_(gradients, scale.to(gradients[0].device))
        self._norm = squares.sum().sqrt()

    def grad_norm(self, device: torch.device) -> Tensor:
        """Return the gradient norm of the step just made, before clipping: a float32 scalar on `device`."""
        if self.parts:
            return self._norm.to(device)
        norm = torch.as_tensor(self.engine.get_global_grad_norm(), dtype=torch.float32, device=device)
        return norm.masked_fill(norm < 0, torch.nan)  # DeepSpeed says -1 for a norm that is not finite

    def optimizer_state(self, model: nn.Module, keep: bool = True) -> dict[str, Tensor]:
        """Return "<parameter>/<key>" -> full tensor on the CPU, as `trainers.checkpoint` writes it. Collective.

        A process that does not `keep` them only takes part.
        """
        from deepspeed.utils import safe_get_full_optimizer_state

        self._link_moments()
        state: dict[str, Tensor] = {}
        steps = {id(p): flat for flat, parameters in self._flat_parameters() for p in parameters}
        for name, parameter in trainable(model):
            moments = self._inner.state.get(steps[id(parameter)], {})
            if "step" not in moments:
                continue  # no step was made yet
            if keep:
                state[f"{name}/step"] = torch.as_tensor(moments["step"], dtype=torch.float32).cpu().clone()
            for key in MOMENTS:
                full = safe_get_full_optimizer_state(parameter, key)
                if keep:
                    state[f"{name}/{key}"] = full.detach().view(full_shape(parameter)).float().cpu().contiguous()
        return state

    def load_optimizer_state(self, model: nn.Module, state: dict[str, Tensor]) -> None:
        """Give every process its part of what `optimizer_state` returned, on any number of processes and any stage."""
        if not state:
            return
        names = {id(parameter): name for name, parameter in trainable(model)}
        for flat, parameters in self._flat_parameters():
            step = max(float(state[f"{names[id(p)]}/step"]) for p in parameters)
            moments = {key: torch.zeros_like(flat) for key in MOMENTS}
            self._inner.state[flat] = {
                "step": torch.tensor(step, device=flat.device)
            } | moments  # as fused AdamW has it
        self._link_moments()
        for name, parameter in trainable(model):
            for key in MOMENTS:
                self._put(parameter, key, state[f"{name}/{key}"].to(torch.float32))

    def _put(self, parameter: nn.Parameter, key: str, full: Tensor) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        if self.stage < 3:
            safe_set_full_optimizer_state(parameter, full, key)
            return
        # The public way to set a full tensor fails where processes do not divide it: the last slice is padded.
        size = getattr(parameter, "ds_tensor").ds_numel  # noqa: B009 (DeepSpeed adds it)
        start = size * self.accelerator.process_index
        mine = full.flatten()[start : start + size]
        safe_set_local_optimizer_state(parameter, nn.functional.pad(mine, (0, size - len(mine))), key)

    def _link_moments(self) -> None:
        """Point every parameter at its place in the flat moments; DeepSpeed 0.19 does so for the first group only."""
        from deepspeed.utils import lazy_init_hp_params_optimizer_state

        if self.stage < 3:
            for flat, parameters in self._flat_parameters():
                lazy_init_hp_params_optimizer_state(parameters, flat, self._inner.state)

    @property
    def _optimizer(self) -> Any:
        return self.engine.optimizer

    @property
    def _inner(self) -> torch.optim.Optimizer:
        """The torch optimizer, over one flat slice a group instead of parameters."""
        return self._optimizer.optimizer

    def _flat_parameters(self) -> Iterator[tuple[Tensor, list[nn.Parameter]]]:
        """Yield each flat slice that the torch optimizer updates, with the parameters that it holds a part of."""
        optimizer = self._optimizer
        if self.stage == 3:
            yield from zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups, strict=True)
        else:
            yield from zip(optimizer.single_partition_of_fp32_groups, optimizer.bit16_groups, strict=True)


def round_once_without_gradients() -> None:
    """Let layers compute what they compute in one process wherever no gradient is asked for.

    Under stage 3 DeepSpeed replaces `torch.nn.functional.linear` in the whole process by one that keeps no whole weight
    for the backward pass. It rounds bfloat16 twice, before and after it adds the bias, so ranks would change.
    """
    from deepspeed.runtime.zero.linear import zero3_linear_wrap

    def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return (zero3_linear_wrap if torch.is_grad_enabled() else _linear)(input, weight, bias)

    if nn.functional.linear is zero3_linear_wrap:
        nn.functional.linear = linear


def trainable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the trainable parameters by name; tied ones come once."""
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def full_shape(parameter: Tensor) -> torch.Size:
    """Return a parameter's shape, also where ZeRO-3 keeps only a slice of it here."""
    return getattr(parameter, "ds_shape", parameter.shape)


@contextmanager
def gathered(parameters: Iterable[Tensor], write: bool = False) -> Iterator[None]:
    """Have whole parameters inside, where ZeRO-3 spreads them; collective there, and nothing anywhere else.

    With `write`, what every process has written alike is kept.
    """
    sharded = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not sharded:
        yield
        return
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters(sharded, modifier_rank=0 if write else None):
        yield
