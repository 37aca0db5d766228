"""The rows of benchmarks/grid.py: flags of every method in small, and what its runs begin from."""

from pathlib import Path

from benchmarks.processes import launched
from models.backbone import BackboneConfig, load_backbone, load_tokenizer

COMMON = (
    "--data.source sample --data.sample_users 96 --data.sample_series 20 --train.trackers [] --train.batch_size 16 "
    "--train.micro_batch_size 4 --train.eval_batch_size 40 --train.lr 0.003 --train.schedule linear "
    "--train.warmup_steps 5 --train.max_grad_norm 1.0 --train.log_every_steps 1 --train.save_every_steps 25 "
    "--train.eval_every_steps 100"
)
FP32, BF16 = "--train.precision fp32", "--train.precision bf16"
TINY = "--backbone.tiny.hidden_size 32 --backbone.tiny.layers 2"
LORA = "--backbone.name {inputs}/backbone --backbone.lora_dropout 0"
MOE_LORA = f"{LORA} --backbone.adapter moe-lora"
IN_4_BITS = f"{BF16} --backbone.quantization 4bit"
IN_8_BITS = f"{BF16} --backbone.quantization 8bit"
CHECKPOINTING = "--backbone.gradient_checkpointing true"
CANDIDATES = "--evaluation.protocol candidates-20"
RETRIEVED = "--method.retriever {inputs}/sasrec --data.cache {inputs}/cache"

OF_ITEM_IDS = "--method.window 12 --method.hidden_size 32 --method.dropout 0"
SASREC, LRUREC = f"--model sasrec {OF_ITEM_IDS}", f"--model lrurec {OF_ITEM_IDS}"
GRU4REC = f"--model gru4rec {OF_ITEM_IDS} --method.num_layers 2"
DLLM2REC = (
    "--model dllm2rec-sasrec --method.student.window 12 --method.student.hidden_size 32 --method.student.dropout 0 "
    "--method.vectors.source teacher --method.vectors.weight 0.03 --method.teacher {inputs}/sasrec "
    "--data.cache {inputs}/cache"
)
RESPONSE = "--method.prompts.mode response --method.prompts.template bigrec-notes --method.prompts.history_length 6"
E4SREC = "--model e4srec --method.prompts.max_history 12"
# Negatives come from all micro-batches that are trained side by side, so there is one of them, as large as the step.
ONE_PASS = "--train.micro_batch_size 16"
DENSE = (
    "--model dense-retrieval --method.texts.max_history 6 --method.cuts 2 --method.log_q true "
    f"--method.refresh_epochs 0.3 {ONE_PASS}"
)
HARD_NEGATIVES = "--method.hard_negatives 2"
TWO_ENCODERS = "--method.two_encoders true --method.learn_temperature true --method.learn_ids true"
LLARA = f"--model llara --method.sasrec {{inputs}}/sasrec {CANDIDATES}"
ILORA = f"--model ilora --method.sasrec {{inputs}}/sasrec --method.vectors states {CANDIDATES} {MOE_LORA}"
# Around LRURec: of the three recommenders of item ids, the one with a weight that only scores.
ILORA_ITEMS = f"--model ilora-items --method.sasrec {{inputs}}/lrurec --method.prompts.max_history 12 {MOE_LORA}"
TRAINED_INSIDE = "--method.train_sasrec true --method.space sasrec --method.distillation mse"
LLAMAREC = (
    "--model llamarec --method.negatives hard --method.cuts 8 --method.prompts.num_candidates 8 "
    f"--method.prompts.history_length 6 {RETRIEVED}"
)
RANKLLM = (
    "--model rankllm --method.num_candidates 6 --method.window 4 --method.stride 2 --method.prompts.history_length 4 "
    f"{RETRIEVED}"
)
STAGE = f"{TINY} --backbone.tiny.heads 2 --backbone.dropout 0 --method.texts.held_out 9"
UR4REC_PARTS = (
    "--method.hidden_size 32 --method.preferences.hidden_size 32 --method.preferences.dropout 0 "
    "--method.preferences.encoder {inputs}/backbone --data.cache {inputs}/cache"
)
# At the rate of the other rows its loss jumps from step to step, and rounding grows to 4e-5 in one process too.
UR4REC = (
    "--model ur4rec --train.lr 0.0005 --method.dropout 0 --method.history_length 6 --method.num_candidates 8 "
    f"--method.cuts 8 --method.retriever {{inputs}}/sasrec {UR4REC_PARTS}"
)
UR4REC_V2 = (
    "--model ur4rec-v2 --method.sasrec {inputs}/sasrec --method.encoder {inputs}/backbone --data.cache {inputs}/cache "
    "--method.cuts 4 --method.hidden_size 16 --method.num_heads 2 --method.history 8 --method.answers candidate "
    "--method.dropout 0 --method.fusion.kind user --method.fusion.dropout 0 --method.balance uncertainty "
    "--method.co_attention true"
)
ROWS = {
    "sasrec float32": f"{SASREC} {FP32}",
    "sasrec bf16": f"{SASREC} {BF16}",
    "lrurec float32": f"{LRUREC} {FP32}",
    "gru4rec float32": f"{GRU4REC} {FP32}",
    "dllm2rec-sasrec float32": f"{DLLM2REC} {FP32}",
    "bigrec float32": f"--model bigrec {TINY} {FP32}",
    "bigrec bf16, checkpointing": f"--model bigrec {TINY} {BF16} {CHECKPOINTING}",
    "bigrec LoRA float32, one prompt a title": f"--model bigrec {RESPONSE} {LORA} {FP32}",
    "bigrec LoRA 4-bit": f"--model bigrec {LORA} {IN_4_BITS}",
    "bigrec LoRA 8-bit": f"--model bigrec {LORA} {IN_8_BITS}",
    "e4srec float32": f"{E4SREC} {TINY} {FP32}",
    "e4srec bf16, checkpointing": f"{E4SREC} {TINY} {BF16} {CHECKPOINTING}",
    "e4srec LoRA 4-bit": f"{E4SREC} {LORA} {IN_4_BITS}",
    "dense-retrieval float32": f"{DENSE} {HARD_NEGATIVES} {TINY} {TWO_ENCODERS} {FP32}",
    "dense-retrieval float32, GradCache": f"{DENSE} {HARD_NEGATIVES} {TINY} --method.grad_cache_rows 3 {FP32}",
    "dense-retrieval LoRA 4-bit, checkpointing": (
        f"{DENSE} --method.loss in-batch --method.grad_cache_rows 8 {LORA} {IN_4_BITS} {CHECKPOINTING}"
    ),
    "mntp float32": f"--model mntp {STAGE} {FP32}",
    "simcse float32": f"--model simcse {STAGE} {ONE_PASS} {FP32}",
    "llara float32": f"{LLARA} {TINY} {FP32}",
    "llara LoRA 4-bit, checkpointing": f"{LLARA} {LORA} {IN_4_BITS} {CHECKPOINTING}",
    "ilora MoE-LoRA float32": f"{ILORA} {FP32}",
    "ilora MoE-LoRA 4-bit, checkpointing": f"{ILORA} {IN_4_BITS} {CHECKPOINTING}",
    "ilora-items MoE-LoRA float32": f"{ILORA_ITEMS} {TRAINED_INSIDE} {FP32}",
    "ilora-items MoE-LoRA 4-bit, checkpointing": (
        f"{ILORA_ITEMS} --method.distillation kl {IN_4_BITS} {CHECKPOINTING}"
    ),
    "llamarec float32": f"{LLAMAREC} {TINY} {FP32}",
    "llamarec LoRA 4-bit, vectors, checkpointing": (
        f"{LLAMAREC} --method.identifiers vectors {LORA} {IN_4_BITS} {CHECKPOINTING}"
    ),
    "rankllm float32": f"{RANKLLM} {TINY} {FP32}",
    "rankllm LoRA 4-bit, checkpointing": f"{RANKLLM} {LORA} {IN_4_BITS} {CHECKPOINTING}",
    "ur4rec-pretrain float32": f"--model ur4rec-pretrain {UR4REC_PARTS} {FP32}",
    "ur4rec float32": f"{UR4REC} {FP32}",
    "ur4rec-v2 float32": f"{UR4REC_V2} {FP32}",
    "ur4rec-v2 bf16": f"{UR4REC_V2} {BF16}",
    "ensemble float32": f"--model ensemble --method.members [{{inputs}}/sasrec,{{inputs}}/lrurec] {FP32}",
}
# Largest difference of a logged loss from one process: float32 sums in another order, bfloat16 with 8 bits, and these
# bits in cosines that are divided by a temperature of .05 or .07. Those of bfloat16 are what rounding does to one
# process alone in the rows where it does most; benchmarks/grid.py measures that, too.
BOUNDS = {"fp32": 1e-5, "bf16": 2e-3, "bf16 cosines": 1e-2}
OF_COSINES = ("dense-retrieval", "ur4rec-v2")


def settings(row: str, inputs: Path) -> list[str]:
    """Return the flags of a row; `inputs` is the folder of `save_inputs`."""
    return [flag.replace("{inputs}", str(inputs)) for flag in f"{COMMON} {ROWS[row]}".split()]


def bound(row: str) -> float:
    return BOUNDS["fp32" if "float32" in row else "bf16 cosines" if row.startswith(OF_COSINES) else "bf16"]


def save_inputs(folder: Path) -> None:
    """Write what rows begin from: a pre-trained base for adapters, backbone/, and runs of sasrec/ and lrurec/."""
    save_small_backbone(folder / "backbone")
    for name in ("sasrec", "lrurec"):
        launched(*settings(f"{name} float32", folder), output=folder / name)


def save_small_backbone(folder: Path) -> Path:
    """Write a small Llama in Hugging Face format, as a pre-trained base for LoRA and quantisation."""
    config = BackboneConfig()
    config.tiny.hidden_size, config.tiny.layers = 64, 2
    tokenizer = load_tokenizer(config, ["Painted Shadow 4 (1986)", "Distant Planet 6 (1971)"] * 50)
    load_backbone(config, tokenizer, seed=0, device="cpu", trainable=True).save_pretrained(str(folder))
    tokenizer.save_pretrained(folder)
    return folder
