"""SASRec's training beside RecTools' and RecBole's: the same users, window, width, layers, heads and loss.

python benchmarks/sasrec.py rectools               (MovieLens 1M; three minutes alone on two cores)
python benchmarks/sasrec.py recbole                (MovieLens 100K; two minutes)

Each is a process of its own that trains with its own loop and data loader, a few steps a turn. RecTools trains the
last window of every user and pads it to 200 events; so do we here, without the padding. RecBole makes an example of
every prefix of every user; the same targets are trained here in one pass a user. A part of an epoch is timed.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.contest import PEERS, PLAIN_LOOP, Contestant, Round, Turns, compare, keep, take_part, take_turns

SCRIPT = str(Path(__file__).resolve())
STEPS = 8  # a turn


class Shape(NamedTuple):
    """What both sides are given of the model and of a step."""

    window: int
    width: int
    heads: int
    blocks: int
    dropout: float
    batch: int

    def flags(self) -> list[str]:
        """Return it as launch/train.py takes it."""
        shape = f"--method.hidden_size {self.width} --method.num_heads {self.heads} --method.num_blocks {self.blocks}"
        loop = f"--method.dropout {self.dropout} --train.batch_size {self.batch}"
        return f"{shape} --method.window {self.window} {loop}".split()


LARGE = Shape(window=200, width=128, heads=2, blocks=2, dropout=0.3, batch=128)  # launch/recipes/ml-1m/sasrec.yaml
FLAGS = ["--model=sasrec", "--method.windows=last", f"--train.log_every_steps={STEPS}", *LARGE.flags(), *PLAIN_LOOP]
OURS = {"bf16": "--train.precision=bf16", "fp32": "--train.precision=fp32"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("peer", choices=["rectools", "recbole"])
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    with TemporaryDirectory() as folder:
        {"rectools": against_rectools, "recbole": against_recbole}[arguments.peer](arguments.repeats, Path(folder))


def against_rectools(repeats: int, folder: Path) -> None:
    """An epoch of MovieLens 1M: 6,040 last windows in 48 steps."""
    flags = [*FLAGS, *"--data.source ml-1m --data.item_core 5".split()]
    write_histories(flags, folder / "histories.json")
    peer = Contestant([SCRIPT, "worker", "rectools", str(folder / "histories.json")], PEERS)
    race("RecTools", peer, flags, STEPS, repeats, folder, what="SASRec, ML-1M epoch", aim=5.0)


def against_recbole(repeats: int, folder: Path) -> None:
    """An epoch of MovieLens 100K: 9 steps here, and 760 of RecBole's, of which a few are timed."""
    flags = [*FLAGS, "--data.source=ml-100k", "--method.windows=all"]
    peer = Contestant([SCRIPT, "worker", "recbole", str(folder)], PEERS)
    race("RecBole", peer, flags, 2, repeats, folder, what="SASRec, ML-100K epoch", aim=50.0)


def race(
    name: str,
    peer: Contestant,
    flags: list[str],
    peers_steps: int,
    repeats: int,
    folder: Path,
    *,
    what: str,
    aim: float,
) -> None:
    """Train in both of our precisions beside a peer, and keep how long an epoch takes."""
    contestants = {
        f"here, {precision}": Contestant([SCRIPT, "worker", *flags, flag, f"--output={folder / precision}"])
        for precision, flag in OURS.items()
    } | {name: peer}

    def play(contestant: Contestant) -> Round:
        steps = peers_steps if contestant is peer else STEPS
        played = contestant.round(steps)
        return played | {"epoch": played["seconds"] / steps * contestant.facts["steps_per_epoch"]}

    rounds = take_turns({name: partial(play, contestant) for name, contestant in contestants.items()}, repeats)
    comparisons = []
    for ours in list(rounds)[:-1]:
        beside = losses(rounds, ours, name) if peers_steps == STEPS else f"{peers_steps} steps of RecBole's a turn"
        comparisons.append(compare(rounds, what, ours, name, key="epoch", aim=aim, beside=beside))
    facts = {name: contestant.facts for name, contestant in contestants.items()}
    settings = {"flags": flags, "steps": STEPS, "steps of the peer": peers_steps, "contestants": facts}
    command = f"benchmarks/sasrec.py {name.lower()}"
    keep(f"speed-sasrec-{name.lower()}", command, settings, rounds, comparisons)


def losses(rounds: dict[str, list[Round]], ours: str, peer: str) -> str:
    """The training loss of both after the same number of steps."""
    steps, ours_now, peers_now = STEPS * (len(rounds[ours]) + 1), rounds[ours][-1], rounds[peer][-1]
    return f"loss {ours_now['loss']:.2f} and {peers_now['loss']:.2f} at step {steps}"


def write_histories(flags: list[str], file: Path) -> None:
    """Write what every user has in training, oldest item first, and the item of validation, for peers to read."""
    from launch.config import parse
    from launch.loading import read_and_split

    _, parts = read_and_split(parse(flags).data)
    histories = [parts.training_items(user).tolist() for user in range(parts.num_users)]
    file.write_text(json.dumps({"histories": histories, "targets": parts.target_items("valid").tolist()}))


def rectools_dataset(file: str) -> Any:
    """Return the histories of a file as RecTools takes them."""
    import pandas as pd
    from rectools.dataset import Dataset

    rows = [
        (user, item, 1.0, pd.Timestamp(place, unit="s"))
        for user, items in enumerate(json.loads(Path(file).read_text())["histories"])
        for place, item in enumerate(items)
    ]
    return Dataset.construct(pd.DataFrame(rows, columns=["user_id", "item_id", "weight", "datetime"]))


def make_rectools(shape: Shape, callbacks: Sequence[Any] = ()) -> Any:
    """Return RecTools' model, untrained, whose trainer stays silent and saves nothing."""
    import pytorch_lightning as pl
    from rectools.models import SASRecModel

    return SASRecModel(
        session_max_len=shape.window,
        n_factors=shape.width,
        n_heads=shape.heads,
        n_blocks=shape.blocks,
        dropout_rate=shape.dropout,
        batch_size=shape.batch,
        loss="softmax",
        get_trainer_func=lambda: pl.Trainer(
            max_epochs=1000,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            devices=1,
            callbacks=list(callbacks),
        ),
    )


def train_rectools(histories: str) -> None:
    """RecTools' own model, data preparation and Lightning trainer, with a callback that waits for its turn."""
    import pytorch_lightning as pl
    import torch

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

    make_rectools(LARGE, [Wait()]).fit(rectools_dataset(histories))


def train_recbole(folder: str) -> None:
    """RecBole's own model, loader and trainer on the MovieLens 100K of its wheel; the loader waits for its turn."""
    import torch
    from recbole.config import Config
    from recbole.data import create_dataset, data_preparation
    from recbole.model.sequential_recommender import SASRec
    from recbole.trainer import Trainer

    turns = Turns()
    sys.argv = sys.argv[:1]  # RecBole reads it, too
    os.chdir(folder)  # and writes where it stands
    settings = {
        "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
        "MAX_ITEM_LIST_LENGTH": LARGE.window,
        "hidden_size": LARGE.width,
        "inner_size": LARGE.width,
        "n_heads": LARGE.heads,
        "n_layers": LARGE.blocks,
        "hidden_dropout_prob": LARGE.dropout,
        "attn_dropout_prob": 0.0,
        "loss_type": "CE",
        "train_neg_sample_args": None,
        "train_batch_size": LARGE.batch,
        "epochs": 1000,
        "eval_step": 0,
        "use_gpu": False,
        "show_progress": False,
    }
    config = Config(model="SASRec", dataset="ml-100k", config_dict=settings)
    train_data, _, _ = data_preparation(config, create_dataset(config))

    class Waiting(type(train_data)):  # type: ignore[misc]
        def __iter__(self) -> Any:
            for batch in super().__iter__():
                turns.step(dict)
                yield batch

    train_data.__class__ = Waiting
    model = SASRec(config, train_data.dataset)
    turns.ready(
        precision="fp32",
        threads=torch.get_num_threads(),
        parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        steps_per_epoch=len(train_data),
    )
    Trainer(config, model).fit(train_data, saved=False)


if __name__ == "__main__":
    take_part(main, {"rectools": train_rectools, "recbole": train_recbole})
