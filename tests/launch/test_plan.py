"""The forecast against what real training keeps, weight for weight and byte for byte."""

import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, Qwen2Config

from launch import plan
from launch.config import RunConfig, parse
from launch.fitting import Planner, flags_that_would_fit
from launch.memory import RESERVED, STRATEGIES, GiB, forecast
from launch.rehearsal import FlopCount, Rehearsal, make_skeleton, rehearse
from launch.sequences import sequence_recommender
from launch.skeletons.base import NextToken
from launch.skeletons.item_lists import TEXT_WIDTH
from launch.skeletons.item_vectors import llara_skeleton
from launch.skeletons.texts import dense_retrieval_skeleton
from launch.skeletons.writers import BIGRecSkeleton, RankLLMSkeleton, llamarec_skeleton
from models.backbone import describe, load_backbone
from models.base import Recommender
from models.dense_retrieval_config import DenseRetrievalConfig
from models.llamarec import LlamaRecConfig
from models.llara import LLaRAConfig
from models.rankllm import RankLLMConfig
from models.skeleton import backbone_skeleton, packed_side_bytes
from models.tiny import llama_config
from models.ur4rec.reranking import UR4Rec, UR4RecConfig, UR4RecPretrain, UR4RecPretrainConfig

ITEMS, ROWS, LENGTH = 1000, 4, 96
SHAPES = Path(__file__).resolve().parents[2] / "launch" / "shapes"
BY_NAME = {strategy.name: strategy for strategy in STRATEGIES}


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Random weights in Hugging Face format, bfloat16 as published models are, heads that share keys."""
    shape = {"hidden_size": 256, "num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 2}
    sizes = shape | {"vocab_size": 2000, "intermediate_size": 704}
    configs = {"llama": LlamaConfig(**sizes), "qwen": Qwen2Config(**sizes)}
    root = tmp_path_factory.mktemp("backbones")
    for name, config in configs.items():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(root / name)
    return {name: str(root / name) for name in configs}


def settings(flags: str, folders: dict[str, str]) -> RunConfig:
    return parse(flags.format(**folders).split())


def real_model(config: RunConfig) -> Recommender:
    """The model with weights, without what BIGRec needs for scoring only."""
    if isinstance(config.method, UR4RecConfig):
        return UR4Rec(config.method, ITEMS, TEXT_WIDTH).train()
    if isinstance(config.method, UR4RecPretrainConfig):
        return UR4RecPretrain(config.method, ITEMS, TEXT_WIDTH).train()
    if config.backbone is None:
        return sequence_recommender(config.method, ITEMS).train()
    if isinstance(config.method, DenseRetrievalConfig):
        readers = [
            load_backbone(config.backbone, None, seed=0, device="cpu", trainable=True, head=False)
            for _ in range(1 + config.method.two_encoders)
        ]
        return dense_retrieval_skeleton(config.method, readers, ITEMS, device="cpu").train()
    if config.backbone.name == "tiny":
        shape = llama_config(config.backbone.tiny, config.backbone.tiny.vocab_size)
        backbone = AutoModelForCausalLM.from_config(shape, dtype=torch.float32)
    else:
        backbone = load_backbone(config.backbone, None, seed=0, device="cpu", trainable=True)
    if getattr(config.method, "scoring", None) == "dot":
        backbone = backbone.base_model
    if isinstance(config.method, LLaRAConfig):
        return llara_skeleton(config.method, backbone, ITEMS, device="cpu").train()
    if isinstance(config.method, LlamaRecConfig):
        return llamarec_skeleton(config.method, backbone, ITEMS, device="cpu").train()
    if isinstance(config.method, RankLLMConfig):
        return RankLLMSkeleton(config.method, backbone).train()
    return BIGRecSkeleton(config.method, backbone, ITEMS, device="cpu").train()


def loss_of(model: Recommender, config: RunConfig) -> torch.Tensor:
    batch = make_skeleton(config, ITEMS).batch(ROWS, LENGTH)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=config.train.precision == "bf16"):
        return model(batch).total


def saved_bytes(model: Recommender, config: RunConfig) -> int:
    """What autograd says that it saves, weights not counted."""
    weights = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    saved: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss_of(model, config)
    return sum(storage.nbytes() for storage in saved.values())


def allocated_peak(model: Recommender, config: RunConfig) -> int:
    """The most that the allocator has given out at once in forward and backward."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        loss_of(model, config).backward()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


CHECKPOINTED = "--backbone.gradient_checkpointing true"
MEASURED = [
    "--model bigrec --train.precision bf16",
    "--model bigrec --train.precision fp32 --backbone.tiny.hidden_size 256 --backbone.tiny.layers 5",
    "--model bigrec --train.precision fp32 --method.objective items --method.scoring items",
    "--model bigrec --train.precision bf16 --backbone.name {llama}",
    "--model bigrec --train.precision fp32 --backbone.name {llama}",
    f"--model bigrec --train.precision bf16 --backbone.name {{llama}} {CHECKPOINTED}",
    "--model bigrec --train.precision bf16 --backbone.name {llama} --backbone.adapter none",
    f"--model bigrec --train.precision fp32 --backbone.name {{llama}} --backbone.adapter none {CHECKPOINTED}",
    "--model bigrec --train.precision bf16 --backbone.name {llama} --backbone.quantization 4bit",
    f"--model bigrec --train.precision bf16 --backbone.name {{llama}} --backbone.quantization 4bit {CHECKPOINTED}",
    "--model bigrec --train.precision bf16 --backbone.name {qwen} --backbone.lora_rank 32",
    "--model dense-retrieval --train.precision fp32 --backbone.name {qwen} --backbone.adapter none",
    "--model dense-retrieval --train.precision bf16 --backbone.name {llama} --method.two_encoders true "
    "--method.hard_negatives 3 --method.learn_ids true",
    "--model llara --train.precision bf16",
    "--model llara --train.precision fp32 --method.vectors states --method.train_sasrec true",
    "--model llara --train.precision bf16 --method.prompts.mode text --backbone.name {llama}",
    "--model ilora --train.precision bf16 --backbone.name {llama} --backbone.adapter moe-lora",
    "--model ilora --train.precision bf16 --backbone.name {qwen} --backbone.adapter moe-lora "
    "--backbone.quantization 4bit --method.gate.kind resnet",
    "--model llamarec --train.precision bf16",
    "--model llamarec --train.precision fp32 --method.scoring dot",
    "--model llamarec --train.precision bf16 --backbone.name {llama} --method.objective published",
    "--model llamarec --train.precision bf16 --backbone.name {qwen} --backbone.quantization 4bit "
    "--method.identifiers vectors",
    "--model rankllm --train.precision bf16 --backbone.name {llama}",
    "--model rankllm --train.precision fp32 --method.objective ranknet",
    "--model sasrec --train.precision bf16",
    "--model sasrec --train.precision fp32 --method.loss gbce --method.num_blocks 3",
    "--model lrurec --train.precision bf16",
    "--model lrurec --train.precision fp32 --method.loss gbce",
    "--model gru4rec --train.precision fp32 --method.num_layers 2",
    "--model gru4rec --train.precision bf16",
    "--model ur4rec --train.precision fp32",
    "--model ur4rec --train.precision bf16 --method.ranker setrank",
    "--model ur4rec-pretrain --train.precision fp32",
]


@pytest.mark.parametrize("flags", MEASURED)
def test_forecast_is_what_training_keeps(flags: str, folders: dict[str, str]) -> None:
    config = settings(flags, folders)
    model = real_model(config)
    expected = rehearse(config, ITEMS, LENGTH, ROWS, device="cpu")
    assert expected.activation_bytes == pytest.approx(saved_bytes(model, config), rel=0.03)
    # Kernels' own workspaces are not forecast: bfloat16 products on a CPU take some.
    assert expected.peak_with_gradients == pytest.approx(allocated_peak(model, config), rel=0.12)


def test_a_pretrained_llama_is_forecast(backbone_root: Path) -> None:
    config = parse(f"--model bigrec --train.precision bf16 --backbone.name {backbone_root / 'stories260k'}".split())
    expected = rehearse(config, ITEMS, LENGTH, ROWS, device="cpu")
    assert expected.activation_bytes == pytest.approx(saved_bytes(real_model(config), config), rel=0.03)


def test_what_bitsandbytes_keeps_outside_autograd_is_seen(folders: dict[str, str]) -> None:
    flags = (
        f"--model bigrec --train.precision bf16 --backbone.name {{llama}} --backbone.quantization 8bit {CHECKPOINTED}"
    )
    config = settings(flags, folders)
    expected = rehearse(config, ITEMS, LENGTH, ROWS, device="cpu")
    model = real_model(config)
    assert expected.activation_bytes > 1.5 * saved_bytes(model, config)
    # At the peak a CPU's kernel casts a whole weight of 8 bits within itself, which no tensor shows.
    assert expected.peak_with_gradients == pytest.approx(allocated_peak(model, config), rel=0.08)


@pytest.mark.parametrize("flags", ["", CHECKPOINTED, "--backbone.quantization 4bit --backbone.lora_dropout 0"])
def test_a_gated_adapter_is_forecast(flags: str, folders: dict[str, str]) -> None:
    """For a method without a skeleton of its own, as far as its backbone goes."""
    config = settings(f"--model bigrec --train.precision bf16 --backbone.name {{llama}} {flags}", folders)
    config.model, config.method, config.backbone.adapter = "ilora-items", None, "moe-lora"
    model = NextToken(load_backbone(config.backbone, None, seed=0, device="cpu", trainable=True)).train()
    expected = rehearse(config, ITEMS, LENGTH, ROWS, device="cpu")
    assert expected.activation_bytes == pytest.approx(saved_bytes(model, config), rel=0.03)
    assert expected.peak_with_gradients == pytest.approx(allocated_peak(model, config), rel=0.12)
    assert expected.trainable_parameters == describe(model)["trainable_parameters"]


@pytest.mark.parametrize("quantization", ["none", "4bit", "8bit"])
def test_weights_are_those_of_the_loaded_backbone(quantization: str, folders: dict[str, str]) -> None:
    config = settings(f"--model bigrec --backbone.name {{llama}} --backbone.quantization {quantization}", folders)
    loaded = load_backbone(config.backbone, None, seed=0, device="cpu", trainable=True)
    seen = rehearse(config, ITEMS, 8, 1)
    size = describe(loaded)
    assert (seen.parameters, seen.trainable_parameters) == (size["parameters"], size["trainable_parameters"])
    stored = sum(size["bytes"].values()) + packed_side_bytes(loaded)
    stored += sum(buffer.nbytes for buffer in loaded.buffers())
    assert seen.weight_bytes == stored
    skeleton = {name: (p.requires_grad, p.dtype) for name, p in backbone_skeleton(config.backbone).named_parameters()}
    trained = {name: (p.requires_grad, p.dtype) for name, p in loaded.named_parameters() if p.requires_grad}
    assert {name: kind for name, kind in skeleton.items() if kind[0]} == trained


@pytest.mark.slow
def test_an_8b_base_in_four_bits() -> None:
    config = parse(f"--backbone.name {SHAPES / 'llama-3.1-8b'} --backbone.quantization 4bit".split())
    seen = rehearse(config, ITEMS, 16, 1)
    linear = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    assert seen.parameters - seen.trainable_parameters == linear + 2 * 128256 * 4096 + 65 * 4096 == 8_030_261_248
    packed = linear * (1 / 2 + 1 / 64 + 4 / (64 * 256))
    in_bfloat16 = 2 * (2 * 128256 * 4096 + 65 * 4096)  # embeddings, head and norms
    assert seen.frozen_bytes == pytest.approx(packed + in_bfloat16, rel=1e-4)


def test_flops_are_those_counted_by_hand(folders: dict[str, str]) -> None:
    """A product costs 2 FLOPs a weight forward and 2 for each gradient; causal attention half of all pairs."""
    flags = f"--model bigrec --backbone.name {SHAPES / 'qwen2.5-7b'} --backbone.lora_dropout 0"
    seen = {
        changes: rehearse(parse(f"{flags} {changes}".split()), ITEMS, LENGTH, 1)
        for changes in ("", "--backbone.quantization 4bit", "--backbone.gradient_checkpointing true")
    }
    width, layers, inner, keys, vocabulary = 3584, 28, 18944, 512, 152064
    base = layers * (2 * width * width + 2 * width * keys + 3 * width * inner)
    adapter = seen[""].trainable_parameters
    attention = 2 * LENGTH * width * layers
    by_hand = 4 * (base + width * vocabulary) + 6 * adapter + 3 * attention
    assert seen[""].flops / LENGTH == pytest.approx(by_hand, rel=0.01)  # the first layer needs no input gradient
    assert seen["--backbone.quantization 4bit"].flops == seen[""].flops
    again = seen["--backbone.gradient_checkpointing true"].flops - seen[""].flops
    assert again / LENGTH == pytest.approx(2 * base + 2 * adapter + attention, rel=0.01)


@pytest.mark.parametrize("is_causal", [True, False])
def test_flops_of_attention(is_causal: bool) -> None:
    """Two products forward and four backward: 8 heads, 64 queries, 64 keys, 16 numbers; half of them if causal."""
    query, key, value = (torch.randn(2, 8, 64, 16, requires_grad=True) for _ in range(3))
    with FlopCount() as forward:
        out = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=is_causal)
    with FlopCount() as backward:
        out.sum().backward()
    product = 2 * 2 * 8 * 64 * 64 * 16 // (2 if is_causal else 1)
    assert (forward.flops, backward.flops) == (2 * product, 4 * product)


def test_speed_is_a_share_of_the_peak(capsys: pytest.CaptureFixture[str]) -> None:
    flags = "--model sasrec --train.batch_size 64 --gpus 2 --length 50"
    assert "At 50% of 10 x 10^12 FLOP/s" in planned(capsys, f"{flags} --gpu_tflops 10 --utilisation 0.5")[1]
    forecast = json.loads(planned(capsys, f"{flags} --gpu_tflops 10 --utilisation 0.5 --json true")[1])
    each = forecast["micro_batch_of_one_process"]["flops"] / (32 * 50)
    assert forecast["tokens_per_second_of_a_gpu"] == pytest.approx(5e12 / each)
    assert "10^12" not in planned(capsys, flags)[1]


def test_cuda_keeps_dropout_masks_of_one_byte(folders: dict[str, str]) -> None:
    config = settings("--model sasrec --train.precision fp32 --method.num_blocks 2", folders)
    on_cpu, on_gpu = (rehearse(config, ITEMS, LENGTH, ROWS, device) for device in ("cpu", "cuda"))
    masks = 1 + 2 * 2  # on the embeddings, and two a block
    saved = on_cpu.activation_bytes - on_gpu.activation_bytes
    assert saved == pytest.approx(masks * 3 * ROWS * LENGTH * config.method.hidden_size, rel=0.01)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("flags", [flags for flags in MEASURED if "items" not in flags])
def test_forecast_is_the_peak_of_a_gpu(flags: str, folders: dict[str, str]) -> None:
    config = settings(flags, folders)
    model = real_model(config).to("cuda")
    batch = make_skeleton(config, ITEMS).batch(ROWS, LENGTH).to(torch.device("cuda"))
    for _ in range(2):  # the first pass also allocates workspaces
        model.zero_grad(set_to_none=True)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=config.train.precision == "bf16"):
            loss = model(batch).total
        loss.backward()
    measured = torch.cuda.max_memory_allocated() - before
    assert rehearse(config, ITEMS, LENGTH, ROWS).peak_with_gradients == pytest.approx(measured, rel=0.1)


ONE = Rehearsal(
    parameters=1_100_000,
    trainable_parameters=100_000,
    frozen_bytes=2_000_000,
    trainable_bytes=400_000,
    unsharded_bytes=8_000,
    uncut_bytes=0,
    persistent_bytes=16_000,
    largest_module_bytes=100_000,
    stored_elements=1_100_000,
    activation_bytes=5_000_000,
    peak_bytes=7_000_000,
    peak_with_gradients=7_100_000,
    logits_bytes=1_500_000,
    flops=3_000_000_000,
)


def test_every_strategy_by_hand() -> None:
    by = {name: forecast(ONE, strategy, gpus=4, accumulates=True) for name, strategy in BY_NAME.items()}
    assert by["ddp"].total == 2_400_000 + 2 * 400_000 + 800_000 + 7_000_000 + RESERVED  # with DDP's own buckets
    in_one_pass = forecast(ONE, BY_NAME["ddp"], gpus=4)
    assert by["ddp"].total - in_one_pass.total == 400_000, "which hold the gradients of a step that does not accumulate"
    assert (by["zero1"].gradients, by["zero2"].gradients, by["zero3"].gradients) == (400_000, 100_000, 100_000)
    # moments and ZeRO's float32 copy, a quarter each
    assert by["zero1"].optimizer == by["zero2"].optimizer == by["zero3"].optimizer == 100_000 * 12 // 4
    assert (by["zero2_offload"].optimizer, by["zero2_offload"].gradients) == (0, 0)
    assert by["zero2_offload"].host == 100_000 * 12 + 400_000
    assert by["zero3"].weights == (2_400_000 - 24_000) // 4 + 24_000
    assert by["zero3_offload"].weights == 24_000
    assert by["zero3_offload"].host == by["zero2_offload"].host + 2_400_000 - 8_000
    # a model within the reuse distance stays gathered as a whole
    assert by["zero3"].buffers - by["zero2"].buffers + _buckets("zero2") - _buckets("zero3") == 2_392_000 - 16_000


def test_weights_of_8_bits_stay_whole_under_zero3(folders: dict[str, str]) -> None:
    """bitsandbytes holds on to them, and ZeRO-3 cuts the parameters beside that."""
    seen = rehearse(
        settings("--model bigrec --backbone.name {llama} --backbone.quantization 8bit", folders), ITEMS, 8, 1
    )
    assert 0.5 * seen.frozen_bytes < seen.uncut_bytes < seen.frozen_bytes
    in_4_bits = "--model bigrec --backbone.name {llama} --backbone.quantization 4bit"
    assert rehearse(settings(in_4_bits, folders), ITEMS, 8, 1).uncut_bytes == 0
    for name in ("zero3", "zero3_offload"):
        cut = forecast(replace(seen, uncut_bytes=0), BY_NAME[name], gpus=4)
        assert forecast(seen, BY_NAME[name], gpus=4).weights - cut.weights == seen.uncut_bytes


def _buckets(name: str) -> int:
    buffers = BY_NAME[name].buffers()
    return 4 * buffers.reduce_bucket_size * (2 if buffers.overlap_comm and name != "zero3" else 1)


def test_one_gpu_without_accumulation_adds_gradients_while_activations_go() -> None:
    alone = forecast(ONE, BY_NAME["ddp"], gpus=1)
    assert alone.total == 2_400_000 + 800_000 + 7_100_000 + RESERVED
    paged = forecast(ONE, BY_NAME["ddp"], gpus=1, optimizer="adamw-8bit-paged")
    assert alone.optimizer - paged.optimizer == pytest.approx(800_000 - 203_125)
    with pytest.raises(ValueError, match="adamw-8bit-paged"):
        forecast(ONE, BY_NAME["ddp"], gpus=1, optimizer="sgd")


SMALL = "--model bigrec --train.batch_size 64 --backbone.tiny.hidden_size 256"


def total(flags: str, gpus: int = 1, length: int = 512) -> int:
    planner = Planner(parse(flags.split()), ITEMS, length, gpus)
    return planner.fit(BY_NAME["ddp"], GiB).forecast.total


@pytest.mark.slow
def test_flags_for_a_run_out_of_memory_fit_and_are_the_least() -> None:
    whole, half, checkpointed = (total(f"{SMALL} {more}") for more in ("", "--train.micro_batch_size 32", CHECKPOINTED))
    assert checkpointed < half < whole
    room = (half + whole) // 2
    found = flags_that_would_fit(parse(SMALL.split()), ITEMS, 512, 1, room)
    assert found == ["--train.micro_batch_size 32", CHECKPOINTED]
    assert all(total(f"{SMALL} {flags}") <= room for flags in found)
    assert flags_that_would_fit(parse(SMALL.split()), ITEMS, 512, 1, RESERVED) == []


@pytest.mark.slow
@pytest.mark.parametrize("rows", [20, 80])
def test_the_largest_micro_batch_fits_and_few_more_would(rows: int) -> None:
    room = total(f"{SMALL} --train.batch_size 128 --train.micro_batch_size {rows}")
    config = parse(f"{SMALL} --train.batch_size 128 --train.micro_batch_size 64".split())
    largest = Planner(config, ITEMS, 512, 1).fit(BY_NAME["ddp"], room).largest_micro_batch
    assert 0.9 * rows <= largest <= rows


def planned(capsys: pytest.CaptureFixture[str], *flags: str) -> tuple[int, str]:
    capsys.readouterr()
    return plan.main([word for part in flags for word in part.split()]), capsys.readouterr().out


def test_the_command_is_one_that_trains(capsys: pytest.CaptureFixture[str]) -> None:
    code, shown = planned(capsys, SMALL, "--gpus 2 --gpu_memory 24 --num_items 50")
    assert code == 0
    command = shlex.split(shown.strip().splitlines()[-1])
    launch = "accelerate launch --config_file launch/accelerate/ddp.yaml --num_processes 2 launch/train.py".split()
    assert command[: len(launch)] == launch
    assert parse(command[len(launch) :]) == parse(SMALL.split())
    assert "Forecasts" in shown


def test_a_micro_batch_that_does_not_fit_is_cut_evenly(capsys: pytest.CaptureFixture[str]) -> None:
    room = total(f"{SMALL} --train.micro_batch_size 40") / GiB
    code, shown = planned(capsys, SMALL, f"--train.micro_batch_size 64 --gpu_memory={room} --json true")
    told = json.loads(shown)
    assert (code, told["pick"], told["forecast"]) == (0, "ddp", True)
    assert told["strategies"][0]["largest_micro_batch"] in (39, 40)
    assert told["command"].endswith("--train.micro_batch_size 32")
    assert told["command"].count("micro_batch_size") == 1


def test_nothing_fits(capsys: pytest.CaptureFixture[str]) -> None:
    code, shown = planned(capsys, "--model sasrec --gpu_memory 1")
    assert code == 1
    assert "Nothing fits" in shown


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--gpus 0", "--gpus is 0"),
        ("--utilisation 40", "at most 1"),
        ("--gpu_memroy 24", "did you mean --gpu_memory"),
        ("--backbone.name ./no/such/folder", "there is no such folder"),
        ("--backbone.name {empty}", "no configuration could be loaded"),
    ],
)
def test_mistakes_are_named(flags: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stopped:
        plan.main(flags.format(empty=tmp_path).split())
    assert message in str(stopped.value)


def test_modules_are_left_as_they_were(folders: dict[str, str]) -> None:
    dropout, layer = nn.functional.dropout, nn.Dropout(0.5)
    rehearse(settings("--model bigrec --backbone.name {llama}", folders), ITEMS, 8, 1)
    assert nn.functional.dropout is dropout
    assert set(layer(torch.ones(100)).tolist()) == {0.0, 2.0}
    assert not torch.is_autocast_enabled("cuda")
