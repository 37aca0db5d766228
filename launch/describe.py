"""Write what methods such as ur4rec read of users and items: a text each, ahead of training.

python launch/describe.py --data.source ml-1m --output descriptions/ml-1m
accelerate launch launch/describe.py --writer model --backbone.name Qwen/Qwen2.5-7B-Instruct --output descriptions/qwen

Texts of users read only training events, and are written anew every --texts.profile_every of them. The same command
goes on with what a stopped one left, and after new data it writes only the texts of what has changed.
"""

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).parents[1]))  # the clone itself is importable, installed or not

from data.config import DataConfig
from data.description_prompts import wording_digest
from data.descriptions import DescriptionSettings, Subject, append, read_texts, subjects, write_manifest
from launch.loading import read_and_split
from launch.parser import SettingsParser
from models.backbone import TINY, BackboneConfig, causal_model, load_backbone, load_tokenizer
from models.devices import gather_object
from models.text_writer import TextWriter, WritingSettings
from trainers.runtime import Runtime, leave


@dataclass(kw_only=True)
class DescribeConfig:
    """What to describe, and who writes."""

    output: Path
    """Folder of the texts; one that is there is gone on with."""
    writer: Literal["template", "model"] = "template"
    """template: sentences made of titles, categories, years and ratings. model: the language model --backbone.name."""
    batch_size: int = 16
    """Texts that a process writes at a time."""
    data: DataConfig = field(default_factory=DataConfig)
    texts: DescriptionSettings = field(default_factory=DescriptionSettings)
    writing: WritingSettings = field(default_factory=WritingSettings)
    backbone: BackboneConfig = field(default_factory=BackboneConfig)

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"--batch_size {self.batch_size}: expected at least 1")
        if self.writer == "model" and self.backbone.name == TINY:
            raise ValueError("--writer model needs a language model that can write: pass --backbone.name")


def main(argv: list[str]) -> int:
    config = SettingsParser(prog="launch/describe.py", description=__doc__).read_as(DescribeConfig, argv)
    runtime = Runtime()
    with runtime.accelerator.local_main_process_first():
        catalog, parts = read_and_split(config.data)
    with runtime.watchdog.watching():
        try:
            writer = None if config.writer == "template" else load_writer(config, runtime)
            name, about = writer_of(config, writer)
            everything = {s.key(name): s for s in subjects(parts, catalog, config.texts)}
            known = read_texts(config.output)
            if runtime.is_main:
                write_manifest(config.output, parts, name, config.texts, about)
            runtime.wait()  # everybody has read what the main process now adds to
            missing = [subject for key, subject in everything.items() if key not in known]
            describe(config, writer, name, missing, runtime)
        except ValueError as error:
            sys.exit(f"error: {error}")
    if runtime.is_main:
        texts = read_texts(config.output)
        empty = sum(not texts[key] for key in everything)
        print(
            f"{config.output}: {len(missing):,} texts written, {len(everything) - len(missing):,} kept, {empty} empty"
        )
    runtime.close()
    return 0


def load_writer(config: DescribeConfig, runtime: Runtime) -> TextWriter:
    """The language model on this process's device; every process has its own."""
    tokenizer = load_tokenizer(config.backbone)
    model = load_backbone(config.backbone, tokenizer, seed=0, device=runtime.device, trainable=False)
    return TextWriter(model, tokenizer, config.writing)


def writer_of(config: DescribeConfig, writer: TextWriter | None) -> tuple[str, dict[str, object]]:
    """A digest of all that texts depend on beside their facts, and the same in words."""
    about: dict[str, object] = {"writer": config.writer, "wording": wording_digest(config.texts.words, config.writer)}
    if writer is not None:
        backbone = config.backbone
        about["model"] = {"name": backbone.name, "quantization": backbone.quantization, "dtype": backbone.dtype}
        about["commit"] = getattr(causal_model(writer.backbone).config, "_commit_hash", None)
        about["chat"] = hashlib.sha256(str(writer.tokenizer.chat_template).encode()).hexdigest()[:16]
        about["writing"] = asdict(config.writing)
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16], about


def describe(
    config: DescribeConfig, writer: TextWriter | None, name: str, missing: Sequence[Subject], runtime: Runtime
) -> None:
    """Write the missing texts, each process its share, and add each round of them to the file. Collective."""
    words, share = config.texts.words, runtime.share
    if writer is None:
        if runtime.is_main:
            append(config.output, name, [(subject, subject.template(words)) for subject in missing])
        return
    longest_first = sorted(missing, key=lambda subject: -len(subject.prompt(words)))  # what fits, fits from the start
    round_size = config.batch_size * share.num_processes
    for start in runtime.watchdog.each(range(0, len(missing), round_size)):
        mine = longest_first[start : start + round_size][share.process_index :: share.num_processes]
        written = gather_object([*zip(mine, write(writer, mine, config, name), strict=True)])
        if runtime.is_main:
            append(config.output, name, written)
            print(f"\r{min(start + round_size, len(missing))} of {len(missing)} texts", end="", flush=True)
    if runtime.is_main and missing:
        print()


def write(writer: TextWriter, about: Sequence[Subject], config: DescribeConfig, name: str) -> list[str]:
    """The texts about some subjects; a prompt that does not fit loses its oldest events."""
    if not about:
        return []
    told = list(about)
    prompts = writer.encode([subject.prompt(config.texts.words) for subject in told])
    while long := [i for i, prompt in enumerate(prompts) if len(prompt) > writer.room]:
        for i in long:
            if len(told[i].events) < 2:
                raise ValueError(
                    f"the prompt about {told[i].kind} {told[i].name} has {len(prompts[i])} tokens, and the model has "
                    f"room for {writer.room} beside a text: lower --writing.max_new_tokens"
                )
            told[i] = told[i]._replace(events=told[i].events[1:])
        for i, prompt in zip(long, writer.encode([told[i].prompt(config.texts.words) for i in long]), strict=True):
            prompts[i] = prompt
    return writer.write(prompts, [int(subject.key(name)[:15], 16) ^ config.writing.seed for subject in about])


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
