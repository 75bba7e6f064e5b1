"""An exported checkpoint equals the run's replacement model in transformers' calls."""

from __future__ import annotations

import importlib.machinery
import importlib.metadata
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    ContinuousBatchingConfig,
)

from fastadapt import serving
from fastadapt.adapter.module import AdapterConfig
from fastadapt.errors import UserError
from fastadapt.models.architectures import ARCHITECTURES
from fastadapt.models.huggingface.classes import classes_of
from fastadapt.models.replacement import ReplacementModel

IDS = torch.tensor([[5, 9, 23, 7, 31, 8]])
GREEDY: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
BACKEND = "vllm.model_executor.models.transformers:TransformersForCausalLM"
ACTIVATIONS = {
    "relu": AdapterConfig(24),
    "topk": AdapterConfig(24, "topk", k=3),
    "batch_topk": AdapterConfig(24, "batch_topk", k=2.5),
    "jumprelu": AdapterConfig(24, "jumprelu", bandwidth=0.4, initial_threshold=0.15),
    "without b_dec": AdapterConfig(24, bias=False),
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_export_equals_the_trained_model(
    architecture: str, exported: Callable[..., tuple[Path, ReplacementModel]]
) -> None:
    folder, model = exported(architecture)
    assert (folder / "model.safetensors.index.json").is_file()
    both: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    loaded, info = both
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert isinstance(loaded, serving.AdaptedModel)
    generate: Any = loaded.generate
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == [type(loaded).__name__]
    with torch.no_grad():
        for mode in ("replacement", "hybrid"):
            with model.mode(mode), loaded.mode(mode):
                assert torch.equal(loaded(IDS).logits, model(IDS).logits)
                assert torch.equal(generate(IDS, **GREEDY), model.generate(IDS, **GREEDY))
        with loaded.mode("hybrid"):
            hybrid = loaded(IDS).logits
    assert not torch.equal(hybrid, loaded(IDS).logits)
    with pytest.raises(UserError, match="does not hold the target's MLPs"), loaded.mode("target"):
        loaded(IDS)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_and_precision(
    activation: str, dtype: str, exported: Callable[..., tuple[Path, ReplacementModel]]
) -> None:
    folder, model = exported(config=ACTIVATIONS[activation], dtype=dtype)
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder)
    assert str(loaded.dtype) == f"torch.{dtype}"
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    for ours, theirs in zip(loaded.adapted_mlps, model.adapters, strict=True):
        for name, tensor in theirs.state_dict().items():
            assert torch.equal(ours.adapter.state_dict()[name], tensor), name


def test_saving_again_changes_no_logits(
    exported: Callable[..., tuple[Path, ReplacementModel]], tmp_path: Path
) -> None:
    folder, _ = exported()
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, again(IDS).logits)


@pytest.mark.quick("qwen2", "gemma3_text")
@pytest.mark.parametrize("architecture", [a for a, paths in ARCHITECTURES.items() if paths.paged])
def test_generate_batch_gives_the_tokens_of_generate(
    architecture: str, exported: Callable[..., tuple[Path, ReplacementModel]]
) -> None:
    folder, _ = exported(architecture)
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder)
    prompts = [[5, 9, 23], [7, 31, 8, 12, 3], [4]]
    config = loaded.generation_config
    config.update(**GREEDY, pad_token_id=2)
    outputs = {}
    for mode in ("replacement", "hybrid"):
        with loaded.mode(mode):
            together = loaded.generate_batch(
                prompts,
                generation_config=config,
                continuous_batching_config=ContinuousBatchingConfig(
                    num_blocks=8, max_batch_tokens=32
                ),
            )
            alone = [loaded.generate(torch.tensor([p]), **GREEDY)[0, len(p) :] for p in prompts]
        outputs[mode] = [out.generated_tokens for out in together.values()]
        assert outputs[mode] == [out.tolist() for out in alone]
    assert outputs["replacement"] != outputs["hybrid"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="graphs are captured on a GPU")
@pytest.mark.parametrize("n_tokens", [1, 7, 300_000])
def test_an_adapter_is_captured_as_a_graph(
    n_tokens: int, exported: Callable[..., tuple[Path, ReplacementModel]]
) -> None:
    """Small calls sum rows of the decoder, larger ones use dense products; none synchronizes."""
    folder, _ = exported()
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder)
    mlp = loaded.cuda().adapted_mlps[0]
    x = torch.randn(1, n_tokens, 16, device="cuda")
    with torch.no_grad():
        mlp(x)  # kernels are compiled
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = mlp(x)
        x.copy_(torch.randn_like(x))
        expected = mlp(x)
        graph.replay()
    torch.testing.assert_close(captured, expected)


def test_the_targets_files_and_settings_are_copied(
    exported: Callable[..., tuple[Path, ReplacementModel]], tmp_path: Path
) -> None:
    target = Path(tmp_path / "target")
    target.mkdir()
    (target / "chat_template.jinja").write_text("{{ messages[0].content }}")
    folder, _ = exported(max_position_embeddings=99, eos_token_id=5)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (folder / name).read_bytes() == (target / name).read_bytes()
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.config.max_position_embeddings == 99
    assert loaded.generation_config.eos_token_id == loaded.config.eos_token_id == 5
    tokenizer = AutoTokenizer.from_pretrained(folder)
    message = [{"role": "user", "content": "w7"}]
    assert tokenizer.apply_chat_template(message, tokenize=False) == "w7"


@pytest.mark.parametrize("named", ["LlamaTokenizerFast", "Qwen2Tokenizer", None])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_tokenizer_is_the_targets(
    architecture: str, named: str | None, save_model: Callable[..., str], tmp_path: Path
) -> None:
    """transformers picks the same class with and without adapters, whatever the files name."""
    target, ours = Path(save_model("target", 0, architecture)), tmp_path / "ours"
    file = target / "tokenizer_config.json"
    config = {k: v for k, v in json.loads(file.read_text()).items() if k != "tokenizer_class"}
    file.write_text(json.dumps(config | ({"tokenizer_class": named} if named else {})))
    shutil.copytree(target, ours)
    values = json.loads((target / "config.json").read_text())
    (ours / "config.json").write_text(
        json.dumps({**values, "model_type": f"fastadapt_{architecture}", "adapter": {}})
    )
    a, b = (AutoTokenizer.from_pretrained(folder) for folder in (ours, target))
    assert type(a) is type(b)
    assert a.get_vocab() == b.get_vocab()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_vllm_finds_every_weight(
    architecture: str, tied: bool, exported: Callable[..., tuple[Path, ReplacementModel]]
) -> None:
    """vLLM stores the module of ``AutoModel`` as ``.model`` and the head as ``.lm_head``."""
    folder, _ = exported(architecture, tie_word_embeddings=tied)
    with torch.device("meta"):
        decoder = AutoModel.from_config(AutoConfig.from_pretrained(folder))
    wanted = {f"model.{name}": tensor.shape for name, tensor in decoder.state_dict().items()}
    if not tied:
        wanted["lm_head.weight"] = decoder.get_input_embeddings().weight.shape
    stored: dict[str, torch.Size] = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as shard:
            stored |= {n: torch.Size(shard.get_slice(n).get_shape()) for n in shard.keys()}  # noqa: SIM118
    assert stored == wanted
    for pattern in decoder.config.base_model_tp_plan:
        parts = pattern.split("*.")
        names = [n for n, _ in decoder.named_modules() if n.startswith(parts[0])]
        optional = "norm" in pattern or "experts" in pattern
        assert any(n.endswith(parts[-1]) for n in names) or optional, pattern


def test_the_vllm_plugin_registers_each_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for vLLM, which is not installed, records the registrations."""
    import sys
    import types

    (entry,) = importlib.metadata.entry_points(group="vllm.general_plugins", name="fastadapt")
    registered: dict[str, str] = {}
    registry = types.SimpleNamespace(
        get_supported_archs=lambda: ["FastadaptLlamaForCausalLM"],
        register_model=registered.__setitem__,
    )
    vllm = types.ModuleType("vllm")
    vllm.__spec__ = importlib.machinery.ModuleSpec("vllm", None)
    vllm.ModelRegistry = registry  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    entry.load()()
    names = {classes_of(architecture)[2].__name__ for architecture in ARCHITECTURES}
    assert set(registered) == names - {"FastadaptLlamaForCausalLM"}
    assert set(registered.values()) == {
        "vllm.model_executor.models.transformers:TransformersForCausalLM"
    }


def test_adapters_that_do_not_fit_are_refused(
    exported: Callable[..., tuple[Path, ReplacementModel]],
    save_model: Callable[..., str],
    tmp_path: Path,
) -> None:
    exported()
    base = str(tmp_path / "base")
    for changes, message in (
        ({"num_hidden_layers": 2}, "layers: adapters .* have 3, but target .* has 2"),
        ({"hidden_size": 32}, "width: adapters .* have 16, but target .* has 32"),
    ):
        other = save_model("other", 0, **changes)
        with pytest.raises(UserError, match=message):
            serving.export(tmp_path / "adapter", tmp_path / "out", target=other, base=base)
    with pytest.raises(
        UserError, match="is neither an empty folder nor an export; give a new folder"
    ):
        serving.export(
            tmp_path / "adapter", tmp_path / "base", target=str(tmp_path / "target"), base=base
        )
