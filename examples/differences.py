"""Compare the steps of two training loops: what the examples share."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

#: Largest difference between two exact ways in float64, relative to a tensor's largest entry.
ROUNDING = 1e-10


def largest_difference(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """Return the largest difference of two sets of tensors, each relative to its largest entry.

    Raises:
        ValueError: the sets have other names or shapes, or a tensor is 0 or not finite, so that
            nothing would be compared.
    """
    if ours.keys() != theirs.keys():
        raise ValueError(f"expected equal names, got {sorted(ours)} and {sorted(theirs)}")
    largest = 0.0
    for name, expected in theirs.items():
        actual, scale = ours[name], float(expected.detach().abs().max())
        if actual.shape != expected.shape:
            raise ValueError(f"{name}: expected {list(expected.shape)}, got {list(actual.shape)}")
        if not 0 < scale < float("inf") or not bool(actual.isfinite().all()):
            raise ValueError(f"{name}: expected finite values that are not all 0, got {expected}")
        largest = max(largest, float((actual - expected).detach().abs().max()) / scale)
    return largest


def report(title: str, difference: float, bound: float = ROUNDING) -> int:
    """Print a difference, and return the status to exit with: 1 if it is above the bound."""
    verdict = "equal up to rounding" if difference <= bound else f"more than {bound:.0e}"
    print(f"{title}: largest relative difference {difference:.1e}, {verdict}")
    return int(not difference <= bound)
