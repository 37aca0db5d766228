"""How far a training step is from the machine: seconds that 10^12 floating-point operations of it take, beside those
of one large matrix product in the same precision.

python benchmarks/machine.py          (SASRec on MovieLens 1M, BIGRec on 100K; two minutes on two cores)

Operations are those of matrix products and attention, as torch counts them; all else that a step does (softmax,
dropout, norms, the optimizer) takes time and counts nothing, so a step cannot reach the product.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.contest import PLAIN_LOOP, THREADS, Round, compare, keep, take_turns, timed
from benchmarks.sasrec import FLAGS as SASREC
from benchmarks.training import make_trainer_of
from data.loaders import Step
from trainers.loop import Trainer
from trainers.signals import Stop

STEPS = 4
SIDE = 2048  # of the matrices whose product is the machine's rate
MODELS = {
    "SASRec step": [*SASREC, "--data.source=ml-1m", "--data.item_core=5"],
    "BIGRec step": ["--model=bigrec", "--data.source=ml-100k", *PLAIN_LOOP],
}
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--precision", choices=list(TYPES), default="fp32")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    precision = arguments.precision
    torch.set_num_threads(THREADS)
    plays: dict[str, Callable[[], Round]] = {"matrix product": timed(products(TYPES[precision]))}
    with TemporaryDirectory() as folder, Stop() as stop:
        for name, flags in MODELS.items():
            own = [f"--train.precision={precision}", f"--data.cache={folder}", f"--output={Path(folder) / name}"]
            plays[name] = timed(steps(make_trainer_of([*flags, *own], stop)))
        rounds = take_turns(plays, arguments.repeats)
    for played in rounds.values():
        for one in played:
            one["per_tera"] = one["seconds"] / one["flops"] * 1e12
    what, beside = f"10^12 operations, {precision}", "ratio: the part of the machine's rate that is reached"
    comparisons = [
        compare(rounds, what, name, "matrix product", key="per_tera", aim=None, beside=beside) for name in MODELS
    ]
    settings = {"flags": MODELS, "steps": STEPS, "side": SIDE}
    keep(f"speed-machine-{precision}", f"benchmarks/machine.py --precision {precision}", settings, rounds, comparisons)


def products(dtype: torch.dtype) -> Callable[[], Round]:
    a, b = torch.randn(2, SIDE, SIDE).to(dtype)

    def multiply() -> Round:
        for _ in range(10):
            a @ b
        return {"flops": 10 * 2 * SIDE**3}

    return multiply


def steps(trainer: Trainer) -> Callable[[], Round]:
    """Return what trains some steps, and counts their operations."""
    trainer.model.train()
    left: Iterator[Step] = iter(trainer.loader.epoch(0))
    taken = [next(left) for _ in range(STEPS)]
    with FlopCounterMode(display=False) as counter:
        train(trainer, taken)

    def again() -> Round:
        train(trainer, taken)
        return {"flops": float(counter.get_total_flops())}

    return again


def train(trainer: Trainer, taken: list[Step]) -> None:
    """Forward, backward and optimizer, as in the loop."""
    for step in taken:
        labels = torch.tensor(sum(batch.count for batch in step.batches))
        for batch in step.batches:
            trainer.runtime.backward(trainer.model(batch).total, labels)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad(set_to_none=True)


if __name__ == "__main__":
    main()
