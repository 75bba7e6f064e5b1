"""Both steps have the same losses and gradients: shown small, on this device, before any is timed.

In float64 ours runs without Triton, whose kernels compute in float32 at most. So where they run,
ours is held in float32 as well, with every kernel that will be timed, under the error budget of
:mod:`fastadapt.kernels.testing`: the oracle is the plain step in float64, its peer the plain step
in float32. T tokens, L layers.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from benchmarks.case import Row
from benchmarks.naive_step import NaiveStep
from benchmarks.step_models import L0, SMALL, make_adapters, make_pair
from fastadapt.batch import Batch
from fastadapt.kernels.device import runs_triton
from fastadapt.kernels.testing import ErrorBudget, error_budget
from fastadapt.models.replacement import ReplacementModel
from fastadapt.objective import ObjectiveConfig, objective

__all__ = ["budget_of", "check", "difference", "in_float64", "of_kernels"]

T = 16
# transformers' norms compute in float32, also of float64: the whole difference between both steps.
LIMIT = 1e-6
NAMES = ("W_enc", "b_enc", "W_dec", "b_dec")
# So many features that L0 of them are planned as codes, in float32 too.
SPARSE = replace(SMALL, layers=2, features=288, dtype=torch.float32)


def check(device: str) -> Row:
    """``right``, and by how much: ``difference`` in float64; where Triton runs, ``kernels``."""
    wide = in_float64(device)
    row: Row = {"right": wide < LIMIT, "difference": wide}
    if runs_triton(device):
        budgets = of_kernels(device)
        row["right"] &= all(budget.within for budget in budgets)
        row["kernels"] = [budget._asdict() for budget in budgets]
        for kernel in row["kernels"]:
            del kernel["worst"]
    return row


def in_float64(device: str) -> float:
    """The largest relative difference of a loss or gradient; NaN where either is not a number."""
    sizes = replace(SMALL, dtype=torch.float64)
    torch.manual_seed(0)
    adapters = make_adapters(sizes, device)
    plain = NaiveStep(make_pair(sizes, device), list(adapters))
    model = ReplacementModel(make_pair(sizes, device), adapters)
    ids = _ids(device)
    each = [
        difference(_ours(model, ids, cutoff, None), _plain(plain, ids, cutoff))
        for cutoff in (0, 1, sizes.layers)
    ]
    return float(torch.tensor(each).max())


def difference(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """The largest ``‖a - b‖ / ‖b‖``. NaN is kept: Python's ``max`` would pass it over."""
    each = [(a - b).norm() / b.norm() for a, b in zip(ours, theirs, strict=True)]
    return float(torch.stack(each).max())


def of_kernels(device: str) -> list[ErrorBudget]:
    """Ours in float32 with Triton, as codes and dense, a layer of one stream and one of two.

    Each loss and gradient is measured by the root mean square of its oracle, all in one budget: of
    a single number, such as the loss, the peer's error is small by chance as often as not.
    """
    torch.manual_seed(0)
    adapters = make_adapters(SPARSE, device, "triton")
    pair = make_pair(SPARSE, device)
    peer = NaiveStep(copy.deepcopy(pair), list(adapters))
    wide = copy.deepcopy(pair)
    wide.target.double()
    wide.base_mlps.double()
    oracle = NaiveStep(wide, list(copy.deepcopy(adapters).double()))
    model = ReplacementModel(pair, adapters)
    ids = _ids(device)
    return [
        budget_of(_ours(model, ids, 1, codes), _plain(oracle, ids, 1), _plain(peer, ids, 1))
        for codes in (L0, SPARSE.features)
    ]


def budget_of(
    ours: Sequence[Tensor], true: Sequence[Tensor], plain: Sequence[Tensor]
) -> ErrorBudget:
    """One budget of all; never kept where the oracle itself is no number."""
    scales = [value.square().mean().sqrt() for value in true]
    actual, oracle, peer = (
        torch.cat([(value / scale).flatten() for value, scale in zip(values, scales, strict=True)])
        for values in (ours, true, plain)
    )
    if not bool(oracle.isfinite().all() & peer.isfinite().all()):
        return ErrorBudget(math.inf, math.inf, 0.0, 0.0, ())
    return error_budget(actual.float(), oracle, peer.float())


def _ours(model: ReplacementModel, ids: Tensor, cutoff: int, codes: float | None) -> list[Tensor]:
    """The loss and every adapter's gradients; planned for so many codes, unless None."""
    model.zero_grad()
    expected = None if codes is None else [codes] * model.n_layers
    out = objective(model, Batch(ids, None, ids), cutoff, ObjectiveConfig(), expected)
    out.loss.backward()
    return _of(out.loss, model.adapters)


def _plain(plain: NaiveStep, ids: Tensor, cutoff: int) -> list[Tensor]:
    for dense in plain.adapted:
        dense.zero_grad()
    loss = plain(ids, cutoff, ObjectiveConfig())["loss"]
    loss.backward()
    return _of(loss, plain.adapted)


def _of(loss: Tensor, layers: Iterable[nn.Module]) -> list[Tensor]:
    gradients = [layer.get_parameter(name).grad for layer in layers for name in NAMES]
    assert all(gradient is not None for gradient in gradients)
    return [loss.detach(), *(g for g in gradients if g is not None)]


def _ids(device: str) -> Tensor:
    return torch.randint(SMALL.vocabulary, (1, T), device=device)
