"""Write the backbone of a finished run in Hugging Face format, its adapter merged: what --backbone.name reads.

python launch/export.py --run runs/NAME --to FOLDER
python launch/export.py --run runs/ml-100k-e4srec --to FOLDER --item_tokens true
"""

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).parents[1]))  # the clone itself is importable, installed or not

import torch
from torch import nn
from transformers import PreTrainedModel

from launch.item_tokens import with_item_tokens
from launch.loading import LoadedRun, load_run
from launch.parser import SettingsParser
from models.backbone import Backbone
from models.e4srec import E4SRec
from models.moe_lora import find_gate


@dataclass
class ExportConfig:
    """What to write, and where."""

    run: Path
    """Run folder."""
    to: Path
    """Folder to write; it is not there yet, or empty."""
    item_tokens: bool = False
    """Of an e4srec run: write all of it, as a language model whose vocabulary holds the items, `<item ID>` each."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the weights. float32 keeps what was trained; the others round it, and take half the space."""


def main(argv: list[str]) -> int:
    config = SettingsParser(prog="launch/export.py", description=__doc__).read_as(ExportConfig, argv)
    if config.to.exists() and (not config.to.is_dir() or any(config.to.iterdir())):
        sys.exit(f"error: --to {config.to} is there already: name a new folder")
    run = load_run(config.run, full_precision=True)
    tokenizer = run.built.tokenizer
    try:
        backbone = merged(backbone_of(run))
        assert tokenizer is not None
        if config.item_tokens:
            if not isinstance(run.built.model, E4SRec):
                raise ValueError(f"--item_tokens true is for runs of e4srec, and this is one of {run.config.model}")
            backbone, tokenizer = with_item_tokens(run.built.model, backbone, tokenizer, run.catalog)
    except ValueError as error:
        sys.exit(f"error: --run {config.run}: {error}")
    unfinished = config.to.with_name(f".{config.to.name}.unfinished")  # whoever finds the folder finds the whole
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        backbone.to(dtype=getattr(torch, config.dtype)).save_pretrained(unfinished)  # type: ignore[call-arg]
        tokenizer.save_pretrained(unfinished)
        unfinished.replace(config.to)
    except OSError as error:
        sys.exit(f"error: --to {config.to} cannot be written: {error.strerror}")
    if config.item_tokens:
        print(f"{type(backbone).__name__} with {run.catalog.num_items:,} items in its vocabulary: {config.to}")
    else:
        print(f"{type(backbone).__name__} with its tokenizer: --backbone.name {config.to}")
    return 0


def backbone_of(run: LoadedRun) -> Backbone:
    """Return the language model in a run's model; raise ValueError unless there is one."""
    found: dict[str, nn.Module] = {}
    for name, module in run.built.model.named_modules():
        if is_language_model(module) and not any(name.startswith(f"{outer}.") for outer in found):
            found[name] = module
    if len(found) != 1 or run.config.backbone is None:
        raise ValueError(f"a model of {run.config.model} holds {len(found)} backbones, and one is exported")
    (backbone,) = found.values()
    return backbone  # type: ignore[return-value]


def is_language_model(module: nn.Module) -> bool:
    from peft import PeftModel

    return isinstance(module, PreTrainedModel | PeftModel)


def merged(backbone: Backbone) -> PreTrainedModel:
    """Return the model with its adapter added to its weights; raise ValueError where each user has another adapter."""
    if not isinstance(backbone, PreTrainedModel):
        return backbone.merge_and_unload()
    if find_gate(backbone) is not None:
        raise ValueError("its adapter (--backbone.adapter moe-lora) is another one for each user, and cannot be merged")
    return backbone


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
