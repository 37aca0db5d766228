"""How long SASRec trains on MovieLens 1M until validation NDCG@10 is .17, here and with RecTools.

make peers && python benchmarks/time_to_quality.py          (an hour: RecTools gets five times our time)

Ours is launch/train.py from its start to the validation that gets there, whatever it does meanwhile. RecTools' time is
that of its `fit_partial`, an epoch a call; between them its own `recommend` is asked for the ten best items of every
user, which does not count. It has our shape; with --large also, at the same time, the larger one of
launch/recipes/ml-1m/sasrec.yaml. One thread each, and processor seconds.
"""

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.contest import PEERS, RESULTS, ROOT, Contestant, Round, Turns, take_part
from benchmarks.sasrec import LARGE, Shape, make_rectools, rectools_dataset, write_histories

SCRIPT = str(Path(__file__).resolve())
WANTED, BUDGET = 0.17, 5  # validation NDCG@10, and how many times our time the peers get
LIKE_OURS = Shape(window=50, width=64, heads=2, blocks=2, dropout=0.2, batch=64)
DATA = "--data.source=ml-1m --data.item_core=5".split()
LOOP = "--train.epochs=30 --train.patience=30 --train.trackers=[] --method.windows=all".split()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--large", action="store_true", help="also RecTools in the shape of ml-1m/sasrec.yaml")
    shapes = [LIKE_OURS, LARGE] if parser.parse_args().large else [LIKE_OURS]
    with TemporaryDirectory() as folder:
        data = Path(folder) / "histories.json"
        flags = ["--model=sasrec", *DATA, *LIKE_OURS.flags(), *LOOP]
        write_histories(flags, data)
        ours = list(train_here(flags, Path(folder) / "run"))
        limit = BUDGET * ours[-1]["seconds"]
        with ThreadPoolExecutor() as pool:
            peers = list(pool.map(lambda shape: list(train_peer(shape, data, limit)), shapes))
    names = [f"RecTools, window {shape.window}, width {shape.width}" for shape in shapes]
    keep({"here": ours, **dict(zip(names, peers, strict=True))}, flags)


def train_here(flags: list[str], folder: Path) -> Iterator[Round]:
    """Run launch/train.py, and yield (epochs, processor seconds since its start, NDCG@10) of every validation."""
    import psutil  # type: ignore[import-untyped]  # Accelerate brings it

    command = [sys.executable, "launch/train.py", *flags, f"--output={folder}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    log = folder.with_suffix(".log")
    with log.open("w") as file:
        process = psutil.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file)
    told = 0
    while process.poll() is None:
        time.sleep(0.2)
        times = process.cpu_times()
        metrics = folder / "metrics.jsonl"
        lines = metrics.read_text().splitlines() if metrics.is_file() else []
        for line in map(json.loads, lines[told:]):
            if "valid/NDCG@10" in line:
                seconds = sum(times[:4])  # user and system, its own and its children's
                yield tell("here", line["epoch"] + 1, seconds, line["valid/NDCG@10"])
                if line["valid/NDCG@10"] >= WANTED:
                    process.kill()
                    process.wait()
                    return
        told = len(lines)
    raise RuntimeError(f"launch/train.py ended below {WANTED}:\n{log.read_text()[-4000:]}")


def train_peer(shape: Shape, data: Path, limit: float) -> Iterator[Round]:
    """Train RecTools an epoch a round, and yield the same of each, until it gets there or `limit` has passed."""
    peer = Contestant([SCRIPT, "worker", "rectools", str(data), json.dumps(shape)], PEERS, threads=1)
    seconds, epoch, best = 0.0, 0, 0.0
    while seconds < limit and best < WANTED:
        played = peer.round(1)
        seconds, epoch, best = seconds + played["processor_seconds"], epoch + 1, max(best, played["NDCG@10"])
        yield tell(f"RecTools, window {shape.window}", epoch, seconds, played["NDCG@10"])
    peer.leave()


def tell(who: str, epoch: float, seconds: float, ndcg: float) -> Round:
    print(f"{who}: epoch {epoch:.0f}, {seconds:.0f} processor seconds, NDCG@10 {ndcg:.4f}", flush=True)
    return {"epoch": epoch, "seconds": round(seconds, 1), "NDCG@10": round(ndcg, 5)}


def train_rectools(file: str, shape: str) -> None:
    """RecTools' own model, an epoch a turn, and what it then recommends for validation."""
    turns = Turns()
    data, dataset = json.loads(Path(file).read_text()), rectools_dataset(file)
    model = make_rectools(Shape(*json.loads(shape)))
    users = list(range(len(data["histories"])))
    target = dict(enumerate(data["targets"]))

    def work(epochs: int) -> Round:
        began = time.process_time()
        model.fit_partial(dataset, min_epochs=epochs, max_epochs=epochs)
        seconds = time.process_time() - began
        best = model.recommend(users, dataset, k=10, filter_viewed=True)
        found = best[best["item_id"] == best["user_id"].map(target)]
        return {
            "processor_seconds": seconds,
            "NDCG@10": float((1 / (found["rank"] + 1).map(math.log2)).sum()) / len(users),
        }

    turns.ready()
    turns.serve(work)


def keep(runs: dict[str, list[Round]], flags: list[str]) -> None:
    """Write the figures, and the table of docs/results.md."""
    from benchmarks.document import hardware, write_section

    ours = runs["here"][-1]["seconds"]
    report: dict[str, Any] = {"command": "benchmarks/time_to_quality.py", "hardware": hardware(), "threads": 1}
    report |= {"wanted": WANTED, "flags": flags, "runs": runs}
    (RESULTS / "time-to-quality.json").write_text(json.dumps(report, indent=1) + "\n")
    machine = report["hardware"]
    lines = [
        f"{machine['device']}, one thread, torch {machine['packages']['torch']}; RecTools trains in float32.",
        "",
        f"| who | epochs | processor s | best validation NDCG@10 | time, over ours to {WANTED} |",
        "|" + " --- |" * 5,
    ]
    for who, run in runs.items():
        best = max(validation["NDCG@10"] for validation in run)
        ratio = f"{run[-1]['seconds'] / ours:.1f}" + ("" if best >= WANTED else ", not reached")
        lines.append(f"| {who} | {run[-1]['epoch']:.0f} | {run[-1]['seconds']:.0f} | {best:.4f} | {ratio} |")
    write_section(ROOT / "docs" / "results.md", report["command"], "\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    take_part(main, {"rectools": train_rectools})
