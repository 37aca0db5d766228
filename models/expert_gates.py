"""Gates of MoE-LoRA: a user's state -> how much of each expert (iLoRA, arXiv 2408.10159)."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .dropout import Dropout

CHANNELS = (16, 32, 64)  # of the three stages of the published residual network
BLOCKS = 3  # in each of them


@dataclass
class GateConfig:
    """How a user's state becomes a gate."""

    kind: Literal["linear", "resnet", "mlp"] = "linear"
    """linear: one layer and a softmax, as the paper says. resnet: the published code's residual network over the state
    as a signal; its batch norm sees the micro-batch in training. mlp: two layers with a GELU between them."""
    hidden_size: int = 64
    """Inner width of mlp."""
    top_k: int | None = None
    """Experts that a user keeps, the others get 0 and these are normalised again; all by default."""
    noise: float = 0.0
    """Standard deviation of Gaussian noise on the logits in training, so that all experts are tried."""
    dropout: float = 0.0
    """Dropout on the user's state."""
    per_layer: bool = False
    """Give every adapted layer a gate of its own instead of sharing one."""


class ExpertGate(nn.Module):
    """A user's state [B, S] -> gate [B, K], or [layers, B, K] if `per_layer`; rows are not negative and sum to one."""

    def __init__(self, config: GateConfig, state_size: int, num_experts: int, num_layers: int) -> None:
        super().__init__()
        if config.top_k is not None and not 1 <= config.top_k <= num_experts:
            raise ValueError(f"--method.gate.top_k {config.top_k}: expected 1 to --backbone.lora_experts {num_experts}")
        self.config, self.num_experts = config, num_experts
        num_logits = num_experts * (num_layers if config.per_layer else 1)
        self.dropout = Dropout(config.dropout)
        self.router: nn.Module = nn.Linear(state_size, num_logits)
        if config.kind == "resnet":
            self.router = ResNet1d(num_logits)
        elif config.kind == "mlp":
            inner = nn.Linear(state_size, config.hidden_size)
            self.router = nn.Sequential(inner, nn.GELU(), nn.Linear(config.hidden_size, num_logits))

    def forward(self, state_BS: Tensor) -> Tensor:
        # A gate is a few numbers a user: they are worth the full precision of the weights.
        with torch.autocast(state_BS.device.type, enabled=False):
            state = self.dropout(state_BS.to(next(self.parameters()).dtype))
            logits = self.router(state).unflatten(1, (-1, self.num_experts)).transpose(0, 1)  # [layers, B, K]
            if self.training and self.config.noise:
                logits = logits + self.config.noise * torch.randn_like(logits)
            if self.config.top_k is not None:
                kept = logits.topk(self.config.top_k, dim=-1)
                logits = torch.full_like(logits, -torch.inf).scatter(-1, kept.indices, kept.values)
            gate = logits.softmax(dim=-1)
        return gate if self.config.per_layer else gate[0]

    @property
    def saved_buffers(self) -> tuple[str, ...]:
        """Buffers that training finds out, for `Recommender.saved_buffers`: batch norm's running statistics."""
        return tuple(name for name, _ in self.named_buffers() if not name.endswith("num_batches_tracked"))


class ResNet1d(nn.Module):
    """The published router: a state of any length S as a signal of one channel -> logits, [B, S] -> [B, num_logits]."""

    def __init__(self, num_logits: int) -> None:
        super().__init__()
        self.conv1 = _conv(1, CHANNELS[0])
        self.bn1 = nn.BatchNorm1d(CHANNELS[0])
        self.layer1 = _stage(CHANNELS[0], CHANNELS[0])
        self.layer2 = _stage(CHANNELS[0], CHANNELS[1])
        self.layer3 = _stage(CHANNELS[1], CHANNELS[2])
        self.fc = nn.Linear(CHANNELS[2], num_logits)

    def forward(self, signal_BS: Tensor) -> Tensor:
        return self.fc(self.features(signal_BS))

    def features(self, signal_BS: Tensor) -> Tensor:
        """Return the mean over positions of what the last stage sees, [B, 64]."""
        x = F.relu(self.bn1(self.conv1(signal_BS[:, None])))
        return self.layer3(self.layer2(self.layer1(x))).mean(dim=2)


class ResidualBlock(nn.Module):
    """Two convolutions and a shortcut without weights; [B, C, S] -> [B, C', S], or every second position if C' > C."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.stride, self.missing = (1 if channels_in == channels_out else 2), channels_out - channels_in
        self.conv1, self.bn1 = _conv(channels_in, channels_out, self.stride), nn.BatchNorm1d(channels_out)
        self.conv2, self.bn2 = _conv(channels_out, channels_out), nn.BatchNorm1d(channels_out)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        # What is missing are channels of zeros, half of them in front.
        before = self.missing // 2
        return F.relu(inner + F.pad(x[..., :: self.stride], (0, 0, before, self.missing - before)))


def _stage(channels_in: int, channels_out: int) -> nn.Sequential:
    first = ResidualBlock(channels_in, channels_out)
    return nn.Sequential(first, *(ResidualBlock(channels_out, channels_out) for _ in range(BLOCKS - 1)))


def _conv(channels_in: int, channels_out: int, stride: int = 1) -> nn.Conv1d:
    return nn.Conv1d(channels_in, channels_out, kernel_size=3, stride=stride, padding=1, bias=False)


def gate_parts(gate: Tensor, count: int) -> dict[str, Tensor]:
    """The mean entropy (in nats) and the mean use of each expert over a batch's gates, for `Loss.parts`.

    As sums over the batch's `count` labels, which is what the log divides by; detached.
    """
    gate = gate.detach().flatten(0, -2)
    uses = {f"expert_{expert}_use": use * count for expert, use in enumerate(gate.mean(dim=0))}
    return {"gate_entropy": torch.special.entr(gate).sum(dim=-1).mean() * count, **uses}
