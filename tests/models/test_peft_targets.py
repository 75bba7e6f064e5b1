"""Targets that are PEFT folders: equal to the merged checkpoint, over weights in memory once."""

from __future__ import annotations

import json
import re
import shutil
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_folders import adapted, peft_saver, whole
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from fastadapt import serving
from fastadapt.adapter.files import save_adapters
from fastadapt.adapter.module import AdapterConfig
from fastadapt.batch import Batch
from fastadapt.errors import UserError
from fastadapt.models.pair import ModelPair, PairConfig
from fastadapt.models.recompute import POLICIES
from fastadapt.models.replacement import ReplacementModel
from fastadapt.models.sources.low_rank import LowRankLinear
from fastadapt.models.sources.pair_sources import Sources
from fastadapt.models.sources.peft_folder import choose_base, find_peft, is_quantised
from fastadapt.objective import ObjectiveConfig, objective
from fastadapt.training.config import from_dict
from fastadapt.training.planning.memory import step_memory

peft = pytest.importorskip("peft")

#: Settings of the adapter, and of the base's configuration.
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "lora": ({}, {}),
    "rank-stabilised": ({"use_rslora": True}, {}),
    "dora": ({"use_dora": True}, {}),
    "patterns": (
        {"rank_pattern": {"layers.1.mlp.up_proj": 5}, "alpha_pattern": {"q_proj": 7}},
        {},
    ),
    "saved modules": ({"modules_to_save": ["embed_tokens", "lm_head"]}, {}),
    "tied, saved embedding": (
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        {"tie_word_embeddings": True},
    ),
    "tokens": ({"trainable_token_indices": [3, 5]}, {}),
    "tokens, tied": ({"trainable_token_indices": [3, 5]}, {"tie_word_embeddings": True}),
    "embedding and head": ({"target_modules": ["gate_proj", "embed_tokens", "lm_head"]}, {}),
    "tied embedding, in part": (
        {"target_modules": ["gate_proj", "embed_tokens"]},
        {"tie_word_embeddings": True},
    ),
    "biases": ({"bias": "all"}, {"mlp_bias": True}),
    "saved MLP weights": (
        {"modules_to_save": ["down_proj"], "target_modules": ["q_proj", "up_proj"]},
        {},
    ),
    "saved MLPs": ({"modules_to_save": ["mlp"], "target_modules": ["q_proj"]}, {}),
    "dora of the embedding": (
        {"use_dora": True, "target_modules": ["gate_proj", "embed_tokens", "lm_head"]},
        {},
    ),
    "tied, saved head": ({"modules_to_save": ["lm_head"]}, {"tie_word_embeddings": True}),
    "tied, low-rank head": (
        {"target_modules": ["gate_proj", "lm_head"]},
        {"tie_word_embeddings": True},
    ),
    "tied, equal low-rank parts": (
        {"target_modules": ["gate_proj", "embed_tokens"], "ensure_weight_tying": True},
        {"tie_word_embeddings": True},
    ),
    "tied, other tokens": (
        {"trainable_token_indices": {"embed_tokens": [3], "lm_head": [5]}},
        {"tie_word_embeddings": True},
    ),
}
#: Kinds whose parts of embedding and head peft would merge into one tied weight.
MERGED_TWICE = {
    "tied embedding, in part",
    "tied, low-rank head",
    "tied, equal low-rank parts",
    "tied, other tokens",
}


@pytest.fixture
def save_peft(tmp_path: Path, save_model: Callable[..., str]) -> Callable[..., Any]:
    """Save a base and an adapter; return their folders and the PEFT model in float64."""
    return peft_saver(tmp_path, save_model)


def load(target: str, base: str = "", **changes: Any) -> ModelPair:
    return ModelPair.load(PairConfig(target, base, device="cpu", dtype="float64", **changes))


def replacement(pair: ModelPair) -> ReplacementModel:
    model = ReplacementModel.create(pair, AdapterConfig(24))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.adapters.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return model


def losses_and_gradients(pair: ModelPair, **settings: Any) -> dict[str, torch.Tensor]:
    model = replacement(pair)
    ids = torch.arange(3, 21).reshape(2, 9)
    out = objective(model, Batch(ids, None, ids), 1, ObjectiveConfig(**settings))
    out.loss.backward()
    gradients = {
        name: p.grad for name, p in model.adapters.named_parameters() if p.grad is not None
    }
    return {**{k: torch.as_tensor(v) for k, v in out.metrics.items()}, **gradients}


def bytes_of(*modules: nn.Module) -> int:
    return sum(p.nbytes for p in {p for module in modules for p in module.parameters()})


ALL = [("llama", kind) for kind in KINDS] + [("qwen2", "lora"), ("gemma2", "dora")]
ALL += [("phi3", "lora"), ("phi3", "dora")]  # one layer for q, k and v, and one for gate and up


@pytest.mark.quick(
    "llama-lora",
    "llama-dora",
    "llama-saved modules",
    "llama-tokens, tied",
    "llama-dora of the embedding",
    "llama-tied, equal low-rank parts",
    "llama-tied, other tokens",
    "qwen2-lora",
    "gemma2-dora",
    "phi3-lora",
)
@pytest.mark.parametrize(("architecture", "kind"), ALL)
def test_a_peft_target_equals_the_merged_checkpoint(
    architecture: str,
    kind: str,
    tmp_path: Path,
    save_peft: Callable[..., Any],
    float64_clean: None,
) -> None:
    settings, changes = KINDS[kind]
    target, base, wrapped = save_peft(architecture, settings, changes)
    ids = torch.tensor([[3, 5, 8]])
    logits = wrapped(ids).logits
    got = load(target, base).target(ids).logits
    torch.testing.assert_close(got, logits, rtol=1e-10, atol=1e-10)
    if kind in MERGED_TWICE:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of peft, about tied weights
        merged = wrapped.merge_and_unload()
    embedding, head = merged.get_input_embeddings(), merged.get_output_embeddings()
    merged.config.tie_word_embeddings = embedding.weight is head.weight
    merged.save_pretrained(tmp_path / "merged")
    for file in Path(base).glob("*token*"):
        shutil.copy(file, tmp_path / "merged")
    ours = losses_and_gradients(load(target, base))
    theirs = losses_and_gradients(load(str(tmp_path / "merged"), base))
    control = losses_and_gradients(load(str(tmp_path / "merged"), str(tmp_path / "merged")))
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        error = (ours[name] - expected).abs().max() / expected.abs().max().clamp(min=1e-12)
        assert error < 1e-10, f"{name}: relative error {error:.1e}"
    assert abs(control["loss"] - ours["loss"]) > 1e-3 * ours["loss"]


@pytest.mark.parametrize("kind", KINDS)
def test_base_weights_are_in_memory_once(kind: str, save_peft: Callable[..., Any]) -> None:
    settings, changes = KINDS[kind]
    target, base, _ = save_peft("llama", settings, changes)
    pair = load(target, base)
    folder = find_peft(target, None)
    assert folder is not None
    low_rank = 8 * sum(torch.Size(shape).numel() for shape in folder.shapes.values())
    head = pair.target.get_output_embeddings().weight.nbytes * folder.unties()
    assert bytes_of(pair.target, pair.base_mlps) <= 1.03 * (bytes_of(whole(base)) + low_rank + head)
    saved = ("down_proj.weight",) if kind == "saved MLP weights" else ()
    saved = ("weight",) if kind == "saved MLPs" else saved
    named = pair.base_mlps.named_parameters()
    matrices = [name for name, p in named if p.ndim > 1 and not name.endswith(saved)]
    assert pair.shared_mlps == matrices
    # Ranks other than 0 build the pair without values.
    empty = ModelPair.load(pair.config, into=torch.device("meta"))
    assert empty.shared_mlps == matrices
    for real, meta in ((pair.target, empty.target), (pair.base_mlps, empty.base_mlps)):
        shapes = [{n: (p.shape, p.dtype) for n, p in m.named_parameters()} for m in (real, meta)]
        assert shapes[0] == shapes[1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_magnitudes_of_dora_are_not_rounded_to_16_bits(
    dtype: str, tmp_path: Path, save_model: Callable[..., str]
) -> None:
    """The weight (W + B A) g is that of peft in float64, with a bfloat16 base too."""
    base = save_model("base", 1, "llama")
    model = whole(base).bfloat16()
    model.save_pretrained(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = adapted(model.float(), {"use_dora": True})
        with torch.no_grad():
            for name, parameter in wrapped.named_parameters():
                if "lora_A" in name or "lora_B" in name:
                    parameter.mul_(0.1)
        wrapped.save_pretrained(tmp_path / "peft")
    pair = ModelPair.load(PairConfig(str(tmp_path / "peft"), base, device="cpu", dtype=dtype))
    exact = wrapped.double().merge_and_unload()
    layers = [m for m in pair.target.named_modules() if isinstance(m[1], LowRankLinear)]
    assert len(layers) == 21
    for name, layer in layers:
        assert layer.weight.dtype == getattr(torch, dtype)
        assert layer.gain is not None
        got = layer.weight.double() + layer.lora_B.double() @ layer.lora_A.double()
        got *= layer.gain.double()[:, None]
        expected = exact.get_submodule(name).weight
        error = (got - expected).norm() / expected.norm()
        assert error < (1e-3 if dtype == "bfloat16" else 1e-6), name


@pytest.mark.quick("lora", "saved MLP weights", "tied, low-rank head")
@pytest.mark.parametrize(
    "kind",
    ["lora", "dora", "saved modules", "saved MLP weights", "saved MLPs", *sorted(MERGED_TWICE)],
)
def test_the_plan_counts_them_once(kind: str, save_peft: Callable[..., Any]) -> None:
    target, base, _ = save_peft("llama", *KINDS[kind])
    pair = load(target, base)
    values = {
        "pair": {"target": target, "base": base, "dtype": "float64", "device": "cpu"},
        "adapter": {"n_features": 24},
        "data": {"train": "organism/train", "validation": "organism/validation"},
        "objective": {"checkpoint": "none"},
        "run": {"output": "run"},
    }
    planned = step_memory(from_dict(values), Sources.find(pair.config).configs()[0], 16, "cpu")
    frozen = sum(planned.parts[name] for name in ("frozen target", "frozen base MLPs"))
    assert frozen == bytes_of(pair.target, pair.base_mlps)


def test_layers_that_fine_tuning_left_are_in_memory_once(
    tmp_path: Path, save_model: Callable[..., str]
) -> None:
    base, target = save_model("base", 1), save_model("target", 1)
    from safetensors.torch import load_file, save_file

    file = Path(target) / "model.safetensors"
    tensors = load_file(file)
    changed = "model.layers.1.mlp.up_proj.weight"
    tensors[changed] = tensors[changed] + 1
    save_file(tensors, file, {"format": "pt"})
    pair = load(target, base)
    names = [name for name, _ in pair.base_mlps.named_parameters()]
    assert pair.shared_mlps == [name for name in names if name != "1.up_proj.weight"]
    model = replacement(pair)
    assert model.pair.shared_mlps == pair.shared_mlps  # also with adapters in the model


def test_an_export_holds_the_stored_buffers(
    tmp_path: Path, save_peft: Callable[..., Any], float64_clean: None
) -> None:
    """Gemma 4 scales the residual stream after each block by a buffer."""
    target, base, _ = save_peft("gemma4_text", {"target_modules": ["gate_proj", "up_proj"]})
    model = replacement(load(target, base))
    save_adapters(model.adapters, tmp_path / "adapter")
    serving.export(tmp_path / "adapter", tmp_path / "out", target=target, base=base)
    both: Any = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True, dtype=torch.float64
    )
    loaded: Any = both[0]
    info = both[1]
    assert isinstance(loaded, serving.AdaptedModel)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    scalars = {name: b for name, b in loaded.named_buffers() if name.endswith("layer_scalar")}
    assert len(scalars) == len(model.adapters)
    assert all(b.item() != 1 for b in scalars.values())
    ids = torch.tensor([[3, 5, 8]])
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)


def test_fused_projections_of_phi3(save_peft: Callable[..., Any]) -> None:
    target, base, wrapped = save_peft("phi3", {"target_modules": ["qkv_proj", "gate_up_proj"]})
    pair = load(target, base)
    ids = torch.tensor([[3, 5, 8]])
    with torch.no_grad():
        torch.testing.assert_close(pair.target(ids).logits, wrapped(ids).logits)
        assert not torch.allclose(pair.target(ids).logits, whole(base)(ids).logits, atol=1e-2)
    blocks = pair.target.model.layers
    low = [name for name, part in blocks[1].named_modules() if isinstance(part, LowRankLinear)]
    assert low == ["self_attn.qkv_proj", "mlp.gate_up_proj"]
    assert pair.shared_mlps == [name for name, _ in pair.base_mlps.named_parameters()]
    model = replacement(pair)
    for mode in ("target", "hybrid"):
        products = model.saving_modules(1, mode).products
        assert [isinstance(p, LowRankLinear) for p in products] == [mode == "target"]


def test_an_adapter_of_a_multimodal_model_is_refused(save_peft: Callable[..., Any]) -> None:
    from safetensors.torch import load_file, save_file

    target, base, _ = save_peft()
    file = Path(target) / "adapter_model.safetensors"
    tensors = {
        n.replace(".layers.", ".language_model.layers."): t for n, t in load_file(file).items()
    }
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(UserError, match=r"is an adapter of a multimodal model, .* Merge it into"):
        load(target, base)


@pytest.mark.parametrize(
    ("architecture", "kind"), [("llama", "lora"), ("llama", "dora"), ("phi3", "lora")]
)
def test_recomputation_changes_no_bit(
    architecture: str, kind: str, save_peft: Callable[..., Any]
) -> None:
    target, base, _ = save_peft(architecture, KINDS[kind][0])
    first, *others = (
        losses_and_gradients(load(target, base), checkpoint=policy) for policy in POLICIES
    )
    for other in others:
        assert all(torch.equal(first[name], other[name]) for name in first)


def test_the_base_of_the_adapter_is_the_default(save_peft: Callable[..., Any]) -> None:
    target, base, _ = save_peft()
    assert load(target).config.base == base
    assert load(target).notes == []
    copied = shutil.copytree(base, f"{base}-copy")
    assert load(target, copied).config.base == copied


def test_added_tokens_need_their_rows(save_peft: Callable[..., Any]) -> None:
    """The adapter adds 8 tokens and holds the resized embedding and head, or not."""
    for save, tied in ((True, False), (False, False), (True, True)):
        _, base, _ = save_peft("llama", {}, {"tie_word_embeddings": tied})
        model = whole(base)
        model.resize_token_embeddings(64, mean_resizing=False)
        trained: dict[str, Any] = {"modules_to_save": ["embed_tokens", "lm_head"]} if save else {}
        if not save:
            trained = {"trainable_token_indices": [45]}
        if tied:
            trained = {}
        wrapped = adapted(model, trained)
        target = f"{base}-peft-{save}-{tied}"
        wrapped.save_pretrained(target, save_embedding_layers=tied)
        if not save:
            with pytest.raises(UserError, match="the adapter adds tokens 40 to 44"):
                load(target, base)
            continue
        pair = load(target, base)
        ids = torch.tensor([[3, 45, 63]])
        torch.testing.assert_close(pair.target(ids).logits, wrapped(ids).logits)
        assert pair.target.config.vocab_size == 64


@pytest.mark.parametrize("tied", [False, True])
def test_added_tokens_that_are_trained_by_index(tied: bool, save_peft: Callable[..., Any]) -> None:
    """With its default settings, peft saves the whole embedding, too, and a tied head's tokens."""
    _, base, _ = save_peft("llama", {}, {"tie_word_embeddings": tied})
    model = whole(base)
    model.resize_token_embeddings(48, mean_resizing=False)
    wrapped = adapted(model, {"trainable_token_indices": [40, 41]})
    target = f"{base}-tokens"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped.save_pretrained(target)
    ids = torch.tensor([[3, 40, 41, 45]])
    torch.testing.assert_close(load(target, base).target(ids).logits, wrapped(ids).logits)
    if tied:  # a head with tokens of its own is another target
        file = Path(target) / "adapter_model.safetensors"
        head = "base_model.model.lm_head.token_adapter.trainable_tokens_delta"
        tensors = load_file(file)
        save_file({**tensors, head: tensors[head] + 1}, file)
        with pytest.raises(UserError, match=r"1 tensors .* unexpected: .*lm_head.token_adapter"):
            load(target, base)


def test_tensors_that_the_settings_do_not_name_are_refused(save_peft: Callable[..., Any]) -> None:
    settings = {"target_modules": ["gate_proj"], "trainable_token_indices": [3]}
    target, base, _ = save_peft("llama", settings)
    change(target, trainable_token_indices=None)
    with pytest.raises(UserError, match=r"1 tensors .* unexpected: .*embed_tokens.token_adapter"):
        load(target, base)


def test_two_adapters_of_a_tied_head_are_refused(save_peft: Callable[..., Any]) -> None:
    settings = {"trainable_token_indices": [3], "target_modules": ["gate_proj", "lm_head"]}
    target, base, _ = save_peft("llama", settings, {"tie_word_embeddings": True})
    with pytest.raises(UserError, match="trainable_token_indices beside another adapter"):
        load(target, base)


def test_an_export_over_an_unsupported_base_names_what_is_supported(
    save_peft: Callable[..., Any], tmp_path: Path
) -> None:
    target, base, _ = save_peft()
    save_adapters(replacement(load(target, base)).adapters, tmp_path / "adapter")
    vit = str(tmp_path / "vit")
    AutoConfig.for_model("vit").save_pretrained(vit)
    with pytest.raises(UserError, match="architecture 'vit' is not supported; supported: "):
        serving.export(tmp_path / "adapter", tmp_path / "out", target=target, base=vit)


# --- refusals, before a weight is read ------------------------------------------------------------


def refused(target: str, base: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the message of loading a pair, during which no weight may be read."""
    import safetensors

    opened = safetensors.safe_open

    class HeaderOnly:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.file = opened(*args, **kwargs)

        def __enter__(self) -> HeaderOnly:
            self.file.__enter__()
            return self

        def __exit__(self, *error: Any) -> None:
            self.file.__exit__(*error)

        def keys(self) -> Any:
            return self.file.keys()

        def get_slice(self, name: str) -> Any:
            return self.file.get_slice(name)

        def get_tensor(self, name: str) -> Any:
            raise AssertionError(f"{name} was read")

    monkeypatch.setattr(safetensors, "safe_open", HeaderOnly)
    with pytest.raises(UserError) as error:
        load(target, base)
    return str(error.value)


def change(folder: str, **values: Any) -> None:
    path = Path(folder) / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another kind": ({"peft_type": "IA3"}, "expected a LoRA.* got peft_type IA3"),
    "changed base": ({"init_lora_weights": "pissa"}, "pissa, which changes the base's weights"),
    "repeated layers": ({"layer_replication": [[0, 2]]}, "got layer_replication"),
    "damaged": ({"r": "three"}, r"adapter_config.json: r: "),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_an_adapter_may_not_be(
    case: str, save_peft: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    target, base, _ = save_peft()
    values, message = REFUSED[case]
    change(target, **values)
    assert re.search(message, refused(target, base, monkeypatch))


def test_a_quantised_base_is_refused(
    save_peft: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    target, base, _ = save_peft()
    path = Path(base) / "config.json"
    quantised = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    path.write_text(json.dumps({**json.loads(path.read_text()), **quantised}))
    assert "is quantised (quantization_config" in refused(target, base, monkeypatch)


QUANTISED = "unsloth/llama-3-8b-bnb-4bit"


@pytest.mark.parametrize(
    ("name", "quantised"),
    [
        (QUANTISED, True),
        ("unsloth/Qwen3-8B-unsloth-bnb-4bit", True),
        ("Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4", True),
        ("Qwen/Qwen2.5-7B-Instruct-AWQ", True),
        ("TheBloke/Llama-2-7B-AutoGPTQ", True),
        ("mlx-community/Qwen3-4B-4bit", True),
        ("org/llama-8bit", True),
        ("org/llama.q4_k_m", True),
        ("org/llama-quanto-qint8", True),
        ("org/Llama-3.1-8B-Instruct-FP8", True),
        ("org/Llama-3.1-8B-MXFP4", True),
        ("org/llama-nf4", True),
        ("me/llama-checkpoint800", False),
        ("me/checkpoint4", False),
        ("me/llama-8b-point8", False),
        ("org/airbnb-reviews-7b", False),
        ("me/int40-steps", False),
        ("me/llama-64bit", False),
        ("me/conf4", False),
        ("meta-llama/Llama-3.1-8B", False),
        ("Qwen/Qwen3-4B-Base", False),
    ],
)
def test_names_of_quantised_models(name: str, quantised: bool) -> None:
    assert is_quantised(name) == quantised


def test_the_base_of_a_quantised_one_is_accepted(
    save_peft: Callable[..., Any],
    save_model: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    target, base, _ = save_peft()
    expected = load(target, base).target.state_dict()
    folder = shutil.copytree(base, tmp_path / "quantised")
    path = folder / "config.json"
    quantised = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    path.write_text(json.dumps({**json.loads(path.read_text()), **quantised}))
    (folder / "model.safetensors").unlink()  # its weights are not read
    for named in (QUANTISED, str(folder)):
        change(target, base_model_name_or_path=named)
        pair = load(target, base)
        assert f"names the base {named}, which is quantised; used is" in pair.notes[0]
        assert all(torch.equal(t, expected[name]) for name, t in pair.target.state_dict().items())
    wide = save_model("wide", 1, "llama", intermediate_size=48)
    for named in (QUANTISED, str(folder)):
        change(target, base_model_name_or_path=named)
        message = refused(target, wide, monkeypatch)
        assert message.endswith(f"Give the model of which {named} is the quantised form")
    change(target, base_model_name_or_path=QUANTISED)
    for same in ("", QUANTISED, QUANTISED.upper()):
        message = refused(target, same, monkeypatch)
        assert f"its base {QUANTISED} is quantised" in message
        assert message.endswith("give that model (pair.base)")


def test_an_adapter_of_another_base_is_refused(
    save_peft: Callable[..., Any], save_model: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    target, base, _ = save_peft()
    wide = save_model("wide", 1, "llama", intermediate_size=48)
    for other in (wide, save_model("other", 2, "llama")):
        message = refused(target, other, monkeypatch)
        assert "weights differ. Give that base" in message
        assert base in message
        assert other in message
    shutil.rmtree(base)  # the adapter was trained elsewhere, on a base of another shape
    message = refused(target, wide, monkeypatch)
    assert re.search(r"lora_\w\.weight has shape .* and the base has a part for", message)


def test_an_adapter_as_base_is_refused(
    save_peft: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    target, base, _ = save_peft()
    over = str(shutil.copytree(target, tmp_path / "over"))
    change(over, base_model_name_or_path=target)
    # Exchanged; an adapter over an adapter.
    for given, under in ((base, target), (over, "")):
        message = refused(given, under, monkeypatch)
        assert message.startswith(f"pair.base {target} is a PEFT adapter")


def test_a_pair_without_a_difference_cannot_be_trained(save_peft: Callable[..., Any]) -> None:
    target, base, _ = save_peft("llama", {"target_modules": ["q_proj", "v_proj"]})
    sources = Sources.find(PairConfig(target, base))
    with pytest.raises(UserError, match="changes q_proj, v_proj and no MLP"):
        sources.check_differ()
    with pytest.raises(UserError, match="bit for bit: fine-tuning changed other parts only"):
        load(target, base).check_mlps_differ()
    with pytest.raises(UserError, match=r"pair\.target and pair\.base are both"):
        Sources.find(PairConfig(base, base)).check_differ()


def without_values(target: str, match: str) -> None:
    """Set the tensors of a PEFT folder whose names match to 0."""
    path = Path(target) / "adapter_model.safetensors"
    tensors = load_file(path)
    chosen = [name for name in tensors if re.search(match, name)]
    assert chosen
    save_file(tensors | {name: torch.zeros_like(tensors[name]) for name in chosen}, path)


@pytest.mark.parametrize("changes", ["lora_B", "lora_A", r"mlp.*lora_B"])
def test_an_untrained_adapter_cannot_be_trained_on(
    changes: str, save_peft: Callable[..., Any]
) -> None:
    target, base, _ = save_peft()
    load(target, base).check_mlps_differ()  # the control
    without_values(target, changes)
    with pytest.raises(UserError, match=r"bit for bit: the low-rank parts .* add nothing"):
        load(target, base).check_mlps_differ()


def test_one_changed_layer_is_a_difference(save_peft: Callable[..., Any]) -> None:
    target, base, _ = save_peft()
    without_values(target, r"(?<!layers\.2\.mlp\.up_proj\.)lora_B")
    load(target, base).check_mlps_differ()


@pytest.mark.parametrize("trained", [True, False])
def test_magnitudes_and_saved_mlps_are_differences_if_they_changed(
    trained: bool, save_peft: Callable[..., Any]
) -> None:
    """With B = 0, DoRA's magnitudes and MLPs saved as a whole may still differ from the base."""
    for settings in (
        {"use_dora": True},
        {"modules_to_save": ["up_proj"], "target_modules": ["o_proj"]},
    ):
        target, base, _ = save_peft("llama", settings)
        without_values(target, "lora_B")
        if not trained:
            path = Path(target) / "adapter_model.safetensors"
            tensors = load_file(path)
            weights = {f"base_model.model.{k}": v for k, v in whole(base).state_dict().items()}
            for name in tensors:
                part = name.replace("lora_magnitude_vector", "weight")
                if part in weights:
                    weight = weights[part]
                    tensors[name] = weight.norm(dim=1) if part != name else weight.clone()
            save_file(tensors, path)
        with nullcontext() if trained else pytest.raises(UserError, match="bit for bit"):
            load(target, base).check_mlps_differ()


def test_pickled_adapters_are_refused(
    save_peft: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    target, base, _ = save_peft()
    (Path(target) / "adapter_model.safetensors").unlink()
    torch.save({}, Path(target) / "adapter_model.bin")
    assert "read from safetensors only" in refused(target, base, monkeypatch)


def test_two_hub_ids_must_be_one(save_peft: Callable[..., Any]) -> None:
    target, base, _ = save_peft()
    change(target, base_model_name_or_path="meta-llama/Llama-3.1-8B")
    folder = find_peft(target, None)
    assert folder is not None
    with pytest.raises(UserError, match=r"pair\.base is Qwen/Qwen2.5-7B, but .*meta-llama/Llama"):
        choose_base(folder, "Qwen/Qwen2.5-7B")
    assert choose_base(folder, "")[0] == "meta-llama/Llama-3.1-8B"
    assert choose_base(folder, "meta-llama/Llama-3.1-8B") == ("meta-llama/Llama-3.1-8B", [])
    name, notes = choose_base(folder, base)
    assert name == base
    assert "names the base meta-llama/Llama-3.1-8B; used is pair.base" in notes[0]
    change(target, base_model_name_or_path=None)
    with pytest.raises(UserError, match=r"pair.base is missing, and .* names none"):
        load(target)


def test_peft_is_an_extra(save_peft: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    target, base, _ = save_peft()
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"pip install 'fastadapt\[peft\]'"):
        load(target, base)


# --- the hub --------------------------------------------------------------------------------------


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], str]:
    """``cached("me/lora", folder)``: put a repository into a hub's cache, and return its commit."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def put(name: str, folder: str) -> str:
        commit = f"{len(name):040x}"
        repository = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        shutil.copytree(folder, repository / "snapshots" / commit)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(commit)
        return commit

    return put


def test_a_hub_id_of_an_adapter(
    save_peft: Callable[..., Any], cached: Callable[[str, str], str], float64_clean: None
) -> None:
    """Adapter and the base that it names come from the hub's cache, at their commits."""
    target, base, _ = save_peft()
    change(target, base_model_name_or_path="me/the-base")
    commits = [cached("me/lora", target), cached("me/the-base", base)]
    sources = Sources.find(PairConfig("me/lora", "", device="cpu", dtype="float64"))
    assert (sources.config.base, sources.notes) == ("me/the-base", [])
    assert [config._commit_hash for config in sources.configs()] == commits
    of_hub, of_folder = (
        losses_and_gradients(load("me/lora")),
        losses_and_gradients(load(target, base)),
    )
    assert of_hub.keys() == of_folder.keys()
    assert all(torch.equal(of_hub[name], of_folder[name]) for name in of_hub)
    pinned = load("me/lora", target_revision=commits[0])
    assert pinned.weights == load("me/lora").weights


def test_an_adapter_on_the_hub_may_have_a_config_of_its_base(
    save_peft: Callable[..., Any], cached: Callable[[str, str], str]
) -> None:
    target, base, _ = save_peft()
    shutil.copy(Path(base) / "config.json", target)
    cached("me/lora", target)
    assert find_peft("me/lora", None) is not None
    shutil.copy(Path(base) / "model.safetensors", target)
    cached("me/whole", target)
    assert find_peft("me/whole", None) is None
    # transformers would load the adapter over its base, and never the whole model's weights.
    for file in Path(base).glob("*token*"):
        shutil.copy(file, target)
    cached("me/both", target)
    for pair in (("me/both", base), (base, "me/both")):
        with pytest.raises(UserError, match=r"me/both: adapter_config.json stands beside the"):
            load(*pair)


def test_a_hub_out_of_reach(
    save_peft: Callable[..., Any], cached: Callable[[str, str], str]
) -> None:
    """What the cache does not hold is named, also of an adapter whose base is left out."""
    target, base, _ = save_peft()
    change(target, base_model_name_or_path="nobody/base")
    cached("me/lora", target)
    lost = (
        r"cannot be loaded: no such folder, the hub's cache .* does not hold it, and HF_HUB_OFFLINE"
    )
    for pair, name in (
        (("nobody/lora", ""), "nobody/lora"),
        (("nobody/lora", base), "nobody/lora"),
        (("me/lora", ""), "nobody/base"),
        ((base, "nobody/base"), "nobody/base"),
    ):
        with pytest.raises(UserError, match=f"model '{name}' {lost}"):
            Sources.find(PairConfig(*pair)).configs()
    with pytest.raises(UserError, match=rf"'me/lora' in revision 'v2' {lost}"):
        Sources.find(PairConfig("me/lora", base, target_revision="v2"))
