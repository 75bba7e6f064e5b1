"""Positions of active units, compared with a loop over the tokens of one text at a time."""

from __future__ import annotations

from collections.abc import Callable
from threading import Event
from typing import Any

import pytest
import torch

from fastadapt.adapter.module import AdapterConfig
from fastadapt.errors import UserError
from fastadapt.features.autointerp.activations import ModelActivations
from fastadapt.features.store.schema import Kind
from fastadapt.models.replacement import ReplacementModel

UNITS = {0: [3, 0, 7], 2: [5]}  # some layers, units not sorted
NEURONS = 4


@pytest.fixture(params=["relu", "topk"])
def model(request: pytest.FixtureRequest, make_pair: Callable[..., Any]) -> ReplacementModel:
    config = AdapterConfig(24, request.param, k=3 if request.param == "topk" else None)
    replacement = ReplacementModel.create(make_pair("qwen2"), config)
    with torch.no_grad():
        for p in replacement.adapters.parameters():
            p.add_(0.1 * torch.randn(p.shape))
    return replacement


@pytest.fixture
def texts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    lengths = (9, 14, 5, 14, 2, 30)
    return [torch.randint(3, 40, (n,), generator=generator).tolist() for n in lengths]


@torch.no_grad()
def active_units(model: ReplacementModel, kind: Kind, ids: list[int]) -> list[torch.Tensor]:
    """Return bool ``[T, F]`` per layer, by transformers' own forward and a loop over tokens."""
    seen: list[torch.Tensor] = []
    hooks = []
    for mlp in model.mlps:
        read = mlp.adapter if kind == "adapter" else getattr(mlp, kind).down_proj
        hooks.append(read.register_forward_pre_hook(lambda _, given: seen.append(given[0][0])))
    with model.mode("target" if kind == "target" else "replacement"):
        model(torch.tensor([ids]))
    for hook in hooks:
        hook.remove()
    active = []
    adapters: Any = model.adapters
    for layer, x in enumerate(seen):
        if kind == "adapter":
            active.append(adapters[layer].encode(x) > 0)
            continue
        norm = getattr(model.mlps[layer], kind).down_proj.weight.norm(dim=0)
        rows = torch.zeros(x.shape, dtype=torch.bool)
        for t, row in enumerate(x * norm):
            for i in sorted(range(len(row)), key=lambda i: -row[i].item())[:NEURONS]:
                rows[t, i] = row[i] > 0
        active.append(rows)
    return active


@pytest.mark.parametrize("kind", ["adapter", "base", "target"])
@pytest.mark.parametrize("batch_tokens", [1, 45])
def test_places_are_those_of_a_loop(
    model: ReplacementModel, texts: list[list[int]], kind: Kind, batch_tokens: int
) -> None:
    reported: list[tuple[int, int]] = []
    reads = ModelActivations(model, neurons_per_token=NEURONS, batch_tokens=batch_tokens)
    computed = reads.places(kind, texts, UNITS, progress=lambda *p: reported.append(p))
    assert reported[-1] == (len(texts), len(texts))
    wanted: dict[tuple[int, int], list[list[int]]] = {
        (layer, unit): [] for layer, in_layer in UNITS.items() for unit in in_layer
    }
    for i, ids in enumerate(texts):
        active = active_units(model, kind, ids)
        for layer, unit in wanted:
            places = active[layer][:, unit].nonzero().flatten().tolist()
            wanted[layer, unit] += [[i, position] for position in places]
    assert {unit: places.tolist() for unit, places in computed.items()} == wanted
    assert any(wanted.values())


def test_the_mode_is_restored_and_hooks_are_removed(
    model: ReplacementModel, texts: list[list[int]]
) -> None:
    model.adapters.train()
    ModelActivations(model).places("adapter", texts, UNITS)
    assert model.adapters.training
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_a_stop_ends_the_computation(model: ReplacementModel, texts: list[list[int]]) -> None:
    stop = Event()
    stop.set()
    computed = ModelActivations(model).places("adapter", texts, UNITS, stop=stop)
    assert all(len(places) == 0 for places in computed.values())


def test_neurons_need_neurons_per_token(model: ReplacementModel, texts: list[list[int]]) -> None:
    with pytest.raises(UserError, match="base neurons"):
        ModelActivations(model).places("base", texts, UNITS)


def test_a_model_without_features_is_refused(make_pair: Callable[..., Any]) -> None:
    tuned = ReplacementModel.create(make_pair("qwen2"), "mlp")
    with pytest.raises(UserError, match="no features"):
        ModelActivations(tuned)
