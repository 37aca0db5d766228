"""A decoder that sees both ways against McGill-NLP/llm2vec: the states of a padded batch."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from models.backbone import BackboneConfig, load_backbone, load_tokenizer
from models.tiny import TinyConfig
from tests.parity.tolerance import assert_near
from tests.toys import golden_llama


def saved_llama(meta: dict, tensors: dict[str, Tensor], folder: Path) -> str:
    """Their weights as a folder in Hugging Face format, with any tokenizer: the test has its own tokens."""
    llama = golden_llama(meta, tensors)
    llama.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_states_are_the_published_ones(golden, tmp_path, kernel):
    meta, tensors = golden("llm2vec")
    tokenizer = load_tokenizer(BackboneConfig(tiny=TinyConfig(vocab_size=600)), ["any text"])
    config = BackboneConfig(name=saved_llama(meta, tensors, tmp_path), causal=False, attention=kernel)
    model = load_backbone(config, tokenizer, seed=0, device="cpu", trainable=False, head=False).double()
    keep = tensors["in.attention_mask"]
    with torch.no_grad():
        states = model(input_ids=tensors["in.input_ids"], attention_mask=keep, use_cache=False).last_hidden_state
    real = keep > 0  # a pad's own state is nobody's
    assert_near(states[real], tensors["out.hidden"][real], 1e-5)
