"""The gated adapter against a loop over its experts, against PEFT, and wherever a pass may lose its gate."""

import copy
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedModel

from models.backbone import BackboneConfig, causal_model, describe, load_backbone, load_tokenizer
from models.base import Recommender
from models.decoder import last_token_embeddings
from models.expert_gates import ExpertGate, GateConfig, gate_parts
from models.moe_lora import ActiveGate, MoELoRALinear, add_moe_lora, find_gate, gate_of
from models.title_generation import beam_search_titles, generate_free
from models.title_scoring import title_log_likelihoods
from tests.models.test_title_scoring import EOS, VOCABULARY, _trie
from tests.toys import grouped_llama
from trainers.state import load_weights, weights_of

USERS, LENGTH, RANK, EXPERTS = 5, 11, 8, 4
CHECKPOINTING = {"use_reentrant": False}


def llama() -> LlamaForCausalLM:
    return grouped_llama(VOCABULARY, EOS)


def adapted(model: PreTrainedModel | None = None, experts: int = EXPERTS, dropout: float = 0.0) -> PreTrainedModel:
    """A model whose adapter has left zero, so that the gate matters."""
    model = model or llama()
    add_moe_lora(model, rank=RANK, experts=experts, scale=2.0, dropout=dropout)
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, MoELoRALinear):
            nn.init.normal_(module.lora_B, std=0.2)
    return model.double()


def adapter_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


@pytest.fixture
def gate_BK() -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return (2 * torch.randn(USERS, EXPERTS, generator=generator, dtype=torch.float64)).softmax(-1).requires_grad_()


@pytest.fixture
def prompts() -> tuple[Tensor, Tensor]:
    """Left-padded prompts of different lengths."""
    ids = torch.randint(3, VOCABULARY, (USERS, LENGTH), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(LENGTH) >= torch.tensor([0, 4, 9, 10, 1])[:, None]).long()
    return ids * mask, mask


def loop_over_experts(layer: MoELoRALinear, x: Tensor, gate: Tensor) -> Tensor:
    """Every expert's own output, as the paper writes it: [B, L, K, out], and their mean by the gate."""
    A, B = layer.lora_A.chunk(EXPERTS, dim=0), layer.lora_B.chunk(EXPERTS, dim=1)
    outputs = torch.stack([x @ a.T @ b.T for a, b in zip(A, B, strict=True)], dim=2)
    return layer.base_layer(x) + layer.scale * (outputs * gate[:, None, :, None]).sum(dim=2)


def one_layer(dropout: float = 0.0) -> MoELoRALinear:
    torch.manual_seed(0)
    base = nn.Linear(12, 10).requires_grad_(False)
    layer = MoELoRALinear(base, ActiveGate(1, EXPERTS), 0, RANK, scale=16.0, dropout=dropout)
    nn.init.normal_(layer.lora_B)
    return layer.double()


def gradients(output: Tensor, tensors: list[Tensor]) -> tuple[Tensor, ...]:
    direction = torch.linspace(-1, 2, output.numel(), dtype=output.dtype).view(output.shape)
    return torch.autograd.grad((output * direction).sum(), tensors)


def test_folded_mix_is_the_mix_of_experts(gate_BK: Tensor) -> None:
    layer = one_layer()
    x = torch.randn(USERS, 7, 12, dtype=torch.float64, requires_grad=True)
    with layer.gate.use(gate_BK):
        folded = layer(x)
    looped = loop_over_experts(layer, x, gate_BK)
    torch.testing.assert_close(folded, looped)
    learned = [x, gate_BK, layer.lora_A, layer.lora_B]
    for ours, expected in zip(gradients(folded, learned), gradients(looped, learned), strict=True):
        torch.testing.assert_close(ours, expected)


def test_dropout_falls_on_the_input_of_the_update_only(gate_BK: Tensor) -> None:
    """The mask is read off the gradient of x, and the same mask put into the loop."""
    layer = one_layer(dropout=0.5)
    x = torch.randn(USERS, 7, 12, dtype=torch.float64, requires_grad=True)
    with layer.gate.use(gate_BK):
        dropped = layer(x)
        (grad,) = torch.autograd.grad((dropped - layer.base_layer(x)).sum(), x, retain_graph=True)
        keep = grad != 0
        assert 0.3 < keep.double().mean() < 0.7
        expected = loop_over_experts(layer, x * keep * 2, gate_BK) - layer.base_layer(x * keep * 2)
        torch.testing.assert_close(dropped - layer.base_layer(x), expected)
        learned = [gate_BK, layer.lora_A, layer.lora_B]
        for ours, theirs in zip(gradients(dropped, learned), gradients(expected, learned), strict=True):
            torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(layer.eval()(x), loop_over_experts(layer, x, gate_BK))


def test_one_expert_is_plain_lora() -> None:
    """Against PEFT on the same Llama, value and every gradient."""
    ours = adapted(experts=1)
    lora = LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=2 * RANK, lora_dropout=0.0, target_modules="all-linear")
    theirs = get_peft_model(llama(), lora).double()
    pairs = {}
    for name, module in causal_model(theirs).named_modules():
        if hasattr(module, "lora_A") and hasattr(module, "base_layer"):
            own = ours.get_submodule(name)
            assert isinstance(own, MoELoRALinear)
            pairs[name] = own
            with torch.no_grad():
                module.lora_A["default"].weight.copy_(own.lora_A)
                module.lora_B["default"].weight.copy_(own.lora_B)
    assert len(pairs) == gate_of(ours).num_layers == 2 * 7
    ids = torch.randint(3, VOCABULARY, (3, 9))
    with gate_of(ours).use(torch.ones(3, 1, dtype=torch.float64)):
        loss = ours(input_ids=ids, labels=ids).loss
    expected = theirs(input_ids=ids, labels=ids).loss
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    for name, own in pairs.items():
        peer: Any = causal_model(theirs).get_submodule(name)
        torch.testing.assert_close(own.lora_A.grad, peer.lora_A["default"].weight.grad)
        torch.testing.assert_close(own.lora_B.grad, peer.lora_B["default"].weight.grad)


def step(model: PreTrainedModel, gate: Tensor, ids: Tensor) -> dict[str, Tensor]:
    """Forward with the gate, backward outside of it: the loss and every gradient."""
    model.zero_grad()
    torch.manual_seed(7)  # of dropout
    with gate_of(model).use(gate):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    (grad_gate,) = torch.autograd.grad(loss, gate, retain_graph=True)
    loss.backward()
    return {
        "loss": loss.detach(),
        "gate": grad_gate,
        **{n: w.grad.clone() for n, w in adapter_weights(model).items() if w.grad is not None},
    }


def test_checkpointing_recomputes_with_the_gate_of_the_forward_pass(gate_BK: Tensor) -> None:
    plain = adapted(dropout=0.3).train()
    base = llama()
    base.activation_checkpointing_enable(CHECKPOINTING)
    recomputing = adapted(base, dropout=0.3).train()
    calls: list[int] = []
    recomputing.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    ids = torch.randint(3, VOCABULARY, (USERS, 9))
    expected, found = step(plain, gate_BK, ids), step(recomputing, gate_BK, ids)
    assert len(calls) == 3  # forward, and once for each of two backward passes
    assert expected.keys() == found.keys()
    assert len(expected) == 2 + 2 * 14
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=name)
    # Two passes with gates of their own before either goes backward, as a loss over pairs has them.
    for model in (plain, recomputing):
        model.zero_grad()
        total = torch.zeros((), dtype=torch.float64)
        for gate in (gate_BK, gate_BK.flip(0)):
            torch.manual_seed(7)
            with gate_of(model).use(gate):
                total = total + model(input_ids=ids, labels=ids, use_cache=False).loss
        total.backward()
    for name, weight in adapter_weights(plain).items():
        torch.testing.assert_close(recomputing.get_parameter(name).grad, weight.grad, msg=name)


def test_checkpointing_that_was_switched_on_without_the_gate_is_noticed(gate_BK: Tensor) -> None:
    model = adapted().train()
    model.activation_checkpointing_enable(CHECKPOINTING)
    ids = torch.randint(3, VOCABULARY, (USERS, 9))
    with gate_of(model).use(gate_BK):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    with pytest.raises(ValueError, match="ran without a gate"):
        loss.backward()


def test_decoding_step_by_step_equals_the_whole_pass(gate_BK: Tensor) -> None:
    model = adapted().eval()
    ids = torch.randint(3, VOCABULARY, (USERS, LENGTH))
    with torch.no_grad(), gate_of(model).use(gate_BK):
        whole = model(ids).logits
        cache, steps = None, []
        for position in range(LENGTH):
            output = model(ids[:, position : position + 1], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            steps.append(output.logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), whole)


@pytest.fixture
def titles() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(1, 7, (40,), generator=generator).tolist()
    return [[*torch.randint(3, 6, (length,), generator=generator).tolist(), EOS] for length in lengths]


def each_user(model: PreTrainedModel, gate: Tensor, run: Callable[[slice], Any]) -> Iterator[Any]:
    for user in range(USERS):
        alone = slice(user, user + 1)
        with gate_of(model).use(gate[alone]):
            yield run(alone)


@pytest.mark.parametrize("nodes_per_forward", [4, 16, 48, 10_000])
@pytest.mark.parametrize("per_layer", [False, True])
def test_titles_are_scored_with_the_gate_of_their_user(
    gate_BK: Tensor,
    prompts: tuple[Tensor, Tensor],
    titles: list[list[int]],
    nodes_per_forward: int,
    per_layer: bool,
) -> None:
    model, trie = adapted().eval(), _trie(titles)
    gate = torch.stack([gate_BK.roll(layer, 1) for layer in range(14)]) if per_layer else gate_BK
    with gate_of(model).use(gate):
        scores = title_log_likelihoods(model, *prompts, trie, block_size=8, nodes_per_forward=nodes_per_forward)
    for user in range(USERS):
        alone = slice(user, user + 1)
        with gate_of(model).use(gate[..., alone, :]):
            ids, mask = prompts
            expected = title_log_likelihoods(model, ids[alone], mask[alone], trie)
        torch.testing.assert_close(scores[alone], expected)
    with gate_of(model).use(gate_BK.flip(0)):
        assert not torch.allclose(title_log_likelihoods(model, *prompts, trie), scores)


def test_beams_keep_the_gate_of_their_user(
    gate_BK: Tensor, prompts: tuple[Tensor, Tensor], titles: list[list[int]]
) -> None:
    model, trie, (ids, mask) = adapted().eval(), _trie(titles), prompts
    with gate_of(model).use(gate_BK):
        items, scores = beam_search_titles(model, ids, mask, trie, num_beams=3)
    alone = list(each_user(model, gate_BK, lambda user: beam_search_titles(model, ids[user], mask[user], trie, 3)))
    assert torch.equal(items, torch.cat([own_items for own_items, _ in alone]))
    torch.testing.assert_close(scores, torch.cat([own_scores for _, own_scores in alone]))


def test_free_generation_keeps_the_gate_of_its_user(backbone_root: Path) -> None:
    config = BackboneConfig(name=str(backbone_root / "stories260k"), adapter="moe-lora", lora_alpha=64)
    tokenizer = load_tokenizer(config)
    model = load_backbone(config, tokenizer, seed=0, device="cpu", trainable=True).eval()
    for weight in adapter_weights(model).values():
        nn.init.normal_(weight, std=0.1)
    gate = torch.eye(4)[:3]
    ids = tokenizer(["Once upon a time"] * 3, return_tensors="pt")["input_ids"]

    def generate(users: slice) -> list[list[str]]:
        with gate_of(model).use(gate[users]):
            return generate_free(model, tokenizer, ids[users], torch.ones_like(ids[users]), 2, max_new_tokens=8)

    together = generate(slice(None))
    assert together == [texts for user in range(3) for texts in generate(slice(user, user + 1))]
    assert len({texts[0] for texts in together}) == 3  # one prompt, three gates
    # The adapter is off where titles are embedded by the base model.
    frozen = load_backbone(config, tokenizer, seed=0, device="cpu", trainable=False)
    expected = last_token_embeddings(frozen, tokenizer, ["Heat", "Fargo"])
    torch.testing.assert_close(last_token_embeddings(model, tokenizer, ["Heat", "Fargo"]), expected)


def test_a_pass_that_does_not_fit_its_gate_is_refused(gate_BK: Tensor) -> None:
    model = adapted().eval()
    gate, ids = gate_of(model), torch.randint(3, VOCABULARY, (2 * USERS, 4))
    with pytest.raises(ValueError, match="ran without a gate"):
        model(ids)
    with gate.use(gate_BK):
        with pytest.raises(ValueError, match=r"\[10, 4, 32\].*5 rows.*ActiveGate\.rows"):
            model(ids)
        with gate.rows(slice(None), 2):
            model(ids)
        with gate.rows(slice(1, 4), 1), pytest.raises(ValueError, match="3 rows"):
            model(ids[:USERS])
        with pytest.raises(ValueError, match="without rows"):  # tokens of all rows in one axis
            model.get_submodule("model.layers.0.mlp.up_proj")(torch.zeros(USERS, 32, dtype=torch.float64))
        model(ids[:USERS])
    for wrong in (gate_BK[:, :3], gate_BK[None], gate_BK[0]):
        with pytest.raises(ValueError, match=r"--backbone\.lora_experts"):
            gate.use(wrong)


def test_a_copied_model_has_a_gate_of_its_own(gate_BK: Tensor) -> None:
    model = adapted()
    copied = copy.deepcopy(model)
    assert len({id(m.gate) for m in copied.modules() if isinstance(m, MoELoRALinear)}) == 1
    with gate_of(model).use(gate_BK), pytest.raises(ValueError, match="ran without a gate"):
        copied(torch.randint(3, VOCABULARY, (USERS, 4)))


def test_targets_choose_layers() -> None:
    model = llama()
    gate = add_moe_lora(model, rank=4, experts=2, scale=1.0, targets=["q_proj", "mlp.up_proj"])
    layers = [name for name, module in model.named_modules() if isinstance(module, MoELoRALinear)]
    assert layers == [f"model.layers.{i}.{name}" for i in range(2) for name in ("self_attn.q_proj", "mlp.up_proj")]
    assert gate.num_layers == 4
    with pytest.raises(ValueError, match=r"--backbone\.lora_targets has proj.*down_proj"):
        add_moe_lora(llama(), rank=4, experts=2, scale=1.0, targets=["proj"])


@pytest.mark.parametrize("quantization", ["none", "8bit", "4bit"])
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_adapter_and_gate_learn_on_every_base(
    backbone_root: Path, quantization: Any, gradient_checkpointing: bool, precision: torch.dtype
) -> None:
    config = BackboneConfig(
        name=str(backbone_root / "stories260k"),
        adapter="moe-lora",
        quantization=quantization,
        gradient_checkpointing=gradient_checkpointing,
    )
    tokenizer = load_tokenizer(config)
    model = load_backbone(config, tokenizer, seed=0, device="cpu", trainable=True)
    assert model.training
    assert causal_model(model).is_gradient_checkpointing is gradient_checkpointing
    weights = adapter_weights(model)
    assert len(weights) == 2 * 5 * 7
    assert all("lora_" in name and weight.dtype == torch.float32 for name, weight in weights.items())
    base = load_backbone(BackboneConfig(name=config.name), tokenizer, seed=0, device="cpu", trainable=False)
    trained = sum(weight.numel() for weight in weights.values())
    assert describe(model)["parameters"] == describe(base)["parameters"] + trained
    torch.manual_seed(0)
    router = ExpertGate(GateConfig("mlp"), 6, 4, gate_of(model).num_layers)
    states = torch.randn(2, 6)
    texts = ["Tom liked big red trucks.", "Lily saw a small bird."]
    ids = tokenizer(texts, return_tensors="pt", padding=True)["input_ids"]
    optimizer = torch.optim.Adam([*weights.values(), *router.parameters()], lr=1e-2)

    def loss() -> Tensor:
        autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == torch.bfloat16)
        with autocast, gate_of(model).use(router(states)):
            return model(input_ids=ids, labels=ids).loss

    first = loss().item()
    for _ in range(6):
        optimizer.zero_grad()
        loss().backward()
        assert all(w.grad is not None and w.grad.isfinite().all() for w in weights.values())
        optimizer.step()
    assert all(w.grad is not None and w.grad.abs().sum() > 0 for w in router.parameters())
    assert loss().item() < first - 0.3


def test_scale_and_seed_follow_the_config(backbone_root: Path) -> None:
    def load(**changes: Any) -> MoELoRALinear:
        settings = {"lora_rank": 6, "lora_experts": 3, "lora_alpha": 12, "lora_targets": ["q_proj"]} | changes
        config = BackboneConfig(name=str(backbone_root / "stories260k"), adapter="moe-lora", **settings)
        seed = 1 if changes.get("lora_dropout") == 0.5 else 0
        model = load_backbone(config, load_tokenizer(config), seed=seed, device="cpu", trainable=True)
        layer = causal_model(model).get_submodule("model.layers.0.self_attn.q_proj")
        assert isinstance(layer, MoELoRALinear)
        return layer

    layer = load()
    assert (layer.scale, layer.lora_A.shape, layer.dropout) == (6, (6, 64), 0.05)
    assert layer.lora_A.abs().max() <= 1 / 8  # kaiming with a = sqrt 5 is uniform within 1 / sqrt(in)
    assert (layer.lora_B == 0).all()
    assert load(lora_scale_by="rank").scale == 2
    assert torch.equal(load().lora_A, layer.lora_A)
    assert not torch.equal(load(lora_dropout=0.5).lora_A, layer.lora_A)


class Gated(Recommender):
    """A backbone and its gate, as a method holds them."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.backbone = adapted()
        torch.manual_seed(seed)
        gate = gate_of(self.backbone)
        self.gate = ExpertGate(GateConfig("resnet"), 16, gate.num_experts, gate.num_layers)
        self.saved_buffers = tuple(f"gate.{name}" for name in self.gate.saved_buffers)
        for weight in adapter_weights(self).values():
            nn.init.normal_(weight, std=0.1)


def test_checkpoints_hold_adapter_gate_and_running_statistics(tmp_path: Path, prompts: tuple[Tensor, Tensor]) -> None:
    trained, fresh = Gated(seed=0), Gated(seed=1)
    states = torch.randn(USERS, 16)
    trained.train().gate(states)  # moves the running statistics
    saved = weights_of(trained)
    assert set(saved) == {*adapter_weights(trained), *trained.saved_buffers}
    assert len(trained.saved_buffers) == 2 * 19
    save_file(saved, tmp_path / "weights.safetensors")
    load_weights(fresh, tmp_path / "weights.safetensors")
    outputs = []
    for model in (trained.eval(), fresh.eval()):
        with torch.no_grad(), gate_of(model.backbone).use(model.gate(states)):
            outputs.append(model.backbone(*prompts).logits)
    assert torch.equal(outputs[0], outputs[1])


def test_other_backbones_have_no_gate() -> None:
    assert find_gate(llama()) is None
    with pytest.raises(ValueError, match=r"--backbone\.adapter moe-lora"):
        gate_of(llama())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_experts": 3}, r"--backbone\.lora_experts 3.*--backbone\.lora_rank 8"),
        ({"name": "tiny"}, r"--backbone\.adapter moe-lora.*learns nothing"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BackboneConfig(**({"name": "some/model", "adapter": "moe-lora"} | changes))


@pytest.mark.parametrize("kind", ["linear", "resnet", "mlp"])
@pytest.mark.parametrize("per_layer", [False, True])
def test_gates_are_distributions(kind: Any, per_layer: bool) -> None:
    torch.manual_seed(0)
    gate = ExpertGate(GateConfig(kind, per_layer=per_layer), state_size=9, num_experts=3, num_layers=5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = gate(torch.randn(4, 9))
    assert out.shape == ((5, 4, 3) if per_layer else (4, 3))
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.sum(-1), torch.ones(out.shape[:-1]))
    assert out.std(dim=0).max() > 1e-4  # another gate for another user, or layer


def test_top_k_keeps_the_largest_and_normalises_again() -> None:
    torch.manual_seed(0)
    gate = ExpertGate(GateConfig(top_k=2), state_size=6, num_experts=4, num_layers=1)
    states = torch.randn(50, 6)
    full = gate.router(states).softmax(-1)
    kept = full * (full >= full.topk(2).values[:, -1:])
    torch.testing.assert_close(gate(states), kept / kept.sum(-1, keepdim=True))
    for top_k in (0, 5):
        with pytest.raises(ValueError, match=r"--method\.gate\.top_k"):
            ExpertGate(GateConfig(top_k=top_k), 6, 4, 1)


@pytest.mark.parametrize("settings", [{"noise": 1.0}, {"dropout": 0.5}])
def test_noise_and_dropout_are_for_training(settings: dict[str, float]) -> None:
    gate = ExpertGate(GateConfig(**settings), state_size=6, num_experts=4, num_layers=1)
    states = torch.randn(3, 6)
    assert not torch.equal(gate(states), gate(states))
    assert torch.equal(gate.eval()(states), gate(states))


def test_logged_parts_are_means_over_users() -> None:
    gate = torch.tensor([[1.0, 0.0], [0.5, 0.5]], requires_grad=True)
    parts = gate_parts(gate, count=10)
    assert not any(part.requires_grad for part in parts.values())
    means = {name: part.item() / 10 for name, part in parts.items()}
    assert means == pytest.approx({"gate_entropy": 0.5 * math.log(2), "expert_0_use": 0.75, "expert_1_use": 0.25})
    assert gate_parts(torch.stack([gate, gate]), 10) == parts
