"""The SASRec that E4SRec ships, whose pads stand on the left and are attended to: states, ratings, loss, gradients."""

import pytest
import torch
from torch import Tensor

from data.batches import SequenceBatch
from models.losses import binary_cross_entropy
from models.sasrec import SASRec, SASRecConfig
from tests.parity.tolerance import assert_near

TYPES = [pytest.param(torch.float64, "64", 1e-9, id="float64"), pytest.param(torch.float32, "", 1e-5, id="float32")]


def published_names(model: SASRec) -> dict[str, str]:
    """Our parameter names -> theirs, but for the tables."""
    layers = {"final_norm": "last_layernorm"}
    names = {}
    for k in range(len(model.blocks)):
        layers |= {
            f"blocks.{k}.attention_norm": f"attention_layernorms.{k}",
            f"blocks.{k}.attention_out": f"attention_layers.{k}.out_proj",
            f"blocks.{k}.feed_forward_norm": f"forward_layernorms.{k}",
            f"blocks.{k}.inner": f"forward_layers.{k}.0",
            f"blocks.{k}.outer": f"forward_layers.{k}.3",
        }
        for kind in ("weight", "bias"):
            names[f"blocks.{k}.query_key_value.{kind}"] = f"attention_layers.{k}.in_proj_{kind}"
    return names | {f"{ours}.{k}": f"{theirs}.{k}" for ours, theirs in layers.items() for k in ("weight", "bias")}


@pytest.fixture
def published(golden):
    """(our model with their weights, their tensors)."""
    meta, tensors = golden("sasrec_e4srec")
    config = SASRecConfig(
        hidden_size=meta["hidden"], num_blocks=meta["blocks"], window=meta["maxlen"], norm="original", pads="left"
    )
    model = SASRec(config, meta["n_items"])
    names = published_names(model)
    tables = {"embedding.weight", "pos_embedding.weight"}
    assert {f"w.{name}" for name in {*names.values(), *tables}} == {name for name in tensors if name.startswith("w.")}
    with torch.no_grad():
        for ours, theirs in names.items():
            model.get_parameter(ours).copy_(tensors[f"w.{theirs}"].view_as(model.get_parameter(ours)))
        model.item_embedding.weight.copy_(tensors["w.embedding.weight"])
        model.position_embedding.weight[1:] = tensors["w.pos_embedding.weight"]  # our row 0 belongs to pads
    return model.eval(), tensors


def states_at_all_slots(model: SASRec, items_BL: Tensor) -> Tensor:
    return model.encode(items_BL, torch.arange(1, items_BL.shape[1] + 1).expand_as(items_BL))


def on_the_right(items_BL: Tensor) -> SequenceBatch:
    """The same histories as our batches hold them."""
    lengths = (items_BL > 0).sum(1)
    moved = torch.tensor([row[row > 0].tolist() + [0] * int((row == 0).sum()) for row in items_BL])
    return SequenceBatch(moved[:, : lengths.max()], lengths)  # a batch may be narrower than the window


@pytest.mark.parametrize(("dtype", "suffix", "tolerance"), TYPES)
def test_states_and_ratings(published, dtype: torch.dtype, suffix: str, tolerance: float) -> None:
    model, tensors = published
    model, items = model.to(dtype), tensors["in.seq"]
    assert (items == 0).any(), "states at padding slots are part of the comparison"
    states = states_at_all_slots(model, items)
    assert_near(states, tensors[f"out{suffix}.feats"], tolerance, "feats")
    ratings = torch.sigmoid(states[:, -1] @ model.item_table.T)
    assert_near(ratings, tensors[f"out{suffix}.ratings"], tolerance, "ratings")


@pytest.mark.parametrize(("dtype", "suffix", "tolerance"), TYPES)
def test_our_batches_give_the_same_states_and_scores(published, dtype, suffix: str, tolerance: float) -> None:
    model, tensors = published
    model, items = model.to(dtype), tensors["in.seq"]
    for kept in (slice(None), slice(1, 3)):
        batch = on_the_right(items[kept])
        states, stored = model.states(batch), tensors[f"out{suffix}.feats"][kept]
        for ours, theirs, length in zip(states, stored, batch.lengths, strict=True):
            assert_near(ours[:length], theirs[-length:], tolerance)
        assert_near(torch.sigmoid(model.scores(batch)[:, 1:]), tensors[f"out{suffix}.ratings"][kept, 1:], 1e-5)


@pytest.mark.parametrize(("dtype", "suffix", "tolerance"), TYPES)
def test_loss_and_gradients(published, dtype: torch.dtype, suffix: str, tolerance: float) -> None:
    model, tensors = published
    model = model.to(dtype)
    states = states_at_all_slots(model, tensors["in.seq"])
    logits = [(states * model.item_embedding(tensors[f"in.{kind}"])).sum(-1) for kind in ("pos", "neg")]
    for ours, name in zip(logits, ("pos_logits", "neg_logits"), strict=True):
        assert_near(ours, tensors[f"out{suffix}.{name}"], tolerance, name)
    real = tensors["in.pos"] != 0
    positive, negative = (values[real] for values in logits)
    # Theirs is a mean of positives plus a mean of negatives; ours a sum over both, divided by their number, K + 1 = 2.
    loss = binary_cross_entropy(positive, negative[:, None]) * 2 / real.sum()
    assert_near(loss, tensors[f"out{suffix}.loss"], tolerance, "loss")
    loss.backward()
    for ours, theirs in published_names(model).items():
        stored = tensors[f"grad{suffix}.{theirs}"]
        assert_near(model.get_parameter(ours).grad.reshape(stored.shape), stored, tolerance, theirs)
    tables = (
        (model.item_embedding.weight.grad, "embedding"),
        (model.position_embedding.weight.grad[1:], "pos_embedding"),
    )
    for gradient, name in tables:
        assert_near(gradient, tensors[f"grad{suffix}.{name}.weight"], tolerance, name)
