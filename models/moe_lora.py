"""MoE-LoRA: a low-rank update whose rank is split into experts, mixed by a gate of each user (iLoRA, arXiv 2408.10159).

Expert k owns r = R/K rows of A and the same columns of B. Instead of every expert's output, [B, L, K, out], the mix is
taken in rank space, which is the same:

    W x + scale * sum_k g_k B_k A_k x  =  W x + scale * B ((A x) * g'),    where g' has each g_k r times in place
"""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from .dropout import dropped, keep_mask

State: TypeAlias = Tensor | Literal["unset", "off"]


class ActiveGate:
    """How much of each expert every row of a forward pass takes: one object that all adapted layers of a model read.

    A gate holds for the passes inside a `with`; layers that run outside of one raise. What gradient checkpointing
    computes again in the backward pass, after the `with` has ended, gets the gate of its forward pass.
    """

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self.num_layers, self.num_experts = num_layers, num_experts
        self.state: State = "unset"

    def use(self, gate: Tensor) -> AbstractContextManager[None]:
        """Passes inside hold one row a user with the gate [B, K]; [layers, B, K] is a gate for each adapted layer."""
        wanted = (self.num_layers, self.num_experts)
        if gate.ndim not in (2, 3) or (*gate.shape[:-2], gate.shape[-1]) != wanted[3 - gate.ndim :]:
            raise ValueError(
                f"a gate of shape {[*gate.shape]}: expected [users, {self.num_experts}] for all layers or "
                f"[{self.num_layers}, users, {self.num_experts}]; the number of experts is --backbone.lora_experts"
            )
        return _Holding(self, gate)

    def rows(self, users: slice, each: int) -> AbstractContextManager[None]:
        """Passes inside hold these of the users only, `each` rows of every one, user after user (beams, trie rows)."""
        if not isinstance(self.state, Tensor):
            return nullcontext()
        return _Holding(self, self.state[..., users, :].repeat_interleave(each, dim=-2))

    def off(self) -> AbstractContextManager[None]:
        """Passes inside are those of the model without its adapter."""
        return _Holding(self, "off")

    def of_layer(self, layer: int, x: Tensor) -> Tensor | None:
        """The gate [rows, K] of the input x [rows, L, in] of a layer, or None where the adapter is off."""
        if isinstance(self.state, Tensor):
            gate = self.state if self.state.ndim == 2 else self.state[layer]
            if x.ndim == 3 and len(x) == len(gate):
                return gate
            raise ValueError(
                f"an adapted layer got an input of shape {[*x.shape]}, and the gate is one of {len(gate)} rows: "
                "expected [rows, tokens, width]. A pass that holds some users only, or several rows of each, says so "
                "by ActiveGate.rows; layers that see tokens without rows are left out by --backbone.lora_targets"
            )
        if self.state == "off":
            return None
        raise ValueError(
            "a model with --backbone.adapter moe-lora ran without a gate: run it inside `with gate.use(gate_BK):`, "
            "where gate = gate_of(model), or inside `gate.off()` for the base model"
        )

    def checkpoint_contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Contexts of a checkpointed function's forward pass and of its recomputation: torch's `context_fn`."""
        return nullcontext(), _Holding(self, self.state)


class _Holding(AbstractContextManager[None]):
    """Puts a state into a gate; may be entered again, as a graph that is kept is run backward again."""

    def __init__(self, gate: ActiveGate, state: State) -> None:
        self.gate, self.state = gate, state
        self.outer: list[State] = []

    def __enter__(self) -> None:
        self.outer.append(self.gate.state)
        self.gate.state = self.state

    def __exit__(self, *_: object) -> None:
        self.gate.state = self.outer.pop()


class MoELoRALinear(nn.Module):
    """A linear layer, frozen and of any precision, and its gated low-rank update in float32.

    `layer` is its place among the adapted layers. With one expert and gate 1 it is plain LoRA.
    """

    def __init__(
        self, base_layer: nn.Linear, gate: ActiveGate, layer: int, rank: int, scale: float, dropout: float
    ) -> None:
        super().__init__()
        device = base_layer.weight.device
        self.base_layer, self.gate, self.layer = base_layer, gate, layer
        self.scale, self.dropout = scale, dropout
        # Parameters of this very module, which calls no other to use them: ZeRO-3 gathers them around its passes.
        self.lora_A = nn.Parameter(torch.empty(rank, base_layer.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(base_layer.out_features, rank, device=device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x_BLI: Tensor) -> Tensor:
        """Return [B, L, out] in the type of the frozen layer's own output."""
        frozen = self.base_layer(x_BLI)
        gate = self.gate.of_layer(self.layer, x_BLI)
        if gate is None:
            return frozen
        device = x_BLI.device.type
        autocast = torch.is_autocast_enabled(device)
        x_BLI = x_BLI.to(torch.get_autocast_dtype(device) if autocast else self.lora_A.dtype)
        keep, scale = None, self.scale
        if self.training and self.dropout:
            keep, share = keep_mask(x_BLI, self.dropout)
            scale = scale / share
        update: Tensor = _GatedUpdate.apply(x_BLI, self.lora_A, self.lora_B, gate, keep, scale)
        return (frozen + update).to(frozen.dtype)

    def extra_repr(self) -> str:
        return f"rank={len(self.lora_A)}, experts={self.gate.num_experts}, scale={self.scale}, dropout={self.dropout}"


class _GatedUpdate(torch.autograd.Function):
    """scale * B ((A (x * keep)) * g') in the type of x.

    Autograd by itself would keep the dropped input of every layer; this keeps x, which layers share, a byte of mask
    for each of its numbers, and A x, [B, L, R].
    """

    @staticmethod
    def forward(
        ctx: Any, x_BLI: Tensor, A_RI: Tensor, B_OR: Tensor, gate_BK: Tensor, keep_BLI: Tensor | None, scale: float
    ) -> Tensor:
        low_BLR = F.linear(_dropped(x_BLI, keep_BLI), A_RI.to(x_BLI.dtype))
        ctx.save_for_backward(x_BLI, A_RI, B_OR, gate_BK, keep_BLI, low_BLR)
        ctx.scale = scale
        mixed = low_BLR * _each_rank(gate_BK, len(A_RI), scale)
        return F.linear(mixed.to(x_BLI.dtype), B_OR.to(x_BLI.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BLO: Tensor) -> tuple[Tensor | None, ...]:
        x_BLI, A_RI, B_OR, gate_BK, keep_BLI, low_BLR = ctx.saved_tensors
        needs_x, needs_A, needs_B, needs_gate, *_ = ctx.needs_input_grad
        dtype, mix = x_BLI.dtype, _each_rank(gate_BK, len(A_RI), ctx.scale)
        grad_x = grad_A = grad_B = grad_gate = None
        grad_mixed = grad_BLO @ B_OR.to(dtype)
        grad_low = (grad_mixed * mix).to(dtype)
        if needs_x:
            grad_x = _dropped(grad_low @ A_RI.to(dtype), keep_BLI)
        if needs_A:
            grad_A = (grad_low.flatten(0, 1).T @ _dropped(x_BLI, keep_BLI).flatten(0, 1)).to(A_RI.dtype)
        if needs_B:
            mixed = (low_BLR * mix).to(dtype)
            grad_B = (grad_BLO.flatten(0, 1).T @ mixed.flatten(0, 1)).to(B_OR.dtype)
        if needs_gate:
            by_rank = (grad_mixed.to(gate_BK.dtype) * low_BLR).sum(dim=1)
            grad_gate = by_rank.unflatten(1, (gate_BK.shape[1], -1)).sum(dim=2) * ctx.scale
        return grad_x, grad_A, grad_B, grad_gate, None, None


def _dropped(x: Tensor, keep: Tensor | None) -> Tensor:
    return x if keep is None else dropped(x, keep)


def _each_rank(gate_BK: Tensor, rank: int, scale: float) -> Tensor:
    """Return the scaled gate of each of the rank's columns, [B, 1, R]."""
    return (gate_BK * scale).repeat_interleave(rank // gate_BK.shape[1], dim=1)[:, None]


def add_moe_lora(
    model: PreTrainedModel,
    *,
    rank: int,
    experts: int,
    scale: float,
    dropout: float = 0.0,
    targets: Sequence[str] | None = None,
) -> ActiveGate:
    """Freeze the model and put an adapter on its linear layers: all but the head, or those that `targets` name.

    The experts must divide the rank. Raises ValueError where a target names no linear layer.
    """
    names = _linear_layers(model, targets)
    gate = ActiveGate(len(names), experts)
    model.requires_grad_(False)
    for layer, name in enumerate(names):
        base_layer = model.get_submodule(name)
        assert isinstance(base_layer, nn.Linear)
        model.set_submodule(name, MoELoRALinear(base_layer, gate, layer, rank, scale, dropout))
    if model.is_activation_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False, "context_fn": gate.checkpoint_contexts})
    return gate


def _linear_layers(model: PreTrainedModel, targets: Sequence[str] | None) -> list[str]:
    head = model.get_output_embeddings()
    linear = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head]
    for target in targets or []:
        if not any(_is_named(name, target) for name in linear):
            known = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
            raise ValueError(f"--backbone.lora_targets has {target}, which is no linear layer; there are {known}")
    if not linear:
        raise ValueError(f"{type(model).__name__} has no linear layer for an adapter: pass another --backbone.name")
    return [name for name in linear if not targets or any(_is_named(name, target) for target in targets)]


def _is_named(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def find_gate(model: nn.Module) -> ActiveGate | None:
    """The gate that the adapted layers of a model share; None where it has no MoE-LoRA."""
    return next((module.gate for module in model.modules() if isinstance(module, MoELoRALinear)), None)


def holding_rows(model: nn.Module, users: slice, each: int) -> AbstractContextManager[None]:
    """`ActiveGate.rows` for what runs any model; without MoE-LoRA there is nothing to say."""
    gate = find_gate(model)
    return nullcontext() if gate is None else gate.rows(users, each)


def gate_of(model: nn.Module) -> ActiveGate:
    """The gate that the adapted layers of a model share; raises ValueError where it has no MoE-LoRA."""
    gate = find_gate(model)
    if gate is None:
        raise ValueError("the backbone has no gated adapter: pass --backbone.adapter moe-lora")
    return gate
