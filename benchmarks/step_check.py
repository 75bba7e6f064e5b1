"""Check before timing, at small shapes, that both steps have the same losses and gradients.

In float64 this library's step runs without Triton, whose kernels compute in float32 at most. Where
Triton runs, the step is therefore also compared in float32, with all kernels that are timed, under
the error budget of :mod:`fastadapt.kernels.testing`. The oracle is the plain step in float64, and
the peer is the plain step in float32. On a GPU, a call has more tokens than the kernels for few
tokens take, as the timed steps have. T tokens, L layers.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
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

TOKENS = {"cuda": 300, "cpu": 16}  # interpreted kernels are slow
# transformers' norms compute in float32 also for float64, which explains the steps' difference.
LIMIT = 1e-6
NAMES = ("W_enc", "b_enc", "W_dec", "b_dec")
# With this many features, L0 active ones are planned as codes, in float32 too.
SPARSE = replace(SMALL, layers=2, features=288, dtype=torch.float32)


def check(device: str) -> Iterator[Row]:
    """Yield whether the steps agree in float64 and, with Triton, in float32 within the budgets."""
    row: Row = {"op": "step", "shape": {"T": TOKENS[device]}}
    wide = in_float64(device)
    claim = f"losses and gradients of the plain step in float64, within {LIMIT:g}"
    yield row | {
        "implementation": "ours",
        "claim": claim,
        "right": wide < LIMIT,
        "difference": wide,
    }
    if runs_triton(device):
        claim = "losses and gradients of the plain step, within the error budget"
        for codes, budget in zip(("codes", "dense products"), of_kernels(device), strict=True):
            errors = budget._asdict()
            del errors["worst"]
            ours = {"implementation": f"triton, {codes}", "claim": claim, "right": budget.within}
            yield row | ours | errors


def in_float64(device: str) -> float:
    """Return the largest relative difference of a loss or gradient; NaN if one is NaN."""
    sizes = replace(SMALL, dtype=torch.float64)
    torch.manual_seed(0)
    adapters = make_adapters(sizes, device)
    plain = NaiveStep(make_pair(sizes, device), list(adapters))
    model = ReplacementModel(make_pair(sizes, device), adapters)
    ids = _ids(device)
    differences = [
        difference(_ours(model, ids, cutoff, None), _plain(plain, ids, cutoff))
        for cutoff in (0, 1, sizes.layers)
    ]
    return float(torch.tensor(differences).max())


def difference(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """Return the largest ``‖a - b‖ / ‖b‖``; torch's max propagates NaN, Python's would not."""
    differences = [(a - b).norm() / b.norm() for a, b in zip(ours, theirs, strict=True)]
    return float(torch.stack(differences).max())


def of_kernels(device: str) -> list[ErrorBudget]:
    """Compare this library's step in float32 with Triton, with codes and with dense products.

    One layer has one stream, the other has two. Losses and gradients are scaled by the RMS of their
    oracles and share one budget, since the peer's error of a single number such as the loss can be
    small by chance.
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
    """Return one budget of all values; it is exceeded if the oracle or the peer is not finite."""
    scales = [value.square().mean().sqrt() for value in true]
    actual, oracle, peer = (
        torch.cat([(value / scale).flatten() for value, scale in zip(values, scales, strict=True)])
        for values in (ours, true, plain)
    )
    if not bool(oracle.isfinite().all() & peer.isfinite().all()):
        return ErrorBudget(math.inf, math.inf, 0.0, 0.0, ())
    return error_budget(actual.float(), oracle, peer.float())


def _ours(model: ReplacementModel, ids: Tensor, cutoff: int, codes: float | None) -> list[Tensor]:
    """Return the loss and all adapters' gradients; ``codes`` per token are planned, if given."""
    model.zero_grad()
    expected = None if codes is None else [codes] * model.n_layers
    out = objective(model, Batch(ids, None, ids), cutoff, ObjectiveConfig(), expected)
    out.loss.backward()
    return _loss_and_gradients(out.loss, model.adapters)


def _plain(plain: NaiveStep, ids: Tensor, cutoff: int) -> list[Tensor]:
    for dense in plain.adapted:
        dense.zero_grad()
    loss = plain(ids, cutoff, ObjectiveConfig())["loss"]
    loss.backward()
    return _loss_and_gradients(loss, plain.adapted)


def _loss_and_gradients(loss: Tensor, layers: Iterable[nn.Module]) -> list[Tensor]:
    gradients = [layer.get_parameter(name).grad for layer in layers for name in NAMES]
    assert all(gradient is not None for gradient in gradients)
    return [loss.detach(), *(g for g in gradients if g is not None)]


def _ids(device: str) -> Tensor:
    return torch.randint(SMALL.vocabulary, (1, TOKENS[device]), device=device)
