"""Write down what a finished run says of the training histories: labels that another model can learn from.

python launch/label.py --run runs/bigrec --output teachers/bigrec
accelerate launch launch/label.py --run runs/rankllm --phase valid --output labels/valid.jsonl

A folder takes the best k items of each training history, of any run that ranks the catalogue, and its item vectors:
what --method.teacher of dllm2rec learns from. A .jsonl file takes how a reranker judges its retriever's candidates, one
JSON line a history; at the end both are compared, on screen and in FILE.audit.json: believe a teacher by its labels of
the phase valid. The same command goes on with what a stopped one left.
"""

import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

sys.path.insert(0, str(Path(__file__).parents[1]))  # the clone itself is importable, installed or not

import numpy as np

from data.candidate_store import CandidateStore, as_test, rows_of
from data.interactions import Catalog
from data.loaders import EvaluationLoader
from data.splits import Split, Targets
from data.teacher_labels import Label, Source, append, judged_before, read_lines, require_training_events
from evaluation.teacher_audit import audit
from launch.loading import LoadedRun, load_run, read_data_of
from launch.parser import SettingsParser
from launch.setting import Reranking
from launch.teaching import write_lists
from models.devices import gather_object
from models.rankllm import TooManyFailures
from trainers.runtime import Runtime, leave


@dataclass(kw_only=True)
class LabelConfig:
    """What to label."""

    run: Path
    """Run folder; for a .jsonl file that of a reranker, rankllm or llamarec."""
    output: Path
    """Folder of lists, or file of judgements (.jsonl); one that is there is gone on with."""
    k: int = 20
    """Folder: items of each list."""
    lists_at_once: int = 8192
    """Folder: lists of one file, and so what a stopped command loses at most; 16 times as many where one pass answers a
    whole window."""
    phase: Literal["train", "valid"] = "train"
    """train: the events that training may see, to learn from. valid: the held-out ones, to measure the teacher by."""
    cuts: int | None = None
    """train: only the last so many events of each user; all when not given."""
    add_target: bool = False
    """train: where the retriever has not found the next item, it takes the place of the last candidate."""
    batch_size: int | None = None
    """Histories of one pass on one process, the run's own when not given."""

    def __post_init__(self) -> None:
        for name in ("cuts", "batch_size", "k", "lists_at_once"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"--{name} {value}: expected at least 1")
        if self.phase == "valid" and (self.cuts is not None or self.add_target):
            raise ValueError("--cuts and --add_target go with --phase train: no teacher is handed a held-out item")
        if self.lists and (self.phase == "valid" or self.add_target or self.batch_size is not None):
            raise ValueError(
                f"--output {self.output} is a folder, for lists of training histories as the run ranks them: --phase "
                "valid, --add_target and --batch_size go with a .jsonl file"
            )

    @property
    def lists(self) -> bool:
        """Whether lists are asked for, and not judgements."""
        return self.output.suffix != ".jsonl"


class Lists(NamedTuple):
    """The histories to judge, and their candidates."""

    rows: Targets
    store: CandidateStore

    def take(self, index: np.ndarray) -> Self:
        rows = Targets(self.rows.user[index], self.rows.position[index])
        return type(self)(rows, CandidateStore(self.store.items[index], self.store.scores[index]))


def main(argv: list[str]) -> int:
    parser = SettingsParser(prog="launch/label.py", description=__doc__)
    config = parser.read_as(LabelConfig, argv)
    run = load_run(config.run)
    if run.built.reranking is None and not config.lists:
        sys.exit(
            f"error: --run {config.run} is a run of {run.config.model}: expected a reranker, rankllm or llamarec; "
            "--output FOLDER takes the best items of any run"
        )
    train = run.config.train
    runtime = Runtime(train.precision, timeout_seconds=train.timeout_seconds)
    parts = read_data_of(run)
    with runtime.watchdog.watching():
        try:
            if config.lists:
                write_lists(run, parts, runtime, config.output, config.k, config.cuts, config.lists_at_once)
            else:
                judge(config, run, runtime, parts)
        except (TooManyFailures, ValueError) as error:
            sys.exit(f"error: {error}")
    runtime.close()
    return 0


def judge(config: LabelConfig, run: LoadedRun, runtime: Runtime, parts: Split) -> None:
    """Let a reranker judge the lists that have no label yet, and compare it with its retriever. Collective."""
    reranking = run.built.reranking
    assert reranking is not None
    lists = choose_lists(config, parts, reranking)
    source = source_of_run(run, config.phase, parts, reranking)
    done = judged_before(config.output, source)
    runtime.wait()  # everybody has read what the main process now adds to
    label(config, run, runtime, parts, without(lists, done, parts), source)
    if runtime.is_main:
        report(config, lists, parts, run.catalog)


def choose_lists(config: LabelConfig, parts: Split, reranking: Reranking) -> Lists:
    """The histories of the phase with the retriever's candidates. Collective."""
    lists = Lists(rows_of(parts, config.phase), reranking.candidates(parts, config.phase))
    if config.phase == "valid":
        return lists
    if config.cuts is not None:
        lists = lists.take(np.flatnonzero(parts.train_end[lists.rows.user] - lists.rows.position <= config.cuts))
    require_training_events(parts, lists.rows.user, lists.rows.position)
    if config.add_target:
        targets = next_items(parts, lists.rows)
        items, missed = lists.store.items.copy(), lists.store.places(targets) < 0
        items[missed, -1] = targets[missed]
        lists = Lists(lists.rows, CandidateStore(items, lists.store.scores))
    return lists


def next_items(parts: Split, rows: Targets) -> np.ndarray:
    """The item behind each history, [n]."""
    return parts.items[parts.offsets[rows.user] + rows.position]


def source_of_run(run: LoadedRun, phase: str, parts: Split, reranking: Reranking) -> Source:
    """Of what the labels of a run are made."""
    return Source(phase, parts.hash, run.folder.path.name, run.checksum, reranking.prompt)


def events_of(rows: Targets, parts: Split) -> list[tuple[str, int]]:
    """Raw user and cut of each row: what names a label."""
    return [(parts.raw_users[u], cut) for u, cut in zip(rows.user.tolist(), rows.position.tolist(), strict=True)]


def without(lists: Lists, done: set[tuple[str, int]], parts: Split) -> Lists:
    """The lists that have no label yet."""
    return lists.take(np.flatnonzero([event not in done for event in events_of(lists.rows, parts)]))


def label(config: LabelConfig, run: LoadedRun, runtime: Runtime, parts: Split, lists: Lists, source: Source) -> None:
    """Judge the lists, each process its share, and add each round of answers to the file. Collective."""
    total = len(lists.rows)
    if not total:
        return
    assert run.built.reranking is not None
    examples = run.built.reranking.listing(as_test(parts, lists.rows), "test", lists.store)
    model = runtime.accelerator.prepare_model(run.built.model, evaluation_mode=True).eval()
    batch_size = config.batch_size or run.config.train.eval_batch_size
    batches: Iterable[Any] = EvaluationLoader(examples, batch_size, runtime.share, runtime.device)
    written: set[int] = set()
    for batch in runtime.watchdog.each(batches):
        scores_BK, statuses = model(batch, method="judged")
        columns = (batch.row.tolist(), batch.candidates.tolist(), scores_BK.float().tolist(), statuses)
        answers = {row: answer for row, *answer in gather_object([*zip(*columns, strict=True)])}
        if runtime.is_main:
            new = {row: answer for row, answer in answers.items() if row not in written}  # a loader may repeat rows
            append(config.output, as_labels(new, lists.rows, parts, run.catalog), source)
            written |= new.keys()
            print(f"\r{len(written)} of {total} lists", end="\n" if len(written) == total else "", flush=True)


def as_labels(answers: dict[int, list[Any]], rows: Targets, parts: Split, catalog: Catalog) -> Iterator[Label]:
    """Answers by row as the lines of a file."""
    for row, (candidates, scores, status) in answers.items():
        ranks = np.empty(len(scores), dtype=np.int64)
        ranks[np.argsort(-np.array(scores), kind="stable")] = np.arange(1, len(scores) + 1)
        user, raw_ids = parts.raw_users[rows.user[row]], [catalog.raw_ids[item] for item in candidates]
        yield Label(user, int(rows.position[row]), raw_ids, ranks.tolist(), [round(s, 6) for s in scores], status)


def report(config: LabelConfig, lists: Lists, parts: Split, catalog: Catalog) -> None:
    """Compare the teacher with the retriever; print the figures and write them beside the labels."""
    row_of = {event: row for row, event in enumerate(events_of(lists.rows, parts))}
    lines = [line for line in read_lines(config.output) if (line["user"], line["cut"]) in row_of]
    next_item = next_items(parts, lists.rows)
    places = []
    for line in lines:
        target = catalog.raw_ids[next_item[row_of[line["user"], line["cut"]]]]
        places.append(line["candidates"].index(target) if target in line["candidates"] else -1)
    ranks = np.array([line["ranks"] for line in lines])
    figures = {"phase": config.phase, **audit(ranks, np.array(places), [line["status"] for line in lines])}
    Path(f"{config.output}.audit.json").write_text(json.dumps(figures, indent=1))
    for name, figure in figures.items():
        print(f"{name}: {figure:.4f}" if isinstance(figure, float) else f"{name}: {figure}")
    print(f"written to {config.output}")


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
