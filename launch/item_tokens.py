"""A trained E4SRec as an ordinary language model: its items are tokens of the vocabulary, its head scores them."""

from copy import deepcopy

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from data.interactions import Catalog
from models.backbone import is_causal
from models.e4srec import E4SRec


def item_token(raw_id: str) -> str:
    """The token that stands for an item, by its id in the data."""
    return f"<item {raw_id}>"


def with_item_tokens(
    model: E4SRec, body: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, catalog: Catalog
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return a language model around `body`, the model's own backbone without adapter, and its tokenizer.

    Behind a prompt of the run, the logits of the items' tokens are the model's scores, but for a number that all items
    of the prompt share. Other tokens have logit zero there: a head for text was never part of the model.

    Raises ValueError where no head without a bias can give those scores.
    """
    if not is_causal(body):
        raise ValueError("a language model that continues text is causal: this run has --backbone.causal false")
    if model.output.match != "dot" or not isinstance(model.output.state_projector, nn.Identity):
        raise ValueError(
            "the head of a language model is a plain product: this run has --method.output.match cosine or "
            "--method.output.projects_state true"
        )
    tokenizer, tokens = deepcopy(tokenizer), [item_token(raw_id) for raw_id in catalog.raw_ids[1:]]
    if tokenizer.add_tokens(tokens, special_tokens=True) != len(tokens):
        raise ValueError(f"the tokenizer knows some of {tokens[0]} ... {tokens[-1]} already")
    ids = torch.tensor(tokenizer.convert_tokens_to_ids(tokens))
    body.config.tie_word_embeddings = False
    body.resize_token_embeddings(max(len(tokenizer), body.config.get_text_config().vocab_size), mean_resizing=False)
    with torch.device("meta"):  # its weights come from `body`
        whole: PreTrainedModel = AutoModelForCausalLM.from_config(body.config)
    setattr(whole, whole.base_model_prefix, body)
    embeddings = body.get_input_embeddings().weight
    assert isinstance(embeddings, torch.Tensor)
    head = nn.Linear(embeddings.shape[1], len(embeddings), bias=False, dtype=embeddings.dtype)
    with torch.no_grad():
        embeddings[ids] = model.input.vectors()[1:].to(embeddings.dtype)
        head.weight.zero_()
        head.weight[ids] = model.output.table.vectors()[1:].to(embeddings.dtype)
    whole.set_output_embeddings(head)
    return whole, tokenizer
