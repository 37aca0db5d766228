"""Small splits, tokenizers and decoders that several test files are about."""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel, PreTrainedTokenizerFast

from data.splits import Split, Targets

HARD_TITLES = [  # quotes, blanks, repeats, an end token's text, and letters that are several bytes
    "Heat (1995)",
    "Fargo (1996)",
    '"Great Performances" Cats (1998)',
    "'Til There Was You (1997)",
    "Doom </s> - PlayStation 4",
    "Creeping Flesh, The (1973)",
    "Krótki film o zabijaniu (1988)",
    "Fargo (1996)",
    "...And Justice for All, 1, 2, 3",
    "三国志 & Co.",
]


def leave_one_out(sequences: Sequence[Sequence[int] | np.ndarray], num_items: int, hash: str = "toy") -> Split:
    """These sequences; the last two events are held out of those that have three or more."""
    length = np.array([len(sequence) for sequence in sequences])
    users = np.flatnonzero(length >= 3)
    return Split(
        name="toy",
        kind="leave-one-out",
        offsets=np.concatenate([[0], np.cumsum(length)]),
        items=np.concatenate([np.asarray(sequence) for sequence in sequences]),
        train_end=np.where(length >= 3, length - 2, length),
        valid=Targets(users, length[users] - 2),
        test=Targets(users, length[users] - 1),
        num_items=num_items,
        hash=hash,
        raw_users=tuple(f"u{user}" for user in range(len(length))),
    )


def without_repeats(lengths: Sequence[int], num_items: int) -> Split:
    """Random sequences of these lengths in which no item comes twice."""
    random = np.random.default_rng(0)
    return leave_one_out([random.permutation(num_items)[:length] + 1 for length in lengths], num_items)


def byte_level_bpe(
    corpus: Iterable[str], vocab_size: int, words: pre_tokenizers.PreTokenizer | None = None
) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer without BOS, cut into words as GPT-2's unless told otherwise, that learned `corpus`."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = words or pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=["</s>"], initial_alphabet=alphabet)
    backend.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="</s>")


def grouped_llama(vocab_size: int, eos: int) -> LlamaForCausalLM:
    """Two layers with grouped key-value heads in float64, so that only real differences show."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        eos_token_id=eos,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).double()


def golden_llama(meta: dict, tensors: dict[str, torch.Tensor]) -> LlamaModel:
    """The decoder that a golden folder describes, with its weights."""
    llama = LlamaModel(
        LlamaConfig(
            vocab_size=meta["vocab"], hidden_size=meta["hidden"], intermediate_size=meta["intermediate"],
            num_hidden_layers=meta["layers"], num_attention_heads=meta["heads"], num_key_value_heads=meta["kv_heads"],
            head_dim=meta["head_dim"], rms_norm_eps=meta["rms_norm_eps"],
            rope_parameters={"rope_type": "default", "rope_theta": meta["rope_theta"]},
        )
    )  # fmt: skip
    llama.load_state_dict({name[6:]: tensor for name, tensor in tensors.items() if name.startswith("llama.")})
    return llama
