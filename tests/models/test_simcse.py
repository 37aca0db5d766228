"""SimCSE: dropout makes the views of a text, everywhere in a backbone and at all times; the loss tells texts apart."""

import pytest
import torch
from torch.nn import functional as F
from transformers import BertConfig, BertModel, GPT2Config, GPT2Model, MambaConfig, MambaModel

from data.stage_examples import WholeTextBatch
from data.texts import TextBatch
from models.backbone import BackboneConfig, load_backbone, load_tokenizer
from models.pretrained import set_dropout
from models.simcse import SimCSE, SimCSEConfig
from models.text_encoder import TextEncoder
from models.tiny import TinyConfig

SMALL = TinyConfig(hidden_size=32, layers=2, heads=2, vocab_size=600)


def model_of(dropout: float, temperature: float = 0.1) -> SimCSE:
    config = BackboneConfig(tiny=SMALL, dropout=dropout, causal=False)
    tokenizer = load_tokenizer(config, ["Heat (1995)"])
    backbone = load_backbone(config, tokenizer, seed=0, device="cpu", trainable=True, head=False)
    return SimCSE(SimCSEConfig(temperature=temperature), TextEncoder(backbone, "mean"))


def batch_of(rows: int = 5) -> WholeTextBatch:
    ids = torch.randint(3, 200, (rows, 6), generator=torch.manual_seed(2))
    keep = torch.ones_like(ids)
    keep[0, 4:] = 0
    return WholeTextBatch(TextBatch(ids, keep, keep), count=rows)


def test_without_dropout_the_loss_is_that_of_one_view():
    model, batch = model_of(0.0), batch_of()
    vectors = F.normalize(model.encoder(batch.texts), dim=1)
    expected = F.cross_entropy(vectors @ vectors.T / 0.1, torch.arange(5), reduction="sum")
    loss = model(batch)
    torch.testing.assert_close(loss.total, expected)
    assert (loss.count, int(loss.parts["accuracy"])) == (5, 5)
    assert model_of(0.0, 1.0)(batch).total > loss.total


def test_dropout_makes_two_views_and_is_never_off():
    model, batch = model_of(0.5), batch_of()
    for mode in (True, False):
        model.train(mode)
        torch.manual_seed(0)
        views = model.encoder(TextBatch(*(torch.cat([t, t]) for t in vars(batch.texts).values()))).chunk(2)
        assert (views[0] - views[1]).abs().amax(dim=1).min() > 1e-3, "each text has two"
        torch.manual_seed(0)
        normal = [F.normalize(view, dim=1) for view in views]
        logits = normal[0] @ normal[1].T / 0.1
        expected = F.cross_entropy(logits, torch.arange(5), reduction="sum")
        torch.testing.assert_close(model(batch).total, expected)


def test_a_muted_batch_adds_nothing_and_still_has_gradients():
    model = model_of(0.3)
    loss = model(batch_of().muted())
    loss.total.backward()
    assert loss.total == loss.count == 0
    assert all(parameter.grad is not None for parameter in model.parameters()), "DDP waits for each"


@pytest.mark.parametrize(
    "model",
    [
        BertModel(BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)),
        GPT2Model(GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, embd_pdrop=0, resid_pdrop=0, attn_pdrop=0)),
        load_backbone(
            BackboneConfig(tiny=SMALL),
            load_tokenizer(BackboneConfig(tiny=SMALL), ["x"]),
            seed=0,
            device="cpu",
            trainable=True,
        ),
    ],
    ids=lambda model: model.config.model_type,
)
def test_dropout_is_set_wherever_an_architecture_has_it_and_its_config_stays(model):
    before, ids = model.config.to_dict(), torch.arange(9)[None]
    model.train()
    for probability, differ in ((0.0, False), (0.4, True)):
        set_dropout(model, probability)
        first, second = (model(input_ids=ids)[0] for _ in range(2))
        assert torch.equal(first, second) != differ
    assert model.config.to_dict() == before


def test_an_architecture_without_dropout_is_refused():
    model = MambaModel(MambaConfig(vocab_size=50, hidden_size=16, state_size=4, num_hidden_layers=1))
    with pytest.raises(ValueError, match=r"--backbone\.dropout 0\.3: mamba has no dropout"):
        set_dropout(model, 0.3)
    with pytest.raises(ValueError, match=r"--backbone\.dropout is 1\.5"):
        BackboneConfig(dropout=1.5)
