"""SASRec's training beside RecTools': the same users, window, width, layers, heads, batch and loss.

python benchmarks/sasrec.py rectools               (MovieLens 1M; four minutes alone on two cores)

Each is a process of its own that trains with its own loop and data loader, a few steps a turn. RecTools trains the
last window of every user and pads it to 200 events; so do we here, without the padding.
"""

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.contest import PEERS, Contestant, Round, Turns, compare, keep, take_turns

THREADS = 2
STEPS = 8  # a turn
WINDOW, WIDTH, HEADS, BLOCKS, DROPOUT, BATCH = 200, 128, 2, 2, 0.3, 128  # of launch/recipes/ml-1m/sasrec.yaml
SHAPE = f"--method.hidden_size {WIDTH} --method.num_heads {HEADS} --method.num_blocks {BLOCKS}".split()
WINDOWS = f"--method.window {WINDOW} --method.windows last --method.dropout {DROPOUT}".split()
LOOP = f"--train.batch_size {BATCH} --train.epochs 1000 --train.eval_every_epochs 1000 --train.log_every_steps {STEPS}"
FLAGS = ["--model=sasrec", *SHAPE, *WINDOWS, *LOOP.split(), "--train.trackers=[]"]
OURS = {"bf16": "--train.precision=bf16", "fp32": "--train.precision=fp32"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("peer", choices=["rectools"])
    parser.add_argument("--repeats", type=int, default=4)
    arguments = parser.parse_args()
    with TemporaryDirectory() as folder:
        against_rectools(arguments.repeats, Path(folder))


def against_rectools(repeats: int, folder: Path) -> None:
    """An epoch of MovieLens 1M: 6,040 last windows in 48 steps."""
    flags = [*FLAGS, *"--data.source ml-1m --data.item_core 5".split()]
    write_histories(flags, folder / "histories.json")
    contestants = {
        f"here, {name}": Contestant([__file__, "worker", *flags, flag, f"--output={folder / name}"], THREADS)
        for name, flag in OURS.items()
    }
    contestants["RecTools"] = Contestant([__file__, "worker-rectools", str(folder / "histories.json")], THREADS, PEERS)

    def play(contestant: Contestant) -> Round:
        played = contestant.round(STEPS)
        return played | {"epoch": played["seconds"] / STEPS * contestant.facts["steps_per_epoch"]}

    rounds = take_turns({name: partial(play, contestant) for name, contestant in contestants.items()}, repeats)
    comparisons = [
        compare(rounds, "SASRec, ML-1M epoch", ours, "RecTools", key="epoch", aim=5.0, beside=losses(rounds, ours))
        for ours in list(rounds)[:-1]
    ]
    facts = {name: contestant.facts for name, contestant in contestants.items()}
    settings = {"flags": flags, "steps": STEPS, "contestants": facts}
    keep("speed-sasrec-rectools", "benchmarks/sasrec.py rectools", settings, rounds, comparisons)


def losses(rounds: dict[str, list[Round]], ours: str) -> str:
    """The training loss of both after the same number of steps."""
    steps, ours_now, peers_now = STEPS * (len(rounds[ours]) + 1), rounds[ours][-1], rounds["RecTools"][-1]
    return f"loss {ours_now['loss']:.2f} and {peers_now['loss']:.2f} at step {steps}"


def write_histories(flags: list[str], file: Path) -> None:
    """Write what every user has in training, oldest item first, for peers to read."""
    from launch.config import parse
    from launch.loading import read_and_split

    _, parts = read_and_split(parse(flags).data)
    histories = [parts.training_items(user).tolist() for user in range(parts.num_users)]
    file.write_text(json.dumps(histories))


def train_rectools(histories: Path) -> None:
    """RecTools' own model, data preparation and Lightning trainer, with a callback that waits for its turn."""
    import pandas as pd
    import pytorch_lightning as pl
    import torch
    from rectools.dataset import Dataset
    from rectools.models import SASRecModel

    turns = Turns()
    losses: list[float] = []

    def report() -> dict[str, float]:
        mean = sum(losses) / len(losses)
        losses.clear()
        return {"loss": mean}

    class Wait(pl.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            turns.step(report)

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
            losses.append(float(outputs["loss"]))

        def on_train_start(self, trainer: Any, module: Any) -> None:
            turns.ready(
                precision="fp32",
                threads=torch.get_num_threads(),
                parameters=sum(p.numel() for p in module.parameters() if p.requires_grad),
                steps_per_epoch=trainer.num_training_batches,
            )

    rows = [
        (user, item, 1.0, pd.Timestamp(place, unit="s"))
        for user, items in enumerate(json.loads(histories.read_text()))
        for place, item in enumerate(items)
    ]
    model = SASRecModel(
        session_max_len=WINDOW,
        n_factors=WIDTH,
        n_heads=HEADS,
        n_blocks=BLOCKS,
        dropout_rate=DROPOUT,
        batch_size=BATCH,
        loss="softmax",
        get_trainer_func=lambda: pl.Trainer(
            max_epochs=1000,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            devices=1,
            callbacks=[Wait()],
        ),
    )
    model.fit(Dataset.construct(pd.DataFrame(rows, columns=["user_id", "item_id", "weight", "datetime"])))


def work(argv: list[str]) -> None:
    if argv[0] == "worker-rectools":
        train_rectools(Path(argv[1]))
    else:
        from benchmarks.training import train

        train(argv[1:], Turns())


if __name__ == "__main__":
    if sys.argv[1:] and sys.argv[1].startswith("worker"):
        work(sys.argv[1:])
    else:
        main()
