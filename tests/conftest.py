"""What every test runs under: no network, one thread, fixed seeds; and tiny random pairs."""

from __future__ import annotations

import os
import sys

# Before anything imports the libraries that read them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import gc
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

try:
    import hypothesis
except ModuleNotFoundError:  # a machine with a GPU and little else: tests that need it say so
    hypothesis = None  # type: ignore[assignment]

PROOF = os.environ.get("FASTADAPT_PROOF") == "1"

if not torch.cuda.is_available() and "FASTADAPT_IR" not in os.environ:
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton
torch.set_num_threads(1)
if hypothesis is not None:
    # Without a deadline: a first call compiles or loads. Drawn anew in `make proof`, else fixed.
    settings = hypothesis.settings
    settings.register_profile("quick", max_examples=25, deadline=None, derandomize=True)
    settings.register_profile("proof", max_examples=200, deadline=None, print_blob=True)
    settings.load_profile("proof" if PROOF else "quick")


@pytest.hookimpl(tryfirst=True)  # before pytest selects by markers
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark as slow what ``@pytest.mark.quick(*ids)`` does not name of a parametrised test."""
    unknown = set()
    for item in items:
        if isinstance(item, pytest.Function) and (quick := item.get_closest_marker("quick")):
            ids = {(item.path, item.originalname, name) for name in quick.args}
            unknown |= ids
            if item.callspec.id not in quick.args:
                item.add_marker("slow")
    for item in items:
        if isinstance(item, pytest.Function) and hasattr(item, "callspec"):
            unknown.discard((item.path, item.originalname, item.callspec.id))
    if unknown and not any("::" in argument for argument in config.args):
        raise pytest.UsageError(f"@pytest.mark.quick names no case of its test: {unknown}")


def pytest_collection_finish() -> None:
    """Leave the libraries' objects out of later garbage collections: a million at each."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def poison() -> Iterator[None]:
    """Fills uninitialised memory with NaN, so that reading it shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


TINY = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "tie_word_embeddings": False,
}


def tiny_config(architecture: str, **changes: Any) -> Any:
    """Configuration of a model of three blocks and width 16."""
    from transformers import AutoConfig

    # Windows shorter than the tests' sequences, and layers of both kinds where there are two.
    layer_types = ["sliding_attention", "full_attention", "sliding_attention"]
    special: dict[str, dict[str, Any]] = {
        "gemma2": {"head_dim": 4, "sliding_window": 4, "final_logit_softcapping": 5.0},
        "gemma3_text": {"head_dim": 4, "sliding_window": 4, "layer_types": layer_types},
        "gemma4_text": {
            "head_dim": 4,
            "global_head_dim": 8,
            "num_global_key_value_heads": 1,
            "attention_k_eq_v": True,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention", "full_attention"],
            "hidden_size_per_layer_input": 6,
            "vocab_size_per_layer_input": changes.get("vocab_size", TINY["vocab_size"]),
            "final_logit_softcapping": 5.0,
        },
        "glm4": {"head_dim": 8, "partial_rotary_factor": 0.5},
        "mistral": {"sliding_window": 4},
        "phi3": {"sliding_window": 5},
        "qwen3": {
            "head_dim": 8,
            "use_sliding_window": True,
            "sliding_window": 4,
            "layer_types": layer_types,
        },
        "qwen3_5_text": {
            "head_dim": 8,
            "partial_rotary_factor": 0.5,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 4,
            "linear_value_head_dim": 5,
            "layer_types": ["full_attention", "linear_attention", "linear_attention"],
        },
    }
    kind = type(AutoConfig.for_model(architecture))
    return kind(**{**TINY, **special.get(architecture, {}), **changes})


def tiny_model(architecture: str, seed: int, dtype: torch.dtype, **changes: Any) -> Any:
    """A random model whose weights are large enough that its predictions differ by token."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(architecture, **changes))
        with torch.no_grad():
            for p in model.parameters():
                p.normal_(0, 0.3)
            for name, buffer in model.named_buffers():
                if name.endswith("layer_scalar"):  # Gemma 4; 1 in a new model
                    buffer.uniform_(0.7, 0.9)
    return model.to(dtype).eval()


@pytest.fixture
def make_pair() -> Callable[..., Any]:
    """``make_pair(architecture, dtype="float32")``: an unrelated target and base as a pair."""
    from torch import nn

    from fastadapt.models.architectures import ARCHITECTURES
    from fastadapt.models.pair import DTYPES, ModelPair, PairConfig

    def make(architecture: str, dtype: str = "float32") -> ModelPair:
        base = tiny_model(architecture, 1, DTYPES[dtype])
        return ModelPair(
            target=tiny_model(architecture, 0, DTYPES[dtype]),
            base_mlps=nn.ModuleList(layer.mlp for layer in base.model.layers),
            tokenizer=None,
            config=PairConfig("target", "base", dtype=dtype, device="cpu"),
            paths=ARCHITECTURES[architecture],
        )

    return make


@pytest.fixture
def float64_clean(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute norms, softmax and linear attention in float64 instead of transformers' float32.

    Float32 leaves an error of 2e-8 between two exact ways.
    """
    from importlib import import_module

    from torch import nn

    from fastadapt.models.architectures import ARCHITECTURES

    softmax = nn.functional.softmax

    def wide_softmax(x: torch.Tensor, dim: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return softmax(x, dim, dtype=None if x.dtype == torch.float64 else dtype)

    def rms(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.weight * (
            x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        )

    def gemma(self: Any, x: torch.Tensor) -> torch.Tensor:
        return (1 + self.weight) * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))

    def gemma4(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self._norm(x) * (self.weight if self.with_scale else 1)

    class Wide:
        """The module ``torch`` of linear attention, in which float32 is float64."""

        float32 = torch.float64

        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

    to_float32 = torch.Tensor.float

    def wide_float(x: torch.Tensor) -> torch.Tensor:
        caller = sys._getframe(1)
        # Angles are float32 in every version, some of which get them so by this method.
        is_rotary = type(caller.f_locals.get("self")).__name__.endswith("RotaryEmbedding")
        is_transformers = caller.f_globals["__name__"].startswith("transformers.")
        wide = x.dtype == torch.float64 and is_transformers and not is_rotary
        return x if wide else to_float32(x)

    special: dict[str, Any] = dict.fromkeys(("gemma2", "gemma3", "qwen3_5"), gemma)
    special["gemma4"] = gemma4
    for architecture in ARCHITECTURES:
        name = architecture.removesuffix("_text")
        modeling = import_module(f"transformers.models.{name}.modeling_{name}")
        norms = [kind for kind in vars(modeling) if kind.endswith("RMSNorm")]
        assert len(norms) == 1, norms
        forward = special.get(name, rms)
        monkeypatch.setattr(getattr(modeling, norms[0]), "forward", forward)
        if name == "qwen3_5":
            monkeypatch.setattr(modeling, "torch", Wide())
    monkeypatch.setattr(torch.Tensor, "float", wide_float)
    monkeypatch.setattr(nn.functional, "softmax", wide_softmax)


@pytest.fixture
def cached_dataset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Path]]:
    """``cached_dataset(name, commit, rows)``: a hub's dataset in a cache; returns its folder."""
    import datasets
    from datasets.arrow_writer import ArrowWriter

    from fastadapt.data.hub import load_hub

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def save(name: str, commit: str, rows: list[dict[str, Any]], config: str = "default") -> Path:
        load_hub.cache_clear()
        folder = tmp_path / "cache" / name.replace("/", "___") / config / "0.0.0" / commit
        folder.mkdir(parents=True)
        features = datasets.Dataset.from_list(rows).features
        file = name.split("/")[-1] + "-train.arrow"
        with ArrowWriter(path=str(folder / file), features=features) as writer:
            for row in rows:
                writer.write(row)
            writer.finalize()
        split = {"name": "train", "num_examples": len(rows), "num_bytes": 1}
        datasets.DatasetInfo(
            features=features,
            config_name=config,
            dataset_name=name.split("/")[-1],
            builder_name="json",
            version="0.0.0",
            splits=[{**split, "dataset_name": name.split("/")[-1]}],
        ).write_to_directory(str(folder))
        return folder

    yield save
    load_hub.cache_clear()


@pytest.fixture
def save_model(tmp_path: Path) -> Callable[..., str]:
    """``save_model(name, seed, **config changes)``: a tiny checkpoint with a tokenizer on disk."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    def save(
        name: str, seed: int = 0, architecture: str = "qwen2", words: str = "w", **changes: Any
    ) -> str:
        folder = tmp_path / name
        model = tiny_model(architecture, seed, torch.float32, **changes)
        model.save_pretrained(folder)
        vocabulary = {"<bos>": 0, "<eos>": 1, "<pad>": 2}
        vocabulary |= {f"{words}{i}": i for i in range(3, model.config.vocab_size)}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
        ).save_pretrained(folder)
        return str(folder)

    return save
