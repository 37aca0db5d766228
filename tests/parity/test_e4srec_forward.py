"""E4SRec against HestiaSky/E4SRec: logits, loss and gradients, with and without adapter, as coded and as intended."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from data.item_prompts import INSTRUCTION, RESPONSE, ItemPromptBatch, ItemPromptLayout, ItemPromptSettings
from models.e4srec import E4SRec, E4SRecConfig, OutputConfig
from models.item_embeddings import ItemTable, ItemTableConfig
from tests.parity.tolerance import assert_near
from tests.toys import golden_llama

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def published(meta: dict, tensors: dict[str, Tensor], run: str) -> E4SRec:
    """Our model with their weights, in float64; the adapter of run `base` is zero."""
    llama = golden_llama(meta, tensors)
    targets = list(meta["lora_targets"])
    lora = LoraConfig(
        task_type="FEATURE_EXTRACTION", r=meta["lora_r"], lora_alpha=meta["lora_alpha"], target_modules=targets
    )
    backbone = get_peft_model(llama, lora)
    for name, parameter in backbone.named_parameters():
        if "lora_" in name and run == "lora":
            _, _, layer, _, projection, matrix, *_ = name.removeprefix("base_model.").split(".")
            stored = tensors[f"lora.layers.{layer}.mlp.{projection}.{matrix[-1]}"]
            parameter.data.copy_(stored)
    settings = ItemPromptSettings(mode="prefix", published_padding=True)
    output = OutputConfig(tied=False, projector="none", scale="none")
    config = E4SRecConfig(prompts=settings, output=output)
    table = ItemTableConfig(projector="linear", train_table=False, scale="none")
    table_in = ItemTable(tensors["w.item_table"], table, meta["hidden"], 1, "input")
    table_in.projector.load_state_dict({k: tensors[f"w.input_proj.{k}"] for k in ("weight", "bias")})
    model = E4SRec(
        config, backbone, table_in, ItemTable(tensors["w.score.weight"], output, meta["hidden"], 1, "output")
    )
    return model.double().eval()


def histories(tensors: dict[str, Tensor]) -> list[np.ndarray]:
    return [items[mask > 0].numpy() for items, mask in zip(tensors["in.items"], tensors["in.items_mask"], strict=True)]


def prompt_batch(tensors: dict[str, Tensor], *, as_coded: bool) -> ItemPromptBatch:
    before, after = (tensors[f"in.prompt_ids_{i}"].numpy() for i in (1, 2))
    layout = ItemPromptLayout(
        before, after, False, None, shares_prefix=not as_coded, causal=not as_coded, published_padding=as_coded
    )
    batch, _, row_ends = layout.batch(histories(tensors))
    return ItemPromptBatch(
        **vars(batch)
        | {"labelled": torch.from_numpy(row_ends), "targets": tensors["in.labels"].flatten(), "count": len(row_ends)}
    )


def logits(model: E4SRec, batch: ItemPromptBatch) -> Tensor:
    query, table = model.output.operands(model.read(batch), slice(None))
    return query @ table.T


@pytest.mark.parametrize("run", ["base", "lora"])
def test_as_coded_the_padded_batch_gives_the_published_logits_loss_and_gradients(golden, run):
    meta, tensors = golden("e4srec_forward")
    model, batch = published(meta, tensors, run), prompt_batch(tensors, as_coded=True)
    assert_near(logits(model, batch), tensors[f"out.{run}.logits"], 1e-5)
    loss = model.loss(batch)
    mean = loss.total / loss.count
    assert_near(mean, tensors[f"out.{run}.loss"], 1e-5)
    mean.backward()
    for ours, theirs in (
        ("input.projector.weight", "input_proj.weight"),
        ("input.projector.bias", "input_proj.bias"),
        ("output.table.learned.weight", "score.weight"),
    ):
        assert_near(model.get_parameter(ours).grad, tensors[f"grad.{run}.{theirs}"], 1e-5)
    compared = 0
    for name, tensor in tensors.items():
        if run == "lora" and name.startswith("grad.lora.lora.layers."):
            *_, layer, _, projection, matrix = name.split(".")
            ours = f"backbone.base_model.model.layers.{layer}.mlp.{projection}.lora_{matrix}.default.weight"
            assert_near(model.get_parameter(ours).grad, tensor, 1e-5)
            compared += 1
    assert compared == (meta["layers"] * len(PROJECTIONS) * 2 if run == "lora" else 0)


@pytest.mark.parametrize("run", ["base", "lora"])
def test_as_intended_a_padded_batch_gives_what_each_history_gives_alone(golden, run):
    meta, tensors = golden("e4srec_forward")
    model, batch = published(meta, tensors, run), prompt_batch(tensors, as_coded=False)
    assert batch.prefix_ids is not None
    assert_near(logits(model, batch), tensors[f"out.{run}.logits_single"], 1e-5)


def test_the_default_texts_are_the_published_ones(golden):
    meta, _ = golden("e4srec_forward")
    assert (meta["prompt_text_1"], meta["prompt_text_2"]) == (INSTRUCTION, RESPONSE)
