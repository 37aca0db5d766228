"""The two residual layers that UR4Rec's networks are made of; norms stand in front of them."""

from torch import Tensor, nn
from torch.nn import functional as F

from ..attention import attention
from ..dropout import dropout


class Attend(nn.Module):
    """x + attention of x to a context (itself, where there is no other)."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm = nn.LayerNorm(width)
        self.query, self.key_value, self.out = (nn.Linear(width, n * width) for n in (1, 2, 1))

    def forward(self, x_BQD: Tensor, context_BSD: Tensor | None = None, allowed: Tensor | None = None) -> Tensor:
        """`allowed` is bool, [Q, S] or [B, 1, 1, S]: who may look at whom."""
        query = self.norm(x_BQD)
        context = query if context_BSD is None else self.norm(context_BSD)
        key, value = self.key_value(context).chunk(2, dim=-1)
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.query(query), key, value)
        )
        mixed = attention(query, key, value, allowed)
        return x_BQD + dropout(self.out(mixed.transpose(1, 2).flatten(2)), self.dropout, self.training)


class FeedForward(nn.Module):
    """x + two linear layers."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm, self.dropout = nn.LayerNorm(width), dropout
        self.inner, self.outer = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        inner = dropout(F.gelu(self.inner(self.norm(x))), self.dropout, self.training)
        return x + dropout(self.outer(inner), self.dropout, self.training)
