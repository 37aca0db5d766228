"""Do ahead what a training run does first: read, split and tokenise, with the flags of launch/train.py.

python launch/prepare.py --model bigrec --data.source ml-1m
"""

import logging
import sys
import time
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).parents[1]))  # the clone itself is importable, installed or not

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from data.splits import Split
from data.tokenized import PromptReport
from launch.config import RunConfig, parse
from launch.loading import read_and_split, setting_of
from launch.methods import METHODS, Setting

PHASES: tuple[Literal["train", "valid", "test"], ...] = ("train", "valid", "test")


def main(argv: list[str]) -> int:
    started = time.perf_counter()
    config = parse(argv)
    console = Console(highlight=False)
    catalog, parts = read_and_split(config.data)
    print(
        f"{parts.name}: {parts.num_users:,} users, {parts.num_items:,} items, {len(parts.items):,} events; "
        f"split {parts.kind} {parts.hash[:12]}, item texts {catalog.text_hash[:12]}; "
        f"read in {time.perf_counter() - started:.1f} s"
    )
    setting = setting_of(config, parts, catalog)
    reports = tokenise(config, setting)
    if reports:
        console.print(prompt_table(reports))
        print(f"kept in {setting.cache / 'prompts'}, where a run with these settings finds them")
    else:
        console.print(events_table(parts))
        print(f"{config.model} trains on item ids: there are no prompts to prepare")
    return 0


def tokenise(config: RunConfig, setting: Setting) -> dict[str, PromptReport]:
    """Build the prompts of every phase, without loading a model; return what each cost, nothing without prompts."""
    make_prompts = METHODS[config.model].prompts
    if make_prompts is None:
        return {}
    try:
        prompts = make_prompts(setting)
        micro_batch = min(config.train.micro_batch_size or config.train.batch_size, config.train.batch_size)
        sizes = (micro_batch, config.train.eval_batch_size, config.train.eval_batch_size)
        built = {phase: prompts.rows(setting.split, phase) for phase in PHASES}
        return {phase: PromptReport.of(built[phase], size) for phase, size in zip(PHASES, sizes, strict=True)}
    except (ValueError, OSError) as error:  # a limit that is too small, a tokenizer that is not there, a full disk
        sys.exit(f"error: {error}")


def prompt_table(reports: dict[str, PromptReport]) -> Table:
    """Return a row a phase: padding is the share of it in batches, cut rows have lost titles to max_length."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)  # billions of tokens fit into 80 columns
    for heading in ("prompts", "rows", "tokens", "labels", "padding", "cut", "MB", "time"):
        table.add_column(heading, justify="left" if heading == "prompts" else "right", no_wrap=True)
    for phase, report in reports.items():
        table.add_row(
            *(phase, f"{report.rows:,}", f"{report.tokens:,}", f"{report.label_tokens:,}"),
            *(f"{report.padding_share:.1%}", f"{report.shortened_rows:,}"),
            *(f"{report.bytes_on_disk / 1e6:.1f}", f"{report.seconds:.1f} s"),
        )
    return table


def events_table(parts: Split) -> Table:
    """Return how many users have events in each part of the split, and how many events there are."""
    table = Table(box=SIMPLE_HEAD)
    for heading in ("part", "users", "events"):
        table.add_column(heading, justify="left" if not table.columns else "right")
    table.add_row("train", f"{int((parts.train_end > 0).sum()):,}", f"{int(parts.train_end.sum()):,}")
    for phase in ("valid", "test"):
        table.add_row(phase, *[f"{len(parts.targets(phase)):,}"] * 2)
    return table


if __name__ == "__main__":
    logger = logging.getLogger("shardrec")  # says what is downloaded
    logger.addHandler(logging.StreamHandler(sys.stdout))
    logger.setLevel(logging.INFO)
    sys.exit(main(sys.argv[1:]))
