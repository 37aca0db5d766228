"""Pooling and contrastive losses against Contriever and LLM2Vec: values and gradients."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import LlamaConfig, LlamaModel

from data.texts import TextBatch
from models.contrastive import info_nce
from models.pooling import Pooling, pool
from models.text_encoder import TextEncoder
from tests.parity.tolerance import assert_near

PRECISIONS = [(torch.float64, "64", 1e-9), (torch.float32, "", 1e-5)]
LLM2VEC_NAMES: dict[Pooling, str] = {"mean": "mean", "weighted-mean": "weighted_mean", "last": "last_token"}


def test_contriever_pooling(golden) -> None:
    _, tensors = golden("contriever_loss")
    states, mask = tensors["pool.in.hidden"], tensors["pool.in.mask"]
    assert (mask == 0).any()
    names: dict[Pooling, str] = {"mean": "average", "cls": "cls"}
    for pooling, name in names.items():
        pooled = pool(states, mask, pooling)
        assert_near(pooled, tensors[f"pool.out.{name}"], 1e-6, name)
        assert_near(normalize(pooled, dim=1), tensors[f"pool.out.{name}_normalized"], 1e-6, name)


@pytest.mark.parametrize("pooling", LLM2VEC_NAMES)
def test_llm2vec_pooling(golden, pooling: Pooling) -> None:
    _, tensors = golden("llm2vec")
    for folder, mask in (("pool", "in.attention_mask"), ("pool_skip_instruction", "in.embed_mask")):
        name = f"out.{folder}.{LLM2VEC_NAMES[pooling]}"
        if name in tensors:  # the last token without its instruction goes by its other name there
            assert_near(pool(tensors["out.hidden"], tensors[mask], pooling), tensors[name], 1e-6, name)
    bos = pool(tensors["out.hidden"], tensors["in.attention_mask"], "cls")
    assert_near(bos, tensors["out.pool.bos_token"], 1e-6)


def test_llm2vec_encoder_with_padding_on_the_other_side(golden) -> None:
    """The same texts padded on the right, with an instruction that is read but not pooled."""
    meta, tensors = golden("llm2vec")
    model = LlamaModel(
        LlamaConfig(
            vocab_size=meta["vocab"],
            hidden_size=meta["hidden"],
            intermediate_size=meta["intermediate"],
            num_hidden_layers=meta["layers"],
            num_attention_heads=meta["heads"],
            num_key_value_heads=meta["kv_heads"],
            rms_norm_eps=meta["rms_norm_eps"],
            rope_parameters={"rope_type": "default", "rope_theta": meta["rope_theta"]},
            is_causal=False,
        )
    )
    model.load_state_dict({n.removeprefix("llama."): t for n, t in tensors.items() if n.startswith("llama.")})
    for row, (length, own) in enumerate(zip(meta["lengths"], meta["text_lengths"], strict=True)):
        ids = tensors["in.input_ids"][row, -length:].numpy()
        texts = TextBatch.of([ids, tensors["in.input_ids"][0].numpy()], skipped=length - own)  # beside a longer one
        for pooling, name in LLM2VEC_NAMES.items():
            vector = TextEncoder(model.eval(), pooling)(texts)[0]
            stored = tensors.get(f"out.pool_skip_instruction.{name}", tensors[f"out.pool.{name}"])
            assert_near(vector, stored[row], 2e-5, f"{pooling} of text {row}")


@pytest.mark.parametrize(("dtype", "kind", "tolerance"), PRECISIONS)
def test_contriever_loss(golden, dtype: torch.dtype, kind: str, tolerance: float) -> None:
    meta, tensors = golden("contriever_loss")
    for name, setting in meta["inbatch"]["settings"].items():
        q, k = (tensors[f"inbatch.in.{side}"].to(dtype, copy=True).requires_grad_() for side in "qk")
        loss = mean_loss(q, k, 1 / setting["temperature"], setting["norm"], setting["ls"])
        loss.backward()
        assert_near(loss, tensors[f"inbatch.out{kind}.{name}.loss"], tolerance, name)
        assert_near(q.grad, tensors[f"inbatch.grad{kind}.{name}.q"], tolerance, name)
        assert_near(k.grad, tensors[f"inbatch.grad{kind}.{name}.k"], tolerance, name)


@pytest.mark.parametrize(("dtype", "kind", "tolerance"), PRECISIONS)
@pytest.mark.parametrize("hard", [True, False])
def test_llm2vec_loss(golden, hard: bool, dtype: torch.dtype, kind: str, tolerance: float) -> None:
    meta, tensors = golden("llm2vec")
    leaves = {side: tensors[f"loss.in.{side}"].to(dtype, copy=True).requires_grad_() for side in ("q", "pos", "neg")}
    candidates = torch.cat([leaves["pos"], leaves["neg"]]) if hard else leaves["pos"]
    loss = mean_loss(leaves["q"], candidates, meta["loss"]["scale"], True)
    loss.backward()
    name = "hard" if hard else "nohard"
    assert_near(loss, tensors[f"loss.out{kind}.{name}"], tolerance)
    for side in ("q", "pos", "neg") if hard else ("q", "pos"):
        assert_near(leaves[side].grad, tensors[f"loss.grad{kind}.{name}.{side}"], tolerance, side)


def mean_loss(q: Tensor, k: Tensor, scale: float, norm: bool, label_smoothing: float = 0.0) -> Tensor:
    if norm:
        q, k = normalize(q, dim=1), normalize(k, dim=1)
    return info_nce(q @ k.T * scale, torch.arange(len(q)), label_smoothing=label_smoothing) / len(q)
