"""UR4Rec's retriever: learned proxies gather from a user's texts what matters for candidates."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from .layers import Attend, FeedForward


@dataclass
class PreferenceSettings:
    """Whose texts the proxies read, and the network that does it."""

    descriptions: Path | None = None
    """Folder that launch/describe.py has written; texts by its default templates when not given."""
    encoder: str = "minilm"
    """Text encoder: minilm, a hub id or a folder."""
    encoder_layers: int = 0
    """Last layers of the encoder that learn, at a rate of their own with --train.lr_multipliers '{"encoder": 0.1}'. 0
    leaves the encoder as it is: then each distinct text is encoded once, and its vector kept in the cache."""
    num_proxies: int = 8
    """Learned vectors that read the texts (published: 8 with a history of 10, 16 with 150)."""
    hidden_size: int = 128
    """Width of the network."""
    num_blocks: int = 2
    """Blocks of self-attention, attention to the texts, and a feed-forward layer."""
    num_heads: int = 4
    """Attention heads; they divide the width."""
    dropout: float = 0.1
    """Dropout behind each layer."""
    candidates_at_once: bool = True
    """One pass for all candidates, each of which sees itself and the proxies; false: a pass for each with proxies of
    its own, whose mean it is given, as the paper's formulas have it."""
    proxies_see_items: bool = True
    """In the one pass, proxies also look at the candidates, as published; false keeps candidates from each other."""

    def __post_init__(self) -> None:
        if self.encoder_layers < 0:
            raise ValueError(f"--method.preferences.encoder_layers {self.encoder_layers}: expected at least 0")
        for name in ("num_proxies", "num_blocks", "num_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"--method.preferences.{name} {getattr(self, name)}: expected at least 1")
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"--method.preferences.num_heads {self.num_heads} must divide --method.preferences.hidden_size "
                f"{self.hidden_size}"
            )


class Block(nn.Module):
    """Self-attention, attention to the texts where there are any, feed-forward."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.self_attention = Attend(width, heads, dropout)
        self.text_attention = Attend(width, heads, dropout)
        self.feed_forward = FeedForward(width, dropout)

    def forward(self, x_BQD: Tensor, allowed_QQ: Tensor, texts_BSD: Tensor | None, real_BS: Tensor | None) -> Tensor:
        x_BQD = self.self_attention(x_BQD, allowed=allowed_QQ)
        if texts_BSD is not None and real_BS is not None:
            x_BQD = self.text_attention(x_BQD, texts_BSD, real_BS[:, None, None])
        return self.feed_forward(x_BQD)


class PreferenceRetriever(nn.Module):
    """R(.): proxies and item vectors through blocks that look at the text vectors of a user."""

    def __init__(self, settings: PreferenceSettings, item_width: int, text_width: int) -> None:
        super().__init__()
        self.settings, width = settings, settings.hidden_size
        self.proxies = nn.Parameter(torch.randn(settings.num_proxies, width))
        self.item_in = nn.Linear(item_width, width)
        self.text_in = nn.Linear(text_width, width)
        self.kinds = nn.Parameter(torch.randn(2, width) * 0.02)  # of a user's text, of an item's
        self.blocks = nn.ModuleList(
            Block(width, settings.num_heads, settings.dropout) for _ in range(settings.num_blocks)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, items_BCH: Tensor | None, texts_BST: Tensor | None, real_BS: Tensor | None) -> Tensor:
        """Return what a pass makes of its tokens, in float32.

        Texts alone: R(P, Z) [B, K, D]. Items alone: R(h) of each [B, C, D], without attention to texts. Both: a vector
        for each candidate that knows the texts, [B, C, D]. `real_BS` marks the texts that are there.
        """
        if items_BCH is None or texts_BST is None or self.settings.candidates_at_once:
            states_BQD = self._run(items_BCH, texts_BST, real_BS)
            both = items_BCH is not None and texts_BST is not None
            return states_BQD[:, len(self.proxies) :] if both else states_BQD
        count = items_BCH.shape[1]
        assert real_BS is not None
        each = (items_BCH.flatten(0, 1)[:, None], *(x.repeat_interleave(count, 0) for x in (texts_BST, real_BS)))
        return self._run(*each)[:, : len(self.proxies)].mean(1).unflatten(0, (-1, count))

    def _run(self, items_BCH: Tensor | None, texts_BST: Tensor | None, real_BS: Tensor | None) -> Tensor:
        tokens, texts_BSD = [], None
        if texts_BST is not None:
            tokens.append(self.proxies.expand(len(texts_BST), -1, -1))
            kinds_SD = torch.cat([self.kinds[:1], self.kinds[1:].expand(texts_BST.shape[1] - 1, -1)])
            texts_BSD = self.text_in(texts_BST.float()) + kinds_SD
        if items_BCH is not None:
            tokens.append(self.item_in(items_BCH))
        x_BQD = torch.cat(tokens, dim=1)
        num_items = 0 if items_BCH is None else items_BCH.shape[1]
        allowed_QQ = seen_by(x_BQD.shape[1] - num_items, num_items, self.settings.proxies_see_items, x_BQD.device)
        for block in self.blocks:
            x_BQD = block(x_BQD, allowed_QQ, texts_BSD, real_BS)
        return self.norm(x_BQD).float()


def seen_by(num_proxies: int, num_items: int, proxies_see_items: bool, device: torch.device | None = None) -> Tensor:
    """Who looks at whom, bool [Q, Q]: all at the proxies, an item also at itself, proxies also at items or not."""
    allowed = torch.eye(num_proxies + num_items, dtype=torch.bool, device=device)
    allowed[:, :num_proxies] = True
    allowed[:num_proxies, num_proxies:] = proxies_see_items
    return allowed
