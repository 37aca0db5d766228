"""Descriptions as a command writes them: resumed, shared among processes, and free of what their writer was told."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.processes import start_ranks
from data.config import DataConfig
from data.descriptions import TEXTS, Descriptions, DescriptionSettings, subjects
from data.sources import read
from data.splits import split
from launch import describe
from models.backbone import BackboneConfig, load_backbone, load_tokenizer
from models.text_writer import Gumbel, TextWriter, WritingSettings
from tests.conftest import forget_accelerator

DATA = "--data.source sample --data.sample_users 8 --data.sample_series 5 --texts.history_length 4".split()
SAMPLE = DataConfig(source="sample", sample_users=8, sample_series=5)
WRITING = WritingSettings(max_new_tokens=12, temperature=0.7, seed=3)


def model_flags(backbone_root: Path) -> list[str]:
    story = backbone_root / "stories260k"
    sampling = f"--writing.max_new_tokens=12 --writing.temperature=0.7 --writing.seed=3 --backbone.name={story}"
    return [*DATA, "--writer=model", "--batch_size=5", *sampling.split()]


def run(*flags: str, output: Path) -> dict[str, dict]:
    forget_accelerator()
    assert describe.main([*flags, f"--output={output}"]) == 0
    return texts_of(output)


def texts_of(folder: Path) -> dict[str, dict]:
    lines = [json.loads(line) for line in (folder / TEXTS).read_text().splitlines()]
    assert len({line["key"] for line in lines}) == len(lines)
    return {line["key"]: line for line in lines}


@pytest.fixture(scope="module")
def written(backbone_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("descriptions")
    run(*model_flags(backbone_root), output=folder)
    return folder


@pytest.fixture(scope="module")
def writer(backbone_root: Path) -> TextWriter:
    backbone = BackboneConfig(name=str(backbone_root / "stories260k"))
    tokenizer = load_tokenizer(backbone)
    return TextWriter(
        load_backbone(backbone, tokenizer, seed=0, device="cpu", trainable=False), tokenizer, replace(WRITING, seed=0)
    )


def test_templates_describe_everything_and_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    first = run(*DATA, output=tmp_path)
    interactions = read(SAMPLE)
    parts = split(interactions, SAMPLE)
    found = Descriptions.read(tmp_path, parts, interactions.catalog)
    everything = list(subjects(parts, interactions.catalog, DescriptionSettings(history_length=4)))
    expected = [subject.template("movie") for subject in everything]
    assert found.item_texts[1:] + found.user_texts[1:] == expected
    capsys.readouterr()
    assert run(*DATA, output=tmp_path) == first
    assert " 0 texts written" in capsys.readouterr().out
    item = f"{found.item_texts[1]}"
    more = run(*DATA, "--texts.words=item", output=tmp_path)  # other words are another writer: nothing is mixed up
    assert len(more) == 2 * len(first)
    assert Descriptions.read(tmp_path, parts, interactions.catalog).item_texts[1] != item


def test_a_stopped_writer_goes_on_with_the_same_texts(written: Path, backbone_root: Path, tmp_path: Path) -> None:
    whole = texts_of(written)
    shutil.copytree(written, tmp_path, dirs_exist_ok=True)
    lines = (written / TEXTS).read_bytes().splitlines(keepends=True)
    (tmp_path / TEXTS).write_bytes(b"".join(lines[:7]) + lines[7][:20])
    assert run(*model_flags(backbone_root), output=tmp_path) == whole
    assert (tmp_path / TEXTS).read_bytes().startswith(b"".join(lines[:7]))


@pytest.mark.slow
def test_two_processes_write_what_one_does(written: Path, backbone_root: Path, tmp_path: Path) -> None:
    both = start_ranks(*model_flags(backbone_root), output=tmp_path / "two", script="describe")
    for process in both:
        assert process.wait() == 0, process.text()
    assert texts_of(tmp_path / "two") == texts_of(written)


def test_a_text_is_what_follows_its_prompt_whatever_stands_beside_it(writer: TextWriter) -> None:
    prompts = [
        writer.tokenizer(text)["input_ids"] for text in ("Lily saw a big", "One day, a little boy named Tim went")
    ]
    for settings in (writer.settings, WritingSettings(max_new_tokens=12)):
        either = TextWriter(writer.backbone, writer.tokenizer, settings)
        alone = [either.write([prompt], [seed])[0] for seed, prompt in enumerate(prompts)]
        assert either.write(prompts, [0, 1]) == alone
        for text, prompt in zip(alone, prompts, strict=True):
            assert text
            ids = torch.tensor([prompt])
            if settings.temperature == 0:
                for _ in range(12):
                    logits = writer.backbone(input_ids=ids).logits[:, -1]
                    ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
                assert text == " ".join(writer.tokenizer.decode(ids[0, len(prompt) :]).split())
    assert writer.write(prompts[:1], [0]) != writer.write(prompts[:1], [5])


def test_draws_follow_the_softmax_of_the_temperature() -> None:
    scores = torch.tensor([1.0, 0.0, -1.0]).expand(20_000, 3)
    draws = Gumbel(range(len(scores)), 0.5, torch.device("cpu"))
    ids = torch.empty(len(scores), 0)
    for _ in range(2):  # the second numbers of each generator as well as the first
        shares = np.bincount(draws(ids, scores).argmax(1), minlength=3) / len(scores)
        assert shares == pytest.approx((scores[0] / 0.5).softmax(0).numpy(), abs=0.01)


def test_a_prompt_that_is_too_long_loses_its_oldest_events(writer: TextWriter) -> None:
    interactions = read(SAMPLE)
    parts = split(interactions, SAMPLE)
    config = describe.DescribeConfig(output=Path("unused"), texts=DescriptionSettings(history_length=30))
    subject = max(subjects(parts, interactions.catalog, config.texts), key=lambda s: len(s.events))
    whole = writer.encode([subject.prompt("movie")])[0]
    short = TextWriter(writer.backbone, writer.tokenizer, writer.settings)
    seen: list[list[list[int]]] = []
    short.write = lambda prompts, seeds: seen.append(prompts) or ["text"]  # type: ignore[method-assign,func-returns-value]
    short.room = len(whole) - 20
    describe.write(short, [subject], config, "me")
    told = writer.tokenizer.decode(seen[0][0])
    assert len(seen[0][0]) <= short.room
    assert subject.events[-1].title in told
    assert subject.events[0].title not in told
    short.room = 20
    with pytest.raises(ValueError, match="room for 20 beside a text"):
        describe.write(short, [subject], config, "me")


def test_a_chat_model_is_asked_as_it_is_used_to_be(writer: TextWriter) -> None:
    writer.tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}User: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}Bot{% if enable_thinking is false %} at once{% endif %}:{% endif %}"
    )
    try:
        (ids,) = writer.encode(["Hello"])
    finally:
        writer.tokenizer.chat_template = None
    assert ids.count(writer.tokenizer.bos_token_id) == 1
    assert writer.tokenizer.decode(ids, skip_special_tokens=True).strip() == "User: Hello\nBot at once:"
