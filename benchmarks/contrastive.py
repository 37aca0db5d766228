"""A contrastive step of dense retrieval beside sentence-transformers: the same pairs, encoder, batch and loss.

python benchmarks/contrastive.py          (all-MiniLM-L6-v2, MovieLens 100K; two minutes on two cores)

A pair is a user's history and the next title, as texts; all other titles of a batch are negatives, cosines are divided
by .05. Each is a process of its own with its own training loop; the peer tokenises texts in every step, as it does for
its users.
"""

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.contest import PLAIN_LOOP, Contestant, Turns, compare, keep, take_part, take_turns

STEPS, BATCH, LR, TEMPERATURE = 4, 32, 2e-5, 0.05  # steps of a turn
PEER = "sentence-transformers"
PAIRS = "--method.texts.max_history 10 --method.texts.pool_prefix true --method.loss in-batch".split()
LOSS = f"--method.temperature {TEMPERATURE} --method.mask_history false".split()
LOOP = f"--train.batch_size {BATCH} --train.lr {LR} --train.log_every_steps {STEPS}".split()
FLAGS = [
    *("--model=dense-retrieval", "--data.source=ml-100k", "--backbone.name=minilm", "--backbone.adapter=none"),
    *(*PAIRS, *LOSS, *LOOP, *PLAIN_LOOP, "--method.cuts=1"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--repeats", type=int, default=4)
    arguments = parser.parse_args()
    precision = arguments.precision
    with TemporaryDirectory() as name:
        folder = Path(name)
        flags = [*FLAGS, f"--train.precision={precision}", f"--data.cache={folder}"]
        write_pairs(flags, folder / "pairs.json")
        contestants = {
            "here": Contestant([__file__, "worker", *flags, f"--output={folder / 'here'}"]),
            PEER: Contestant([__file__, "worker", PEER, str(folder / "pairs.json"), precision]),
        }
        rounds = take_turns({n: partial(c.round, STEPS) for n, c in contestants.items()}, arguments.repeats)
    loss = f"loss {rounds['here'][-1]['loss']:.2f} and {rounds[PEER][-1]['loss']:.2f}"
    what = f"contrastive training {precision}, {STEPS} steps of {BATCH} pairs"
    comparison = compare(rounds, what, "here", PEER, aim=1.5, beside=loss)
    settings = {"flags": FLAGS, "precision": precision, "contestants": {n: c.facts for n, c in contestants.items()}}
    keep(f"speed-contrastive-{precision}", "benchmarks/contrastive.py", settings, rounds, [comparison])


def write_pairs(flags: list[str], file: Path) -> None:
    """Write the texts of an epoch's pairs, and where the encoder's files are."""
    from benchmarks.training import setting_of
    from data.retrieval_examples import TrainingCuts
    from launch.methods import METHODS
    from models.pretrained import MINILM, path_of

    setting = setting_of(flags)
    parts, built = setting.split, METHODS["dense-retrieval"].build(setting)
    examples = built.training()
    assert isinstance(examples, TrainingCuts)
    assert built.tokenizer is not None
    decode = partial(built.tokenizer.decode, skip_special_tokens=True)
    pairs = []
    for user, draw in zip(examples.user, examples.draw, strict=True):
        items, cut = parts.training_items(int(user)), int(examples.positions(int(user), 0)[draw])
        pairs.append((decode(examples.texts.user(items[:cut])), decode(examples.texts.item(int(items[cut])))))
    file.write_text(json.dumps({"encoder": path_of(MINILM), "pairs": pairs}))


def train_peer(file: str, precision: str) -> None:
    """The trainer of sentence-transformers, with a callback that waits for its turn."""
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.losses import MultipleNegativesRankingLoss

    from benchmarks import hf_trainer

    turns, given = Turns(), json.loads(Path(file).read_text())
    users, items = zip(*given["pairs"], strict=True)
    model = SentenceTransformer(given["encoder"], device="cpu")
    same = hf_trainer.arguments(Path(file).with_name("peer"), BATCH, LR, STEPS, precision)
    trainer = SentenceTransformerTrainer(
        model,
        SentenceTransformerTrainingArguments(**same),
        train_dataset=Dataset.from_dict({"anchor": list(users), "positive": list(items)}),
        loss=MultipleNegativesRankingLoss(model, scale=1 / TEMPERATURE),
        callbacks=[hf_trainer.Wait(turns)],
    )
    hf_trainer.train(trainer, turns, precision)


if __name__ == "__main__":
    take_part(main, {PEER: train_peer})
