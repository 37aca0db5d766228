"""GRU4Rec: gated recurrent units over item ids (Hidasi et al., arXiv 1511.06939), trained at every position."""

from dataclasses import dataclass

from torch import Tensor, nn

from data.batches import SequenceBatch

from .dropout import dropout
from .sequence_recommender import SequenceConfig, SequenceRecommender


@dataclass
class GRU4RecConfig(SequenceConfig):
    """GRU4Rec's shape and loss."""

    num_layers: int = 1
    """Recurrent layers."""
    recurrent_size: int | None = None
    """Width of the recurrent layers; the same as hidden_size when not given."""


class GRU4Rec(SequenceRecommender):
    """Recurrent layers over item embeddings, and a linear map back to the embeddings' width."""

    config: GRU4RecConfig

    def __init__(self, config: GRU4RecConfig, num_items: int) -> None:
        super().__init__(config, num_items)
        hidden, recurrent = config.hidden_size, config.recurrent_size or config.hidden_size
        # One module a layer: cuDNN would draw the dropout between layers of one module from a state of its own, which
        # does not follow the seed of a step.
        self.layers = nn.ModuleList(
            nn.GRU(recurrent if layer else hidden, recurrent, batch_first=True) for layer in range(config.num_layers)
        )
        self.outer = nn.Linear(recurrent, hidden)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the embeddings from N(0, initializer_range); the other weights are as torch draws them."""
        for embedding in (self.item_embedding, self.output_embedding):
            if embedding is not None:
                nn.init.normal_(embedding.weight, std=self.config.initializer_range)
                nn.init.zeros_(embedding.weight[0].detach())

    def states(self, batch: SequenceBatch) -> Tensor:
        """Return the state after every event, [B, L, H]."""
        x = self.item_embedding(batch.items)
        for layer in self.layers:
            x, _ = layer(dropout(x, self.config.dropout, self.training))
        return self.outer(x)
