"""LRURec against the retriever of LlamaRec's code: scores of every position, ranks, loss and gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from data.batches import SequenceBatch, sequences_of
from models.lrurec import LRURec, LRURecConfig
from tests.parity.tolerance import assert_near

OURS = {  # of a block: our names and theirs
    "recurrence_norm": "lru_layer.layer_norm",
    "inner": "feed_forward.w_1",
    "outer": "feed_forward.w_2",
    "feed_forward_norm": "feed_forward.layer_norm",
}
TYPES = [pytest.param(torch.float64, 1e-9, id="float64"), pytest.param(torch.float32, 1e-5, id="float32")]


def our_weights(tensors: dict[str, Tensor], num_blocks: int) -> dict[str, Tensor]:
    """Their weights under our names; complex maps become real maps to and from (real, imaginary) pairs."""
    ours = {"item_embedding.weight": tensors["w.embedding.token.weight"], "item_bias": tensors["w.model.bias"]}
    ours |= {f"embedding_norm.{kind}": tensors[f"w.embedding.layer_norm.{kind}"] for kind in ("weight", "bias")}
    for k in range(num_blocks):
        block = f"w.model.lru_blocks.{k}"
        for our, their in OURS.items():
            ours |= {f"blocks.{k}.{our}.{kind}": tensors[f"{block}.{their}.{kind}"] for kind in ("weight", "bias")}
        unit, layer = f"blocks.{k}.recurrence", f"{block}.lru_layer"
        nu_theta_gamma = tensors[f"{layer}.params_log"]
        ours |= dict(zip([f"{unit}.log_{name}" for name in ("nu", "theta", "gamma")], nu_theta_gamma, strict=True))
        for kind in ("weight", "bias"):
            parts = [tensors[f"{layer}.in_proj.{kind}.{part}"] for part in ("real", "imag")]
            ours[f"{unit}.inputs.{kind}"] = torch.stack(parts, 1).flatten(0, 1)
        real, imaginary = (tensors[f"{layer}.out_proj.weight.{part}"] for part in ("real", "imag"))
        ours[f"{unit}.outputs.weight"] = torch.stack([real, -imaginary], 2).flatten(1)
        ours[f"{unit}.outputs.bias"] = tensors[f"{layer}.out_proj.bias.real"]  # the imaginary part is thrown away
    return ours


@pytest.fixture
def published(golden) -> tuple[LRURec, SequenceBatch, dict[str, Tensor]]:
    """(our model with their weights, their sequences padded on the right, their tensors)."""
    meta, tensors = golden("lrurec")
    sizes = meta["sizes"]
    model = LRURec(LRURecConfig(hidden_size=sizes["hidden"], num_blocks=sizes["blocks"]), sizes["num_items"])
    model.load_state_dict(our_weights(tensors, sizes["blocks"]))  # which names every parameter
    model.item_embedding.padding_idx = None  # theirs trains the row of padding, as a class of the softmax
    real = tensors["seq"] > 0
    batch = sequences_of(tensors["seq"][real].numpy(), real.sum(1).numpy())
    tensors["ce_loss"] = torch.tensor(meta["ce_loss"], dtype=torch.float64)
    return model.eval(), batch, tensors


def all_scores(model: LRURec, batch: SequenceBatch) -> Tensor:
    """Scores at every event, [events, N + 1]; the column of padding as the published code has it."""
    query, table = model.operands(model.states(batch))
    return (query @ table.T)[batch.items > 0]


@pytest.mark.parametrize(("dtype", "tolerance"), TYPES)
def test_scores_of_every_position(published, dtype: torch.dtype, tolerance: float) -> None:
    model, batch, tensors = published
    model = model.to(dtype)
    real = tensors["seq"] > 0
    assert not real.all(), "padding is part of the comparison"
    embedded = model.embedding_norm(model.item_embedding(batch.items))[batch.items > 0]
    assert_near(embedded, tensors["input_emb"][real], tolerance)
    assert_near(all_scores(model, batch), tensors["scores_all_positions"][real], tolerance)


def test_ranks_of_the_last_position(published) -> None:
    model, batch, tensors = published
    scores = model(SequenceBatch(batch.items, batch.lengths, row=torch.arange(len(batch.items))))
    assert scores[:, 0].isneginf().all()
    assert_near(scores[:, 1:], tensors["last_scores"][:, 1:], 1e-5)
    unseen = scores.scatter(1, batch.items, -1e9)
    assert_near(unseen[:, 1:], tensors["masked_scores"][:, 1:], 1e-5)
    assert torch.equal(unseen.topk(20).indices, tensors["top20"])


@pytest.mark.parametrize(("dtype", "tolerance"), TYPES)
def test_loss_and_gradients(published, dtype: torch.dtype, tolerance: float) -> None:
    """With the class of padding in the softmax, which ours leaves out."""
    model, batch, tensors = published
    model = model.to(dtype)
    real = tensors["seq"] > 0
    assert (tensors["labels"][real] > 0).all()
    loss = F.cross_entropy(all_scores(model, batch), tensors["labels"][real])
    assert_near(loss, tensors["ce_loss"], tolerance)
    loss.backward()
    unit = model.blocks[0].recurrence
    recurrence = [parameter.grad for parameter in (unit.log_nu, unit.log_theta, unit.log_gamma)]
    assert_near(torch.stack(recurrence), tensors["grad.params_log_block0"], tolerance)
    assert_near(model.item_embedding.weight.grad, tensors["grad.token"], tolerance)
    assert_near(model.item_bias.grad, tensors["grad.bias"], tolerance)
