"""The built-in backbone `tiny`: a small Llama and its byte-level BPE tokenizer, both made on the spot."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

# A title should be few tokens, the same ones inside a prompt and alone. So a word keeps the blank before it,
# its brackets and its digits (" (1994)"), while what stands between titles in a prompt is cut off: quotes,
# `", "`, and the comma after a closing bracket.
WORDS = r'", "|"|\s?[^\s"]*\)(?=,)|\s?[^\s"]+|\s+(?!\S)|\s'


@dataclass
class TinyConfig:
    """Shape of the built-in backbone."""

    hidden_size: int = 128
    """Width of the residual stream."""
    layers: int = 3
    """Decoder layers."""
    heads: int = 4
    """Attention heads; they divide the width."""
    vocab_size: int = 4096
    """Most tokens that the tokenizer learns; small catalogues fill fewer."""
    max_positions: int = 2048
    """Longest text in tokens."""

    def __post_init__(self) -> None:
        if self.heads < 1 or self.hidden_size % (2 * self.heads):
            raise ValueError(
                f"--backbone.tiny.hidden_size {self.hidden_size} must be a multiple of twice "
                f"--backbone.tiny.heads, {2 * self.heads}: every head rotates pairs of numbers"
            )
        if self.vocab_size < 512:
            raise ValueError(
                f"--backbone.tiny.vocab_size {self.vocab_size} is too small: 256 bytes come first, pass 512 or more"
            )


# How often the texts of methods with long ones count: enough to make their words tokens beside thousands of titles,
# which halves prompts and leaves titles as they are (tests/models/test_backbone.py).
LONG_PROMPTS = 30


def vocabulary_text(
    titles: Sequence[str], counts: np.ndarray, prompts: Iterable[str] = (), prompt_count: int = 1
) -> list[str]:
    """What the tokenizer learns from: prompts `prompt_count` times, each title 1 + log2(1 + its training events) times.

    `counts[i]` belongs to `titles[i]`; empty titles (the padding item) are left out. The logarithm lets the
    words of rare titles become tokens too.
    """
    text = list(prompts) * prompt_count
    for title, count in zip(titles, counts, strict=True):
        if title:
            text += [title] * (1 + int(math.log2(1 + count)))
    return text


def train_tiny_tokenizer(config: TinyConfig, training_text: Iterable[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: decoding gives every text back, and learning again the same one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_text, trainer)
    # as Llama does: BOS in front unless add_special_tokens=False
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", tokenizer.token_to_id("<bos>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        padding_side="left",
        model_max_length=config.max_positions,
        clean_up_tokenization_spaces=False,
    )


def build_tiny(config: TinyConfig, tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """A float32 Llama on the CPU, embeddings tied; the same seed gives the same weights on every process."""
    llama = llama_config(config, len(tokenizer))
    llama.pad_token_id, llama.bos_token_id = tokenizer.pad_token_id, tokenizer.bos_token_id
    llama.eos_token_id = tokenizer.eos_token_id
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(llama)


def llama_config(config: TinyConfig, vocab_size: int) -> LlamaConfig:
    """The shape of the Llama that `build_tiny` makes for a vocabulary of this size."""
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=math.ceil(config.hidden_size * 8 / 3 / 32) * 32,  # SwiGLU's 8/3, in steps of one vector
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.heads,
        max_position_embeddings=config.max_positions,
        tie_word_embeddings=True,
    )
