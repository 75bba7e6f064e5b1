"""Codes of every kind from one traversal, in every architecture and with padding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastadapt.adapter.module import AdapterConfig
from fastadapt.batch import Batch
from fastadapt.data.batches import collate
from fastadapt.data.sequences import Sample
from fastadapt.errors import UserError
from fastadapt.features.collect.layer_codes import walk
from fastadapt.features.store.schema import Kind
from fastadapt.features.store.units import Neurons, output_matrix, output_rows
from fastadapt.models.architectures import ARCHITECTURES
from fastadapt.models.replacement import ReplacementModel

K = 3


def padded() -> Batch:
    rows = [torch.randint(3, 40, (n,)) for n in (9, 4, 6)]
    return collate([Sample(i, row, row) for i, row in enumerate(rows)], 2)


def neurons_of(model: ReplacementModel) -> dict[Kind, list[Neurons]]:
    kinds: tuple[Kind, ...] = ("base", "target")
    return {
        kind: [
            Neurons(output_rows(model, kind, layer).float().norm(dim=1), K)
            for layer in range(model.n_layers)
        ]
        for kind in kinds
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_codes_equal_those_of_the_modules_inputs(
    architecture: str, dtype: str, make_pair: Callable[..., Any]
) -> None:
    model: Any = ReplacementModel.create(make_pair(architecture, dtype), AdapterConfig(12)).eval()
    with torch.no_grad():
        for adapter in model.adapters:
            adapter.W_dec.normal_(0, 0.1)
    given: dict[str, list[torch.Tensor]] = {"adapter": [], "base": [], "target": []}
    for adapter, mlp in zip(model.adapters, model.mlps, strict=True):
        for name, module in (
            ("adapter", adapter),
            ("base", output_matrix(mlp, "base")),
            ("target", output_matrix(mlp, "target")),
        ):
            module.register_forward_pre_hook(lambda _, x, name=name: given[name].append(x[0]))
    batch = padded()
    layers = list(walk(model, batch, neurons_of(model)))
    assert [layer for layer, _ in layers] == list(range(model.n_layers))
    real = batch.real.flatten()
    for layer, codes_by_kind in layers:
        assert list(codes_by_kind) == ["adapter", "base", "target"]
        a = model.adapters[layer].encode(given["adapter"][layer]).flatten(0, 1).detach()
        check(codes_by_kind["adapter"], torch.where(real[:, None], a, 0).float())
        for kind in ("base", "target"):
            h = given[kind][layer].flatten(0, 1).float()
            norm = output_rows(model, kind, layer).float().norm(dim=1)
            assert norm.shape == h.shape[1:]
            rank = (h * norm).argsort(dim=1, descending=True).argsort(dim=1)
            check(codes_by_kind[kind], torch.where((rank < K) & (h > 0) & real[:, None], h, 0))


def check(codes: Any, dense: torch.Tensor) -> None:
    scattered = torch.zeros_like(dense)
    scattered[codes.tokens, codes.features] = codes.values.float()
    assert torch.equal(scattered, dense)
    assert len(codes.values) == (dense != 0).sum() > 0
    place = codes.tokens * dense.shape[1] + codes.features
    assert (place.diff() > 0).all()


def test_kinds_that_are_not_requested_are_not_computed(make_pair: Callable[..., Any]) -> None:
    model = ReplacementModel.create(make_pair("qwen2"), AdapterConfig(12)).eval()
    ran: list[int] = []
    for mlp in model.mlps:
        mlp.target.register_forward_pre_hook(lambda *_: ran.append(1))  # type: ignore[union-attr]
    assert [list(codes_by_kind) for _, codes_by_kind in walk(model, padded(), {})] == [
        ["adapter"]
    ] * 3
    assert not ran


def test_an_mlp_without_the_expected_output_matrix(make_pair: Callable[..., Any]) -> None:
    model = ReplacementModel.create(make_pair("qwen2"), AdapterConfig(12))
    del model.mlps[0].base.down_proj
    with pytest.raises(UserError, match=r"has no down_proj; collect the adapter alone"):
        output_rows(model, "base", 0)
