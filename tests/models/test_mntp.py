"""Masked next-token prediction: the loss of the published code, read one place before the token, with what follows."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from data.corpus import Corpus
from data.stage_examples import MaskedBatch, MaskedTexts, MaskingSettings
from data.title_tokens import TokenTable
from models.backbone import BackboneConfig, load_backbone, load_tokenizer
from models.losses import count_first
from models.mntp import MNTP
from models.tiny import TinyConfig

TINY = BackboneConfig(tiny=TinyConfig(hidden_size=32, layers=2, heads=2, vocab_size=600), causal=False)
LINES = ["Heat (1995), a film of a thief", "Fargo (1996)", "Star Wars (1977) and what came behind it"]


@pytest.fixture(scope="module")
def model_and_batch() -> tuple[MNTP, MaskedBatch]:
    tokenizer = load_tokenizer(TINY, LINES)
    corpus = Corpus(TokenTable.of([tokenizer(line)["input_ids"] for line in LINES]), np.ones(3, np.int64), 0)
    backbone = load_backbone(TINY, tokenizer, seed=0, device="cpu", trainable=True, masked=True)
    examples = MaskedTexts(corpus, np.arange(3), MaskingSettings(rate=0.4), tokenizer, 1)
    return MNTP(backbone), examples.collate(np.arange(3), 0)


def test_the_loss_is_that_of_a_causal_head_with_mlm_labels(model_and_batch):
    """The library's head shifts labels by one, which is what the published code trains."""
    model, batch = model_and_batch
    labels = torch.full_like(batch.input_ids, -100)
    labels.flatten()[batch.labelled + 1] = batch.targets
    published = model.backbone(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=labels).loss
    ours = model.loss(batch)
    assert ours.count == (labels >= 0).sum() > 3
    torch.testing.assert_close(ours.total / ours.count, published)


def test_what_follows_a_masked_token_helps_to_predict_it(model_and_batch):
    model, batch = model_and_batch
    first, width = int(batch.labelled[0]), batch.input_ids.shape[1]
    one = replace(batch, labelled=batch.labelled[:1], targets=batch.targets[:1], count=1)
    last = int(batch.attention_mask[first // width].sum()) - 1
    assert first % width < last - 1
    changed = batch.input_ids.clone()
    changed[first // width, last] = 7
    assert (model.loss(one).total - model.loss(replace(one, input_ids=changed)).total).abs() > 1e-4
    padded = replace(
        batch, input_ids=F.pad(batch.input_ids, (0, 3)), attention_mask=F.pad(batch.attention_mask, (0, 3))
    )
    rows = batch.labelled // width
    padded = replace(padded, labelled=batch.labelled + 3 * rows)
    torch.testing.assert_close(model.loss(padded).total, model.loss(batch).total)


def test_accuracy_is_measured_where_no_gradient_is(model_and_batch):
    model, batch = model_and_batch
    assert not model.train().loss(batch).parts
    with torch.no_grad():
        parts = model.eval().loss(batch).parts
        logits = model.backbone(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits.flatten(0, 1)
    assert parts["accuracy"] == (logits[batch.labelled].argmax(1) == batch.targets).sum()
    hidden, table = torch.randn(50, 4), torch.randn(9, 4)
    target = (hidden @ table.T).argmax(1)
    assert count_first(hidden, table, target, chunk_rows=7) == 50
    assert count_first(hidden, table, (target + 1) % 9, chunk_rows=7) == 0


def test_a_batch_without_masked_tokens_adds_nothing(model_and_batch):
    model, batch = model_and_batch
    loss = model.train().loss(batch.muted())
    loss.total.backward()
    assert loss.total == loss.count == 0
    assert all(parameter.grad is not None for parameter in model.parameters()), "DDP waits for each"
    model.zero_grad()
