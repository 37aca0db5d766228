"""Item vectors of a language model inside a student's own, against DLLM2Rec's students: inputs, scores, gradients.

The published GRU is ours without the last linear map; the published SASRec is the one that LLaRA ships. With two heads
it divides by another root than ours, so there only what is read is compared.
"""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from data.batches import SequenceBatch
from models.dllm2rec import DLLM2Rec, DLLM2RecConfig, VectorsConfig
from models.gru4rec import GRU4Rec, GRU4RecConfig
from models.sasrec_llara import PUBLISHED_NAMES, SASRecLLaRA
from models.sequence_recommender import SequenceRecommender

from .tolerance import assert_near

TOLERANCE = 1e-12
GRU_WEIGHTS = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")


class Published:
    """One of the three published students, with its items counted from 1 as ours are."""

    def __init__(self, golden, name: str) -> None:
        meta, tensors = golden("dllm2rec_losses")
        self.sizes, self.ed_weight = meta["sizes"], meta["hyper"]["ed_weight"]
        prefix = f"{name}."
        self.tensors = {k.removeprefix(prefix): t.double() for k, t in tensors.items() if k.startswith(prefix)}
        self.vectors = self.from_one(torch.cat([tensors["llm_table"], torch.zeros_like(tensors["llm_table"][:1])]))
        items, padding = tensors["seq"], self.sizes["items"]
        self.batch = SequenceBatch((items + 1) % (padding + 1), tensors["seq_len"], row=torch.arange(len(items)))
        self.probe = tensors["probe"]

    @staticmethod
    def from_one(table: Tensor) -> Tensor:
        """Put the padding row, which is their last, in front."""
        return table.double().roll(1, 0)

    def student(self) -> SequenceRecommender:
        sizes, published = self.sizes, self.tensors
        state = {"item_embedding.weight": self.from_one(published["item_embeddings.weight"])}
        if "weight_ih_l0" in published:
            config = GRU4RecConfig(hidden_size=sizes["hidden"], window=sizes["max_len"])
            model: SequenceRecommender = GRU4Rec(config, sizes["items"])
            state |= {f"layers.0.{name}": published[name] for name in GRU_WEIGHTS}
            state |= {"outer.weight": torch.eye(sizes["hidden"]), "outer.bias": torch.zeros(sizes["hidden"])}
        else:
            model = SASRecLLaRA(sizes["items"], sizes["hidden"], sizes["max_len"])
            state["position_embedding.weight"] = published["positional_embeddings.weight"]
            for ours, theirs in PUBLISHED_NAMES.items():
                weight = published[f"{theirs}.weight"]
                state[f"{ours}.weight"] = weight.squeeze(-1) if weight.ndim == 3 else weight
                state[f"{ours}.bias"] = published[f"{theirs}.bias"]
            state |= {f"item_scores.{kind}": model.state_dict()[f"item_scores.{kind}"] for kind in ("weight", "bias")}
        model.load_state_dict(state)
        return model.eval()

    def distilled(self) -> DLLM2Rec:
        student = self.student()
        config = DLLM2RecConfig(vectors=VectorsConfig(weight=self.ed_weight))
        model = DLLM2Rec(config, student, torch.ones(self.sizes["items"]), self.vectors)
        projector = model.student.item_embedding.parametrizations["weight"][0].projector  # type: ignore[index]
        projector.load_state_dict({kind: self.tensors[f"projector.{kind}"] for kind in ("weight", "bias")})
        return model.eval()

    def scores(self, student: SequenceRecommender) -> Tensor:
        """Scores by the published head, a free linear map of the state."""
        return student.user_states(self.batch) @ self.tensors["head.weight"].T + self.tensors["head.bias"]


@pytest.fixture(autouse=True)
def in_float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(params=["gru", "sasrec", "sasrec2h"])
def published(golden, request: pytest.FixtureRequest) -> Published:
    return Published(golden, request.param)


def test_what_a_student_reads(published: Published) -> None:
    read = published.distilled().student.item_embedding(published.batch.items)
    assert_near(read, published.tensors["out.input_emb"], TOLERANCE)


@pytest.mark.parametrize("name", ["gru", "sasrec"])
def test_scores_and_gradients(golden, name: str) -> None:
    published = Published(golden, name)
    assert_near(published.scores(published.student()), published.tensors["out.scores_without_llm"], TOLERANCE)
    student = published.distilled().student
    scores = published.scores(student)
    assert_near(scores, published.tensors["out.scores"], TOLERANCE)
    (scores * published.probe).sum().backward()
    parts = student.item_embedding.parametrizations["weight"]  # type: ignore[index]
    offsets, projector = parts.original.grad, parts[0].projector
    assert_near(projector.weight.grad, published.tensors["out.grad_projector_weight"], TOLERANCE)
    assert_near(projector.bias.grad, published.tensors["out.grad_projector_bias"], TOLERANCE)
    assert_near(offsets, published.from_one(published.tensors["out.grad_item_emb"]), TOLERANCE)


@pytest.mark.parametrize("name", ["gru", "sasrec"])
def test_the_folded_student_is_the_published_one_with_its_teacher(golden, name: str) -> None:
    published = Published(golden, name)
    model = published.distilled()
    trained = {name: tensor.detach() for name, tensor in model.named_parameters()}
    plain = published.student()
    plain.load_state_dict(model.plain_weights(trained))
    assert_near(published.scores(plain), published.tensors["out.scores"], TOLERANCE)
    assert not torch.allclose(published.scores(plain), published.tensors["out.scores_without_llm"])
