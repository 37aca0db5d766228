"""A language model that answers prompts in plain text: greedily, or by draws that belong to a prompt."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerFast

from data.batches import pad

from .backbone import Backbone, causal_model

ANSWER = "\n\nAnswer:"  # what follows a prompt where the tokenizer knows no chat


@dataclass
class WritingSettings:
    """How texts are written."""

    max_new_tokens: int = 128
    """Tokens of a text, at most."""
    temperature: float = 0.0
    """0 takes the likeliest token each time; above 0 tokens are drawn, from softmax(logits / temperature)."""
    seed: int = 0
    """Of the draws; each prompt has its own, so a text does not depend on its batch."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.temperature < 0:
            raise ValueError(
                f"--writing.max_new_tokens {self.max_new_tokens} and --writing.temperature {self.temperature}: "
                "expected at least 1 and at least 0"
            )


class Gumbel(LogitsProcessor):
    """Noise under which the likeliest token is a draw from softmax(logits / temperature)."""

    def __init__(self, seeds: Sequence[int], temperature: float, device: torch.device) -> None:
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        self.temperature = temperature

    def __call__(self, input_ids: Tensor, scores_BV: Tensor) -> Tensor:
        noise = [torch.empty_like(scores_BV[0]).exponential_(generator=g) for g in self.generators]
        return scores_BV / self.temperature - torch.stack(noise).log()


class TextWriter:
    """A frozen backbone with its tokenizer."""

    def __init__(self, backbone: Backbone, tokenizer: PreTrainedTokenizerFast, settings: WritingSettings) -> None:
        """Raises ValueError where the model has no room for a prompt beside a text."""
        self.backbone, self.tokenizer, self.settings = backbone, tokenizer, settings
        shape = causal_model(backbone).config.get_text_config()
        positions = getattr(shape, "max_position_embeddings", None) or tokenizer.model_max_length
        self.room = int(min(positions, tokenizer.model_max_length)) - settings.max_new_tokens
        if self.room < 1:
            raise ValueError(
                f"--writing.max_new_tokens {settings.max_new_tokens} leaves no room for a prompt in the {positions} "
                "positions of this model: lower it"
            )

    def encode(self, prompts: list[str]) -> list[list[int]]:
        """Tokens of each prompt, as the model is used to be asked."""
        if self.tokenizer.chat_template is None:
            return self.tokenizer([prompt + ANSWER for prompt in prompts])["input_ids"]
        chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
        # The flag is read by templates of models that would first think aloud; others do not know it.
        texts = self.tokenizer.apply_chat_template(
            chats, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        return self.tokenizer(cast(list[str], texts), add_special_tokens=False)["input_ids"]

    @torch.no_grad()
    def write(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> list[str]:
        """Return what follows each prompt, up to the end of the text; `seeds` are those of the prompts."""
        causal = causal_model(self.backbone)
        ids, mask = map(torch.from_numpy, pad([*map(np.array, prompts)], side="left"))
        ids = ids.where(mask > 0, self.tokenizer.pad_token_id)
        draws = LogitsProcessorList()
        if self.settings.temperature:
            draws.append(Gumbel(seeds, self.settings.temperature, causal.device))
        of_checkpoint = causal.generation_config
        end = None if of_checkpoint is None else of_checkpoint.eos_token_id  # a chat has another end than a text
        causal.generation_config = GenerationConfig()  # its penalties and its own sampling are nobody's wish here
        try:
            output = cast(Any, causal).generate(
                input_ids=ids.to(causal.device),
                attention_mask=mask.to(causal.device),
                logits_processor=draws,
                generation_config=GenerationConfig(
                    do_sample=False,
                    max_new_tokens=self.settings.max_new_tokens,
                    eos_token_id=end if end is not None else self.tokenizer.eos_token_id,
                    pad_token_id=self.tokenizer.pad_token_id,
                ),
            )
        finally:
            causal.generation_config = of_checkpoint
        # All prompts end in the same column, since pads stand on the left: what is behind it was written.
        texts = self.tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
        return [" ".join(text.split()) for text in texts]
