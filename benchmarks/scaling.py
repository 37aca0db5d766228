"""How much faster two processes of one thread train than one, and what ZeRO leaves on each, measured.

python benchmarks/scaling.py          (some minutes on two quiet cores; writes the table of docs/scaling.md)

The same steps of the same model, large enough that computing takes nearly all the time. Throughput is the median of
what the training loop logs, after the first lines.
"""

import json
import statistics
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from benchmarks.document import hardware, write_section

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "scaling.json"
STRATEGIES = ("ddp", "zero1", "zero2", "zero3")
WARM_UP = 2  # log lines left out
FLAGS = (
    "--model bigrec --data.source sample --backbone.tiny.hidden_size 384 --backbone.tiny.layers 6 "
    "--backbone.tiny.heads 6 --train.batch_size 64 --train.micro_batch_size 32 --train.max_steps 10 "
    "--train.log_every_steps 1 --train.eval_every_steps 1000 --train.group_by_length epoch --train.trackers []"
).split()


def main() -> None:
    with TemporaryDirectory() as folder:
        measured = {"one": measure("one", Path(folder))}
        for strategy in STRATEGIES:
            measured[strategy] = measure(strategy, Path(folder))
            # One process again between the others: what the machine does meanwhile is then seen.
            measured[f"one, beside {strategy}"] = measure("one", Path(folder))
    RESULTS.write_text(json.dumps({"hardware": hardware(), "flags": FLAGS, "runs": measured}, indent=1) + "\n")
    write_section(ROOT / "docs" / "scaling.md", "benchmarks/scaling.py", markdown(measured))
    print(markdown(measured))


def measure(strategy: str, folder: Path) -> dict[str, Any]:
    """Run a strategy in processes of one thread and return tokens/s and the bytes on each process."""
    run = folder / f"{strategy}-{len(list(folder.iterdir()))}"
    launcher = [sys.executable]
    if strategy != "one":
        configuration = ROOT / "launch" / "accelerate" / f"{strategy}.yaml"
        launcher += ["-m", "accelerate.commands.launch", "--config_file", str(configuration), "--num_processes=2"]
    command = [*launcher, str(Path(__file__)), "worker", *FLAGS, f"--output={run}"]
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["env", *(f"{k}={v}" for k, v in environment.items()), *command], cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    speeds = [line["tokens_per_s"] for line in lines if "loss" in line][WARM_UP:]
    held = json.loads((run / "held.json").read_text())
    print(strategy, round(statistics.median(speeds)), held, flush=True)
    return {"tokens_per_s": statistics.median(speeds), "slowest": min(speeds), "fastest": max(speeds), **held}


def work(argv: list[str]) -> None:
    """Train as launch/train.py does, and write what this process then holds."""
    from benchmarks.training import make_trainer_of
    from trainers.signals import Stop

    with Stop() as stop:
        trainer = make_trainer_of(argv, stop)
        with trainer.tracking:
            trainer.train()
    if trainer.runtime.is_main:
        (trainer.folder / "held.json").write_text(json.dumps(held(trainer)))
    trainer.runtime.close()


def held(trainer: Any) -> dict[str, int]:
    """Return the numbers that are trained, and the bytes of weights and of optimizer state on this process."""
    parameters = list(trainer.runtime.unwrap(trainer.model).parameters())
    zero = trainer.runtime.zero
    own = [getattr(parameter, "ds_tensor", parameter) for parameter in parameters]
    inner = trainer.optimizer.optimizer if zero is None else zero._inner
    copies = [] if zero is None else [flat for flat, _ in zero._flat_parameters()]
    state = [t for moments in inner.state.values() for t in moments.values() if torch.is_tensor(t)]
    return {
        "parameters": sum(getattr(p, "ds_numel", p.numel()) for p in parameters),
        "weight_bytes": sum(t.numel() * t.element_size() for t in own),
        "optimizer_bytes": sum(t.numel() * t.element_size() for t in [*state, *copies]),
    }


def formula(strategy: str, parameters: int, processes: int = 2) -> tuple[int, int]:
    """Return the bytes of weights and of optimizer state that a process should hold when everything is trained."""
    shares = processes if strategy.startswith("zero") else 1
    copy = 4 if strategy.startswith("zero") else 0  # ZeRO's own float32 slice of the weights
    weights = 4 * parameters // (processes if strategy == "zero3" else 1)
    return weights, (8 + copy) * parameters // shares


def markdown(measured: dict[str, dict[str, Any]]) -> str:
    """Return the table of speed and memory."""
    lines = ["| strategy | tokens/s | of one process | weights a process, MB (formula) | optimizer, MB (formula) |"]
    lines.append("|" + " --- |" * 5)
    for strategy in STRATEGIES:
        run, beside = measured[strategy], measured[f"one, beside {strategy}"]
        ratio = run["tokens_per_s"] / beside["tokens_per_s"]
        weights, optimizer = formula(strategy, run["parameters"])
        lines.append(
            f"| {strategy}, 2 processes | {run['tokens_per_s']:,.0f} | {ratio:.2f} | "
            f"{_megabytes(run['weight_bytes'])} ({_megabytes(weights)}) | "
            f"{_megabytes(run['optimizer_bytes'])} ({_megabytes(optimizer)}) |"
        )
    alone = statistics.median(speeds(measured))
    return "\n".join(
        ["", f"One process of one thread: {alone:,.0f} tokens/s (median of five runs).", "", *lines]
    ).strip()


def speeds(measured: dict[str, dict[str, Any]]) -> Iterable[float]:
    return [run["tokens_per_s"] for name, run in measured.items() if name.startswith("one")]


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.1f}"


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        work(sys.argv[2:])
    else:
        main()
