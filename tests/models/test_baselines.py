"""MLPs, norms, biases and low-rank updates: first the hybrid, then their weights."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastadapt.adapter.files import read_transcoders, save_adapters
from fastadapt.adapter.module import AdapterConfig
from fastadapt.batch import Batch
from fastadapt.errors import UserError
from fastadapt.interop import hu2026
from fastadapt.models.architectures import ARCHITECTURES
from fastadapt.models.baselines import Baseline, LoraConfig
from fastadapt.models.replacement import ReplacementModel
from fastadapt.models.trained_files import load_adapters
from fastadapt.objective import ObjectiveConfig, objective
from fastadapt.training.held_out import evaluate
from fastadapt.training.optimizer import AdapterOptimizer, OptimizerConfig

KINDS = ("mlp", "norms", "bias", "lora")
IDS = torch.tensor([[5, 9, 23, 7, 31, 8]])
OUTPUT_ALONE = ObjectiveConfig(sparsity=0, nmse=0, bridge=0)


def fresh(pair: Any, kind: Baseline) -> ReplacementModel:
    return ReplacementModel.create(pair, LoraConfig(3, 24) if kind == "lora" else kind)


def tuned(pair: Any, kind: Baseline) -> ReplacementModel:
    """With weights far from the hybrid's."""
    model = fresh(pair, kind)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.adapters.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=generator).to(p.dtype))
    return model


class Biased(torch.nn.Module):
    """An MLP with a bias of its output: the oracle of the kind ``bias``."""

    def __init__(self, mlp: torch.nn.Module, bias: torch.Tensor) -> None:
        super().__init__()
        self.mlp, self.bias = mlp, torch.nn.Parameter(bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp(x) + self.bias


def plain(pair: Any, kind: Baseline, adapters: Any = None) -> Any:
    """transformers' own model of the student, made by loading weights: the oracle."""
    model = copy.deepcopy(pair.target)
    for i, (layer, base) in enumerate(zip(model.model.layers, pair.base_mlps, strict=True)):
        layer.mlp = copy.deepcopy(base)
        weights = adapters[i].state_dict() if adapters is not None else {}
        last = {
            n.removeprefix("final_norm."): weights.pop(n) for n in list(weights) if "final" in n
        }
        if kind == "mlp" and weights:
            layer.mlp.load_state_dict(weights)
        elif kind == "bias":
            if weights:
                layer.mlp = Biased(layer.mlp, weights["bias"].clone())
        elif kind == "lora":
            with torch.no_grad():
                for name in {key.rpartition(".")[0] for key in weights}:
                    low = weights[f"{name}.lora_B"] @ weights[f"{name}.lora_A"]
                    layer.mlp.get_parameter(name).add_(low)
        elif weights:
            missing, unexpected = layer.load_state_dict(weights, strict=False)
            assert not unexpected
            norms = [name for name in missing if "norm" in name]
            assert set(norms) <= {"linear_attn.norm.weight"}  # gated, a part of attention
        if last:
            model.model.norm.load_state_dict(last)
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_it_starts_as_the_hybrid_to_the_bit(
    architecture: str, kind: Baseline, make_pair: Callable[..., Any]
) -> None:
    pair = make_pair(architecture)
    target, hybrid = copy.deepcopy(pair.target), plain(pair, kind)
    model = fresh(pair, kind)
    with torch.no_grad():
        mode: Any
        for mode, oracle in (("target", target), ("hybrid", hybrid), ("replacement", hybrid)):
            with model.mode(mode):
                assert torch.equal(model(IDS).logits, oracle(IDS).logits), mode


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_it_is_transformers_model_of_its_weights(
    architecture: str, kind: Baseline, make_pair: Callable[..., Any]
) -> None:
    pair = make_pair(architecture)
    target, hybrid = copy.deepcopy(pair.target), plain(pair, kind)
    given = tuned(copy.deepcopy(pair), kind).adapters
    student = plain(pair, kind, given)
    model = ReplacementModel(pair, given)
    with torch.no_grad():
        mode: Any
        for mode, oracle in (("target", target), ("hybrid", hybrid), ("replacement", student)):
            expected = oracle(IDS).logits
            with model.mode(mode):
                assert torch.equal(model(IDS).logits, expected), mode
            inputs = model.block_inputs(IDS, None)
            h = inputs.hidden
            for layer in range(model.n_layers):
                h, aux = model.block(layer, h, inputs.arguments[layer], mode)
                assert aux is None
            logits = model.final_norm(h, mode) @ model.head.T
            if model.softcap:
                logits = model.softcap * (logits / model.softcap).tanh()
            torch.testing.assert_close(logits, expected)
    assert not torch.equal(student(IDS).logits, hybrid(IDS).logits)


def test_the_rank_gives_as_many_parameters_as_adapters(make_pair: Callable[..., Any]) -> None:
    """To within half of what one rank more has; never above the full rank."""
    for architecture in ("qwen2", "phi3"):
        pair = make_pair(architecture)
        adapters = ReplacementModel.create(copy.deepcopy(pair), AdapterConfig(24)).adapters
        low = ReplacementModel.create(copy.deepcopy(pair), LoraConfig(None, 24)).adapters
        ours, theirs = (sum(p.numel() for p in part.parameters()) for part in (low, adapters))
        one = sum(sum(p.shape) for p in pair.base_mlps.parameters() if p.ndim == 2)
        assert abs(ours - theirs) <= one / 2
        full = ReplacementModel.create(copy.deepcopy(pair), LoraConfig(None, 10_000)).adapters
        assert getattr(full[0], "rank") == 16  # the width  # noqa: B009
    with pytest.raises(UserError, match=r"run\.rank: expected at most 16.*got 17"):
        ReplacementModel.create(make_pair("qwen2"), LoraConfig(17, 24))


def test_the_seed_draws_one_factor_of_a_low_rank_update(make_pair: Callable[..., Any]) -> None:
    weights = [
        ReplacementModel.create(make_pair("qwen2"), LoraConfig(3, 24), seed=seed).adapters
        for seed in (1, 1, 2)
    ]
    first, same, other = ({n: p.detach() for n, p in w.named_parameters()} for w in weights)
    for name in first:
        assert torch.equal(first[name], same[name])
        assert torch.equal(first[name], other[name]) == name.endswith("lora_B")
        bound = first[name].shape[1] ** -0.5
        assert (first[name].abs().max() == 0) == name.endswith("lora_B")
        assert first[name].abs().max() <= bound


def test_every_norm_is_refit(make_pair: Callable[..., Any]) -> None:
    block = {"input_layernorm.weight", "post_attention_layernorm.weight"}
    around = {"pre_feedforward_layernorm.weight", "post_feedforward_layernorm.weight"}
    heads = {"self_attn.q_norm.weight", "self_attn.k_norm.weight"}
    expected = dict.fromkeys(("qwen2", "llama", "mistral", "phi3"), block) | {
        "gemma2": block | around,
        "gemma3_text": block | around | heads,
        "olmo2": (block - {"input_layernorm.weight"})
        | {"post_feedforward_layernorm.weight"}
        | heads,
        "gemma4_text": block | around | heads | {"post_per_layer_input_norm.weight"},
        "glm4": block | {"post_self_attn_layernorm.weight", "post_mlp_layernorm.weight"},
        "qwen3": block | heads,
        "qwen3_5_text": block | heads,
    }
    assert expected.keys() == ARCHITECTURES.keys()
    for architecture, names in expected.items():
        layers = [
            {name for name, _ in layer.named_parameters()}
            for layer in fresh(make_pair(architecture), "norms").adapters
        ]
        later = block if architecture == "qwen3_5_text" else names  # linear attention
        assert layers == [names, later, later | {"final_norm.weight"}], architecture


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ["qwen2", "gemma2", "olmo2"])
def test_generate_in_each_mode(
    architecture: str, kind: Baseline, make_pair: Callable[..., Any]
) -> None:
    model = tuned(make_pair(architecture), kind)
    seen = set()
    for mode in ("target", "hybrid", "replacement"):
        with model.mode(mode):
            settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
            cached = model.generate(IDS, **settings)
            ids = IDS
            for _ in range(8):
                ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
            assert torch.equal(cached, ids)
            seen.add(tuple(ids[0].tolist()))
    assert len(seen) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_batches_give_the_tokens_of_generate(kind: Baseline, make_pair: Callable[..., Any]) -> None:
    from transformers import ContinuousBatchingConfig

    model = tuned(make_pair("qwen2"), kind)
    prompts = [[5, 9, 23], [7, 31, 8, 12, 3], [4]]
    greedy = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    config = model.model.generation_config
    config.update(**greedy, pad_token_id=2)
    with torch.no_grad():
        together = model.model.generate_batch(
            prompts,
            generation_config=config,
            continuous_batching_config=ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=32),
        )
        alone = [model.generate(torch.tensor([p]), **greedy)[0, len(p) :] for p in prompts]
    assert [o.generated_tokens for o in together.values()] == [out.tolist() for out in alone]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_compile(kind: Baseline, make_pair: Callable[..., Any]) -> None:
    torch._dynamo.reset()
    model = tuned(make_pair("gemma2"), kind)
    compiled = torch.compile(model.model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        for mode in ("replacement", "hybrid", "target"):
            with model.mode(mode):
                torch.testing.assert_close(
                    compiled(IDS, use_cache=False).logits, model(IDS).logits, rtol=1e-4, atol=1e-4
                )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ["qwen2", "gemma3_text", "olmo2"])
def test_gradients_are_those_of_the_plain_models_kl(
    architecture: str, kind: Baseline, make_pair: Callable[..., Any]
) -> None:
    pair = make_pair(architecture, "float64")
    given = tuned(copy.deepcopy(pair), kind).adapters
    student = plain(pair, kind, given).requires_grad_(True)
    with torch.no_grad():
        y = pair.target(IDS).logits[:, :-1].log_softmax(-1)
    ours = student(IDS).logits[:, :-1].log_softmax(-1)
    expected = (y.exp() * (y - ours)).sum(-1).mean()
    expected.backward()
    model = ReplacementModel(pair, given)
    out = objective(model, Batch(IDS, None, IDS), 1, OUTPUT_ALONE)
    out.loss.backward()
    torch.testing.assert_close(out.loss, expected, rtol=1e-6, atol=0)
    assert out.calls == []
    assert out.metrics.keys() == {"kl", "loss", "nmse", "nmse_token", "top1_error"}
    for i, adapter in enumerate(model.adapters):
        for name, p in adapter.named_parameters():
            if kind == "lora":
                expected_gradient = _of_factor(student.model.layers[i].mlp, adapter, name)
                torch.testing.assert_close(p.grad, expected_gradient, rtol=1e-5, atol=1e-7)
                continue
            inside = name if kind == "norms" else f"mlp.{name}"
            path = f"model.layers.{i}.{inside}"
            if name.startswith("final_norm"):
                path = "model.norm.weight"
            assert p.grad is not None
            # transformers' RMSNorm computes in float32 in any dtype.
            torch.testing.assert_close(
                p.grad, student.get_parameter(path).grad, rtol=1e-5, atol=1e-7
            )


def _of_factor(mlp: torch.nn.Module, adapter: torch.nn.Module, name: str) -> torch.Tensor:
    """Return the gradient of a factor of W + B A from that of the whole matrix."""
    matrix, factor = name.rsplit(".", 1)
    whole = mlp.get_parameter(matrix).grad
    assert whole is not None
    if factor == "lora_A":
        return adapter.get_parameter(f"{matrix}.lora_B").T @ whole
    return whole @ adapter.get_parameter(f"{matrix}.lora_A").T


@pytest.mark.parametrize("kind", KINDS)
def test_each_stream_ends_in_the_norm_of_its_last_block(
    kind: Baseline, make_pair: Callable[..., Any]
) -> None:
    """A bridge is one model up to the cutoff and the other, with its last norm, from there on."""
    pair = make_pair("olmo2", "float64")
    target = copy.deepcopy(pair.target)
    given = tuned(copy.deepcopy(pair), kind).adapters
    student = plain(pair, kind, given)
    model = ReplacementModel(pair, given)
    arguments = model.block_inputs(IDS, None)
    cutoff = 1

    def kl(first: Any, then: Any) -> torch.Tensor:
        h = arguments.hidden
        for i, keywords in enumerate(arguments.arguments):
            h = (first if i < cutoff else then).model.layers[i](h, **keywords)
        logits = then.lm_head(then.model.norm(h))[:, :-1].log_softmax(-1)
        return (y.exp() * (y - logits)).sum(-1).mean()

    with torch.no_grad():
        y = target(IDS).logits[:, :-1].log_softmax(-1)
        expected = {
            "kl": kl(student, student),
            "bridge_adapter_to_target": kl(student, target),
            "bridge_target_to_adapter": kl(target, student),
        }
    assert len({round(float(value), 6) for value in expected.values()}) == 3
    config = ObjectiveConfig(sparsity=0, nmse=0, bridge=1)
    metrics = objective(model, Batch(IDS, None, IDS), cutoff, config).metrics
    for name, value in expected.items():
        torch.testing.assert_close(metrics[name], value, rtol=1e-6, atol=0)


@pytest.mark.parametrize("weights", [(0, 0), (1, 1)], ids=["output", "nmse-and-bridges"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_moves_what_is_trained_and_nothing_else(
    kind: Baseline, weights: tuple[int, ...], make_pair: Callable[..., Any]
) -> None:
    pair = make_pair("gemma2")
    frozen = {n: t.clone() for n, t in pair.target.state_dict().items()}
    base = [{n: t.clone() for n, t in mlp.state_dict().items()} for mlp in pair.base_mlps]
    with torch.no_grad():
        before = pair.target(IDS).logits
    model = fresh(pair, kind)
    parameters = dict(model.adapters.named_parameters())
    start = {name: p.detach().clone() for name, p in parameters.items()}
    optimizer = AdapterOptimizer(parameters, OptimizerConfig(lr=1e-2))
    config = ObjectiveConfig(sparsity=0, nmse=weights[0], bridge=weights[1])
    losses = []
    for step in range(4):
        out = objective(model, Batch(IDS, None, IDS), step, config)
        out.loss.backward()
        losses.append(float(out.metrics["kl"]))
        trained = {id(p) for p in parameters.values()}
        assert all(p.grad is None for p in model.parameters() if id(p) not in trained)
        optimizer.step(1e-2, optimizer.gradient_norm())
    assert losses[-1] < losses[0]
    assert all(not torch.equal(p, start[name]) for name, p in parameters.items())
    for mlp, was in zip(model.mlps, base, strict=True):
        assert all(torch.equal(t, was[n]) for n, t in mlp.base.state_dict().items())
    now = {
        name.replace(".mlp.target.", ".mlp.").replace("norm.norm.", "norm."): t
        for name, t in model.model.state_dict().items()
        if ".mlp.base." not in name and ".mlp.adapter." not in name
    }
    assert now.keys() == frozen.keys()
    assert all(torch.equal(t, frozen[name]) for name, t in now.items())
    with torch.no_grad(), model.mode("target"):
        assert torch.equal(model(IDS).logits, before)


@pytest.mark.parametrize("kind", KINDS)
def test_recomputing_changes_no_bit(kind: Baseline, make_pair: Callable[..., Any]) -> None:
    gradients: list[list[Any]] = []
    for policy in ("none", "attention", "full"):
        model = tuned(make_pair("qwen3"), kind)
        config = ObjectiveConfig(sparsity=0, checkpoint=policy)
        objective(model, Batch(IDS, None, IDS), 1, config).loss.backward()
        gradients.append([p.grad for p in model.adapters.parameters()])
    for other in gradients[1:]:
        assert all(torch.equal(a, b) for a, b in zip(gradients[0], other, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_an_evaluation_has_no_numbers_of_features(
    kind: Baseline, make_pair: Callable[..., Any]
) -> None:
    model = tuned(make_pair("qwen2"), kind)
    values = evaluate(model, [Batch(IDS, None, IDS)])
    assert not [key for key in values if "l0" in key or "dead" in key or "density" in key]
    with torch.no_grad(), model.mode("target"):
        y = model(IDS).logits[:, :-1].log_softmax(-1)
    ours = model(IDS).logits[:, :-1].log_softmax(-1)
    kl = (y.exp() * (y - ours)).sum(-1).mean().item()
    assert values["kl_adapter"] == pytest.approx(kl, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ["phi3", "gemma3_text"])
def test_saved_and_loaded(
    architecture: str, kind: Baseline, make_pair: Callable[..., Any], tmp_path: Path
) -> None:
    model = tuned(make_pair(architecture), kind)
    save_adapters(model.adapters, tmp_path, {"step": 3})
    card = json.loads((tmp_path / "fastadapt.json").read_text())
    assert (card["kind"], card["additive"]) == (kind, False)
    loaded, metadata = load_adapters(tmp_path)
    assert metadata == {"step": 3}
    assert {module.kind for module in loaded} == {kind}
    again = ReplacementModel(make_pair(architecture), loaded)
    with torch.no_grad():
        for mode in ("target", "hybrid", "replacement"):
            with model.mode(mode), again.mode(mode):
                assert torch.equal(model(IDS).logits, again(IDS).logits)


def _edit(folder: Path, **changes: object) -> None:
    path = folder / "fastadapt.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _without_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "layer_1.safetensors")
    save_file(dict(list(tensors.items())[1:]), folder / "layer_1.safetensors")


DAMAGE = {
    "kind": (
        lambda f: _edit(f, kind="dora"),
        r"kind must be one of .*mlp, norms, bias, lora, got 'dora'",
    ),
    "other kind": (
        lambda f: _edit(f, kind="transcoder_adapter"),
        r"object missing required field adapter",
    ),
    "additive": (lambda f: _edit(f, additive=True), r"'additive' must be false for mlp"),
    "no shapes": (
        lambda f: _edit(f, tensors=None),
        r"tensors: expected array, got null",
    ),
    "odd shapes": (
        lambda f: _edit(f, tensors=[{"a": 3}] * 3),
        r"tensors.*: expected array, got int",
    ),
    "tensor": (_without_a_tensor, r"layer_1.*down_proj\.weight: expected \(16, 40\), got none"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_is_refused(
    damage: str, make_pair: Callable[..., Any], tmp_path: Path
) -> None:
    save_adapters(fresh(make_pair("qwen2"), "mlp").adapters, tmp_path)
    change, message = DAMAGE[damage]
    change(tmp_path)
    with pytest.raises(UserError, match=message):
        load_adapters(tmp_path)


def test_weights_of_another_model_are_refused(make_pair: Callable[..., Any]) -> None:
    kind: Any
    for kind, other, message in (
        ("mlp", "phi3", r"mlp of layer 0: down_proj|mlp of layer 0: gate_proj.weight: .*none"),
        ("norms", "qwen3", r"norms of layer 0: self_attn\.k_norm\.weight: expected \(8,\), as in"),
    ):
        given = fresh(make_pair("qwen2"), kind).adapters
        pair = make_pair(other)
        with pytest.raises(UserError, match=message):
            ReplacementModel(pair, given)
        ReplacementModel.create(pair, kind)  # the pair is as it was
    given = fresh(make_pair("qwen2"), "lora").adapters
    with pytest.raises(
        UserError, match=r"lora of layer 0: gate_\w+\.weight\.lora_A: expected none"
    ):
        ReplacementModel(make_pair("phi3"), given)
    mixed = fresh(make_pair("qwen2"), "mlp").adapters
    mixed[1] = fresh(make_pair("qwen2"), "norms").adapters[1]
    with pytest.raises(UserError, match="the same class in all layers"):
        ReplacementModel(make_pair("qwen2"), mixed)


def test_what_wants_transcoders_refuses_others_by_name(
    make_pair: Callable[..., Any], tmp_path: Path
) -> None:
    model = fresh(make_pair("qwen2"), "mlp")
    save_adapters(model.adapters, tmp_path / "mlp")
    with pytest.raises(UserError, match=r"this export needs transcoder adapters.*kind 'mlp'"):
        read_transcoders(tmp_path / "mlp", "this export")
    with pytest.raises(UserError, match=r"format hu2026 needs transcoder adapters.*'mlp'"):
        hu2026.save(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("architecture", ["qwen2", "gemma2", "qwen3"])
def test_a_pair_carries_one_kind_after_another(
    architecture: str, make_pair: Callable[..., Any]
) -> None:
    """With the same bits as a pair that never carried anything else."""
    configs: list[Any] = [AdapterConfig(24), "norms", "mlp", "bias", LoraConfig(3, 24), "norms"]

    def perturbed(seed: int) -> ReplacementModel:
        model = ReplacementModel.create(make_pair(architecture), configs[seed], seed=seed)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in model.adapters.parameters():
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
        return model

    alone = [perturbed(seed) for seed in range(len(configs))]
    ids = torch.tensor([[5, 9, 23, 7, 31, 8]])
    with torch.no_grad():
        for first in range(len(configs)):
            model = perturbed(first)
            for other in (*alone, alone[first]):
                model.set_adapters(other.adapters)
                assert model.adapters is other.adapters
                assert torch.equal(model(ids).logits, other(ids).logits)
                with model.mode("target"), alone[0].mode("target"):
                    assert torch.equal(model(ids).logits, alone[0](ids).logits)
    with pytest.raises(UserError, match="expected 3 adapters, one per layer, got 2"):
        model.set_adapters(alone[0].adapters[:2])
    assert model.adapters is alone[-1].adapters
