"""What a recommender is."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import Tensor, nn

from data.batches import Batch


class Loss(NamedTuple):
    """A sum and the number of labels that it runs over; the training loop divides by the global step's count.

    A tuple, since ZeRO-3 and DDP look for the tensors of an output inside tuples.
    """

    total: Tensor  # float32 scalar
    count: int  # type: ignore[assignment]  # hides the one of tuples
    parts: Mapping[str, Tensor] = MappingProxyType({})  # detached sums of named terms: logged as loss/<name>


class Recommender(nn.Module):
    """A model that learns from batches with labels and scores the whole catalogue for batches without.

    Both go through `forward`, because that is where DistributedDataParallel and ZeRO hook in.
    """

    saved_buffers: tuple[str, ...] = ()  # buffers that training finds out: they belong to the weights

    def forward(self, batch: Batch, method: str | None = None) -> Any:
        """Return a `Loss` for a batch with labels, scores [B, N + 1] float32 for an evaluation batch.

        `method` names another method to call with the batch.
        """
        return getattr(self, method or ("loss" if batch.row is None else "scores"))(batch)

    @abstractmethod
    def loss(self, batch: Batch) -> Loss:
        """Return the summed loss over the labels of `batch`."""

    @abstractmethod
    def scores(self, batch: Batch) -> Tensor:
        """Return [B, N + 1] float32 scores of every catalogue item, column 0 (padding) at -inf."""

    def catalogue_vectors(self) -> Tensor | None:
        """Return what the model knows each item by, [N + 1, D], row 0 for padding; None where that is no vector."""
        return None

    def judged(self, batch: Any) -> tuple[Tensor, Sequence[str]]:
        """Return [B, C] float32 scores of `batch.candidates`, as listed, and whether each answer could be read."""
        return self.scores(batch).gather(1, batch.candidates), ["ok"] * len(batch.candidates)


class Stage(Recommender):
    """A model that prepares a backbone for a later run: it has a loss, and ranks nothing (see `Built.held_out`)."""

    def scores(self, batch: Batch) -> Tensor:
        """Raise TypeError: whoever ranks has been refused before."""
        raise TypeError(f"{type(self).__name__} is a stage, which ranks nothing")
