"""Count the floating-point operations of a training step on fake tensors, without weights.

The step runs at the true shapes, and torch's counter adds up its matrix products. A multiply-add
counts as two operations. Fused causal attention computes half of the scores and counts half.

A step's operations are a sum over its layers, which differ by what they recompute and by whether
they lie before the cutoff. Models of two and three layers give the count at any depth.

T tokens, D width, F features, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from torch import nn

from fastadapt.adapter.module import AdapterConfig
from fastadapt.batch import Batch
from fastadapt.kernels.flops import register_flop_formulas
from fastadapt.models.architectures import ARCHITECTURES
from fastadapt.models.baselines import Baseline, LoraConfig
from fastadapt.models.pair import DTYPES, ModelPair, PairConfig
from fastadapt.models.recompute import ATTENTION_OPS
from fastadapt.models.replacement import ReplacementModel
from fastadapt.models.sources.low_rank import RANKS, attach_ranks, sharing_copy
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
    trained: AdapterConfig | LoraConfig | Baseline
    objective: ObjectiveConfig
    sequences: int
    tokens: int


@contextmanager
def fake_pair(setup: Setup, n_layers: int) -> Any:
    """Create a pair of ``n_layers`` layers on fake tensors; yield it with the fake mode on."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        yield random_pair(setup, n_layers)


def random_pair(setup: Setup, n_layers: int, device: str = "cpu") -> ModelPair:
    """Create a pair of ``n_layers`` layers with random weights, at the shapes of ``setup``."""
    from transformers import AutoModelForCausalLM

    config = _shortened(setup.target, n_layers)
    paths = ARCHITECTURES[config.model_type]
    attention = paths.attention if setup.pair.attention == "auto" else setup.pair.attention
    with torch.device(device):
        models = [
            AutoModelForCausalLM.from_config(
                config,
                attn_implementation="eager" if attention == "eager" else "sdpa",
                dtype=DTYPES[setup.pair.dtype],
                trust_remote_code=setup.pair.trust_remote_code,
            ).eval()
            for _ in range(2)
        ]
        target_blocks, blocks = (
            getattr(getattr(model, paths.decoder), paths.layers) for model in models
        )
        mlps = nn.ModuleList(getattr(block, paths.mlp) for block in blocks)
        if ranks := getattr(setup.target, RANKS, None):  # a PEFT target shares its base's weights
            mlps = nn.ModuleList(sharing_copy(getattr(block, paths.mlp)) for block in target_blocks)
            for block in target_blocks:
                attach_ranks(block, ranks)
    return ModelPair(models[0], mlps, None, replace(setup.pair, device=device), paths)


def _shortened(config: Any, n_layers: int) -> Any:
    """Return a configuration of a model's last ``n_layers`` layers, repeated if it has fewer."""
    values = config.to_dict()
    last = [i % config.num_hidden_layers for i in range(-n_layers, 0)]
    for name, value in values.items():  # lists with one entry per layer, such as layer_types
        if isinstance(value, list) and len(value) == config.num_hidden_layers:
            values[name] = [value[i] for i in last]
    if layers := values.get("per_layer_config"):  # settings that differ by layer, by its index
        given = {int(i): settings for i, settings in layers.items()}
        values["per_layer_config"] = {new: given[i] for new, i in enumerate(last) if i in given}
    return type(config).from_dict({**values, "num_hidden_layers": n_layers})


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


def flops_per_step(
    setup: Setup,
    n_layers: int,
    codes_per_token: float | None,
    policies: Callable[[int], Sequence[str]] | None = None,
) -> float:
    """Return the operations of a step, averaged over the cutoffs that the objective may draw.

    A step is summed from its layers: models of two and three layers give the operations of a layer
    with and without bridges, and of the first layer together with the head.

    Args:
        setup: shapes and settings.
        n_layers: L.
        codes_per_token: as in :func:`count`.
        policies: returns what each layer saves at a cutoff (:mod:`fastadapt.models.recompute`).
            None: ``objective.checkpoint`` in all layers.
    """

    @cache
    def counted(policy: str, depth: int, cutoff: int) -> float:
        changed = replace(setup, objective=replace(setup.objective, checkpoint=policy))
        return count(changed, depth, cutoff, codes_per_token)

    def layer(policy: str, forked: bool) -> float:
        return counted(policy, 3, int(forked)) - counted(policy, 2, int(forked))

    def summed(cutoff: int) -> float:
        chosen = policies(cutoff) if policies else [setup.objective.checkpoint] * n_layers
        # At both ends one bridge repeats the output's KL.
        forks = cutoff if cutoff < n_layers else 0
        first, *others = chosen
        total = counted(first, 2, int(forks > 0)) - layer(first, forks > 0)
        return total + sum(layer(p, 0 < forks <= i) for i, p in enumerate(others, 1))

    cutoffs = range(setup.objective.first_cutoff, n_layers + 1)
    return sum(map(summed, cutoffs)) / len(cutoffs)


def _attention(query: Any, key: Any, *_: Any, **__: Any) -> int:
    """Return the operations of two products: the scores, and the weighted sum of the values."""
    sequences, heads, tokens, width = query
    return int(2 * 2 * sequences * heads * tokens * key[2] * width)


def _attention_backward(_: Any, query: Any, key: Any, *__: Any, **___: Any) -> int:
    """Return the operations of five products: the scores again, and the gradients of 4 factors."""
    sequences, heads, tokens, width = query
    return int(5 * 2 * sequences * heads * tokens * key[2] * width)
