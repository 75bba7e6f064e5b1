"""Pairs of every kind of block and of multimodal checkpoints, and models that are refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from multimodal import OLDER, TEXT, multimodal_model, save_older
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from fastadapt import serving
from fastadapt.adapter.files import save_adapters
from fastadapt.adapter.module import AdapterConfig
from fastadapt.errors import RunError, UserError
from fastadapt.evaluation.generation.sampling import choose_batching
from fastadapt.interop import hu2026
from fastadapt.models.architectures import ARCHITECTURES, MULTIMODAL, check_supported
from fastadapt.models.block_inputs import Unread
from fastadapt.models.pretrained import model_config
from fastadapt.models.replacement import ModelPair, PairConfig, ReplacementModel
from fastadapt.models.sources.text_tower import text_prefixes

IDS = torch.tensor([[5, 9, 23, 7, 31, 8], [8, 30, 4, 4, 17, 2]])
NEW = ("gemma4_text", "qwen3_5_text")


def hybrid_by_name(model: Any, base: Path) -> Any:
    """Return a plain model whose weights named ``mlp`` are those of the base's file."""
    theirs = load_file(base / "model.safetensors")
    names = zip(mlp_names(model.state_dict()), mlp_names(theirs), strict=True)
    model.load_state_dict({ours: theirs[name] for ours, name in names}, strict=False)
    return model


def mlp_names(names: Iterable[str]) -> list[str]:
    """Return the names of the text model's MLPs, in an order that no prefix changes."""
    return sorted(n for n in names if ".layers." in n and ".mlp." in n and "vis" not in n)


def pair_of(target: Path, base: Path) -> ReplacementModel:
    pair = ModelPair.load(PairConfig(str(target), str(base), device="cpu", dtype="float64"))
    return ReplacementModel.create(pair, AdapterConfig(8))


def largest(model: ReplacementModel, mode: Any, plain: Any) -> float:
    """Return the largest difference between a mode's logits and a plain model's."""
    with torch.no_grad(), model.mode(mode):
        return float((model(IDS).logits - plain(input_ids=IDS).logits).abs().max())


@pytest.mark.quick("gemma4_text", "qwen3_5_text", "glm4")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_hybrid_equals_a_plain_model_with_the_bases_mlps(
    architecture: str, save_model: Callable[..., str]
) -> None:
    target, base = (Path(save_model(n, i, architecture)) for i, n in enumerate("tb"))
    model = pair_of(target, base)
    plain = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float64).eval()
    assert largest(model, "target", plain) < 1e-10
    assert largest(model, "hybrid", plain) > 1e-2  # the control
    assert largest(model, "hybrid", hybrid_by_name(plain, base)) < 1e-10


@pytest.fixture
def save_multimodal(save_model: Callable[..., str]) -> Callable[..., list[Path]]:
    """Save a multimodal target and base; return their folders."""

    def save(architecture: str, older: bool = False) -> list[Path]:
        folders = []
        for seed, name in enumerate(("target", "base")):
            folder = Path(save_model(name, seed, TEXT[architecture][0]))  # for the tokenizer
            (folder / "model.safetensors").unlink()
            whole = multimodal_model(architecture, AutoConfig.from_pretrained(folder), seed)
            if older:
                save_older(whole, folder)
            else:
                whole.save_pretrained(folder)
            folders.append(folder)
        return folders

    return save


CASES = [*((a, False) for a in MULTIMODAL), *((a, True) for a in OLDER)]


@pytest.mark.quick("gemma3-False", "gemma4-False", "qwen3_5-False", "llava-True")
@pytest.mark.parametrize(("architecture", "older"), CASES)
def test_the_text_model_of_a_multimodal_checkpoint(
    architecture: str, older: bool, save_multimodal: Callable[..., list[Path]]
) -> None:
    """The oracle is the whole multimodal model, on text."""
    target, base = save_multimodal(architecture, older)
    model = pair_of(target, base)
    assert type(model.model).__name__.endswith("ForCausalLM")
    plain = AutoModelForImageTextToText.from_pretrained(target, dtype=torch.float64).eval()
    assert largest(model, "target", plain) < 1e-10
    assert largest(model, "hybrid", plain) > 1e-2
    assert largest(model, "hybrid", hybrid_by_name(plain, base)) < 1e-10


@pytest.mark.parametrize(
    "architecture", [pytest.param("gemma3", marks=pytest.mark.slow), "qwen3_5"]
)
def test_an_export_of_a_multimodal_pair_is_its_text_model(
    architecture: str, save_multimodal: Callable[..., list[Path]], tmp_path: Path
) -> None:
    target, base = save_multimodal(architecture)
    model = pair_of(target, base)
    adapter: Any
    with torch.no_grad():
        for adapter in model.adapters:
            adapter.W_dec.normal_(0, 0.3)
    save_adapters(model.adapters, tmp_path / "adapter")
    folder = tmp_path / "exported"
    serving.export(tmp_path / "adapter", folder, target=str(target), base=str(base))
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    assert loaded.config.model_type == f"fastadapt_{TEXT[architecture][0]}"
    assert largest(model, "replacement", loaded) < 1e-10
    with loaded.mode("hybrid"):
        assert largest(model, "replacement", loaded) > 1e-2
        assert largest(model, "hybrid", loaded) < 1e-10


def change_config(folder: Path, **values: Any) -> None:
    """Set keys of a ``config.json``; None removes a key."""
    path = folder / "config.json"
    changed = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({key: v for key, v in changed.items() if v is not None}))


@pytest.mark.parametrize("architecture", ["mistral3", "internvl", "llama"])
@pytest.mark.parametrize("said", [None, True])
def test_a_head_of_its_own_is_not_tied_whatever_the_configuration_says(
    architecture: str,
    said: bool | None,
    save_multimodal: Callable[..., list[Path]],
    save_model: Callable[..., str],
    tmp_path: Path,
) -> None:
    """The default of Mistral 3 and InternVL is tied; mergers of adapters leave True behind."""
    if architecture == "llama":
        target, base = (Path(save_model(n, i, "llama")) for i, n in enumerate("tb"))
    else:
        target, base = save_multimodal(architecture)
    change_config(target, tie_word_embeddings=said)
    model = pair_of(target, base)
    empty = ModelPair.load(model.pair.config, into=torch.device("meta"))
    embedding, head = empty.target.get_input_embeddings(), empty.target.get_output_embeddings()
    assert embedding.weight is not head.weight
    assert not empty.target.config.tie_word_embeddings
    assert (
        model.model.get_output_embeddings().weight is not model.model.get_input_embeddings().weight
    )
    save_adapters(model.adapters, tmp_path / "adapter")
    folder = tmp_path / "exported"
    serving.export(tmp_path / "adapter", folder, target=str(target), base=str(base))
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False


def test_weights_that_are_not_here_are_not_asked_for_the_head(
    save_multimodal: Callable[..., list[Path]], save_model: Callable[..., str]
) -> None:
    """A plan reads configurations alone; the text model's decides where the outer has no entry."""
    target, _ = save_multimodal("mistral3")
    change_config(target, tie_word_embeddings=None)
    (target / "model.safetensors").unlink()
    assert not model_config(str(target), None, trust=False).tie_word_embeddings
    # A head with the embedding's bits is tied.
    tied = Path(save_model("tied", 0, "llama", tie_word_embeddings=True))
    tensors = load_file(tied / "model.safetensors")
    same = tensors["model.embed_tokens.weight"].clone()
    save_file({**tensors, "lm_head.weight": same}, tied / "model.safetensors", {"format": "pt"})
    assert model_config(str(tied), None, trust=False).tie_word_embeddings


@pytest.mark.parametrize("inner", [None, False])
@pytest.mark.parametrize("architecture", ["mistral3", "internvl"])
def test_a_head_that_is_not_stored_is_tied_by_default(
    architecture: str, inner: bool | None, save_multimodal: Callable[..., list[Path]]
) -> None:
    """The outer default of these two is tied, and the text model's is not."""
    target, base = save_multimodal(architecture)
    for folder in (target, base):
        whole: Any = AutoModelForImageTextToText.from_pretrained(folder)
        whole.config.tie_word_embeddings = True
        whole.tie_weights()
        whole.save_pretrained(folder)
        text = whole.config.text_config.to_dict() | {"tie_word_embeddings": inner}
        text = {key: value for key, value in text.items() if value is not None}
        change_config(folder, tie_word_embeddings=None, text_config=text)
    assert "lm_head.weight" not in load_file(target / "model.safetensors")
    model = pair_of(target, base)
    plain = AutoModelForImageTextToText.from_pretrained(target, dtype=torch.float64).eval()
    assert largest(model, "target", plain) < 1e-10
    assert model_config(str(target), None, trust=False).tie_word_embeddings


def test_an_export_asks_downloaded_weights_for_the_head(
    save_model: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights arrive when they are first asked for, as those of a hub id do."""
    from transformers import utils

    target, base = (Path(save_model(n, i, "qwen2")) for i, n in enumerate("tb"))
    change_config(target, tie_word_embeddings=True)
    save_adapters(pair_of(target, base).adapters, tmp_path / "adapter")
    weights, remote = target / "model.safetensors", tmp_path / "remote.safetensors"
    cached_file = utils.cached_file

    def download(source: str, name: str, **settings: Any) -> Any:
        call = (source, name, settings.get("local_files_only", False))
        if call == (str(target), weights.name, False) and remote.exists():
            remote.rename(weights)
        return cached_file(source, name, **settings)

    monkeypatch.setattr(utils, "cached_file", download)
    for export in (serving.export, hu2026.from_adapters):
        weights.rename(remote)
        folder = tmp_path / export.__module__
        export(tmp_path / "adapter", folder, target=str(target), base=str(base))
        assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False


def test_an_export_of_an_unsupported_model_names_what_is_supported(
    save_model: Callable[..., str], tmp_path: Path
) -> None:
    base = save_model("base", 0)
    save_adapters(pair_of(Path(base), Path(base)).adapters, tmp_path / "adapter")
    target = str(tmp_path / "vit")
    AutoConfig.for_model("vit", num_hidden_layers=3).save_pretrained(target)
    for export, message in (
        (serving.export, "architecture 'vit' is not supported; supported: "),
        (hu2026.from_adapters, "needs a Qwen2 model .*; this is vit"),
    ):
        with pytest.raises(UserError, match=message):
            export(tmp_path / "adapter", tmp_path / "out", target=target, base=base)


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "shared keys": ("gemma4_text", {"num_kv_shared_layers": 1}, "keys and values of earlier"),
    "experts": (
        "gemma4_text",
        {"enable_moe_block": True, "num_experts": 2, "top_k_experts": 1},
        "experts beside the MLP",
    ),
    "both directions": (
        "gemma3_text",
        {"use_bidirectional_attention": True},
        "predicts the next token",
    ),
}


@pytest.mark.parametrize(("architecture", "settings", "reason"), REFUSED.values(), ids=REFUSED)
def test_settings_of_a_supported_architecture_that_are_refused(
    architecture: str, settings: dict[str, Any], reason: str
) -> None:
    check_supported(AutoConfig.for_model(architecture))
    (key, value), *_ = settings.items()
    message = f"'{architecture}' is supported, but not with {key}={value!r}: .*{reason}"
    with pytest.raises(UserError, match=message):
        check_supported(AutoConfig.for_model(architecture, **settings))


SMALL = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
UNSUPPORTED: dict[str, tuple[dict[str, Any], str]] = {
    "gpt2": ({}, r"the model \(GPT2LMHeadModel\) has no attribute 'model' \(Paths.decoder\)"),
    "qwen3_moe": (
        {**SMALL, "num_experts": 2, "mlp_only_layers": [0]},
        r"model.layers.1.mlp \(Qwen3MoeSparseMoeBlock\) has no attribute 'gate_proj'",
    ),
    "smollm3": (
        {**SMALL, "pad_token_id": 2},
        r'docs/adding-an-architecture.md .* to add "smollm3": Paths\(\)',
    ),
    "bert": ({}, r"model \(BertLMHeadModel\) has no attribute 'model'"),
    "vit": ({}, r"no causal language model from its configuration \(ValueError: Unrecognized"),
    "paligemma": ({}, "is multimodal, and its text model 'gemma' is not supported either"),
    "llava_next": ({}, "text model 'llama' is supported if it is saved alone"),
}


@pytest.mark.parametrize("architecture", UNSUPPORTED)
def test_an_unsupported_model_names_what_is_missing(architecture: str) -> None:
    settings, reason = UNSUPPORTED[architecture]
    config = AutoConfig.for_model(architecture, **settings)
    with pytest.raises(UserError, match=f"'{architecture}' is not supported: .*{reason}") as error:
        check_supported(config)
    assert str(error.value).endswith(f"Supported: {', '.join(sorted(ARCHITECTURES))}")


def test_a_block_that_reads_what_another_left_raises(make_pair: Callable[..., Any]) -> None:
    model = ReplacementModel.create(make_pair("gemma4_text"), AdapterConfig(8))
    inputs = model.block_inputs(IDS, None)
    assert inputs.arguments[0]["per_layer_input"].shape == (2, 6, 6)
    left = inputs.arguments[1]["shared_kv_states"]
    model.block(1, inputs.hidden, inputs.arguments[1], "target")
    assert isinstance(left, Unread)
    assert len(left) == 0
    attention: Any = model.blocks[2].self_attn
    attention.is_kv_shared_layer = True
    with pytest.raises(RunError, match="a block reads 'full_attention', which an earlier block"):
        model.block(2, inputs.hidden, inputs.arguments[2], "target")


def test_two_text_models_in_a_checkpoint() -> None:
    names = ["a.embed_tokens.weight", "b.embed_tokens.weight"]
    with pytest.raises(
        UserError, match=r"expected one part with embed_tokens.weight, got a\., b\."
    ):
        text_prefixes(names, "x/y")


@pytest.mark.parametrize("architecture", ["qwen2", *NEW])
def test_static_batches_where_a_paged_cache_cannot_run(architecture: str) -> None:
    model: Any = SimpleNamespace(
        config=AutoConfig.for_model(architecture), device=torch.device("cuda")
    )
    assert choose_batching(model, "static") == "static"
    assert choose_batching(model, "auto") == ("static" if architecture in NEW else "continuous")
    if architecture in NEW:
        with pytest.raises(UserError, match=f"cannot run '{architecture}'; expected auto or stat"):
            choose_batching(model, "continuous")
