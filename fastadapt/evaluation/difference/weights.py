"""Measures how much the weights of each part and layer changed, and the rank of the changes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from threading import Event
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastadapt.evaluation.difference.parts import PARTS, Swap, TwoModels


class Ranks(NamedTuple):
    """Measures of the rank of a matrix with singular values σ; NaN for a matrix of zeros.

    Attributes:
        stable: ``Σ σ² / max σ²`` (Rudelson and Vershynin 2007).
        effective: ``exp(H)`` with the entropy H of ``σ / Σ σ`` (Roy and Vetterli 2007).
    """

    stable: float
    effective: float


def ranks(matrix: Tensor) -> Ranks:
    """Return the stable and the effective rank of a matrix ``[M, N]``, computed in float64.

    Example:
        >>> [round(rank, 3) for rank in ranks(torch.diag(torch.tensor([2.0, 1.0, 1.0, 0.0])))]
        [1.5, 2.828]
    """
    wide = matrix.double()
    wide = wide if wide.shape[0] <= wide.shape[1] else wide.T
    powers = torch.linalg.eigvalsh(wide @ wide.T)
    # Rounding turns singular values of 0 into about 1e-8 of the largest.
    powers = powers.where(powers > 1e-14 * powers.max(), 0)
    values = powers.sqrt()
    share = values / values.sum()
    return Ranks((powers.sum() / powers.max()).item(), torch.special.entr(share).sum().exp().item())


def weight_changes(
    models: TwoModels,
    *,
    with_ranks: bool = True,
    progress: Callable[[int, int], None] | None = None,
    stop: Event | None = None,
) -> list[dict[str, Any]]:
    """Return the section ``weights`` of ``where.json``: one entry per part and layer.

    The entry of a part outside of the blocks has the layer None. ``change`` is ``‖ΔW‖ / ‖W‖`` over
    all weights of the part in the layer, ``W`` being the base's (in Gemma's norms with the 1 that
    they add), null if these are 0. ``matrices`` has, by name of the matrix, its own ``change`` and
    the ranks of ``ΔW``, null where nothing changed, or without ranks. A weight that is
    shared in both models counts once.

    Args:
        models: the two models.
        with_ranks: whether to compute the ranks, whose eigenvalues take most of the time.
        progress: called with (compared modules, all modules).
        stop: set it to stop after the current module; the list is incomplete then.
    """
    entries: list[dict[str, Any]] = []
    done, total = 0, len(models.swaps)
    for part in PARTS:
        for layer in (*range(models.n_layers), None):
            swaps = [swap for swap in models.swaps if (swap.part, swap.layer) == (part, layer)]
            if not swaps:
                continue
            if stop is not None and stop.is_set():
                return entries
            offset = models.pair.paths.norm_offset if part == "norms" else 0.0
            entries.append({"part": part, "layer": layer, **_change(swaps, offset, with_ranks)})
            done += len(swaps)
            if progress is not None:
                progress(done, total)
    return entries


@torch.no_grad()
def _change(swaps: Sequence[Swap], offset: float, with_ranks: bool) -> dict[str, Any]:
    changed = whole = 0.0
    matrices: dict[str, dict[str, float | None]] = {}
    for name, target, base in _weights(swaps):
        delta = target.double() - base.double()
        power, reference = (
            delta.square().sum().item(),
            (base + offset).double().square().sum().item(),
        )
        changed, whole = changed + power, whole + reference
        if base.ndim == 2:
            each = ranks(delta) if power and with_ranks else None
            matrices[name] = {
                "change": _relative(power, reference),
                "stable_rank": each and each.stable,
                "effective_rank": each and each.effective,
            }
    return {"change": _relative(changed, whole), "matrices": matrices}


def _relative(power: float, reference: float) -> float | None:
    return math.sqrt(power / reference) if reference else None


def _weights(swaps: Sequence[Swap]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield name, the target's and the base's tensor of each weight of the modules ``swaps``.

    Norms inside of attention are left out, since they are swaps of the part ``norms``. A weight
    that only one model shares between two modules is compared in both.
    """
    seen: set[tuple[int, int]] = set()
    for swap in swaps:
        for path, module in swap.base.named_modules():
            if swap.part == "attention" and type(module).__name__.endswith("RMSNorm"):
                continue
            other = swap.target.get_submodule(path)
            for name, base in module.named_parameters(recurse=False):
                weight = other if hasattr(other, "merged") else getattr(other, name)
                key = (id(weight), id(base))
                if key not in seen:
                    seen.add(key)
                    parts = (swap.name.rpartition(".")[2], path, name)
                    yield ".".join(filter(None, parts)), _tensor(other, name), base


def _tensor(module: nn.Module, name: str) -> Tensor:
    """Return a weight of a module, with the low-rank update merged into it where there is one.

    Such a layer has a method ``merged``, which returns this weight.
    """
    merged: Callable[[], Tensor] | None = getattr(module, "merged", None)
    if name == "weight" and merged is not None:
        return merged()
    tensor: Tensor = getattr(module, name)
    return tensor
