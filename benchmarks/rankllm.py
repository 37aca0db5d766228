"""Three ways to have one language model rank the same lists: how fast, and how well.

python benchmarks/rankllm.py                          (the built-in backbone; writes its table into docs/methods/)
python benchmarks/rankllm.py --backbone FOLDER        (any backbone in Hugging Face format; writes nothing)

The model learns for a while to write permutations and to rank by the first identifier (the combined objective), then
ranks every list in three ways: by the logits of the first identifier, by the permutation that it writes, and by yes or
no for each candidate behind one shared prefix, which it is not trained for. The ways take turns on each batch, so all
of them meet the same machine. A list is the next item of a user and 19 items drawn at random; a random order has
NDCG@10 .227.
"""

import argparse
import json
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from torch import Tensor

from benchmarks.document import hardware, write_section
from data.candidate_rows import UnseenCandidates, shuffled
from data.candidate_store import CandidateStore, training_cuts
from data.config import DataConfig
from data.draws import Draws
from data.listwise_batches import ListedHistories, TrainingLists
from data.listwise_prompts import ListwiseEncoder, ListwiseSettings
from data.listwise_templates import ONE_CANDIDATE, ONE_HISTORY, ONE_QUESTION, rank_template
from data.prompt_rows import response_rows
from data.prompts import title_texts
from data.sources import read
from data.splits import Split, split
from evaluation.metrics import per_user_metrics
from evaluation.protocols import draw_candidates
from models.backbone import TINY, BackboneConfig, load_backbone, load_tokenizer
from models.rankllm import Mode, RankLLM, RankLLMConfig
from models.tiny import LONG_PROMPTS, TinyConfig, vocabulary_text

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "rankllm.json"
CANDIDATES, BATCH = 20, 16
GOAL = 2.0  # times as many users as by written permutations
SETTINGS = ListwiseSettings()
WAYS: tuple[Mode, ...] = ("logits", "generate", "pointwise")


def main() -> None:
    parser = argparse.ArgumentParser(description="Rank the same lists in three ways.")
    parser.add_argument("--backbone", default=TINY, help="tiny, or a folder in Hugging Face format")
    parser.add_argument("--steps", type=int, default=300, help="training steps of 16 lists")
    parser.add_argument("--users", type=int, default=64, help="lists that are ranked")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    data = DataConfig(source="sample", sample_users=arguments.users)
    interactions = read(data)
    parts, titles = split(interactions, data), title_texts(interactions.catalog)
    model = make_model(arguments.backbone, titles, parts)
    train(model, parts, arguments.steps)
    measured = measure(model, parts)
    report = {"hardware": hardware(), "settings": vars(arguments), "goal": GOAL, "measured": measured}
    print(markdown(measured))
    if arguments.backbone == TINY:
        RESULTS.write_text(json.dumps(report, indent=1) + "\n")
        write_section(ROOT / "docs" / "methods" / "rankllm.md", "benchmarks/rankllm.py", markdown(measured))
    sys.exit(0 if ratio(measured) >= GOAL else 1)


def make_model(backbone: str, titles: list[str], parts: Split) -> RankLLM:
    config = RankLLMConfig(num_candidates=CANDIDATES, max_failures=1.0, prompts=SETTINGS)
    shape = BackboneConfig(name=backbone, adapter="none", tiny=TinyConfig(hidden_size=64, layers=2))
    texts = [*rank_template(SETTINGS.template).messages("", titles[1:21]), ONE_HISTORY, ONE_CANDIDATE, ONE_QUESTION]
    tokenizer = load_tokenizer(shape, vocabulary_text(titles, parts.item_counts(), texts, LONG_PROMPTS))
    model = load_backbone(shape, tokenizer, seed=0, device="cpu", trainable=True)
    return RankLLM(config, model, ListwiseEncoder(tokenizer, titles, SETTINGS), seed=0)


def train(model: RankLLM, parts: Split, steps: int) -> None:
    """Teach the model the next item before random others, the more popular first, in steps of BATCH lists."""
    cuts = training_cuts(parts)
    rows = response_rows(parts, SETTINGS.history())
    drawn = UnseenCandidates(parts, rows, CANDIDATES).draw(np.arange(len(cuts)), Draws.of(0, 0, np.arange(len(cuts))))
    drawn = np.take_along_axis(drawn, np.argsort(-parts.item_counts()[drawn], axis=1, kind="stable"), axis=1)
    store = CandidateStore(drawn.astype(np.int32), np.zeros(drawn.shape, np.float32))
    examples = TrainingLists(parts, model.encoder, store, None, CANDIDATES, 0, writes=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    random = np.random.default_rng(0)
    model.train()
    for step in range(steps):
        loss = model(examples.collate(random.choice(len(cuts), BATCH, replace=False), epoch=step))
        (loss.total / loss.count).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def measure(model: RankLLM, parts: Split) -> dict[str, Any]:
    """Rank the test lists in every way, batch by batch."""
    candidates = draw_candidates(parts, "test", "candidates-20", seed=0)
    assert candidates is not None
    listed = shuffled(candidates, Draws.of(0, 0, np.arange(len(candidates))))
    examples = ListedHistories(parts, "test", model.encoder, listed, CANDIDATES)
    seconds: dict[Mode, list[float]] = {way: [] for way in WAYS}
    ranks: dict[Mode, list[Tensor]] = {way: [] for way in WAYS}
    model.take_counts()
    answers = 0
    for start in range(0, len(listed), BATCH):
        indices = np.arange(start, min(start + BATCH, len(listed)))
        batch, target = examples.collate(indices), torch.from_numpy(candidates[indices, :1])
        for way in WAYS:
            began = time.perf_counter()
            model.config = replace(model.config, mode=way)
            scores = model.judge(batch, batch.candidates).scores
            seconds[way].append((time.perf_counter() - began) / len(indices))
            own = scores.gather(1, (batch.candidates == target).int().argmax(1, keepdim=True))
            ranks[way].append(torch.stack([(scores > own).sum(1), (scores == own).sum(1) - 1]))
            if way == "generate":
                answers += model.take_counts()["ok"]
            model.take_counts()
    result: dict[str, Any] = {}
    for way in WAYS:
        greater, equal = torch.cat(ranks[way], dim=1).numpy()
        ndcg = per_user_metrics(greater, equal, (10,))["NDCG@10"].mean()
        result[way] = {"users_per_second": 1 / statistics.median(seconds[way]), "NDCG@10": float(ndcg)}
    result["generate"]["permutations"] = answers / len(listed)
    return result


def ratio(measured: dict[str, Any]) -> float:
    """Return how many users the logits rank while one is ranked by writing."""
    return measured["logits"]["users_per_second"] / measured["generate"]["users_per_second"]


def markdown(measured: dict[str, Any]) -> str:
    lines = [
        "| way to rank 20 candidates | users a second | NDCG@10 | answers that are permutations |",
        "|" + " --- |" * 4,
    ]
    for way, figures in measured.items():
        share = f"{figures['permutations']:.3f}" if "permutations" in figures else "by construction"
        lines.append(f"| {way} | {figures['users_per_second']:.1f} | {figures['NDCG@10']:.4f} | {share} |")
    return "\n".join([*lines, "", f"The logits rank {ratio(measured):.1f} times as many users as written answers."])


if __name__ == "__main__":
    main()
