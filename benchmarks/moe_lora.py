"""MoE-LoRA against the published computation and against plain LoRA: what a step keeps for its backward pass, and how
long it takes.

python benchmarks/moe_lora.py          (a minute on one thread; writes the table of docs/methods/adapters.md)

One Llama, one rank, one batch; the adapters take turns, so all of them meet the same machine. What an adapter keeps
is what autograd saves with it, less what it saves without any. The published computation (iLoRA's code) makes every
expert's output, [B, L, K, out]; it is restated here and checked to give the same loss and gradients.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from benchmarks.contest import spread
from benchmarks.document import hardware, write_section
from models.moe_lora import MoELoRALinear, add_moe_lora

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "moe-lora.json"
ROWS, LENGTH, RANK, EXPERTS, ALPHA, DROPOUT = 8, 128, 8, 4, 32, 0.1  # rank, experts, alpha and dropout as published
HIDDEN, INTERMEDIATE, LAYERS, HEADS, VOCABULARY = 512, 1376, 2, 8, 1000  # widths in the proportions of Llama-2-7B
REPEATS = 15
GOALS = {"saved_bytes_ratio": 8.0, "step_time_ratio": 1.15}

Step = Callable[[], Tensor]


class PublishedLinear(nn.Module):
    """A linear layer whose update is the sum of every expert's whole output, weighed by the gate."""

    def __init__(self, layer: MoELoRALinear) -> None:
        super().__init__()
        self.base_layer, self.gate, self.layer = layer.base_layer, layer.gate, layer.layer
        self.lora_A, self.lora_B = layer.lora_A, layer.lora_B
        self.scale, self.dropout = layer.scale, nn.Dropout(layer.dropout)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate.of_layer(self.layer, x)
        assert gate is not None
        low = F.linear(self.dropout(x.to(self.lora_A.dtype)), self.lora_A).chunk(EXPERTS, dim=-1)
        experts = [F.linear(part, B) for part, B in zip(low, self.lora_B.chunk(EXPERTS, dim=1), strict=True)]
        mixed = (torch.stack(experts, dim=2) * gate[:, None, :, None]).sum(dim=2)
        return self.base_layer(x) + mixed * self.scale


def main() -> None:
    torch.set_num_threads(1)
    measured = {precision: measure(dtype) for precision, dtype in (("float32", None), ("bfloat16", torch.bfloat16))}
    settings = {"rows": ROWS, "tokens": LENGTH, "rank": RANK, "experts": EXPERTS, "dropout": DROPOUT}
    settings |= {"hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "layers": LAYERS, "heads": HEADS}
    report = {"hardware": hardware(), "settings": settings, "goals": GOALS, "measured": measured}
    RESULTS.write_text(json.dumps(report, indent=1) + "\n")
    write_section(ROOT / "docs" / "methods" / "adapters.md", "benchmarks/moe_lora.py", markdown(measured))
    print(markdown(measured))
    sys.exit(0 if all(holds(result) for result in measured.values()) else 1)


def markdown(measured: dict[str, Any]) -> str:
    """Return what each adapter keeps, and the medians of its time."""
    lines = [
        "| precision | adapter | saved for backward, MB | step, s | to plain LoRA's |",
        "|" + " --- |" * 5,
    ]
    for precision, result in measured.items():
        for name, held in result["adapter's saved bytes"].items():
            ratio = result["step time to plain LoRA's"][name]
            quartiles = f"{ratio['lower_quartile']:.2f} to {ratio['upper_quartile']:.2f}"
            seconds = result["step seconds"][name]["median"]
            lines.append(
                f"| {precision} | {name} | {held / 1e6:.1f} | {seconds:.2f} | {ratio['median']:.2f} ({quartiles}) |"
            )
    where = hardware()
    text = f"{where['device']}, one thread, torch {where['packages']['torch']}, peft {where['packages']['peft']}; "
    text += f"{ROWS} rows of {LENGTH} tokens, {LAYERS} layers {HIDDEN} wide, dropout {DROPOUT}; medians (quartiles) of"
    return "\n".join([f"{text} {REPEATS} rounds, ratios within a round.", "", *lines])


def holds(result: dict[str, Any]) -> bool:
    enough = result["published / ours, saved bytes"] >= GOALS["saved_bytes_ratio"]
    return enough and result["step time to plain LoRA's"]["ours"]["median"] <= GOALS["step_time_ratio"]


def measure(autocast: torch.dtype | None) -> dict[str, Any]:
    """Return bytes and times of all adapters under one precision."""
    ids = torch.randint(VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    models = {"no adapter": llama(autocast), "plain LoRA": plain_lora(autocast), "ours": moe_lora(autocast)}
    models["published"] = published(moe_lora(autocast))
    steps = {name: step_of(model, ids, autocast) for name, model in models.items()}
    check_equal(ids)
    held = {name: saved_bytes(models[name], step) for name, step in steps.items()}
    adapters = {name: held[name] - held["no adapter"] for name in ("published", "plain LoRA", "ours")}
    times = take_turns({name: steps[name] for name in adapters})
    return {
        "adapter's saved bytes": adapters,
        "published / ours, saved bytes": round(adapters["published"] / adapters["ours"], 2),
        "step seconds": {name: spread(seconds) for name, seconds in times.items()},
        "step time to plain LoRA's": {
            name: spread([own / plain for own, plain in zip(seconds, times["plain LoRA"], strict=True)])
            for name, seconds in times.items()
        },
    }


def llama(autocast: torch.dtype | None) -> LlamaForCausalLM:
    """A frozen base with random weights in the type of the computation."""
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
    )
    model = LlamaForCausalLM(shape).requires_grad_(False).train()
    return model if autocast is None else model.to(autocast)


def plain_lora(autocast: torch.dtype | None) -> nn.Module:
    lora = LoraConfig(
        task_type="CAUSAL_LM", r=RANK, lora_alpha=ALPHA, lora_dropout=DROPOUT, target_modules="all-linear"
    )
    return get_peft_model(llama(autocast), lora, autocast_adapter_dtype=True).train()


def moe_lora(autocast: torch.dtype | None) -> PreTrainedModel:
    model = llama(autocast)
    add_moe_lora(model, rank=RANK, experts=EXPERTS, scale=ALPHA / (RANK // EXPERTS), dropout=DROPOUT)
    for module in model.modules():
        if isinstance(module, MoELoRALinear):
            nn.init.normal_(module.lora_B, std=0.01)
    return model


def published(model: PreTrainedModel) -> PreTrainedModel:
    """The same adapter with the published computation."""
    for name, module in list(model.named_modules()):
        if isinstance(module, MoELoRALinear):
            model.set_submodule(name, PublishedLinear(module))
    return model


def step_of(model: nn.Module, ids: Tensor, autocast: torch.dtype | None) -> Step:
    """Return what runs forward: the loss, with a gradient for inputs and gate as in a method that trains both."""
    embed = model.get_input_embeddings()  # type: ignore[operator]
    gates = [module.gate for module in model.modules() if isinstance(module, MoELoRALinear | PublishedLinear)]

    def step() -> Tensor:
        inputs = embed(ids).requires_grad_()
        gate = torch.linspace(-1, 1, ROWS * EXPERTS).view(ROWS, EXPERTS).softmax(-1).requires_grad_()
        with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
            if not gates:
                return model(inputs_embeds=inputs, labels=ids).loss
            with gates[0].use(gate):
                return model(inputs_embeds=inputs, labels=ids).loss

    return step


def check_equal(ids: Tensor) -> None:
    """Raise unless both computations give the same loss and gradients in float32, dropout off."""
    found = []
    for model in (moe_lora(None).eval(), published(moe_lora(None)).eval()):
        loss = step_of(model, ids, None)()
        found.append([loss, *torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])])
    for value, expected in zip(*found, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-5 * expected.abs().max().item())


def saved_bytes(model: nn.Module, step: Step) -> int:
    """Return the bytes that autograd saves in a forward pass, weights not counted and shared storage once."""
    weights = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    saved: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        step()
    return sum(storage.nbytes() for storage in saved.values())


def take_turns(steps: dict[str, Step]) -> dict[str, list[float]]:
    """Return the seconds of forward and backward passes; the first round is not counted."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(REPEATS + 1):
        for name, step in steps.items():
            started = time.perf_counter()
            step().backward()
            times[name].append(time.perf_counter() - started)
    return {name: seconds[1:] for name, seconds in times.items()}


if __name__ == "__main__":
    main()
