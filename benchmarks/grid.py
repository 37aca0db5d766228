"""Every method under every strategy: it trains like one process, checkpoints, resumes and evaluates the same.

python benchmarks/grid.py                                (all cells, and the table of docs/scaling.md)
python benchmarks/grid.py --rows "bigrec LoRA 4-bit" --strategies zero3     (these cells of it)
python benchmarks/grid.py --missing                      (cells that have no figure yet; each is kept as soon as it has)

A cell is one run of 50 steps that is stopped after 25 and started again, so its second half comes from a checkpoint.
Dropout is off, for it differs between processes; everything else is as in any run.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.document import hardware, write_section
from launch.run_folder import commit_of_clone
from models.backbone import BackboneConfig, load_backbone, load_tokenizer

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "grid.json"
STEPS = 50
# Largest difference of a logged loss from one process: float32 sums in another order, and bfloat16 with 8 bits.
BOUNDS = {"fp32": 1e-5, "bf16": 1e-3}
STRATEGIES = ("one", "ddp", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload")
COMMON = (
    "--data.source sample --data.sample_users 96 --data.sample_series 20 --train.trackers [] --train.batch_size 16 "
    "--train.micro_batch_size 4 --train.eval_batch_size 40 --train.lr 0.003 --train.schedule linear "
    "--train.warmup_steps 5 --train.max_grad_norm 1.0 --train.log_every_steps 1 --train.save_every_steps 25 "
    "--train.eval_every_steps 100"
).split()
OF_ITEM_IDS = "--method.window 12 --method.hidden_size 32 --method.dropout 0".split()
SASREC, LRUREC, GRU4REC = (["--model", name, *OF_ITEM_IDS] for name in ("sasrec", "lrurec", "gru4rec"))
TINY = "--backbone.tiny.hidden_size 32 --backbone.tiny.layers 2".split()
BIGREC = ["--model", "bigrec", *TINY]
LORA = "--model bigrec --backbone.lora_dropout 0".split()
E4SREC = "--model e4srec --method.prompts.max_history 12 --backbone.lora_dropout 0".split()
CANDIDATES = "--evaluation.protocol candidates-20".split()
LLARA = ["--model", "llara", *TINY, *CANDIDATES]
LLAMAREC = (
    "--model llamarec --method.negatives hard --method.cuts 8 --method.prompts.num_candidates 8 "
    "--method.prompts.history_length 6 --backbone.lora_dropout 0"
).split()
MOE_LORA = "--model ilora --backbone.adapter moe-lora --backbone.lora_dropout 0".split()
ILORA = [*MOE_LORA, *CANDIDATES, "--method.vectors=states"]
# Negatives come from all micro-batches that are trained side by side, so there is one of them, as large as the step.
DENSE = (
    "--model dense-retrieval --method.texts.max_history 6 --method.cuts 2 --method.hard_negatives 2 "
    "--method.log_q true --method.refresh_epochs 0.3 --train.micro_batch_size 16 --backbone.lora_dropout 0"
).split()
TWO_ENCODERS = "--method.two_encoders true --method.learn_temperature true --method.learn_ids true".split()
UR4REC = (
    "--model ur4rec --method.hidden_size 32 --method.dropout 0 --method.history_length 6 --method.num_candidates 8 "
    "--method.cuts 8 --method.preferences.hidden_size 32 --method.preferences.dropout 0"
).split()
RANKLLM = [*("--model", "rankllm"), *TINY, *"--method.num_candidates 6 --method.window 4 --method.stride 2".split()]
UR4REC_V2 = (
    "--model ur4rec-v2 --method.cuts 4 --method.hidden_size 16 --method.num_heads 2 --method.history 8 "
    "--method.answers candidate --method.dropout 0 --method.fusion.kind user --method.fusion.dropout 0 "
    "--method.balance uncertainty"
).split()
ROWS = {
    "sasrec float32": [*SASREC, "--train.precision=fp32"],
    "sasrec bf16": [*SASREC, "--train.precision=bf16"],
    "lrurec float32": [*LRUREC, "--train.precision=fp32"],
    "gru4rec float32": [*GRU4REC, "--method.num_layers=2", "--train.precision=fp32"],
    "dllm2rec-sasrec float32": [
        *"--model dllm2rec-sasrec --method.student.window 12 --method.student.hidden_size 32".split(),
        *"--method.student.dropout 0 --method.vectors.source teacher --method.vectors.weight 0.03".split(),
        "--train.precision=fp32",
    ],
    "bigrec float32": [*BIGREC, "--train.precision=fp32"],
    "bigrec bf16, checkpointing": [*BIGREC, "--train.precision=bf16", "--backbone.gradient_checkpointing=true"],
    "bigrec LoRA float32": [*LORA, "--train.precision=fp32"],
    "bigrec LoRA 4-bit": [*LORA, "--train.precision=bf16", "--backbone.quantization=4bit"],
    "bigrec LoRA 8-bit": [*LORA, "--train.precision=bf16", "--backbone.quantization=8bit"],
    "e4srec float32": [*E4SREC, *TINY, "--train.precision=fp32"],
    "e4srec bf16, checkpointing": [*E4SREC, *TINY, "--train.precision=bf16", "--backbone.gradient_checkpointing=true"],
    "e4srec LoRA 4-bit": [*E4SREC, "--train.precision=bf16", "--backbone.quantization=4bit"],
    "dense-retrieval float32": [*DENSE, *TINY, *TWO_ENCODERS, "--train.precision=fp32"],
    "dense-retrieval float32, GradCache": [*DENSE, *TINY, "--method.grad_cache_rows=3", "--train.precision=fp32"],
    "dense-retrieval LoRA 4-bit, checkpointing": [
        *(*DENSE, "--train.precision=bf16", "--method.grad_cache_rows=8"),
        *("--method.loss=in-batch", "--method.hard_negatives=0"),
        *("--backbone.quantization=4bit", "--backbone.gradient_checkpointing=true"),
    ],
    "llara float32": [*LLARA, "--train.precision=fp32"],
    "llamarec float32": [*LLAMAREC, *TINY, "--train.precision=fp32"],
    "llamarec LoRA 4-bit, vectors, checkpointing": [
        *(*LLAMAREC, "--train.precision=bf16", "--method.identifiers=vectors"),
        *("--backbone.quantization=4bit", "--backbone.gradient_checkpointing=true"),
    ],
    "ilora MoE-LoRA float32": [*ILORA, "--train.precision=fp32"],
    "ilora MoE-LoRA 4-bit, checkpointing": [
        *(*ILORA, "--train.precision=bf16"),
        *("--backbone.quantization=4bit", "--backbone.gradient_checkpointing=true"),
    ],
    "rankllm float32": [*RANKLLM, "--method.prompts.history_length=4", "--train.precision=fp32"],
    "ur4rec float32": [*UR4REC, "--train.precision=fp32"],
    "ur4rec-v2 float32": [*UR4REC_V2, "--train.precision=fp32"],
}


@dataclass
class Cell:
    """What was measured of one row under one strategy."""

    row: str
    strategy: str
    loss_difference: float  # largest, over the logged steps
    resumed: bool
    same_evaluation: bool  # the processes ranked every user as one process ranks them with the saved weights
    seconds: float
    commit: str | None = None  # that it was measured at; cells may be measured one by one

    @property
    def holds(self) -> bool:
        return self.loss_difference <= bound(self.row) and self.resumed and self.same_evaluation


def main() -> None:
    parser = argparse.ArgumentParser(description="Run every method under every strategy.")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=list(STRATEGIES))
    parser.add_argument("--missing", action="store_true", help="leave out cells that have a figure")
    arguments = parser.parse_args()
    whole = arguments.rows == list(ROWS) and arguments.strategies == list(STRATEGIES) and not arguments.missing
    cells = {} if whole else earlier_cells()
    known = set(cells) if arguments.missing else set()
    ran, commit = [], commit_of_clone()  # asked once: writing figures changes the clone
    with TemporaryDirectory() as folder:
        save_inputs(Path(folder))
        for row in arguments.rows:
            wanted = [strategy for strategy in arguments.strategies if (row, strategy) not in known]
            for strategy in dict.fromkeys(("one", *wanted)) if wanted else ():  # all are compared with one process
                cell = cells[row, strategy] = run_cell(row, strategy, Path(folder), commit)
                ran.append(cell)
                print(cell, flush=True)
                write(cells)
    sys.exit(0 if all(cell.holds for cell in ran) else 1)


def write(cells: Mapping[tuple[str, str], Cell]) -> None:
    """Write all figures, and the table of docs/scaling.md."""
    kept = [asdict(cells[key]) for key in product(ROWS, STRATEGIES) if key in cells]
    RESULTS.write_text(json.dumps({"hardware": hardware(), "cells": kept}, indent=1))
    write_section(ROOT / "docs" / "scaling.md", "benchmarks/grid.py", markdown(cells))


def earlier_cells() -> dict[tuple[str, str], Cell]:
    """Return the cells that were measured before, to put new ones among them; exit where another machine did."""
    results = json.loads(RESULTS.read_text())
    if results["hardware"] != hardware():
        sys.exit(
            f"error: {RESULTS} was measured on {results['hardware']}, and this is {hardware()}: measure all cells "
            "here, without --rows and --strategies"
        )
    return {(cell["row"], cell["strategy"]): Cell(**cell) for cell in results["cells"]}


def settings(row: str, inputs: Path) -> list[str]:
    """Return the flags of a row; `inputs` is the folder of `save_inputs`."""
    flags = [f"--backbone.name={inputs / 'backbone'}"] if "LoRA" in row else []
    if row.startswith(("llara", "ilora")):
        flags.append(f"--method.sasrec={inputs / 'sasrec'}")
    if row.startswith(("llamarec", "rankllm", "ur4rec ")):
        flags += [f"--method.retriever={inputs / 'sasrec'}", f"--data.cache={inputs / 'cache'}"]
    if row.startswith("ur4rec "):
        flags.append(f"--method.preferences.encoder={inputs / 'backbone'}")
    if row.startswith("ur4rec-v2"):
        flags += [f"--method.sasrec={inputs / 'sasrec'}", f"--method.encoder={inputs / 'backbone'}"]
        flags.append(f"--data.cache={inputs / 'cache'}")
    if row.startswith("dllm2rec"):
        flags += [f"--method.teacher={inputs / 'sasrec'}", f"--data.cache={inputs / 'cache'}"]
    return [*COMMON, *ROWS[row], *flags]


def bound(row: str) -> float:
    return BOUNDS["fp32" if "float32" in row else "bf16"]


def save_inputs(folder: Path) -> None:
    """Write what rows begin from: a pre-trained base for adapters, backbone/, and a SASRec run, sasrec/."""
    save_small_backbone(folder / "backbone")
    checked([sys.executable, "launch/train.py", *settings("sasrec float32", folder), f"--output={folder / 'sasrec'}"])


def save_small_backbone(folder: Path) -> Path:
    """Write a small Llama in Hugging Face format, as a pre-trained base for LoRA and quantisation."""
    config = BackboneConfig()
    config.tiny.hidden_size, config.tiny.layers = 64, 2
    tokenizer = load_tokenizer(config, ["Painted Shadow 4 (1986)", "Distant Planet 6 (1971)"] * 50)
    load_backbone(config, tokenizer, seed=0, device="cpu", trainable=True).save_pretrained(str(folder))
    tokenizer.save_pretrained(folder)
    return folder


def run_cell(row: str, strategy: str, folder: Path, commit: str | None) -> Cell:
    """Train half, go on with the other half, and evaluate what was saved in one process."""
    run, started = folder / row.replace(" ", "-") / strategy, time.perf_counter()
    launcher = [sys.executable, "-m", "accelerate.commands.launch"]
    launcher += ["--config_file", str(configuration(strategy, folder))] if strategy != "one" else ["--num_processes=1"]
    train = ["launch/train.py", *settings(row, folder), f"--output={run}"]
    output = ""
    for steps in (STEPS // 2, STEPS):
        output = checked([*launcher, *train, f"--train.max_steps={steps}"])
    protocol = json.loads((run / "results.json").read_text())["header"]["protocol"]
    checked([sys.executable, "launch/evaluate.py", f"--run={run}", f"--protocol={protocol}"])
    return Cell(
        row,
        strategy,
        loss_difference(run, run.with_name("one")),
        "resuming" in output,
        same_evaluation(run),
        round(time.perf_counter() - started, 1),
        commit,
    )


def configuration(strategy: str, folder: Path) -> Path:
    """Return the Accelerate configuration of a strategy; ZeRO-3 would keep weights as small as these whole."""
    own = ROOT / "launch" / "accelerate" / f"{strategy}.yaml"
    if not strategy.startswith("zero3"):
        return own
    deepspeed = json.loads((ROOT / "ds_configs" / f"{strategy}.json").read_text())
    deepspeed["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    (folder / f"{strategy}.json").write_text(json.dumps(deepspeed))
    changed = folder / f"{strategy}.yaml"
    changed.write_text(own.read_text().replace(f"ds_configs/{strategy}.json", str(folder / f"{strategy}.json")))
    return changed


def checked(command: list[str]) -> str:
    """Return what a command prints; raise when it fails."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")
    return done.stdout


def losses(run: Path) -> list[tuple[int, float]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


def loss_difference(run: Path, reference: Path) -> float:
    """Return the largest difference of a step's loss; both must have the same steps."""
    ours, theirs = losses(run), losses(reference)
    if [step for step, _ in ours] != [step for step, _ in theirs]:
        raise RuntimeError(f"{run} logged the steps {[step for step, _ in ours]}, {reference} others")
    return max(abs(a - b) for (_, a), (_, b) in zip(ours, theirs, strict=True))


def same_evaluation(run: Path) -> bool:
    """Whether launch/evaluate.py, in one process, ranks every test user as the run did."""
    (again,) = (run / "evaluations").glob("*.parquet")
    return pd.read_parquet(again).equals(pd.read_parquet(run / "ranks" / "test.parquet"))


def markdown(cells: Mapping[tuple[str, str], Cell]) -> str:
    """Return the table: the largest loss difference of each cell, or what failed; nothing where none was measured."""
    lines = ["| method and base | " + " | ".join(STRATEGIES) + " |", "| --- |" + " --- |" * len(STRATEGIES)]
    for row in ROWS:
        entries = [entry(cells[row, strategy]) if (row, strategy) in cells else "" for strategy in STRATEGIES]
        lines.append(f"| {row} | " + " | ".join(entries) + " |")
    return "\n".join(lines)


def entry(cell: Cell) -> str:
    if cell.holds:
        return f"{cell.loss_difference:.0e}"
    reasons = {"does not resume": not cell.resumed, "evaluates otherwise": not cell.same_evaluation}
    return f"{cell.loss_difference:.0e} " + ", ".join(reason for reason, is_so in reasons.items() if is_so)


if __name__ == "__main__":
    main()
