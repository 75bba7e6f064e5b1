"""A whole training step, ours and the plain one, on one device with random weights of true shapes.

Forward, backward, clipping, update. Adapters get a bias at which about L0 of their features fire.
Both are first shown to have the same losses and gradients, small and in float64, on this device.
Where the plain step does not fit in memory at a length, the next shorter one is tried.

T tokens, d width, F features, L layers.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.case import Row
from benchmarks.naive_step import NaiveStep
from benchmarks.roofs import Roofs
from benchmarks.timing import synchronize
from fastadapt.adapter import AdapterConfig, TranscoderAdapter
from fastadapt.batch import Batch
from fastadapt.models import ReplacementModel
from fastadapt.objective import ObjectiveConfig, objective
from fastadapt.pair import ModelPair, PairConfig
from fastadapt.pretrained import ARCHITECTURES
from fastadapt.recompute import POLICIES
from fastadapt.training import memory
from fastadapt.training.config import from_dict
from fastadapt.training.metrics import StepGatherer
from fastadapt.training.optimizer import AdapterOptimizer, OptimizerConfig
from fastadapt.training.shapes import Shapes
from fastadapt.training.work import Setup, count

__all__ = ["PAPER", "SMALL", "Sizes", "check", "rows"]

L0 = 10.0
STEPS = 3


@dataclass(frozen=True)
class Sizes:
    """Shapes of a pair, and the lengths to time."""

    d: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    features: int
    lengths: tuple[int, ...]  #: of ours
    shorter: tuple[int, ...]  #: of the plain step, longest first: the first that fits is timed
    dtype: torch.dtype


PAPER = Sizes(
    3584, 18_944, 28, 28, 4, 152_064, 8192, (7500, 10_000), (7500, 5000, 3500, 2500, 1500),
    torch.bfloat16,
)  # fmt: skip
SMALL = Sizes(64, 160, 3, 4, 2, 500, 256, (128,), (128,), torch.float32)


def make_pair(sizes: Sizes, device: str) -> ModelPair:
    """Random weights, made where they stay."""
    from transformers import AutoModelForCausalLM

    config = _config(sizes)
    torch.manual_seed(0)
    with torch.device(device):
        target = AutoModelForCausalLM.from_config(config, dtype=sizes.dtype).eval()
        layer = type(target.model.layers[0].mlp)
        mlps = nn.ModuleList(layer(config).to(sizes.dtype) for _ in range(sizes.layers))
    # A fine-tuned model's MLPs are its base's, a little moved.
    with torch.no_grad():
        for mlp, block in zip(mlps, target.model.layers, strict=True):
            for ours, theirs in zip(mlp.parameters(), block.mlp.parameters(), strict=True):
                ours.copy_(theirs + 0.05 * theirs.std() * torch.randn_like(theirs))
    pair = replace(_pair(sizes), device=device)
    return ModelPair(target, mlps, None, pair, ARCHITECTURES["qwen2"])


def make_adapters(sizes: Sizes, device: str) -> nn.ModuleList:
    """About L0 features a token: their input has norm sqrt(d), so z is normal, std 1/sqrt(3)."""
    adapters = nn.ModuleList(
        TranscoderAdapter(sizes.d, AdapterConfig(sizes.features), device=device, dtype=sizes.dtype)
        for _ in range(sizes.layers)
    )
    quantile = torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(1 - L0 / sizes.features))
    with torch.no_grad():
        for adapter in adapters:
            assert isinstance(adapter, TranscoderAdapter)
            adapter.b_enc.fill_(-float(quantile) / math.sqrt(3))
            adapter.W_dec.normal_(std=0.02 / math.sqrt(sizes.d))
    return adapters


def check(device: str) -> float:
    """The largest relative difference of a loss or gradient between both steps, in float64."""
    sizes = replace(SMALL, dtype=torch.float64)
    adapters = make_adapters(sizes, device)
    plain = NaiveStep(make_pair(sizes, device), list(adapters))
    model = ReplacementModel(make_pair(sizes, device), adapters)
    ids = torch.randint(sizes.vocabulary, (1, 40), device=device)
    config, worst = ObjectiveConfig(), 0.0
    for cutoff in (0, 1, sizes.layers):
        model.zero_grad()
        for dense in plain.adapted:
            dense.zero_grad()
        ours = objective(model, Batch(ids, None, ids), cutoff, config)
        theirs = plain(ids, cutoff, config)["loss"]
        ours.loss.backward()
        theirs.backward()
        pairs = [(ours.loss.detach(), theirs.detach())]
        for adapter, dense in zip(adapters, plain.adapted, strict=True):
            for name, parameter in adapter.named_parameters():
                pairs.append((parameter.grad, dense.get_parameter(name).grad))
        worst = max(worst, *(float((a - b).norm() / b.norm()) for a, b in pairs))
    return worst


def rows(sizes: Sizes, device: str, roofs: Roofs) -> Iterator[Row]:
    """The plain step at the longest length that fits, then ours there and at its own lengths."""
    worst = check(device)
    right = worst < 1e-6  # transformers' norms compute in float32, also of float64
    base: Row = {"op": "step", "right": right, "difference": worst}
    plain = next(_plain(sizes, device, roofs, base), None)
    if plain is not None:
        yield plain
    lengths = dict.fromkeys([*([plain["shape"]["T"]] if plain else []), *sizes.lengths])
    model = ReplacementModel(make_pair(sizes, device), make_adapters(sizes, device))
    optimizer = AdapterOptimizer(dict(model.adapters.named_parameters()), _optimizer())
    for T in lengths:
        for policy in POLICIES:
            row = _row(sizes, T, f"ours, {policy}", base)
            row["planned_bytes"] = planned_bytes(sizes, T, policy, device)
            step = _our_step(model, optimizer, sizes, T, policy, device)
            try:
                yield row | _timed(step, sizes, T, device, roofs)
            except torch.OutOfMemoryError as error:
                yield row | {"kind": "floor", "error": str(error).splitlines()[0]}
            _empty(device)


def _plain(sizes: Sizes, device: str, roofs: Roofs, base: Row) -> Iterator[Row]:
    """Its row at the first of the lengths that fits; everything of it is gone afterwards."""
    for T in sizes.shorter:
        adapters = make_adapters(sizes, device)
        plain = NaiveStep(make_pair(sizes, device), list(adapters))
        del adapters
        parameters = {
            f"{i}.{name}": p
            for i, mlp in enumerate(plain.adapted)
            for name, p in mlp.named_parameters()
            if p.requires_grad
        }
        optimizer = AdapterOptimizer(parameters, _optimizer())
        step = _plain_step(plain, optimizer, device)
        row = _row(sizes, T, "plain", base) | {"kind": "reference"}
        try:
            measured = _timed(step, sizes, T, device, roofs)
        except torch.OutOfMemoryError:
            measured = None
        del plain, parameters, optimizer, step
        _empty(device)
        if measured is not None:
            yield row | measured
            return


def _plain_step(
    plain: NaiveStep, optimizer: AdapterOptimizer, device: str
) -> Callable[[Tensor, int], Tensor]:
    config = ObjectiveConfig(logits_dtype=None if device == "cpu" else "bfloat16")

    def step(ids: Tensor, cutoff: int) -> Tensor:
        loss = plain(ids, cutoff, config)["loss"]
        loss.backward()
        _update(optimizer)
        return loss.detach()

    return step


def _our_step(
    model: ReplacementModel,
    optimizer: AdapterOptimizer,
    sizes: Sizes,
    T: int,
    policy: str,
    device: str,
) -> Callable[[Tensor, int], Tensor]:
    logits = None if device == "cpu" else "bfloat16"
    config = ObjectiveConfig(checkpoint=policy, logits_dtype=logits)
    expected = [2 * L0] * sizes.layers

    def step(ids: Tensor, cutoff: int) -> Tensor:
        gathered = StepGatherer()
        out = objective(model, Batch(ids, None, ids), cutoff, config, expected)
        out.loss.backward()
        gathered.add(out, 1.0, T)
        _update(optimizer)
        return out.metrics["loss"]

    return step


def _timed(
    step: Callable[[Tensor, int], Tensor], sizes: Sizes, T: int, device: str, roofs: Roofs
) -> Row:
    """Steps one after the other at cutoffs over the range, the host's share included."""
    on_gpu = device == "cuda"
    ids = torch.randint(sizes.vocabulary, (1, T), device=device)
    cutoffs = [max(1, sizes.layers * i // (STEPS + 1)) for i in range(1, STEPS + 1)]
    step(ids, cutoffs[0])
    synchronize(device)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    seconds, losses = [], []
    for cutoff in cutoffs:
        began = time.perf_counter()
        losses.append(step(ids, cutoff))
        synchronize(device)
        seconds.append(time.perf_counter() - began)
    median = sorted(seconds)[len(seconds) // 2]
    kept, adapter = ObjectiveConfig(checkpoint="none"), AdapterConfig(sizes.features)
    setup = Setup(_config(sizes), _pair(sizes), adapter, kept, 1, T)
    necessary = sum(count(setup, sizes.layers, k, L0) for k in cutoffs) / len(cutoffs)
    return {
        "median_s": median,
        "spread_s": max(seconds) - min(seconds),
        "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else 0,
        "tokens_per_s": T / median,
        "necessary_flops": necessary,
        "share_of_gemm_rate": necessary / median / roofs.gemm_flops_per_s,
        "losses": [float(loss) for loss in losses],
        "hours_for_380M_tokens": 380e6 / (T / median) / 3600,
    }


def planned_bytes(sizes: Sizes, T: int, policy: str, device: str) -> int:
    """What the memory plan says of our step."""
    config = from_dict(
        {
            "pair": asdict(_pair(sizes)),
            "adapter": {"n_features": sizes.features},
            "objective": {
                "checkpoint": policy,
                "logits_dtype": None if device == "cpu" else "bfloat16",
            },
            "data": {"train": "none.jsonl", "validation": "none.jsonl"},
            "optimizer": {"masters": False},
            "run": {"output": "none"},
        }
    )
    return max(memory.phases(Shapes.of(config, _config(sizes), T, device)).values())


def _row(sizes: Sizes, T: int, implementation: str, base: Row) -> Row:
    shape = {"T": T, "d": sizes.d, "F": sizes.features, "L": sizes.layers}
    return {**base, "implementation": implementation, "kind": "ours", "shape": shape}


def _config(sizes: Sizes) -> Any:
    from transformers import Qwen2Config

    return Qwen2Config(
        hidden_size=sizes.d,
        intermediate_size=sizes.inner,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        vocab_size=sizes.vocabulary,
        tie_word_embeddings=False,
    )


def _pair(sizes: Sizes) -> PairConfig:
    return PairConfig("target", "base", dtype=str(sizes.dtype)[6:])


def _optimizer() -> OptimizerConfig:
    return OptimizerConfig(masters=False)


def _update(optimizer: AdapterOptimizer) -> None:
    optimizer.step(1e-5, optimizer.gradient_norm())


def _empty(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
