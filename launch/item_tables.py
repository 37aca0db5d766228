"""The item tables of a model that reads item vectors, from an earlier run, from titles or from chance."""

from pathlib import Path
from typing import Literal

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from data.prompts import title_texts
from data.title_tokens import TokenTable, encode
from models.backbone import Backbone, BackboneConfig, causal_model, load_backbone
from models.devices import own_device
from models.e4srec import E4SRecConfig, token_norm
from models.item_embeddings import ItemTable, ItemTableConfig, mean_token_embeddings
from models.pretrained import load_saved_tokenizer
from models.text_vectors import text_vectors

from .earlier_runs import require_run
from .setting import Setting


def item_tables(
    setting: Setting, config: E4SRecConfig, backbone: Backbone, tokenizer: PreTrainedTokenizerBase
) -> tuple[ItemTable, ItemTable]:
    """Make the tables that a backbone reads and is matched with; those of a finished run get their shapes only."""
    width, norm = causal_model(backbone).config.get_text_config().hidden_size, token_norm(backbone)
    titles = title_texts(setting.catalog)[1:]

    def make(part: ItemTableConfig, name: str, flag: Literal["input", "output"]) -> ItemTable:
        source: str = part.source
        if source == "auto":
            without_run = "title" if setting.catalog.has_titles else "random"
            source = "sasrec" if config.sasrec is not None else without_run
        if setting.saved is not None:
            vectors = torch.ones(saved_shape(setting.saved, name))
        elif source == "random":
            generator = torch.Generator().manual_seed(setting.seed)
            vectors = torch.randn(setting.catalog.num_items + 1, width, generator=generator)
        elif source == "title":
            vectors = mean_token_embeddings(backbone, TokenTable.of([[], *encode(tokenizer, titles)]))
        elif source == "encoder":
            vectors = encoded_titles(config.encoder, titles)
        elif config.sasrec is None:
            raise ValueError(
                f"--method.{flag}.source sasrec needs --method.sasrec: a run folder or a .safetensors file"
            )
        else:
            vectors = vectors_of(config.sasrec, setting)
        vectors[0] = 0
        return ItemTable(vectors, part, width, norm, flag)

    table_in = make(config.input, "input", "input")
    return table_in, table_in if config.output.tied else make(config.output, "output.table", "output")


def encoded_titles(encoder: str, titles: list[str]) -> Tensor:
    """Return what a text encoder makes of each title, [N + 1, D]; row 0 is zero."""
    tokenizer = load_saved_tokenizer(encoder)
    frozen = BackboneConfig(name=encoder)
    model = load_backbone(frozen, tokenizer, seed=0, device=own_device(), trainable=False, head=False)
    vectors = text_vectors(model, tokenizer, titles)
    return torch.cat([torch.zeros_like(vectors[:1]), vectors])


def vectors_of(path: Path, setting: Setting) -> Tensor:
    """Return the item vectors [N + 1, D] of a run of the same data, or of a file with one table.

    Raises ValueError unless they fit. A file says nothing about its items but their number.
    """
    if path.suffix != ".safetensors":
        known = setting.load_model(require_run(path, "sasrec", setting).folder).model.catalogue_vectors()
        if known is None:
            raise ValueError(
                f"--method.sasrec {path} is a run without item vectors: expected one of sasrec, gru4rec, lrurec or "
                "e4srec"
            )
        vectors = known
    elif not path.is_file():
        raise ValueError(f"--method.sasrec {path}: there is no such file")
    else:
        tables = [tensor for tensor in load_file(path).values() if tensor.ndim == 2]
        if len(tables) != 1:
            raise ValueError(f"--method.sasrec {path} holds {len(tables)} tables, expected one [items + 1, width]")
        vectors = tables[0].float()
    if len(vectors) != setting.catalog.num_items + 1:
        raise ValueError(
            f"--method.sasrec {path} has vectors of {len(vectors) - 1:,} items, and the catalogue has "
            f"{setting.catalog.num_items:,}: it belongs to other data or another --data.item_core"
        )
    return vectors


def saved_shape(model_folder: Path, name: str) -> list[int]:
    """Return the shape of the item table `name` in a finished run."""
    with safe_open(model_folder / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
        key = next(key for key in (f"{name}.learned.weight", f"{name}.fixed") if key in names)
        return file.get_slice(key).get_shape()
