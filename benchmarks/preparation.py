"""How time and memory of preparing prompts grow with events.

python benchmarks/preparation.py          (minutes, and 20 GB on disk meanwhile; writes its table into docs/results.md)

Folders as MovieLens 20M has them (`ratings.csv`, `movies.csv`), generated, up to 20 million events, 145 distinct items
a user, go through launch/prepare.py with an empty cache: read, split, and one BIGRec prompt an event. Memory is what
the process holds itself at its peak, looked at twenty times a second; pages of files that it has mapped do not count.
"""

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import pyarrow as pa
import pyarrow.csv

from benchmarks.contest import RESULTS, ROOT
from benchmarks.document import hardware, write_section

EVENTS, ITEMS, EVENTS_A_USER = (200_000, 2_000_000, 20_000_000), 27_000, 145
COMMAND = "benchmarks/preparation.py"
SYLLABLES = "ka lor mi ren sta vel do bri an the por shi gal mon ter wi qua ned fu ols"
FLAGS = "--model bigrec --method.prompts.mode response --method.prompts.template dense".split()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="where all files are kept meanwhile")
    folder = parser.parse_args().folder
    measured = [measure(events, folder) for events in EVENTS]
    report = {"hardware": hardware(), "flags": FLAGS, "points": measured}
    (RESULTS / "preparation.json").write_text(json.dumps(report, indent=1) + "\n")
    write_section(ROOT / "docs" / "results.md", COMMAND, markdown(measured))
    print(markdown(measured))


def measure(events: int, parent: Path | None) -> dict[str, Any]:
    with TemporaryDirectory(dir=parent) as folder:
        source = Path(folder) / "generated"
        generate(source, events)
        flags = [*FLAGS, f"--data.source={source}", f"--data.cache={Path(folder) / 'cache'}"]
        began, peak = time.perf_counter(), 0
        printed = Path(folder) / "printed"
        with printed.open("w") as file:
            process = subprocess.Popen([sys.executable, str(ROOT / "launch" / "prepare.py"), *flags], stdout=file)
            while process.poll() is None:
                peak = max(peak, own_memory(process.pid))
                time.sleep(0.05)
        seconds = time.perf_counter() - began
        print(said := printed.read_text(), flush=True)
        if process.returncode:
            sys.exit(f"error: launch/prepare.py ended with {process.returncode}")
        rows = sum(
            int(n.replace(",", "")) for n in re.findall(r"^\s*(?:train|valid|test)\s+([\d,]+)", said, re.MULTILINE)
        )
        return {"events": events, "prompts": rows, "seconds": seconds, "peak_memory": peak}


def generate(folder: Path, events: int) -> None:
    """Write ratings and titles; a user's items are an arithmetic progression modulo a prime, so none comes twice."""
    folder.mkdir()
    random, users = np.random.default_rng(0), events // EVENTS_A_USER
    prime = next(n for n in range(ITEMS - 1, 1, -1) if all(n % d for d in range(2, int(n**0.5) + 1)))
    first, step = random.integers(prime, size=users), random.integers(1, prime, size=users)
    place = np.arange(EVENTS_A_USER)
    ratings = {
        "userId": np.repeat(np.arange(1, users + 1), EVENTS_A_USER),
        "movieId": ((first[:, None] + step[:, None] * place) % prime + 1).reshape(-1),
        "rating": random.integers(1, 11, size=users * EVENTS_A_USER) / 2,
        "timestamp": (random.integers(10**9, size=users)[:, None] + 60 * place).reshape(-1),
    }
    pyarrow.csv.write_csv(pa.table(ratings), folder / "ratings.csv")
    words = ["".join(random.choice(SYLLABLES.split(), size)).title() for size in random.integers(1, 5, size=20_000)]
    chosen = random.choice(words, (ITEMS, 3))
    titles = [f"{' '.join(row[: 1 + item % 3])} ({1930 + item % 90})" for item, row in enumerate(chosen)]
    movies = {"movieId": np.arange(1, ITEMS + 1), "title": titles, "genres": ["Drama|Comedy"] * ITEMS}
    pyarrow.csv.write_csv(pa.table(movies), folder / "movies.csv")


def own_memory(process: int) -> int:
    """Bytes in memory that belong to the process alone, without mapped files; 0 when it is gone."""
    try:
        found = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text())
    except OSError:
        return 0
    return 1024 * int(found[1]) if found else 0


def markdown(measured: list[dict[str, Any]]) -> str:
    lines = ["| events | prompts | seconds | peak GB |", "|" + " --- |" * 4]
    for point in measured:
        gigabytes = point["peak_memory"] / 1e9
        lines.append(f"| {point['events']:,} | {point['prompts']:,} | {point['seconds']:.0f} | {gigabytes:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
