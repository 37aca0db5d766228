"""UR4Rec of the paper, its first stage and its second, as the table of methods builds them."""

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch import nn

from data.batches import Examples
from data.candidate_lists import COUNT_FLAG, EvaluationLists, Texts, TextTokens, TextVectors, TrainingLists
from data.candidate_rows import shuffled
from data.descriptions import Descriptions, DescriptionSettings
from data.draws import Draws
from data.prompt_rows import PromptSettings, Rows, evaluation_rows, response_rows
from data.splits import Phase, Split
from data.title_tokens import TokenTable
from evaluation.results import Evaluation
from models.backbone import BackboneConfig, causal_model, load_backbone
from models.devices import own_device
from models.pretrained import load_saved_tokenizer, set_dropout
from models.sequence_recommender import SequenceRecommender
from models.text_encoder import TextEncoder
from models.text_vectors import MAX_TOKENS, text_vectors
from models.ur4rec.proxies import PreferenceSettings
from models.ur4rec.reranking import MORE_PLACES, UR4Rec, UR4RecConfig, UR4RecPretrain, UR4RecPretrainConfig
from trainers.runtime import best_precision

from .candidates import FirstStage, Retriever
from .earlier_runs import require_run
from .setting import Built, CannotRank, Setting

logger = logging.getLogger("shardrec")


def build_ur4rec_pretrain(setting: Setting) -> Built:
    config: UR4RecPretrainConfig = setting.method
    texts_of = text_source(setting, config.preferences)
    texts_of(setting.split)  # before anything is drawn for the weights
    encoder = encoder_of(config.preferences)
    with seeded(setting.seed):
        model = UR4RecPretrain(config, setting.catalog.num_items, width_of(texts_of(setting.split), encoder), encoder)
    if config.item_vectors is not None and setting.saved is None:
        with torch.no_grad():
            model.items.weight.copy_(vectors_of(config.item_vectors, setting, config.hidden_size))
    split, history = setting.split, PromptSettings(history_length=config.history_length)

    def lists(rows: Rows, cuts: int | None = None) -> Examples:
        return TrainingLists(split, rows, config.num_candidates, setting.seed, texts_of(split), cuts=cuts)

    def training() -> Examples:
        return lists(response_rows(split, history), config.cuts)

    return Built(model, training, None, held_out=lambda: lists(evaluation_rows(split, history, "valid")))


def build_ur4rec(setting: Setting) -> Built:
    config: UR4RecConfig = setting.method
    split, stage = setting.split, None
    if config.retriever is not None:
        stage = FirstStage(Retriever(config.retriever, setting), config.num_candidates, COUNT_FLAG, split)
        if setting.saved is None:
            stage.report_ceiling()
    texts_of = text_source(setting, config.preferences) if config.augment else lambda split: None
    texts = texts_of(split)
    encoder = None if texts is None else encoder_of(config.preferences)
    with seeded(setting.seed):
        model = UR4Rec(config, setting.catalog.num_items, 0 if texts is None else width_of(texts, encoder), encoder)
    if setting.saved is None:
        begin(model, config, setting)

    def training() -> Examples:
        rows = response_rows(split, PromptSettings(history_length=config.history_length))
        found = stage.candidates(split, "train") if stage is not None and config.negatives == "hard" else None
        return TrainingLists(split, rows, config.num_candidates, setting.seed, texts, cuts=config.cuts, found=found)

    def listed(split: Split, phase: Phase, candidates: np.ndarray) -> Examples:
        return EvaluationLists(split, phase, config.history_length, candidates, texts_of(split))

    def evaluation(split: Split, phase: Phase) -> Examples:
        assert stage is not None
        return listed(split, phase, stage.candidates(split, phase).items)

    def offering(split: Split, phase: Phase, candidates: np.ndarray) -> Examples:
        most = config.num_candidates + MORE_PLACES
        if config.ranker == "prm" and candidates.shape[1] > most:
            raise CannotRank(
                f"it knows {most} places of a list, and this protocol offers {candidates.shape[1]} candidates: train "
                f"with {COUNT_FLAG} {candidates.shape[1]}"
            )
        return listed(split, phase, shuffled(candidates, Draws.of(setting.seed, 0, np.arange(len(candidates)))))

    def summary(split: Split, evaluation: Evaluation) -> dict[str, Any]:
        assert stage is not None
        return stage.figures(split, evaluation)

    own = (evaluation, summary) if stage is not None else (None, None)
    return Built(model, training, own[0], offering=offering, summary=own[1])


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Weights made inside follow from the seed alone: what is read from the cache has drawn no numbers before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def begin(model: UR4Rec, config: UR4RecConfig, setting: Setting) -> None:
    """Give a new model what earlier runs have learned."""
    if config.item_vectors is not None:
        model.set_item_vectors(vectors_of(config.item_vectors, setting, config.hidden_size))
    if config.init is None:
        return
    earlier = setting.load_model(require_run(config.init, "init", setting).folder).model
    if not isinstance(earlier, UR4RecPretrain):
        raise ValueError(f"--method.init {config.init} is a run of another model: expected one of ur4rec-pretrain")
    theirs, own = earlier.config.preferences, config.preferences
    if own.encoder_layers < theirs.encoder_layers:  # a run saves the layers that it trains
        raise ValueError(
            f"--method.init {config.init} has an encoder whose last layers learned: pass "
            f"--method.preferences.encoder_layers {theirs.encoder_layers} or more"
        )
    compared = {
        "hidden_size": (config.hidden_size, earlier.config.hidden_size),
        "preferences": (own, replace(theirs, encoder_layers=own.encoder_layers)),
    }
    for name, (here, there) in compared.items():
        if here != there:
            raise ValueError(
                f"--method.{name} {here} is not what --method.init {config.init} was trained with, {there}: pass the "
                "same flags"
            )
    model.begin_with(earlier)


def vectors_of(run: Path, setting: Setting, width: int) -> torch.Tensor:
    """The item vectors of a run of the same data, [N + 1, width]."""
    model = setting.load_model(require_run(run, "item_vectors", setting).folder).model
    if not isinstance(model, SequenceRecommender):
        raise ValueError(f"--method.item_vectors {run} has no item table: expected a run of sasrec, gru4rec or lrurec")
    if model.config.hidden_size != width:
        raise ValueError(
            f"--method.item_vectors {run} has vectors of {model.config.hidden_size} numbers: pass --method.hidden_size "
            f"{model.config.hidden_size}"
        )
    return model.item_table.detach().cpu()


def encoder_of(settings: PreferenceSettings) -> TextEncoder | None:
    """The text encoder, where some of it learns."""
    if not settings.encoder_layers:
        return None
    return learning_encoder(settings.encoder, settings.encoder_layers, "--method.preferences.encoder_layers")


def width_of(texts: Texts, encoder: TextEncoder | None) -> int:
    """Numbers of a text's vector."""
    if encoder is not None:
        return encoder.width
    assert isinstance(texts, TextVectors)
    return texts.items.shape[1]


def text_source(setting: Setting, settings: PreferenceSettings) -> Callable[[Split], Texts]:
    """A function from a split to its texts as the model reads them, which it makes once."""

    def read(split: Split) -> Texts:
        if settings.descriptions is None:
            found = Descriptions.of_templates(split, setting.catalog, DescriptionSettings())
        else:
            found = Descriptions.read(settings.descriptions, split, setting.catalog)
        if settings.encoder_layers:
            return tokens_of(found, settings.encoder)
        of_items = kept_vectors(found.item_texts, settings.encoder, setting.cache)
        if not split.hash:  # new histories are asked about once
            return TextVectors(found, of_items, vectors_now(found.user_texts, settings.encoder))
        return TextVectors(found, of_items, kept_vectors(found.user_texts, settings.encoder, setting.cache))

    known: dict[int, tuple[Split, Texts]] = {}

    def texts_of(split: Split) -> Texts:
        if not split.hash:  # asked about once, and not to be kept
            return read(split)
        if id(split) not in known:
            known[id(split)] = (split, read(split))
        return known[id(split)][1]

    return texts_of


def tokens_of(found: Descriptions, encoder: str) -> TextTokens:
    """The texts as tokens, each distinct one once."""
    row_of = {text: row for row, text in enumerate(dict.fromkeys(["", *found.item_texts, *found.user_texts]))}
    items, users = (np.array([row_of[text] for text in texts]) for texts in (found.item_texts, found.user_texts))
    return TextTokens(found, encoder_tokens(list(row_of), encoder), items, users)


def encoder_tokens(texts: Sequence[str], encoder: str) -> TokenTable:
    """The texts' tokens with the special ones around them; an empty text has those, too."""
    tokenizer = load_saved_tokenizer(encoder)
    return TokenTable.of(tokenizer(list(texts), truncation=True, max_length=MAX_TOKENS)["input_ids"])


def learning_encoder(name: str, layers: int, flag: str) -> TextEncoder:
    """A text encoder whose last layers learn, without dropout: most of it stays as it is."""
    tokenizer, settings = load_saved_tokenizer(name), BackboneConfig(name=name, dtype="float32")
    model = load_backbone(settings, tokenizer, seed=0, device="cpu", trainable=False, head=False)
    with suppress(ValueError):  # it has none
        set_dropout(causal_model(model), 0.0)
    every = max((m for m in causal_model(model).modules() if isinstance(m, nn.ModuleList)), key=len)
    if not 1 <= layers <= len(every):
        raise ValueError(f"{flag} {layers}: expected 1 to {len(every)}")
    for layer in every[-layers:]:
        layer.requires_grad_(True)
    return TextEncoder(model, "mean")


def kept_vectors(texts: Sequence[str], encoder: str, cache: Path) -> np.ndarray:
    """What `vectors_now` gives, kept in the cache under a hash of the texts."""
    digest = hashlib.sha256("\0".join([encoder, *texts]).encode()).hexdigest()[:32]
    file = cache / "text-vectors" / f"{digest}.npy"
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{file}.lock"):  # the other processes of this host wait for the vectors instead of making them
        if not file.is_file():
            unfinished = file.with_name(f"{digest}.unfinished.npy")
            with torch.random.fork_rng(devices=[]):  # else weights made later would tell what was in the cache
                np.save(unfinished, vectors_now(texts, encoder))
            unfinished.replace(file)
    return np.load(file)


def vectors_now(texts: Sequence[str], encoder: str) -> np.ndarray:
    """Vectors of texts, [n, T] float16, each distinct text encoded once; those of empty texts are zeros."""
    row_of = {text: row for row, text in enumerate(dict.fromkeys(["", *texts]))}
    logger.info("encoding %d texts with %s", len(row_of) - 1, encoder)
    tokenizer = load_saved_tokenizer(encoder)
    frozen, device = BackboneConfig(name=encoder), own_device()
    model = load_backbone(frozen, tokenizer, seed=0, device=device, trainable=False, head=False)
    with torch.autocast(device.type, torch.bfloat16, enabled=best_precision(device) == "bf16"):
        vectors = text_vectors(model, tokenizer, list(row_of)).half().numpy()
    vectors[0] = 0
    return vectors[[row_of[text] for text in texts]]
