"""The pre-trained tokenizer that tests of prompts share."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase


@pytest.fixture(scope="session")
def sentencepiece(backbone_root: Path) -> PreTrainedTokenizerBase:
    """Llama's kind of tokenizer: a blank before the text, BOS and EOS."""
    return AutoTokenizer.from_pretrained(backbone_root / "stories260k")
