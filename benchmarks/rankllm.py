"""Three ways to have one language model rank the same lists: how fast, and how well.

python benchmarks/rankllm.py                          (the built-in backbone; writes its table into docs/methods/)
python benchmarks/rankllm.py --backbone FOLDER        (any backbone in Hugging Face format; writes nothing)

The model learns to write permutations and to rank by the first identifier (the combined objective), then ranks lists in
three ways: by the logits of the first identifier, by the permutation that it writes, and by yes or no for each
candidate behind one shared prefix, which it is not trained for. The ways take turns on each batch, so all of them meet
the same machine. A list is the next item of a user and others drawn at random. The model learns lists of 5, and quality
is that of lists of 5 (a random order has NDCG@10 .590); of lists of 20 only the cost is measured.
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
LEARNED, LONG = 5, 20  # candidates of a list
TRAINED_AT_ONCE, BATCH = 32, 16
HISTORY, WARMUP, DRAWN_ANEW = 5, 100, 200
GOAL = 2.0  # times as many users as by written permutations
SETTINGS = ListwiseSettings(history_length=HISTORY)
WAYS: tuple[Mode, ...] = ("logits", "generate", "pointwise")


def main() -> None:
    parser = argparse.ArgumentParser(description="Rank the same lists in three ways.")
    parser.add_argument("--backbone", default=TINY, help="tiny, or a folder in Hugging Face format")
    parser.add_argument("--steps", type=int, default=3000, help="training steps of 32 lists")
    parser.add_argument("--users", type=int, default=500, help="users of the sample, all of whose lists are ranked")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    data = DataConfig(source="sample", sample_users=arguments.users)
    interactions = read(data)
    parts, titles = split(interactions, data), title_texts(interactions.catalog)
    model = make_model(arguments.backbone, titles, parts)
    train(model, parts, arguments.steps)
    measured = {count: measure(model, parts, count) for count in (LEARNED, LONG)}
    report = {"hardware": hardware(), "settings": vars(arguments), "goal": GOAL, "measured": measured}
    print(markdown(measured))
    if arguments.backbone == TINY:
        RESULTS.write_text(json.dumps(report, indent=1) + "\n")
        write_section(ROOT / "docs" / "methods" / "rankllm.md", "benchmarks/rankllm.py", markdown(measured))
    sys.exit(0 if ratio(measured) >= GOAL else 1)


def make_model(backbone: str, titles: list[str], parts: Split) -> RankLLM:
    config = RankLLMConfig(num_candidates=LONG, max_failures=1.0, prompts=SETTINGS)
    shape = BackboneConfig(name=backbone, adapter="none", tiny=TinyConfig(hidden_size=128, layers=2))
    texts = [*rank_template(SETTINGS.template).messages("", titles[1:21]), ONE_HISTORY, ONE_CANDIDATE, ONE_QUESTION]
    tokenizer = load_tokenizer(shape, vocabulary_text(titles, parts.item_counts(), texts, LONG_PROMPTS))
    model = load_backbone(shape, tokenizer, seed=0, device="cpu", trainable=True)
    return RankLLM(config, model, ListwiseEncoder(tokenizer, titles, SETTINGS), seed=0)


def train(model: RankLLM, parts: Split, steps: int) -> None:
    """Teach the model the next item before random others, the more popular first; the others change now and then."""
    cuts, rows = training_cuts(parts), response_rows(parts, SETTINGS.history())
    unseen, everything = UnseenCandidates(parts, rows, LEARNED), np.arange(len(cuts))

    def examples(number: int) -> TrainingLists:
        drawn = unseen.draw(everything, Draws.of(number, 0, everything))
        popular = np.argsort(-parts.item_counts()[drawn], axis=1, kind="stable")
        store = CandidateStore(np.take_along_axis(drawn, popular, axis=1), np.zeros(drawn.shape, np.float32))
        return TrainingLists(parts, model.encoder, store, None, LEARNED, 0, writes=True)

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / WARMUP) * (1 - 0.9 * step / steps)
    )
    random, taken = np.random.default_rng(0), examples(0)
    model.train()
    for step in range(steps):
        if step % DRAWN_ANEW == 0:
            taken = examples(step)
        loss = model(taken.collate(random.choice(len(cuts), TRAINED_AT_ONCE, replace=False), epoch=step))
        (loss.total / loss.count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if (step + 1) % 100 == 0:
            print(f"step {step + 1}  loss {loss.total.item() / loss.count:.3f}", flush=True)
    model.eval()


def measure(model: RankLLM, parts: Split, count: int) -> dict[str, Any]:
    """Rank lists of so many candidates in every way, batch by batch; those of 64 users where only the cost counts."""
    candidates = draw_candidates(parts, "test", "candidates-20", seed=0)
    assert candidates is not None
    candidates, ranked = candidates[:, :count], len(candidates) if count == LEARNED else min(64, len(candidates))
    listed = shuffled(candidates, Draws.of(0, 0, np.arange(len(candidates))))
    examples = ListedHistories(parts, "test", model.encoder, listed, count)
    seconds: dict[Mode, list[float]] = {way: [] for way in WAYS}
    ranks: dict[Mode, list[Tensor]] = {way: [] for way in WAYS}
    model.take_counts()
    answers = 0
    for start in range(0, ranked, BATCH):
        indices = np.arange(start, min(start + BATCH, ranked))
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
    result["generate"]["permutations"] = answers / ranked
    return result


def ratio(measured: dict[int, dict[str, Any]]) -> float:
    """Return how many users the logits rank while one is ranked by writing, lists of 20."""
    return measured[LONG]["logits"]["users_per_second"] / measured[LONG]["generate"]["users_per_second"]


def markdown(measured: dict[int, dict[str, Any]]) -> str:
    lines = [
        f"| way to rank | users a second, {LEARNED} candidates | {LONG} candidates | NDCG@10, {LEARNED} candidates | "
        "answers that are permutations |",
        "|" + " --- |" * 5,
    ]
    for way, figures in measured[LEARNED].items():
        share = f"{figures['permutations']:.3f}" if "permutations" in figures else "by construction"
        speeds = " | ".join(f"{measured[count][way]['users_per_second']:.1f}" for count in (LEARNED, LONG))
        lines.append(f"| {way} | {speeds} | {figures['NDCG@10']:.4f} | {share} |")
    said = f"The logits rank {ratio(measured):.1f} times as many users as written answers with {LONG} candidates."
    return "\n".join([*lines, "", said])


if __name__ == "__main__":
    main()
