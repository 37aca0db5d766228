"""Item vectors in a prompt against iLoRA and LLaRA: embeddings and gradients, placeholder by placeholder."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from models.item_embeddings import make_projector, put_vectors
from tests.parity.tolerance import assert_near


def slots_and_items(meta: dict, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The published rule: the n-th placeholder of a kind, from the left, shows the n-th item that there is."""
    ids = meta["token_ids"]
    slots, items = [], []
    for row, tokens in enumerate(tensors["in.input_ids"]):
        shown = {
            "[HistoryEmb]": tensors["in.seq"][row, : tensors["in.len_seq"][row]],
            "[CansEmb]": tensors["in.cans"][row, : tensors["in.len_cans"][row]],
            "[ItemEmb]": tensors["in.item_id"][row : row + 1],
        }
        for marker, those in shown.items():
            for place, item in zip((tokens == ids[marker]).nonzero()[:, 0].tolist(), those.tolist(), strict=False):
                slots.append(row * meta["seq_len"] + place)
                items.append(item)
    return torch.tensor(slots), torch.tensor(items)


@pytest.mark.parametrize(("dtype", "bits", "tolerance"), [(torch.float64, "64", 1e-9), (torch.float32, "", 1e-5)])
def test_embeddings_and_gradients(golden, dtype: torch.dtype, bits: str, tolerance: float) -> None:
    meta, tensors = golden("ilora_injection")
    slots, items = slots_and_items(meta, tensors)
    assert len(slots) == sum(
        min(row["history_length"], row["history_placeholders"])
        + min(meta["candidates"], row["candidate_placeholders"])
        + row["item_placeholder"]
        for row in meta["rows"]
    )
    projector = make_projector("mlp", meta["item_dim"], meta["llm_hidden"]).to(dtype)
    names = [f"{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")]
    projector.load_state_dict({name: tensors[f"w.projector.{name}"] for name in names})
    tokens, table = (tensors[f"w.{name}"].to(dtype) for name in ("token_table", "item_table"))
    tokens.requires_grad_()
    embeds = put_vectors(F.embedding(tensors["in.input_ids"], tokens), slots, projector(F.embedding(items, table)))
    assert_near(embeds, tensors[f"out{bits}.inputs_embeds"], tolerance)
    embeds.backward(tensors["in.dy"].to(dtype))
    assert_near(tokens.grad, tensors[f"grad{bits}.token_table"], tolerance, "token_table")
    for name in names:
        assert_near(projector.get_parameter(name).grad, tensors[f"grad{bits}.projector.{name}"], tolerance, name)
