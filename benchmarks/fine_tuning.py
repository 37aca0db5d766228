"""BIGRec's fine-tuning with LoRA beside TRL's SFTTrainer and the Trainer of transformers: the same rows, labels on the
response only.

python benchmarks/fine_tuning.py          (four minutes on two cores)

Each is a process of its own that trains with its own loop, an epoch of the same prompts of MovieLens 100K a turn, from
the same weights, with the same adapter, batch, optimizer and precision. `dense` is our other way to train BIGRec, in
which one causal pass trains every title of a user's history: other rows, so only its response tokens are compared
(`--dense`).

The backbone has the shape of SmolLM2-135M and random weights, which take as long as others and need no download; its
tokenizer is that of all-MiniLM-L6-v2. `--backbone FOLDER` takes any causal language model in Hugging Face format.
"""

import argparse
import sys
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.contest import PLAIN_LOOP, Contestant, Round, Turns, compare, keep, take_part, take_turns

LR, SMOLLM2 = 1e-3, "smollm2-135m"
RANK, ALPHA, DROPOUT = 8, 16, 0.05  # of BackboneConfig, and as published
FLAGS = ["--model=bigrec", "--data.source=ml-100k", f"--train.lr={LR}", *PLAIN_LOOP]
RESPONSE = "--method.prompts.mode response --method.prompts.template bigrec-movie --method.prompts.history_length 10"
PEERS = ("TRL", "Trainer")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", type=Path, help="a folder; the shape of SmolLM2-135M when not given")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--rows", type=int, default=8, help="prompts of an epoch")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--dense", action="store_true", help="also our dense mode")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    with TemporaryDirectory() as folder:
        backbone = arguments.backbone or write_smollm2(Path(folder) / SMOLLM2)
        compete(backbone, arguments, Path(folder))


def write_smollm2(folder: Path) -> Path:
    """Write a Llama of the published shape with random weights, and a tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from models.pretrained import MINILM, load_saved_tokenizer

    tokenizer = load_saved_tokenizer(MINILM)
    tokenizer.bos_token, tokenizer.eos_token = tokenizer.cls_token, tokenizer.sep_token
    shape = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    shape.bos_token_id, shape.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    shape.pad_token_id = tokenizer.pad_token_id
    torch.manual_seed(0)
    LlamaForCausalLM(shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def compete(backbone: Path, arguments: argparse.Namespace, folder: Path) -> None:
    precision, repeats, steps = arguments.precision, arguments.repeats, arguments.rows // arguments.batch
    common = [*FLAGS, f"--backbone.name={backbone}", f"--train.precision={precision}", f"--data.cache={folder}"]
    common += [f"--train.batch_size={arguments.batch}", f"--train.log_every_steps={steps}"]
    response = [*common, *RESPONSE.split(), f"--method.prompts.few_shot={arguments.rows}"]
    labels = write_rows(response, folder / "rows")

    def play(contestant: Contestant) -> Round:
        played = contestant.round(steps)
        seconds = played["seconds"] / played.get("labels", labels)
        growth = played["peak_memory"] - played["memory_before"]
        return played | {"per_token": 1e6 * seconds, "growth": growth / 1e6}

    comparisons, what = [], f"{backbone.name}, LoRA {precision}"
    every: dict[str, list[Round]] = {}
    facts: dict[str, dict[str, Any]] = {}
    for peer in PEERS:  # one after the other: in float32 all of them together do not fit into 24 GB
        workers = {"here": response, "here, dense": common} if arguments.dense else {"here": response}
        contestants = {
            name: Contestant([__file__, "worker", *flags, f"--output={folder / peer / name}"])
            for name, flags in workers.items()
        }
        given = [str(backbone), str(folder / "rows"), precision, str(arguments.batch)]
        contestants[peer] = Contestant([__file__, "worker", peer, *given])
        rounds = take_turns({name: partial(play, one) for name, one in contestants.items()}, repeats)
        loss = f"loss {rounds['here'][-1]['loss']:.2f} and {rounds[peer][-1]['loss']:.2f} after {repeats + 1} epochs"
        token, memory = f"{what}, a response token", f"{what}, memory of training"
        comparisons += [
            compare(rounds, token, "here", peer, key="per_token", unit="µs", aim=2.0, beside=loss),
            compare(rounds, memory, "here", peer, key="growth", unit="MB", aim=1 / 0.6),
        ]
        if arguments.dense:
            row = compare(rounds, token, "here, dense", peer, key="per_token", unit="µs", aim=None, beside="other rows")
            comparisons.append(row)
        every |= {f"{name}, beside {peer}": played for name, played in rounds.items()}
        facts |= {name: one.facts for name, one in contestants.items()}
        for one in contestants.values():
            one.leave()
    sizes = {"backbone": backbone.name, "rows": arguments.rows, "batch": arguments.batch, "labels": labels}
    settings = {**sizes, "precision": precision, "contestants": facts}
    command = f"benchmarks/fine_tuning.py --precision {precision}" + " --dense" * arguments.dense
    command += "" if arguments.backbone is None else f" --backbone {backbone.name}"
    keep(f"speed-fine-tuning-{backbone.name}-{precision}", command, settings, every, comparisons)


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


def train_peer(peer: str, backbone: str, rows: str, precision: str, batch: str) -> None:
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
    dataset = load_from_disk(rows)
    steps = len(dataset) // int(batch)
    same = hf_trainer.arguments(Path(rows).with_name(peer), int(batch), LR, steps, precision)
    same["train_sampling_strategy"] = "group_by_length"  # as in BIGRec's code
    callbacks: list[Any] = [hf_trainer.Wait(turns)]
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


if __name__ == "__main__":
    take_part(main, {peer: partial(train_peer, peer) for peer in PEERS})
