"""The SASRec encoders that LLaRA and iLoRA ship: user vectors, scores, item vectors, and ranks where there are some."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from data.batches import SequenceBatch
from models.sasrec_llara import SASRecLLaRA, read_sasrec_llara
from tests.parity.tolerance import assert_near

DATA_SETS = ["movielens", "lastfm", "steam"]


@pytest.fixture(params=DATA_SETS)
def published(request, golden, tmp_path: Path):
    """(a file with the weights of a data set, its other tensors by name)."""
    prefix = f"{request.param}."
    _, tensors = golden("sasrec_checkpoints")
    mine = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    compared = {name: tensor for name, tensor in mine.items() if name.startswith(("in.", "out."))}
    weights = {name: tensor for name, tensor in mine.items() if name not in compared}
    save_file(weights, tmp_path / f"{request.param}.safetensors")
    return tmp_path / f"{request.param}.safetensors", compared


def histories(tensors: dict[str, torch.Tensor], length: int = 10) -> SequenceBatch:
    real = torch.arange(10) < tensors["in.len_seq"][:, None]
    return SequenceBatch((tensors["in.seq"] + 1).where(real, 0)[:, :length], tensors["in.len_seq"])


def test_users_scores_and_item_vectors(published) -> None:
    path, tensors = published
    model, batch = read_sasrec_llara(path).double(), histories(tensors)
    assert len(set(tensors["in.len_seq"].tolist())) > 1, "short histories are part of the comparison"
    users = model.user_states(batch)
    assert_near(users[:, None], tensors["out.user"], 1e-5, "user")
    scores = model.item_scores(users)[:, 1:]
    assert_near(scores, tensors["out.scores"], 1e-5, "scores")
    assert_near(model.float().scores(batch)[:, 1:], tensors["out.scores"], 1e-4, "scores in float32")
    assert model.scores(batch)[:, 0].isneginf().all()
    if "out.item_vectors" in tensors:
        real = batch.items > 0
        assert_near(model.item_table[batch.items][real], tensors["out.item_vectors"][real], 1e-9, "item vectors")
    if "in.next" in tensors:
        target = scores.gather(1, tensors["in.next"][:, None])
        assert torch.equal((scores > target).sum(1) + 1, tensors["out.rank_of_next"])


def test_states_of_shorter_batches_are_the_same(published) -> None:
    path, tensors = published
    model, batch = read_sasrec_llara(path), histories(tensors)
    row = int(tensors["in.len_seq"].argmin())
    length = int(tensors["in.len_seq"][row])
    alone = SequenceBatch(batch.items[row : row + 1, :length], batch.lengths[row : row + 1])
    torch.testing.assert_close(model.user_states(alone)[0], model.user_states(batch)[row], rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="11 events"):
        model.states(SequenceBatch(torch.ones(1, 11, dtype=torch.int64), torch.tensor([11])))


def test_a_catalogue_may_hold_some_of_the_items(published) -> None:
    path, tensors = published
    kept = np.array(sorted({*tensors["in.seq"].flatten().tolist(), 7, 3} - {len(load_file(path)["s_fc.bias"])}))
    model: SASRecLLaRA = read_sasrec_llara(path, kept)
    ours = {int(theirs): item for item, theirs in enumerate(kept, start=1)}
    batch = histories(tensors)
    renumbered = SequenceBatch(batch.items.clone().apply_(lambda item: item and ours[item - 1]), batch.lengths)
    assert_near(model.scores(renumbered)[:, 1:], tensors["out.scores"][:, kept], 1e-4)
    with pytest.raises(ValueError, match="numbered from 0"):
        read_sasrec_llara(path, np.append(kept, model.num_items + 10**6))


def test_another_file_is_refused(tmp_path: Path) -> None:
    save_file({"item_embeddings.weight": torch.ones(3, 4)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="is no published SASRec of LLaRA"):
        read_sasrec_llara(tmp_path / "other.safetensors")
