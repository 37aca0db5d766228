"""UR4Rec V2, built from a run of SASRec, or from the stage before, and the texts of users and items."""

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn

from data.batches import Examples
from data.descriptions import Descriptions, DescriptionSettings
from data.preference_batches import (
    EvaluationPreferences,
    PreferenceRows,
    ProfileSentences,
    TrainingPreferences,
    split_sentences,
)
from data.splits import Phase, Split
from data.title_tokens import TokenTable
from evaluation.metrics import per_user_metrics
from evaluation.protocols import seen_pairs
from evaluation.ranks import candidate_mask, count_among
from models.devices import gather_object
from models.text_encoder import TextEncoder
from models.ur4rec.v2 import UR4RecV2
from models.ur4rec.v2_config import UR4RecV2Config

from .earlier_runs import require_run
from .llara import inner_sasrec
from .setting import HISTORIES, Built, Setting
from .ur4rec_lists import encoder_tokens, kept_vectors, learning_encoder, seeded, vectors_now

logger = logging.getLogger("shardrec")


def build_ur4rec_v2(setting: Setting) -> Built:
    config: UR4RecV2Config = setting.method
    earlier = earlier_stage(setting, config)
    sasrec = inner_sasrec(setting, config.sasrec, "", 0) if earlier is None else earlier.sasrec
    if sasrec is None:
        raise ValueError("ur4rec-v2 begins with a recommender of item ids: pass --method.sasrec, a run of sasrec")
    texts = Texts(setting, config)
    num_users, item_texts = setting.split.num_users, None
    if setting.saved is not None:
        num_users, item_texts = saved_sizes(setting.saved, config, setting.catalog.num_items)
    else:
        item_texts = texts.of_items()
    encoder, item_tokens = (texts.encoder(), texts.item_tokens()) if texts.learns else (None, None)
    with seeded(setting.seed):
        model = UR4RecV2(config, sasrec, item_texts, num_users, encoder, item_tokens)
    if earlier is not None:
        model.begin_with(earlier)

    def training() -> Examples:
        rows = texts.rows(setting.split, sasrec.config.window, num_users)
        return TrainingPreferences(rows, config.cuts, config.num_negatives, setting.seed)

    def evaluation(split: Split, phase: Phase) -> Examples:
        return EvaluationPreferences(texts.rows(split, sasrec.config.window, num_users), phase)

    def calibrate(prepared: nn.Module, batches: Iterable[Any], held_out: np.ndarray) -> None:
        finish_model(prepared, model, list(batches), setting.split)

    parts = {"sasrec": "sasrec_scores", "retriever": "retriever_scores"}
    return Built(model, training, evaluation, calibrate=calibrate, parts=parts)


def earlier_stage(setting: Setting, config: UR4RecV2Config) -> UR4RecV2 | None:
    """The model of --method.init; raises ValueError where that is no run of this method."""
    if config.init is None:
        return None
    require_run(config.init, "init", setting)
    earlier = setting.load_model(config.init).model
    if not isinstance(earlier, UR4RecV2):
        raise ValueError(f"--method.init {config.init} is a run of another model: expected one of ur4rec-v2")
    return earlier


class Texts:
    """The texts of a run, and what the encoder makes of them."""

    def __init__(self, setting: Setting, config: UR4RecV2Config) -> None:
        self.setting, self.config = setting, config
        self.learns = config.train == "end-to-end"
        self.made: tuple[np.ndarray, ProfileSentences, Tensor | TokenTable] | None = None  # of a split's items

    def descriptions(self, split: Split) -> Descriptions:
        """Those of --method.descriptions, or made without a language model: so is what a new history is told by."""
        catalog, config, is_new = self.setting.catalog, self.config, split.name == HISTORIES
        if config.descriptions is not None and not is_new:
            return Descriptions.read(config.descriptions, split, catalog)
        settings = DescriptionSettings(profile_every=0 if is_new else config.profile_every)
        return Descriptions.of_templates(split, catalog, settings)

    def rows(self, split: Split, window: int, num_users: int) -> PreferenceRows:
        """What puts the rows of a split together; what is made of its texts serves all splits of the same events."""
        if self.made is None or self.made[0] is not split.items:
            profiles = ProfileSentences.of(self.descriptions(split), self.config.profile_sentences)
            is_new = split.name == HISTORIES
            read = self.tokens(profiles.sentences) if self.learns else self.vectors(profiles.sentences, keep=not is_new)
            self.made = split.items, profiles, read
        known_users = split.name != HISTORIES and split.num_users == num_users
        return PreferenceRows(split, *self.made[1:], window, known_users)

    def item_sentences(self) -> list[list[str]]:
        """What is encoded of each item's text: all in one, or its first sentences, as many of each, some empty."""
        texts, config = self.descriptions(self.setting.split).item_texts, self.config
        if not config.co_attention:
            return [[text] for text in texts]
        found = [split_sentences(text, config.description_sentences) for text in texts]
        return [sentences + [""] * (config.description_sentences - len(sentences)) for sentences in found]

    def of_items(self) -> Tensor:
        """The items' texts as vectors, [N + 1, Q, T]."""
        sentences = self.item_sentences()
        return self.vectors([s for text in sentences for s in text]).unflatten(0, (len(sentences), -1))

    def item_tokens(self) -> TokenTable:
        """The tokens of what `of_items` encodes, none of an empty sentence."""
        sentences = [s for text in self.item_sentences() for s in text]
        table = self.tokens(sentences)
        return TokenTable.of([table[i].tolist() if sentence else [] for i, sentence in enumerate(sentences)])

    def tokens(self, texts: Sequence[str]) -> TokenTable:
        """The texts' tokens with the special ones around them; the first, empty text has some, too."""
        return encoder_tokens(texts, self.config.encoder)

    def vectors(self, texts: Sequence[str], *, keep: bool = True) -> Tensor:
        """Return the texts as vectors [n, T] float16, empty ones as zeros; those of new histories are not kept."""
        encoder = self.config.encoder
        return torch.from_numpy(
            kept_vectors(texts, encoder, self.setting.cache) if keep else vectors_now(texts, encoder)
        )

    def encoder(self) -> TextEncoder:
        """The text encoder, of which the last layers learn."""
        return learning_encoder(self.config.encoder, self.config.encoder_layers, "--method.encoder_layers")


def saved_sizes(folder: Path, config: UR4RecV2Config, num_items: int) -> tuple[int, Tensor]:
    """Return how many users a finished run remembers, and an empty table of its items' texts."""
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        users = file.get_slice("memory.until").get_shape()[0] if config.memory.enabled else 0
        return users, torch.zeros(file.get_slice("item_texts").get_shape(), dtype=torch.float16)


def finish_model(prepared: nn.Module, model: UR4RecV2, batches: Sequence[Any], split: Split) -> None:
    """Bring texts and memory up to date with the final weights, then choose the fusion's weight on validation."""
    prepared.eval()
    if model.encoder is not None:
        prepared(batches[0], "keep_texts")
    if model.memory is not None:
        for batch in batches:
            prepared(batch, "remember")
    if model.config.fusion.sasrec_weight is None:
        choose_shift(prepared, model, batches, split)


def choose_shift(prepared: nn.Module, model: UR4RecV2, batches: Sequence[Any], split: Split) -> None:
    """Set the shift with the best NDCG@10 on validation; of equal ones the one nearest to the shift there is."""
    targets = split.target_items("valid")
    counts: list[tuple[int, int, int, int]] = []
    for batch in batches:
        rows = batch.row.cpu().numpy()
        fused = prepared(batch, "choices").float()
        seen = (torch.from_numpy(a).to(fused.device) for a in seen_pairs(split, "valid", "full-history", rows))
        target = torch.from_numpy(targets[rows]).to(fused.device)
        seen_rows, seen_items = seen
        for choice, scores in enumerate(fused):
            allowed = candidate_mask(scores, target, seen_rows, seen_items, None)
            greater, equal, _ = count_among(scores, target, allowed)
            counts += zip(rows.tolist(), [choice] * len(rows), greater.tolist(), equal.tolist(), strict=True)
    everyone = np.unique(np.array(gather_object(counts)), axis=0)  # a loader may repeat rows
    gain = per_user_metrics(everyone[:, 2], everyone[:, 3], (10,))["NDCG@10"]
    each = [gain[everyone[:, 1] == choice].mean() for choice in range(len(model.fusion.choices()))]
    shifts = model.fusion.choices()
    best = [shift for shift, value in zip(shifts, each, strict=True) if value >= max(each) - 1e-12]
    model.fusion.shift.copy_(min(best, key=lambda shift: abs(shift.sigmoid() - model.fusion.shift.sigmoid())))
