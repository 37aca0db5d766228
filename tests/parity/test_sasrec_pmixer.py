"""SASRec, Pre-LN and Post-LN, against pmixer/SASRec.pytorch: every state, score, logit and gradient."""

import pytest
import torch
from torch import Tensor

from models.losses import binary_cross_entropy
from models.sasrec import SASRec, SASRecConfig

NORMS = ["post", "pre"]
# The same quantities were stored in both types; an error is relative to the largest entry of its tensor.
TYPES = [pytest.param(torch.float64, "64", 1e-9, id="float64"), pytest.param(torch.float32, "", 1e-5, id="float32")]


def published_names(model: SASRec) -> dict[str, str]:
    """Our parameter names -> theirs."""
    names = {"item_embedding.weight": "item_emb.weight", "position_embedding.weight": "pos_emb.weight"}
    layers = {"final_norm": "last_layernorm"}
    for k in range(len(model.blocks)):
        layers |= {
            f"blocks.{k}.attention_norm": f"attention_layernorms.{k}",
            f"blocks.{k}.attention_out": f"attention_layers.{k}.out_proj",
            f"blocks.{k}.feed_forward_norm": f"forward_layernorms.{k}",
            f"blocks.{k}.inner": f"forward_layers.{k}.conv1",
            f"blocks.{k}.outer": f"forward_layers.{k}.conv2",
        }
        for kind in ("weight", "bias"):
            names[f"blocks.{k}.query_key_value.{kind}"] = f"attention_layers.{k}.in_proj_{kind}"
    return names | {f"{ours}.{k}": f"{theirs}.{k}" for ours, theirs in layers.items() for k in ("weight", "bias")}


def assert_near(ours: Tensor | None, stored: Tensor, tolerance: float, name: str) -> None:
    assert ours is not None, name
    error = (ours.reshape(stored.shape) - stored).abs().max() / stored.abs().max()
    assert ours.dtype == stored.dtype
    assert error < tolerance, f"{name}: relative error {error}"


@pytest.fixture(params=NORMS)
def published(request, golden):
    """(norm, our model with their weights, their tensors)."""
    meta, tensors = golden("sasrec_pmixer")
    config = SASRecConfig(
        hidden_size=meta["hidden"], num_heads=meta["heads"], num_blocks=meta["blocks"], window=meta["maxlen"],
        norm=request.param,
    )  # fmt: skip
    model = SASRec(config, meta["n_items"])
    names = published_names(model)
    assert names.keys() == dict(model.named_parameters()).keys()
    assert {f"w.{name}" for name in names.values()} == {name for name in tensors if name.startswith("w.")}
    with torch.no_grad():
        for ours, theirs in names.items():
            model.get_parameter(ours).copy_(tensors[f"w.{theirs}"].view_as(model.get_parameter(ours)))
    return request.param, model.eval(), tensors


def states_at_all_slots(model: SASRec, items_BL: Tensor) -> Tensor:
    """Run the encoder on left-padded histories, whose slots are numbered from the window's start; pads have slot 0."""
    slots = torch.arange(1, items_BL.shape[1] + 1).where(items_BL > 0, 0)
    return model.encode(items_BL, slots)


def training_logits(model: SASRec, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    states = states_at_all_slots(model, tensors["in.seq"])
    positive, negative = (model.item_embedding(tensors[f"in.{kind}"]) for kind in ("pos", "neg"))
    return (states * positive).sum(-1), (states * negative).sum(-1)


@pytest.mark.parametrize(("dtype", "suffix", "tolerance"), TYPES)
def test_states_scores_and_logits(published, dtype: torch.dtype, suffix: str, tolerance: float) -> None:
    norm, model, tensors = published
    model = model.to(dtype)
    stored = {name: tensors[f"out{suffix}.{norm}.{name}"] for name in ("feats", "scores", "pos_logits", "neg_logits")}
    states = states_at_all_slots(model, tensors["in.seq"])
    assert (tensors["in.seq"] == 0).any(), "states at padding slots are part of the comparison"
    assert_near(states, stored["feats"], tolerance, "feats")
    assert_near(states[:, -1] @ model.item_embedding.weight[1:].T, stored["scores"], tolerance, "scores")
    for logits, name in zip(training_logits(model, tensors), ("pos_logits", "neg_logits"), strict=True):
        assert_near(logits, stored[name], tolerance, name)


@pytest.mark.parametrize(("dtype", "suffix", "tolerance"), TYPES)
def test_loss_and_gradients(published, dtype: torch.dtype, suffix: str, tolerance: float) -> None:
    norm, model, tensors = published
    model = model.to(dtype)
    real = tensors["in.pos"] != 0
    positive, negative = (logits[real] for logits in training_logits(model, tensors))
    # Theirs is a mean of positives plus a mean of negatives; ours a sum over both, divided by their number, K + 1 = 2.
    loss = binary_cross_entropy(positive, negative[:, None]) * 2 / real.sum()
    assert_near(loss, tensors[f"out{suffix}.{norm}.loss"], tolerance, "loss")
    loss.backward()
    for ours, theirs in published_names(model).items():
        assert_near(model.get_parameter(ours).grad, tensors[f"grad{suffix}.{norm}.{theirs}"], tolerance, theirs)
    for table in (model.item_embedding, model.position_embedding):
        assert table.weight.grad is not None
        assert not table.weight.grad[0].any(), "the padding row is not trained"
