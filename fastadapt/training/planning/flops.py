"""Count the floating-point operations of a training step on fake tensors, without weights.

The step runs at the true shapes, and torch's counter adds up its matrix products. A multiply-add
counts as two operations. Fused causal attention computes half of the scores and counts half.

A step's operations are linear in the number of layers before the cutoff and in the number behind
it, so models of two and three layers give the count at any depth.

T tokens, D width, F features, L layers.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from torch import nn

from fastadapt.adapter.module import AdapterConfig
from fastadapt.batch import Batch
from fastadapt.kernels.flops import register_flop_formulas
from fastadapt.models.baselines import Baseline
from fastadapt.models.pair import DTYPES, ModelPair, PairConfig
from fastadapt.models.pretrained import ARCHITECTURES
from fastadapt.models.recompute import ATTENTION_OPS
from fastadapt.models.replacement import ReplacementModel
from fastadapt.objective import ObjectiveConfig, objective


@dataclass(frozen=True)
class Setup:
    """Shapes and settings that determine a step's operations and memory.

    Attributes:
        target: transformers' configuration of the target; the base's MLPs have the same sizes.
        pair, trained, objective: components of a run's configuration.
        sequences, tokens: B and T of the batch, without padding.
    """

    target: Any = field(hash=False)
    pair: PairConfig
    trained: AdapterConfig | Baseline
    objective: ObjectiveConfig
    sequences: int
    tokens: int


@contextmanager
def fake_pair(setup: Setup, n_layers: int) -> Any:
    """Create a pair of ``n_layers`` layers on fake tensors, and yield it in their mode."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import AutoModelForCausalLM

    config = type(setup.target).from_dict(
        {**setup.target.to_dict(), "num_hidden_layers": n_layers, "layer_types": None}
    )
    paths = ARCHITECTURES[config.model_type]
    attention = paths.attention if setup.pair.attention == "auto" else setup.pair.attention
    with FakeTensorMode(allow_non_fake_inputs=True):
        models = [
            AutoModelForCausalLM.from_config(
                config,
                attn_implementation="eager" if attention == "eager" else "sdpa",
                dtype=DTYPES[setup.pair.dtype],
                trust_remote_code=setup.pair.trust_remote_code,
            ).eval()
            for _ in range(2)
        ]
        blocks = getattr(getattr(models[1], paths.decoder), paths.layers)
        mlps = nn.ModuleList(getattr(block, paths.mlp) for block in blocks)
        pair = replace(setup.pair, device="cpu")
        yield ModelPair(models[0], mlps, None, pair, paths)


def count(setup: Setup, n_layers: int, cutoff: int, codes_per_token: float | None) -> float:
    """Return the operations of one step, forward and backward, at one cutoff.

    Args:
        setup: shapes and settings.
        n_layers: L.
        cutoff: k in 0..L.
        codes_per_token: expected codes per token of every layer, an argument of
            :func:`fastadapt.objective.objective`; F gives dense products in all layers.
    """

    def step(pair: ModelPair, batch: Batch) -> None:
        model = ReplacementModel.create(pair, setup.trained)
        expected = None if codes_per_token is None else [codes_per_token] * n_layers
        objective(model, batch, cutoff, setup.objective, expected).loss.backward()

    return count_of(setup, n_layers, step)


def count_of(setup: Setup, n_layers: int, step: Callable[[ModelPair, Batch], None]) -> float:
    """Return the operations of any function ``step(pair, batch)``."""
    from torch.utils.flop_counter import FlopCounterMode

    register_flop_formulas()
    aten = torch.ops.aten
    # The counter has formulas for the attention kernels of GPUs only; fake tensors use the CPU's.
    formulas = {
        aten._scaled_dot_product_flash_attention_for_cpu: _attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    }
    with fake_pair(setup, n_layers) as pair:
        ids = torch.zeros(setup.sequences, setup.tokens, dtype=torch.int64)
        with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
            step(pair, Batch(ids, None, ids))
    total = 0.0
    for op, flops in counter.get_flop_counts()["Global"].items():
        name = str(op).replace(".", "::", 1).removesuffix("_backward")
        total += flops / 2 if name in ATTENTION_OPS else flops
    return total


def flops_per_step(setup: Setup, n_layers: int, codes_per_token: float | None) -> float:
    """Return the operations of a step, averaged over the cutoffs that the objective may draw."""

    @cache
    def counted(depth: int, cutoff: int) -> float:
        return count(setup, depth, cutoff, codes_per_token)

    def count_at(depth: int, cutoff: int) -> float:
        return counted(depth, cutoff % depth)  # at both ends one bridge repeats the output's KL

    return mean_over_cutoffs(count_at, n_layers, setup.objective.first_cutoff)


def mean_over_cutoffs(count_at: Callable[[int, int], float], n_layers: int, first: int) -> float:
    """Return the mean of ``count_at(n_layers, k)`` over k in ``first..n_layers``.

    ``count_at`` is called for depths 2 and 3 only. Between its ends it is linear in the number of
    layers up to the cutoff and in the number behind it.
    """
    two, three = count_at(2, 0), count_at(3, 0)
    ends = {0: two + (n_layers - 2) * (three - two)}
    two, three = count_at(2, 2), count_at(3, 3)
    ends[n_layers] = two + (n_layers - 2) * (three - two)
    one_each = count_at(2, 1)
    before, behind = count_at(3, 2) - one_each, count_at(3, 1) - one_each
    constant = one_each - before - behind
    cutoffs = range(first, n_layers + 1)
    each = [ends.get(k, k * before + (n_layers - k) * behind + constant) for k in cutoffs]
    return sum(each) / len(each)


def _attention(query: Any, key: Any, *_: Any, **__: Any) -> int:
    """Return the operations of two products: the scores, and the weighted sum of the values."""
    sequences, heads, tokens, width = query
    return int(2 * 2 * sequences * heads * tokens * key[2] * width)


def _attention_backward(_: Any, query: Any, key: Any, *__: Any, **___: Any) -> int:
    """Return the operations of five products: the scores again, and the gradients of 4 factors."""
    sequences, heads, tokens, width = query
    return int(5 * 2 * sequences * heads * tokens * key[2] * width)
