"""The loss of a stage that ranks nothing, on examples that it is not trained on."""

from collections.abc import Iterable

import torch
from accelerate.utils import set_seed
from torch import nn

from data.batches import Batch
from models.devices import gather_object

LOSS = "loss"  # the validation metric of such a stage: lower is better


def held_out_loss(model: nn.Module, batches: Iterable[Batch], seed: int) -> dict[str, float]:
    """Return the loss and its parts, each a mean over the labels of all processes: call it on every process.

    `model` gives a `models.base.Loss` for a batch; `seed` decides what a model draws even here, such as dropout.
    Raises ValueError where no example has a label.
    """
    was_training = model.training
    model.eval()
    set_seed(seed)
    sums: dict[str, float] = {"labels": 0}
    with torch.no_grad():
        for batch in batches:
            loss = model(batch)
            sums["labels"] += loss.count
            for name, value in {LOSS: loss.total, **loss.parts}.items():
                sums[name] = sums.get(name, 0.0) + float(value)
    model.train(was_training)
    shares: list[dict[str, float]] = gather_object([sums])
    totals = {name: sum(share[name] for share in shares) for name in sums}
    labels = totals.pop("labels")
    if not labels:
        raise ValueError("the examples that are held out have no label, so there is no loss to select by")
    return {name: total / labels for name, total in totals.items()}
