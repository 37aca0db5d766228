"""BIGRec's fine-tuning with LoRA beside TRL's SFTTrainer and the Trainer of transformers: the same rows, labels on the
response only.

python benchmarks/fine_tuning.py --backbone FOLDER          (a Llama in Hugging Face format; five minutes on two cores)

Each is a process of its own that trains with its own loop, an epoch of the same 64 prompts of MovieLens 100K a turn,
from the same weights, with the same adapter, batch, optimizer and precision. `dense` is our other way to train BIGRec,
in which one causal pass trains every title of a user's history: other rows, so only its response tokens are compared.
"""

import argparse
import os
import sys
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.contest import PLAIN_LOOP, ROOT, Contestant, Round, Turns, compare, keep, take_turns

THREADS = 2
ROWS, BATCH, LR = 64, 16, 1e-3
RANK, ALPHA, DROPOUT = 8, 16, 0.05  # of BackboneConfig, and as published
STEPS = ROWS // BATCH
BACKBONES = Path(os.environ.get("SHARDREC_BACKBONES", ROOT.parent / "shared" / "backbones"))
LOOP = f"--train.batch_size {BATCH} --train.lr {LR} --train.log_every_steps {STEPS}".split()
FLAGS = ["--model=bigrec", "--data.source=ml-100k", *LOOP, *PLAIN_LOOP]
RESPONSE = f"--method.prompts.mode response --method.prompts.template bigrec-movie --method.prompts.few_shot {ROWS}"
PEERS = ("TRL", "Trainer")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", type=Path, default=BACKBONES / "stories260k")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--repeats", type=int, default=4)
    arguments = parser.parse_args()
    with TemporaryDirectory() as folder:
        compete(arguments.backbone, arguments.precision, arguments.repeats, Path(folder))


def compete(backbone: Path, precision: str, repeats: int, folder: Path) -> None:
    common = [*FLAGS, f"--backbone.name={backbone}", f"--train.precision={precision}", f"--data.cache={folder}"]
    response = [*common, *RESPONSE.split()]
    labels = write_rows(response, folder / "rows")

    def ours(name: str, flags: list[str]) -> Contestant:
        return Contestant([__file__, "worker", *flags, f"--output={folder / name}"], THREADS)

    contestants = {"here": ours("response", response), "here, dense": ours("dense", common)}
    for peer in PEERS:
        contestants[peer] = Contestant(
            [__file__, "worker", peer, str(backbone), str(folder / "rows"), precision], THREADS
        )

    def play(contestant: Contestant) -> Round:
        played = contestant.round(STEPS)
        seconds = played["seconds"] / played.get("labels", labels)
        growth = played["peak_memory"] - played["memory_before"]
        return played | {"per_token": 1e6 * seconds, "growth": growth / 1e6}

    rounds = take_turns({name: partial(play, contestant) for name, contestant in contestants.items()}, repeats)
    comparisons = []
    token, memory = f"BIGRec LoRA {precision}, a response token", f"BIGRec LoRA {precision}, memory of training"
    for peer in PEERS:
        loss = f"loss {rounds['here'][-1]['loss']:.2f} and {rounds[peer][-1]['loss']:.2f} after {repeats + 1} epochs"
        comparisons += [
            compare(rounds, token, "here", peer, key="per_token", unit="µs", aim=2.0, beside=loss),
            compare(rounds, token, "here, dense", peer, key="per_token", unit="µs", aim=None, beside="other rows"),
            compare(rounds, memory, "here", peer, key="growth", unit="MB", aim=1 / 0.6),
        ]
    facts = {name: contestant.facts for name, contestant in contestants.items()}
    settings = {"backbone": backbone.name, "rows": ROWS, "batch": BATCH, "precision": precision, "contestants": facts}
    keep(f"speed-fine-tuning-{backbone.name}-{precision}", "benchmarks/fine_tuning.py", settings, rounds, comparisons)


def write_rows(flags: list[str], folder: Path) -> int:
    """Write the prompts that we train on, as tokens and labels, for peers to read; return the number of labels."""
    from benchmarks.training import setting_of
    from launch.methods import METHODS

    setting = setting_of(flags)
    prompts = METHODS["bigrec"].prompts
    assert prompts is not None
    rows = prompts(setting).rows(setting.split, "train").select_columns(["input_ids", "context"])
    rows.save_to_disk(folder)
    return sum(len(ids) - context for ids, context in zip(rows["input_ids"], rows["context"], strict=True))


def train_peer(peer: str, backbone: str, rows: str, precision: str) -> None:
    """TRL's trainer or that of transformers, with a callback that waits for its turn."""
    import torch
    from datasets import load_from_disk
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from benchmarks import hf_trainer

    turns = Turns()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(backbone, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(backbone)
    lora = LoraConfig(
        task_type="CAUSAL_LM", r=RANK, lora_alpha=ALPHA, lora_dropout=DROPOUT, target_modules="all-linear"
    )
    same = hf_trainer.arguments(Path(rows).with_name(peer), BATCH, LR, STEPS, precision)
    same["train_sampling_strategy"] = "group_by_length"  # as in BIGRec's code
    callbacks: list[Any] = [hf_trainer.Wait(turns)]
    dataset = load_from_disk(rows)
    if peer == "TRL":
        from trl import SFTConfig, SFTTrainer

        dataset = dataset.map(
            lambda row: {"completion_mask": [0] * row["context"] + [1] * (len(row["input_ids"]) - row["context"])},
            remove_columns=["context"],
        )
        trainer: Any = SFTTrainer(
            model,
            SFTConfig(**same, completion_only_loss=True),
            train_dataset=dataset,
            processing_class=tokenizer,
            peft_config=lora,
            callbacks=callbacks,
        )
    else:
        from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

        dataset = dataset.map(
            lambda row: {"labels": [-100] * row["context"] + row["input_ids"][row["context"] :]},
            remove_columns=["context"],
        )
        trainer = Trainer(
            get_peft_model(model, lora),
            TrainingArguments(**same),
            DataCollatorForSeq2Seq(tokenizer),
            train_dataset=dataset,
            callbacks=callbacks,
        )
    hf_trainer.train(trainer, turns, precision)


def work(argv: list[str]) -> None:
    if argv[0] in PEERS:
        train_peer(*argv)
    else:
        from benchmarks.training import train

        train(argv, Turns())


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        work(sys.argv[2:])
    else:
        main()
