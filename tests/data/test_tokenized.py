"""Prompts as tokens: equal to encoding whole texts, every label once, one build, never half a build."""

import dataclasses
import logging
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from data import tokenized
from data.interactions import Catalog
from data.prompt_rows import PromptSettings
from data.prompts import TEMPLATES, template_by_name
from data.splits import Split, Targets
from data.title_tokens import TitleTokens
from data.tokenized import PromptReport, Prompts, build_prompts, fingerprint
from tests.toys import HARD_TITLES, byte_level_bpe, leave_one_out

TITLES = [*HARD_TITLES[:3], " Agatha Christie", *HARD_TITLES[3:], "trailing blank ", ""]


def make_catalog(titles: list[str]) -> Catalog:
    raw_ids = ["", *(f"raw{item}" for item in range(1, len(titles) + 1))]
    return Catalog(("", *titles), ((),) * len(raw_ids), tuple(raw_ids), has_titles=True)


def make_split(lengths: list[int], num_items: int, seed: int = 0) -> Split:
    items = np.random.default_rng(seed).integers(1, num_items + 1, sum(lengths))
    return leave_one_out(np.split(items, np.cumsum(lengths)[:-1]), num_items, hash=f"hash of seed {seed}")


CATALOG = make_catalog(TITLES)
SPLIT = make_split([30, 2, 1, 3, 12, 4, 55], len(TITLES))


@pytest.fixture(scope="session")
def byte_level() -> PreTrainedTokenizerFast:
    """GPT-2's kind of tokenizer, with merges that reach over quotes and commas, no BOS, and EOS."""
    return byte_level_bpe([template.prompt(TITLES * 3) for template in TEMPLATES.values()] * 3, vocab_size=600)


@pytest.fixture(scope="session")
def merging() -> PreTrainedTokenizerFast:
    """A tokenizer without words: one token may hold the end of a title and the start of the next one."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    corpus = [template.prompt(TITLES * 3) for template in TEMPLATES.values()] * 3
    backend.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=600, special_tokens=["<unk>", "</s>"]))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


TOKENIZERS = ["byte_level", "sentencepiece", "merging"]
Phase = Literal["train", "valid", "test"]


@pytest.fixture
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    return request.getfixturevalue(getattr(request, "param", "byte_level"))


def build(cache: Path, tokenizer: PreTrainedTokenizerBase, phase: Phase = "train", **settings: Any) -> Dataset:
    return build_prompts(SPLIT, CATALOG, tokenizer, PromptSettings(**settings), phase, cache, False)


def whole(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return bos + tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def shown(items) -> list[str]:
    return [CATALOG.titles[item] or CATALOG.raw_ids[item] for item in items]


# --- Titles ---


@pytest.mark.parametrize("tokenizer", ["byte_level", "sentencepiece"], indirect=True)
@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_titles_are_encoded_behind_a_newline_and_end_with_eos(tokenizer, template) -> None:
    tokens = TitleTokens.build(tokenizer, CATALOG, template)
    newline, eos = whole(tokenizer, "\n"), tokenizer.eos_token_id
    assert len(tokens) == len(TITLES) + 1
    assert tokens.offsets.shape == (len(TITLES) + 2,)
    assert tokens.ids.dtype == np.int32
    assert tokens[0].tolist() == [eos]
    for item, text in enumerate(shown(range(1, len(tokens))), start=1):
        in_context = whole(tokenizer, "\n" + template.response(text))
        assert tokens[item].tolist() == [*in_context[len(newline) :], eos]
        assert eos not in tokens[item][:-1], "a title that spells </s> must not end there"
    assert tokens[2].tolist() == tokens[9].tolist(), "equal titles, equal tokens"
    sequences = {tuple(tokens[item]) for item in range(1, len(tokens))}
    assert not any(a != b and b[: len(a)] == a for a in sequences for b in sequences), "a prefix of another"


def test_a_title_that_merges_with_the_newline_is_encoded_alone() -> None:
    backend = Tokenizer(models.WordLevel({"\n": 0, "\nA": 1, "A": 2, "B": 3, "</s>": 4}, unk_token="</s>"))
    backend.pre_tokenizer = pre_tokenizers.Split("B", "isolated")  # "\nA" stays one word, "\nB" does not
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    tokens = TitleTokens.build(tokenizer, make_catalog(["A", "B"]), TEMPLATES["dense"])
    assert [tokens[item].tolist() for item in (1, 2)] == [[2, 4], [3, 4]]


def test_a_tokenizer_without_eos_is_refused(byte_level) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level.backend_tokenizer)
    with pytest.raises(ValueError, match="no EOS"):
        TitleTokens.build(tokenizer, CATALOG, TEMPLATES["dense"])


# --- Response mode ---


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_response_rows_equal_whole_texts(cache, request, kind: str, name: str, caplog) -> None:
    tokenizer = request.getfixturevalue(kind)
    with caplog.at_level(logging.WARNING):
        prompts = build(cache, tokenizer, template=name, history_length=4, max_length=4096)
    if kind != "merging" and name != "dense":
        assert not caplog.records, "titles could have been encoded apart"
    template = template_by_name(name)
    titles = TitleTokens.build(tokenizer, CATALOG, template)
    expected = [(user, position) for user in range(SPLIT.num_users) for position in range(1, SPLIT.train_end[user])]
    assert list(zip(prompts["user"], prompts["position"], strict=True)) == expected
    for row in prompts:
        history = SPLIT.history(row["user"], row["position"])[-4:]
        target = SPLIT.training_items(row["user"])[row["position"]]
        assert row["input_ids"][: row["context"]] == whole(tokenizer, template.prompt(shown(history)))
        assert row["input_ids"][row["context"] :] == titles[target].tolist()
        assert row["length"] == len(row["input_ids"])


def test_the_merging_tokenizer_cannot_be_spliced(cache, merging, caplog) -> None:
    build(cache, merging)
    assert "merges titles" in caplog.text


def test_a_byte_level_row_is_its_whole_text(cache, byte_level) -> None:
    """The seam between prompt and answer is no seam for this kind of tokenizer."""
    row = build(cache, byte_level, history_length=3)[5]
    history = SPLIT.history(row["user"], row["position"])[-3:]
    template = TEMPLATES["bigrec-movie"]
    (target,) = shown([SPLIT.training_items(row["user"])[row["position"]]])
    text = template.prompt(shown(history)) + template.response(target)
    assert row["input_ids"] == [*whole(byte_level, text), byte_level.eos_token_id]


@pytest.mark.parametrize("tokenizer", TOKENIZERS, indirect=True)
@pytest.mark.parametrize("phase", ["valid", "test"])
def test_evaluation_rows_end_before_the_target(cache, tokenizer, phase: Literal["valid", "test"]) -> None:
    prompts = build(cache, tokenizer, phase, history_length=5)
    targets = SPLIT.targets(phase)
    assert prompts["row"][:] == list(range(len(targets)))
    for row in prompts:
        user, position = targets.user[row["row"]], targets.position[row["row"]]
        assert (row["user"], row["position"]) == (user, position)
        text = TEMPLATES["bigrec-movie"].prompt(shown(SPLIT.history(user, position)[-5:]))
        assert row["input_ids"] == whole(tokenizer, text)
        assert row["context"] == row["length"] == len(row["input_ids"])


def test_a_target_without_history_gets_the_empty_form(cache, byte_level) -> None:
    cold = dataclasses.replace(SPLIT, test=Targets(np.array([2]), np.array([0])))
    prompts = build_prompts(cold, CATALOG, byte_level, PromptSettings(), "test", cache, False)
    assert prompts[0]["input_ids"] == whole(byte_level, TEMPLATES["bigrec-movie"].prompt([]))


@pytest.mark.parametrize("tokenizer", TOKENIZERS, indirect=True)
def test_long_rows_lose_their_oldest_titles(cache, tokenizer) -> None:
    free = build(cache, tokenizer, max_length=4096)
    limit = int(np.median(free["length"]))
    prompts = build(cache, tokenizer, max_length=limit)
    template = TEMPLATES["bigrec-movie"]
    lost = 0
    for row, untouched in zip(prompts, free, strict=True):
        assert row["length"] <= limit
        assert row["input_ids"][row["context"] :] == untouched["input_ids"][untouched["context"] :]
        history = shown(SPLIT.history(row["user"], row["position"])[-10:])
        room = limit - (row["length"] - row["context"])
        while len(whole(tokenizer, template.prompt(history))) > room:
            history = history[1:]
        assert row["input_ids"][: row["context"]] == whole(tokenizer, template.prompt(history))
        lost += row["length"] < untouched["length"]
    assert 0 < lost < len(prompts)
    assert PromptReport.of(prompts, 8).shortened_rows == lost
    assert PromptReport.of(free, 8).shortened_rows == 0


@pytest.mark.parametrize("mode", ["response", "dense"])
def test_a_title_that_cannot_fit_is_an_error(cache, byte_level, mode: str) -> None:
    with pytest.raises(ValueError, match=r"event \d+ of user 0 .*--method.prompts.max_length 20 "):
        build(cache, byte_level, mode=mode, max_length=20)
    assert not list((cache / "prompts").glob("*/")), "nothing is left behind"


def test_few_shot_rows_are_drawn_by_seed(cache, byte_level) -> None:
    everything = build(cache, byte_level)
    pairs = {
        seed: list(zip(drawn["user"], drawn["position"], strict=True))
        for seed in (0, 1)
        for drawn in [build(cache, byte_level, few_shot=16, seed=seed)]
    }
    assert len(set(pairs[0])) == len(set(pairs[1])) == 16
    assert pairs[0] != pairs[1]
    rows = {(row["user"], row["position"]): row["input_ids"] for row in everything}
    assert all(row["input_ids"] == rows[row["user"], row["position"]] for row in build(cache, byte_level, few_shot=16))
    assert build(cache, byte_level, few_shot=10_000)["input_ids"][:] == everything["input_ids"][:]


def test_a_phase_without_targets_is_an_error_that_names_it(cache, byte_level) -> None:
    nothing = dataclasses.replace(SPLIT, valid=Targets(np.array([], np.int64), np.array([], np.int64)))
    with pytest.raises(ValueError, match=r"toy: no valid prompts; the split holds out no event"):
        build_prompts(nothing, CATALOG, byte_level, PromptSettings(), "valid", cache, False)


def test_min_history(cache, byte_level) -> None:
    assert min(build(cache, byte_level, min_history=7)["position"]) == 7
    with pytest.raises(ValueError, match=r"no train prompts.*--method.prompts.min_history 999"):
        build(cache, byte_level, min_history=999)


# --- Dense mode ---


@pytest.mark.parametrize("tokenizer", TOKENIZERS, indirect=True)
@pytest.mark.parametrize(("window", "overlap", "tight"), [(8, 3, False), (2, 1, False), (90, 5, False), (8, 5, True)])
def test_every_title_but_the_first_is_a_label_once(cache, tokenizer, window: int, overlap: int, tight: bool):
    titles = TitleTokens.build(tokenizer, CATALOG, TEMPLATES["dense"])
    instruction = whole(tokenizer, TEMPLATES["dense"].prompt([]))
    room = 2 * int(titles.lengths.max()) if tight else 4096
    settings = PromptSettings("dense", "dense", 10, window, overlap, max_length=len(instruction) + room)
    prompts = build_prompts(SPLIT, CATALOG, tokenizer, settings, "train", cache, False)
    labelled: dict[int, list[int]] = {user: [] for user in range(SPLIT.num_users)}
    shortened = 0
    for row in prompts:
        assert row["length"] == len(row["input_ids"]) <= settings.max_length
        parts = np.split(np.array(row["input_ids"]), [len(instruction), row["context"]])
        num_context, num_labels = ((part == tokenizer.eos_token_id).sum() for part in parts[1:])
        position, items = row["position"], SPLIT.training_items(row["user"])
        assert parts[0].tolist() == instruction
        assert parts[1].tolist() == joined(titles, items[position - num_context : position])
        assert parts[2].tolist() == joined(titles, items[position : position + num_labels])
        assert num_context + num_labels <= window
        assert num_context <= min(position, overlap)
        shortened += num_context < min(position, overlap)
        labelled[row["user"]] += range(position, position + num_labels)
    for user, positions in labelled.items():
        assert positions == list(range(1, SPLIT.train_end[user]))
    assert PromptReport.of(prompts, 4).shortened_rows == shortened
    assert (shortened > 0) == tight


def joined(titles: TitleTokens, items: np.ndarray) -> list[int]:
    return [int(token) for item in items for token in titles[item]]


def test_dense_evaluation_reads_the_last_titles(cache, sentencepiece) -> None:
    prompts = build(cache, sentencepiece, "test", template="dense", mode="dense", history_length=3)
    titles = TitleTokens.build(sentencepiece, CATALOG, TEMPLATES["dense"])
    for row in prompts:
        last = SPLIT.history(row["user"], row["position"])[-3:]
        expected = whole(sentencepiece, TEMPLATES["dense"].prompt([])) + [t for item in last for t in titles[item]]
        assert row["input_ids"] == expected
        assert row["context"] == row["length"]


@pytest.mark.parametrize(
    ("settings", "flag"),
    [
        ({"window": 5, "overlap": 5}, "overlap 5"),
        ({"overlap": 0}, "overlap 0"),
        ({"history_length": 0}, "history_length 0"),
        ({"few_shot": 16, "mode": "dense"}, "few_shot 16"),
        ({"mode": "packed"}, "mode 'packed'"),
        ({"template": "alpaca"}, "template 'alpaca'"),
    ],
)
def test_settings_that_contradict_each_other(settings: dict, flag: str) -> None:
    with pytest.raises(ValueError, match=rf"--method.prompts.{flag}"):
        PromptSettings(**settings)


# --- On disk ---


@pytest.mark.parametrize("phase", ["train", "test"])
def test_histories_of_no_data_set_are_not_kept(cache, byte_level, phase: Phase) -> None:
    prompts = Prompts(CATALOG, byte_level, PromptSettings(), cache, main_process=False)
    typed = prompts.rows(dataclasses.replace(SPLIT, hash=""), phase)
    assert not cache.exists()
    assert typed.to_list() == prompts.rows(SPLIT, phase).to_list()
    assert cache.exists()


def test_columns_and_report(cache, byte_level) -> None:
    prompts = build(cache, byte_level)
    kinds = {name: str(feature) for name, feature in prompts.features.items()}
    assert kinds.pop("input_ids") == "List(Value('int32'))"
    assert kinds == dict.fromkeys(["context", "user", "position", "length"], "Value('int32')")
    report = PromptReport.of(prompts, 2)
    lengths = sorted(prompts["length"])
    assert report.rows == len(prompts)
    assert report.tokens == sum(lengths) == sum(map(len, prompts["input_ids"]))
    assert report.label_tokens == sum(lengths) - sum(prompts["context"])
    pairs = [lengths[i : i + 2] for i in range(0, len(lengths), 2)]
    padded = sum(max(pair) * len(pair) for pair in pairs)
    assert report.padding_share == pytest.approx(1 - sum(lengths) / padded)
    assert report.bytes_on_disk == Path(prompts.cache_files[0]["filename"]).stat().st_size
    assert report.seconds > 0


def test_batches_of_rows_do_not_change_them(tmp_path, byte_level, monkeypatch) -> None:
    rows = build(tmp_path / "whole", byte_level).to_list()
    monkeypatch.setattr(tokenized, "ROWS_PER_BATCH", 7)
    assert build(tmp_path / "batches", byte_level).to_list() == rows
    valid = build(tmp_path / "batches", byte_level, "valid")
    monkeypatch.setattr(tokenized, "ROWS_PER_BATCH", 2)
    assert build(tmp_path / "other", byte_level, "valid").to_list() == valid.to_list()


def test_second_start_finds_the_rows(cache, sentencepiece, monkeypatch) -> None:
    split = make_split([200] * 500, len(TITLES))
    first = build_prompts(split, CATALOG, sentencepiece, PromptSettings(), "train", cache, False)
    monkeypatch.setattr(tokenized, "_build", lambda *_: pytest.fail("built again"))
    began = time.perf_counter()
    second = build_prompts(split, CATALOG, sentencepiece, PromptSettings(), "train", cache, False)
    assert time.perf_counter() - began < 0.5
    assert len(second) == len(first) == 500 * 197
    assert second[98_000] == first[98_000]


def test_fingerprint_depends_on_everything_and_nothing_else(byte_level, merging) -> None:
    base: tuple[Any, ...] = (SPLIT, CATALOG, byte_level, PromptSettings(), "test")
    targets = dataclasses.replace(SPLIT, test=Targets(SPLIT.test.user[:-1], SPLIT.test.position[:-1]))
    changed: list[tuple[int, Any]] = [
        (0, dataclasses.replace(SPLIT, name="other")),
        (0, dataclasses.replace(SPLIT, items=SPLIT.items[::-1])),
        (0, dataclasses.replace(SPLIT, train_end=SPLIT.train_end - 1)),
        (0, targets),
        (1, make_catalog([*TITLES[:-1], "renamed"])),
        (2, merging),
        (3, PromptSettings(history_length=9)),
        (3, PromptSettings(template="bigrec-game")),
        (4, "valid"),
    ]
    names = [fingerprint(*(*base[:i], value, *base[i + 1 :])) for i, value in changed]
    assert len({fingerprint(*base), *names}) == len(changed) + 1
    before = fingerprint(*base)
    byte_level(["a", "b c"], padding=True, truncation=True, max_length=3)  # leaves its options in the backend
    assert fingerprint(*base) == before
    # Training rows do not depend on what is tested.
    training = [fingerprint(split, CATALOG, byte_level, PromptSettings(), "train") for split in (SPLIT, targets)]
    assert training[0] == training[1]


@pytest.mark.parametrize("damage", ["truncate", "no rows", "no account"])
def test_a_damaged_folder_is_built_again(cache, byte_level, damage: str) -> None:
    rows = build(cache, byte_level).to_list()
    (prompts,) = cache.glob("prompts/*/prompts.arrow")
    if damage == "truncate":
        os.truncate(prompts, prompts.stat().st_size // 2)
    else:
        (prompts if damage == "no rows" else prompts.with_name("build.json")).unlink()
    assert build(cache, byte_level).to_list() == rows


class Jobs:
    """Processes that build into one cache, each a second slower than needed; `written` tells of bytes."""

    def __init__(self, cache: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        self.cache, self.tokenizer = cache, tokenizer
        self.context = multiprocessing.get_context("fork")
        self.builds, self.written = self.context.Value("i", 0), self.context.Event()
        self.started: list[multiprocessing.process.BaseProcess] = []

    def start(self) -> multiprocessing.process.BaseProcess:
        self.started.append(self.context.Process(target=self._run))
        self.started[-1].start()
        return self.started[-1]

    def _run(self) -> None:
        write = tokenized._write

        def write_slowly(*arguments: Any) -> int:
            with self.builds.get_lock():
                self.builds.value += 1
            shortened = write(*arguments)
            self.written.set()
            time.sleep(1)
            return shortened

        tokenized._write = write_slowly  # type: ignore[assignment]
        build(self.cache, self.tokenizer)


@pytest.fixture
def jobs(cache, byte_level, monkeypatch) -> Iterator[Jobs]:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")  # a fork of a process whose tokenizer has threads hangs
    jobs = Jobs(cache, byte_level)
    yield jobs
    for job in jobs.started:
        job.kill()


def test_two_jobs_at_once_make_one_build(cache, byte_level, jobs: Jobs) -> None:
    for job in [jobs.start(), jobs.start()]:
        job.join(60)
    assert [job.exitcode for job in jobs.started] == [0, 0]
    assert jobs.builds.value == 1
    assert len(build(cache, byte_level)) == sum(np.maximum(SPLIT.train_end - 1, 0))


def test_a_killed_build_is_never_taken_for_a_whole_one(cache, byte_level, jobs: Jobs, monkeypatch) -> None:
    job = jobs.start()
    assert jobs.written.wait(60)
    assert job.pid is not None
    os.kill(job.pid, signal.SIGKILL)
    job.join(60)
    assert list(cache.glob("prompts/*/prompts.arrow")), "it was killed with bytes on disk"

    prompts = build(cache, byte_level)  # neither waits for the dead job's lock nor believes its files
    monkeypatch.setattr(tokenized, "ROWS_PER_BATCH", 5)
    assert prompts.to_list() == build(cache / "fresh", byte_level).to_list()
    assert not list(cache.glob("prompts/*.unfinished"))


def test_a_full_disk_leaves_nothing(cache, byte_level, monkeypatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        build(cache, byte_level)
    assert not list(cache.glob("prompts/*/"))


def test_progress_only_on_the_main_process(cache, byte_level, capfd, monkeypatch) -> None:
    monkeypatch.setattr(tokenized, "ROWS_PER_BATCH", 1)
    monkeypatch.setattr(tokenized, "SHOW_AFTER", 0)
    build(cache, byte_level)
    assert "prompts" not in capfd.readouterr().err
    build_prompts(SPLIT, CATALOG, byte_level, PromptSettings(seed=5), "train", cache, main_process=True)
    assert "train prompts" in capfd.readouterr().err
