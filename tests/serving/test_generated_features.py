"""``generate(output_features=True)`` gives the features of the whole text, and changes no token."""

from __future__ import annotations

import threading
from collections.abc import Callable
from inspect import signature, unwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    Qwen2Model,
    StoppingCriteriaList,
)
from transformers.generation import GenerateDecoderOnlyOutput

from fastadapt import scale_features, serving
from fastadapt.adapter.module import AdapterConfig
from fastadapt.errors import RunError, UserError
from fastadapt.kernels.transcoder import SparseCodes
from fastadapt.models.architectures import ARCHITECTURES
from fastadapt.models.huggingface.classes import classes_of
from fastadapt.models.huggingface.generated_features import recorded
from fastadapt.models.replacement import ReplacementModel

F, PAD = 24, 2
PROMPTS = [[5, 9, 23], [7, 31, 8, 12, 3], [4]]
IDS = torch.tensor([[PAD] * (5 - len(p)) + p for p in PROMPTS])
MASK = (IDS != PAD).long()
BATCH: dict[str, Any] = {"input_ids": IDS, "attention_mask": MASK}
#: What transformers calls the cache: ``cache`` from 5.24 on.
CACHE = (
    "cache" if "cache" in signature(unwrap(Qwen2Model.forward)).parameters else "past_key_values"
)
GREEDY: dict[str, Any] = {
    "max_new_tokens": 7,
    "do_sample": False,
    "eos_token_id": None,
    "pad_token_id": PAD,
}
SAMPLED = GREEDY | {"do_sample": True, "temperature": 3.0, "top_k": 0}
ACTIVATIONS = {
    "relu": AdapterConfig(F),
    "topk": AdapterConfig(F, "topk", k=3),
    "batch_topk": AdapterConfig(F, "batch_topk", k=2.5),
    "jumprelu": AdapterConfig(F, "jumprelu", bandwidth=0.4, initial_threshold=0.15),
}


Served = Callable[..., Any]


@pytest.fixture
def served(make_pair: Callable[..., Any]) -> Served:
    """``served(architecture, activation)``: a model of the registered class, in float64."""

    def make(architecture: str = "qwen2", activation: str = "relu") -> Any:
        classes: tuple[Any, ...] = classes_of(architecture)
        config, _, causal = classes
        values = make_pair(architecture, "float64").target.config.to_dict()
        values |= {"adapter": vars(ACTIVATIONS[activation]), "model_type": config.model_type}
        model = causal(config.from_dict(values)).double().eval()
        draw = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for name, p in (*model.named_parameters(), *model.named_buffers()):
                if name.endswith("threshold"):
                    p.fill_(0.2)
                elif name.endswith("layer_scalar"):
                    p.fill_(0.8)
                elif isinstance(p, torch.nn.Parameter):
                    p.copy_(0.3 * torch.randn(p.shape, generator=draw, dtype=torch.float64))
        return model

    return make


def activations(adapter: Any, x: Tensor) -> Tensor:
    """Return a [T, F] of inputs [T, D], by the formula."""
    z = x @ adapter.W_enc.T + adapter.b_enc
    if adapter.config.activation == "topk":
        kth = z.topk(adapter.config.k).values[:, -1:]
        return torch.where(z >= kth, z, 0).relu()
    cut = 0 if adapter.threshold is None else adapter.threshold
    return torch.where(z > cut, z, 0)


@torch.no_grad()
def by_hand(model: Any, ids: Tensor) -> list[Tensor]:
    """Return each layer's a [T, F], from the MLPs' inputs in one pass over a text."""
    seen: list[Tensor] = []
    hooks = [m.register_forward_pre_hook(lambda _, x: seen.append(x[0][0])) for m in layers(model)]
    model(ids[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    return [activations(m.adapter, x) for m, x in zip(layers(model), seen, strict=True)]


def layers(model: Any) -> list[Any]:
    mlps: list[Any] = model.adapted_mlps
    return mlps


def dense(codes: SparseCodes, first: int, n_tokens: int) -> Tensor:
    """Return a [T, F] of the tokens from `first` on; no other token has codes."""
    a = torch.zeros(n_tokens, F, dtype=torch.float64)
    assert torch.equal(codes.tokens, codes.tokens.sort().values)
    assert len(codes.tokens) == 0 or first <= int(codes.tokens.min())
    a[codes.tokens - first, codes.features] = codes.values
    return a


def check_rows(model: Any, out: Any, firsts: list[int], ends: list[int]) -> None:
    """Compare each row's features with those of its text from `first` to `end`, read whole."""
    assert len(out.features) == len(out.sequences) == len(firsts)
    for codes, ids, first, end in zip(out.features, out.sequences, firsts, ends, strict=True):
        assert len(codes) == len(layers(model))
        for layer, a in zip(codes, by_hand(model, ids[first : end - 1]), strict=True):
            got = dense(layer, first, end - 1 - first)
            assert torch.equal(got != 0, a != 0)
            assert (got - a).abs().max() < 1e-10
            assert 0 < int((a != 0).sum()) < a.numel()


SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": GREEDY,
    "sampled": SAMPLED,
    "several samples": SAMPLED | {"num_return_sequences": 2},
    "static cache": GREEDY | {"cache_implementation": "static"},
    "no cache": GREEDY | {"use_cache": False},
    "chunked prefill": GREEDY | {"prefill_chunk_size": 2},
    "a configuration": {"generation_config": GenerationConfig(**GREEDY)},
    "an empty cache": GREEDY,
    "scores": GREEDY | {"output_scores": True, "return_dict_in_generate": True},
}


@pytest.mark.parametrize("case", SETTINGS)
def test_the_features_are_those_of_the_whole_text(
    case: str, served: Served, float64_clean: None
) -> None:
    """Prompts of different lengths; the tokens are those of a call without the option."""
    model = served()

    def generate(**more: Any) -> Any:
        torch.manual_seed(1)
        cache = {CACHE: DynamicCache()} if case == "an empty cache" else {}
        return model.generate(**BATCH, **SETTINGS[case], **cache, **more)

    plain, out = generate(), generate(output_features=True)
    assert torch.equal(out.sequences, plain if isinstance(plain, Tensor) else plain.sequences)
    assert isinstance(out, GenerateDecoderOnlyOutput)
    assert out["features"] is out.features  # type: ignore[attr-defined]
    assert (out.scores is None) == (case != "scores")
    copies = len(out.sequences) // len(PROMPTS)
    firsts = [5 - len(p) for p in PROMPTS for _ in range(copies)]
    check_rows(model, out, firsts, [12] * len(firsts))


@pytest.mark.parametrize("activation", list(ACTIVATIONS)[1:])
def test_every_activation(activation: str, served: Served, float64_clean: None) -> None:
    model = served(activation=activation)
    out = model.generate(**BATCH, **GREEDY, output_features=True)
    check_rows(model, out, [2, 0, 4], [12] * 3)


@pytest.mark.quick("gemma3_text", "gemma4_text", "qwen3_5_text")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture(architecture: str, served: Served, float64_clean: None) -> None:
    model = served(architecture)
    out = model.generate(IDS[1:2], **GREEDY, output_features=True)
    check_rows(model, out, [0], [12])


def test_padding_is_inferred_as_transformers_infers_it(served: Served, float64_clean: None) -> None:
    model = served()
    out = model.generate(IDS, **GREEDY, output_features=True)
    assert torch.equal(out.sequences, model.generate(IDS, **GREEDY))
    assert torch.equal(out.sequences, model.generate(**BATCH, **GREEDY))
    check_rows(model, out, [2, 0, 4], [12] * 3)
    unknown = GREEDY | {"pad_token_id": 1, "eos_token_id": [1, 39]}
    whole = model.generate(IDS, **unknown, output_features=True)  # token 2 is a token like others
    assert torch.equal(whole.sequences, model.generate(IDS, **unknown))
    assert int(whole.features[2][0].tokens.min()) == 0


@pytest.mark.parametrize("pad", [PAD, "eos"])
def test_a_response_ends_where_it_ends_alone(pad: Any, served: Served, float64_clean: None) -> None:
    model = served()
    free = model.generate(**BATCH, **GREEDY)[:, 5:].tolist()
    # A token that ends one response early, and another response never.
    early = [t for row in free for t in row[1:5] if t != PAD and any(t not in r for r in free)]
    eos = early[0]
    ends = [5 + (row.index(eos) + 1 if eos in row else 7) for row in free]
    assert min(ends) < max(ends) == 12
    stops = GREEDY | {"eos_token_id": [eos, 39], "pad_token_id": eos if pad == "eos" else PAD}
    out = model.generate(**BATCH, **stops, output_features=True)
    assert out.sequences[0, -1] == stops["pad_token_id"] or ends[0] == 12
    check_rows(model, out, [2, 0, 4], ends)
    for i, prompt in enumerate(PROMPTS):
        alone = model.generate(torch.tensor([prompt]), **stops, output_features=True)
        for ours, theirs in zip(out.features[i], alone.features[0], strict=True):
            assert torch.equal(ours.features, theirs.features)
            assert torch.equal(ours.tokens - (5 - len(prompt)), theirs.tokens)
    longest = ends.index(12)

    def stop(ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """End the longest response after three tokens."""
        return torch.tensor([i == longest and ids.shape[1] >= 8 for i in range(3)])

    if pad == PAD:
        ends[longest] = 8
        stopping = {"stopping_criteria": StoppingCriteriaList([stop])}
        out = model.generate(**BATCH, **stops, **stopping, output_features=True)
        check_rows(model, out, [2, 0, 4], ends)


@pytest.mark.parametrize("activation", ["relu", "jumprelu"])
def test_an_export_gives_the_features_of_the_run(
    activation: str,
    exported: Callable[..., tuple[Path, ReplacementModel]],
    float64_clean: None,
) -> None:
    """Also with features removed and scaled, where features of later layers differ."""
    folder, run = exported(config=ACTIVATIONS[activation], dtype="float64")
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    assert isinstance(model, serving.AdaptedCausalLM)
    plain = model.generate(**BATCH, **GREEDY, output_features=True)
    active = plain.features[1][0].features
    scaled = {(0, int(active[0])): 0.0, (0, int(active[1])): -3.0, (1, 4): 2.0}
    for factors in ({}, scaled):
        if not factors:
            out = plain
            features = [run.features(ids[first:-1]) for ids, first in rows(out)]
        else:
            with scale_features(model, factors), scale_features(run, factors):
                out = model.generate(**BATCH, **GREEDY, output_features=True)
                features = [run.features(ids[first:-1]) for ids, first in rows(out)]
            assert not (out.features[1][0].features == active[0]).any()
            assert not torch.equal(out.features[1][2].values, plain.features[1][2].values)
        for ours, theirs, (_, first) in zip(out.features, features, rows(out), strict=True):
            for a, b in zip(ours, theirs, strict=True):
                assert torch.equal(a.tokens - first, b.tokens)
                assert torch.equal(a.features, b.features)
                assert (a.values - b.values).abs().max() < 1e-10


def rows(out: Any) -> list[tuple[Tensor, int]]:
    return [(ids, 5 - len(p)) for ids, p in zip(out.sequences, PROMPTS, strict=True)]


class Ops(TorchDispatchMode):
    """Names of the operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def operations(generate: Callable[..., Any], **more: Any) -> list[str]:
    with Ops() as ops:
        generate(IDS[1:2], attention_mask=MASK[1:2], **GREEDY, **more)
    return ops.names


def test_without_the_option_the_same_operations_run(served: Served) -> None:
    """Compared with transformers' own method, before and after a recorded and a failed call."""
    model = served()

    def unchanged(*args: Any, **kwargs: Any) -> Any:
        return GenerationMixin.generate(model, *args, **kwargs)

    expected = operations(unchanged)
    assert operations(model.generate) == expected
    more = operations(model.generate, output_features=True)
    assert more.count("aten.nonzero.default") >= expected.count("aten.nonzero.default") + 3 * 7
    with pytest.raises(ZeroDivisionError):
        model.generate(
            IDS, **GREEDY, logits_processor=[lambda ids, scores: 1 / 0], output_features=True
        )
    assert not any(mlp._forward_hooks for mlp in layers(model))
    assert operations(model.generate) == expected


def test_the_calls_of_other_threads_are_not_recorded(served: Served) -> None:
    model = served()
    with recorded(layers(model), cached=True) as readings, torch.no_grad():
        thread = threading.Thread(target=model, args=(IDS[:, :2],))
        thread.start()
        thread.join()
        assert readings == [[], [], []]
        model(IDS)
    assert [[reading.length for reading in layer] for layer in readings] == [[5]] * 3


def filled() -> DynamicCache:
    cache = DynamicCache()
    cache.update(torch.zeros(3, 2, 2, 4), torch.zeros(3, 2, 2, 4), 0)
    return cache


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_beams": 2}, "expected greedy search or sampling .*, got beam search;"),
        ({"num_beams": 2, "do_sample": True}, "got beam sample;"),
        ({"prompt_lookup_num_tokens": 2}, "got assisted generation;"),
        ({"assistant_model": torch.nn.Identity()}, "got assisted generation;"),
        ({"cache_implementation": "paged"}, "got the paged cache;"),
        ({"guidance_scale": 1.5}, "got a guidance_scale, which reads other texts, too;"),
        ({"custom_generate": print}, "got custom_generate;"),
        ({CACHE: filled()}, f"got {CACHE} that hold tokens already;"),
        ({"return_dict_in_generate": False}, "pass return_dict_in_generate=True, or omit it"),
        ({"input_ids": None}, r"expected input_ids \[B, T\] as the prompts"),
        ({"inputs_embeds": torch.zeros(3, 5, 16)}, r"expected input_ids \[B, T\] as the prompts"),
    ],
)
def test_what_cannot_be_assigned_to_tokens_is_refused(
    changes: dict[str, Any], message: str, served: Served
) -> None:
    model = served()
    with pytest.raises(UserError, match=f"^output_features: .*{message}"):
        model.generate(**{**BATCH, **GREEDY, **changes}, output_features=True)
    assert not any(mlp._forward_hooks for mlp in layers(model))


def test_modes_and_methods_without_features_are_refused(served: Served) -> None:
    model = served()
    with model.mode("hybrid"), pytest.raises(UserError, match="in which no adapter runs"):
        model.generate(IDS, **GREEDY, output_features=True)
    with pytest.raises(UserError, match="does not return features; use generate"):
        model.generate_batch(PROMPTS, output_features=True)


def test_calls_for_other_tokens_are_noticed(served: Served) -> None:
    model = served()

    def reads_again(ids: Tensor, scores: Tensor) -> Tensor:
        logits: Tensor = model(ids, use_cache=False).logits[:, -1]
        return logits

    processors = LogitsProcessorList([reads_again])
    with pytest.raises(RunError, match="reads 11 tokens of each sequence, but its calls read"):
        model.generate(IDS, **GREEDY, logits_processor=processors, output_features=True)
