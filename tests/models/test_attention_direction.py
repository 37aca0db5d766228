"""Who sees whom: with `--backbone.causal false` an earlier state depends on what follows, and never otherwise."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from models.backbone import Backbone, BackboneConfig, is_causal, load_backbone, load_tokenizer
from models.tiny import TinyConfig

ARCHITECTURES = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config, "mistral": MistralConfig}
TINY = BackboneConfig(tiny=TinyConfig(hidden_size=32, layers=2, heads=2, vocab_size=600))
LENGTH, PADS = 7, 3


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return load_tokenizer(TINY, ["Heat (1995)", "Fargo (1996)"])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> dict[str, Path]:
    """Random decoders of every architecture, in Hugging Face format."""
    root = tmp_path_factory.mktemp("decoders")
    for name, shape in ARCHITECTURES.items():
        config = shape(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, head_dim=8,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        )  # fmt: skip
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return {name: root / name for name in ARCHITECTURES}


def states_of(model: Backbone, last_token: int, side: str) -> Tensor:
    """The states [LENGTH, H] of a text that ends with this token, beside a row without pads where there are any."""
    text = [*range(100, 100 + LENGTH - 1), last_token]
    pads = [0] * PADS if side != "none" else []
    row, keep = (text + pads, [1] * LENGTH + pads) if side == "right" else (pads + text, pads + [1] * LENGTH)
    other = list(range(110, 110 + len(row)))
    mask = None if side == "none" else torch.tensor([keep, [1] * len(row)])
    with torch.no_grad():
        states = model(input_ids=torch.tensor([row, other]), attention_mask=mask, use_cache=False).last_hidden_state[0]
    return states[torch.tensor(keep) > 0]


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_last_token_moves_the_states_before_it_exactly_where_it_may(folders, tokenizer, name, kernel, side):
    for causal in (False, True, None):
        config = BackboneConfig(name=str(folders[name]), causal=causal, attention=kernel)
        model = load_backbone(config, tokenizer, seed=0, device="cpu", trainable=False, head=False)
        moved = (states_of(model, 200, side) - states_of(model, 201, side)).abs().amax(dim=1)
        assert moved[-1] > 0.1
        if causal is False:
            assert (moved[:-1] > 1e-3).all(), f"{name} with {kernel}, padded {side}, is silently causal"
        else:
            assert (moved[:-1] == 0).all()


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_pads_on_either_side_change_no_state(folders, tokenizer, name, kernel):
    config = BackboneConfig(name=str(folders[name]), causal=False, attention=kernel)
    model = load_backbone(config, tokenizer, seed=0, device="cpu", trainable=False, head=False)
    alone = states_of(model, 200, "none")
    for side in ("left", "right"):
        assert torch.allclose(states_of(model, 200, side), alone, atol=1e-5)


@pytest.mark.parametrize("adapter", ["lora", "none"])
def test_training_sees_both_ways_through_an_adapter_and_checkpointing(folders, tokenizer, adapter):
    both_ways = BackboneConfig(name=str(folders["llama"]), causal=False, adapter=adapter, lora_dropout=0.0)
    gradients = []
    for recomputed in (False, True):
        config = replace(both_ways, gradient_checkpointing=recomputed)
        model = load_backbone(config, tokenizer, seed=0, device="cpu", trainable=True, head=False)
        embeds = torch.randn(1, LENGTH, 32, generator=torch.manual_seed(1), requires_grad=True)
        model(inputs_embeds=embeds, use_cache=False).last_hidden_state[0, 0].sum().backward()
        assert (embeds.grad[0, -1].abs() > 0).any(), "the first state depends on the last token"
        gradients.append(embeds.grad)
    assert torch.allclose(*gradients, atol=1e-6)


def test_the_direction_is_saved_with_the_weights(folders, tokenizer, tmp_path):
    both_ways = BackboneConfig(name=str(folders["qwen2"]), causal=False)
    model = load_backbone(both_ways, tokenizer, seed=0, device="cpu", trainable=False, head=True, masked=True)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    as_saved = BackboneConfig(name=str(tmp_path))
    options = {"seed": 0, "device": "cpu", "trainable": False}
    assert not is_causal(load_backbone(as_saved, tokenizer, head=False, **options))
    with pytest.raises(ValueError, match=r"writes text: pass --backbone\.causal true"):
        load_backbone(as_saved, tokenizer, **options)
    assert is_causal(load_backbone(replace(as_saved, causal=True), tokenizer, **options))


def test_an_architecture_without_attention_to_turn_round_is_refused(tokenizer, tmp_path):
    config = MambaConfig(vocab_size=len(tokenizer), hidden_size=32, state_size=4, num_hidden_layers=1)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    both_ways = BackboneConfig(name=str(tmp_path), causal=False, attention="eager")
    with pytest.raises(ValueError, match=r"--backbone\.causal false has no effect on mamba"):
        load_backbone(both_ways, tokenizer, seed=0, device="cpu", trainable=False, head=False)
