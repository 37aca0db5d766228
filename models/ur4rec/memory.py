"""UR4Rec V2's memory: a vector for each user that outlives the steps of training.

It says for each user how many events it has read (`until`), and nobody reads it who asks for one of these. So it never
knows a target, in whatever order the cuts of a user are trained.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..contrastive import gather_rows
from .v2_config import MemoryConfig

NEVER = -1  # beside a number of events: nothing was written of this user
NO_USER = -1  # beside the number of a user: one that training does not have


class MemoryGate(nn.Module):
    """r <- a r + (1 - a) v with a = sigmoid(W [r; v])."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.of_answer, self.of_memory = nn.Linear(width, width), nn.Linear(width, width, bias=False)

    def forward(self, r_RnD: Tensor, memory_RnD: Tensor) -> Tensor:
        a = torch.sigmoid(self.of_answer(r_RnD) + self.of_memory(memory_RnD))
        return a * r_RnD + (1 - a) * memory_RnD


class Memory(nn.Module):
    """State [U, D], how much each user's has read, and when it was written; a GRU cell says what news makes of it."""

    state: Tensor  # [U, D] float32
    until: Tensor  # [U] int64: the state reads the user's events before this position
    written: Tensor  # [U] float32: epochs trained when it was written

    def __init__(self, config: MemoryConfig, num_users: int, width: int) -> None:
        super().__init__()
        self.config = config
        self.cell = nn.GRUCell(width, width)
        self.register_buffer("state", torch.zeros(num_users, width))
        self.register_buffer("until", torch.full((num_users,), NEVER))
        self.register_buffer("written", torch.zeros(num_users))

    def read(self, users_R: Tensor, cuts_R: Tensor) -> Tensor:
        """Return what is remembered of the events before each cut, [R, D]: zeros where it has read beyond."""
        return self.state[users_R.clamp(min=0)] * self.fits(users_R, cuts_R)[:, None]

    def fits(self, users_R: Tensor, cuts_R: Tensor) -> Tensor:
        """Return [R] bool: whether something is remembered, and nothing at or behind the cut."""
        until = self.until[users_R.clamp(min=0)]
        return (users_R != NO_USER) & (until != NEVER) & (until <= cuts_R)

    def advance(self, memory_RD: Tensor, news_RD: Tensor) -> Tensor:
        """Return what a write would make of the memory: v <- decay v + (1 - decay) GRU(news, v)."""
        with torch.autocast(memory_RD.device.type, enabled=False):
            answer = self.cell(news_RD.float(), memory_RD)
        return self.config.decay * memory_RD + (1 - self.config.decay) * answer

    def fires(self, users_R: Tensor, cuts_R: Tensor, news_RD: Tensor, progress: float) -> Tensor:
        """Return [R] bool: whether any trigger asks for a write. A memory that does not fit is begun anew."""
        users = users_R.clamp(min=0)
        begins = ~self.fits(users_R, cuts_R)
        new_events = (cuts_R - self.until[users].clamp(min=0)).where(~begins, cuts_R)
        asked = torch.zeros_like(begins)
        for trigger in self.config.triggers:
            if trigger == "count":
                asked |= new_events >= self.config.every
            elif trigger == "drift":
                cosine = F.cosine_similarity(self.state[users], news_RD.float(), dim=1)
                asked |= begins | (cosine < 1 - self.config.drift)
            elif trigger == "time":
                asked |= begins | (progress - self.written[users] >= self.config.epochs)
        return asked & (new_events > 0) & (users_R != NO_USER)

    @torch.no_grad()
    def write(self, users_R: Tensor, cuts_R: Tensor, memory_RD: Tensor, chosen_R: Tensor, progress: float) -> None:
        """Write the chosen rows of all processes, alike on all of them. Collective; a user is chosen at most once."""
        kept = chosen_R.nonzero()[:, 0]
        users = gather_rows(users_R[kept]).rows
        self.state[users] = gather_rows(memory_RD.detach().float()[kept]).rows
        self.until[users] = gather_rows(cuts_R[kept]).rows
        self.written[users] = progress
