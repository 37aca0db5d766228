"""Prompts that are tokenised once and kept, beside tokenising in the training loop.

python benchmarks/prompts.py          (BIGRec's prompts of all of MovieLens 1M, built-in tokenizer; two minutes)

Preparing is what launch/prepare.py does with an empty cache, the second start the same with a full one; each in a
process of its own. The loop makes and tokenises the texts of a batch of 32, as a collator would, with the tokenizer's
own threads; it is timed on some thousands of rows, and counted for three epochs.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.contest import Contestant, Round, Turns, compare, keep, take_turns

BATCH, EPOCHS = 32, 3
LOOP_ROWS = 12_800
FLAGS = (
    "--model bigrec --data.source ml-1m --data.item_core 5 "
    "--method.prompts.mode response --method.prompts.template bigrec-movie"
).split()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    with TemporaryDirectory() as folder:

        def started(name: str) -> Contestant:
            return Contestant([__file__, "worker", name, folder])

        prepare, again, loop = (started(name) for name in ("prepare", "again", "loop"))

        def play_loop() -> Round:
            played = loop.round(LOOP_ROWS)
            return played | {"epochs": played["seconds"] / LOOP_ROWS * loop.facts["rows"] * EPOCHS}

        def play_once(contestant: Contestant) -> Round:
            played = contestant.round(1)
            return played | {"epochs": played["seconds"]}

        plays: dict[str, Callable[[], Round]] = {"prepared once": partial(play_once, prepare)}
        plays |= {"second start": partial(play_once, again), "loop": play_loop}
        rounds = take_turns(plays, repeats)
    gigabytes = max(played["peak_memory"] for played in rounds["prepared once"]) / 1e9
    what = f"prompts of ML-1M, {prepare.facts['rows']:,} rows, {EPOCHS} epochs"
    comparisons = [
        compare(rounds, what, "prepared once", "loop", key="epochs", aim=5.0, beside=f"peak memory {gigabytes:.2f} GB"),
        compare(rounds, what, "second start", "loop", key="epochs", aim=None, beside="wanted: below 2 s"),
    ]
    facts = {"prepare": prepare.facts, "loop": loop.facts, "rows timed in the loop": LOOP_ROWS}
    keep("speed-prompts", "benchmarks/prompts.py", {"flags": FLAGS, "contestants": facts}, rounds, comparisons)


def work(way: str, folder: Path) -> None:
    """One of the three, a round at a time."""
    turns, (rows, does) = Turns(), ways(FLAGS, folder)
    if way == "again":
        does[way](0)
    turns.ready(rows=rows)
    turns.serve(does[way])


def ways(flags: list[str], folder: Path) -> tuple[int, dict[str, Callable[[int], Round]]]:
    """Return the rows of an epoch, and what does the three; the loop takes the number of rows to do."""
    import shutil
    from dataclasses import replace

    import numpy as np

    from benchmarks.training import setting_of
    from data.prompt_rows import response_rows
    from data.prompts import template_by_name, title_texts
    from launch.methods import bigrec_prompts

    setting = setting_of(flags)
    prompts, split = bigrec_prompts(setting), setting.split
    rows, texts = response_rows(split, prompts.settings), title_texts(setting.catalog)
    template, random = template_by_name(prompts.settings.template), np.random.default_rng(0)

    def prepare(_: int) -> Round:
        shutil.rmtree(folder / "fresh", ignore_errors=True)
        replace(prompts, cache=folder / "fresh").rows(split, "train")
        return {}

    def again(_: int) -> Round:
        return {"tokens": float(len(replace(prompts, cache=folder / "kept").rows(split, "train")[0]["input_ids"]))}

    def loop(count: int) -> Round:
        drawn = random.choice(len(rows.user), count, replace=False)
        for start in range(0, count, BATCH):
            batch = []
            for row in drawn[start : start + BATCH]:
                items = split.training_items(int(rows.user[row]))[rows.start[row] : rows.stop[row]]
                *history, answer = (texts[item] for item in items)
                batch.append(template.prompt(history) + template.response(answer))
            prompts.tokenizer(batch, truncation=True, max_length=prompts.settings.max_length)
        return {}

    return len(rows.user), {"prepare": prepare, "again": again, "loop": loop}


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        work(sys.argv[2], Path(sys.argv[3]))
    else:
        main()
