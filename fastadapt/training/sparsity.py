"""λ of each training step: constant, rising over a ramp, or steered to a target L0.

Steering makes L0 follow a path to the target. Before step t, let ``s`` be the share of the run's
summed learning rates that earlier steps have used, ``w`` that of step t, and ``L`` the mean L0 of
the recent tokens. Then

- ``L* = l0 · 10^((1 - s)^1.5) + 10 · L_first · exp(-20 s)`` is the path;
- ``e = log(L / L*)``, clamped to [-1, 1], is the error;
- ``λ = objective.sparsity · exp(2 e + 10 Σ w e)``, summed over the steps up to t: proportional and
  integral control of log λ.

The first term of the path is the course of L0 under a constant λ, so that a right λ stays. At first
half of all features fire, whatever λ is; the second term is above that L0, so that λ starts low.
Without it λ would rise meanwhile, and features would die, which no smaller λ revives. Times are
shares of the learning rate, in proportion to which weights answer to λ: I / P is the reciprocal of
the share that an answer takes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from fastadapt.objective import ObjectiveConfig
from fastadapt.training.optimizer import OptimizerConfig, learning_rate

PROPORTIONAL, INTEGRAL = 2.0, 10.0
BOUND = 1.0  # of the error, in natural logarithms
#: Share of a run's steps over which L0 is averaged.
RECENT = 0.02


def ramped(step: int, steps: int, config: ObjectiveConfig) -> float:
    """Return λ of step ``step`` (0-based) of ``steps`` under ``objective.sparsity_ramp``.

    With ``r = round(sparsity_ramp * steps)`` it is ``sparsity (step + 1) / (r + 1)`` for the first
    ``r`` steps, of which none has λ 0, and ``sparsity`` from then on.

    Example:
        >>> config = ObjectiveConfig(sparsity=1.0, sparsity_ramp=0.75)
        >>> [ramped(step, 4, config) for step in range(4)]
        [0.25, 0.5, 0.75, 1.0]
    """
    rising = round(config.sparsity_ramp * steps)
    return config.sparsity * (step + 1) / (rising + 1) if step < rising else config.sparsity


def path(share: float, first: float, target: float) -> float:
    """Return the L0 that a run should have after a share of its summed learning rates.

    Args:
        share: share of the summed learning rates, in [0, 1].
        first: L0 of the first step.
        target: L0 at the end.

    Example:
        >>> [round(path(share, 4096.0, 4.0), 1) for share in (0.0, 0.2, 0.4, 0.7, 1.0)]
        [41000.0, 771.0, 25.4, 5.9, 4.0]
    """
    return target * float(10 ** (1 - share) ** 1.5) + 10 * first * math.exp(-20 * share)


class SparsityWeight:
    """Gives λ of each step; steers it if ``objective.l0`` is set.

    Call :meth:`value` once before each step, and :meth:`applied` after each step whose update was
    made. All values are Python floats, equal on all ranks.

    Args:
        config: settings of the objective.
        optimizer: settings of the learning rate.
        steps: number of steps of the run.
        proportional, integral: gains P and I; with both 0, λ stays.
    """

    def __init__(
        self,
        config: ObjectiveConfig,
        optimizer: OptimizerConfig,
        steps: int,
        *,
        proportional: float = PROPORTIONAL,
        integral: float = INTEGRAL,
    ) -> None:
        self.config, self._steps = config, steps
        self._gains = proportional, integral
        self._shares, self._spent = _shares(optimizer, steps)
        self._decay = 1 - 1 / max(1.0, RECENT * steps)
        self._first = self._active = self._tokens = self._integral = 0.0

    def record(self, weight: float) -> dict[str, float]:
        """Return λ as an entry of a record; nothing if all steps have the configured λ."""
        varies = self.config.l0 is not None or self.config.sparsity_ramp > 0
        return {"sparsity_weight": weight} if varies else {}

    def value(self, step: int) -> float:
        """Return λ of step ``step`` (0-based); after the last one, that of one more step."""
        if self.config.l0 is None:
            return ramped(step, self._steps, self.config)
        proportional, integral = self._gains
        error = self._error(step)
        total = self._integral + self._shares[step] * error
        return self.config.sparsity * math.exp(proportional * error + integral * total)

    def applied(self, step: int, l0_per_layer: Sequence[float], tokens: int) -> None:
        """Count a step whose update was made: the L0 of its ``tokens`` in each layer."""
        if self.config.l0 is None:
            return
        self._integral += self._shares[step] * self._error(step)
        l0 = fmean(l0_per_layer)
        self._first = self._first or l0
        self._active = self._decay * self._active + l0 * tokens
        self._tokens = self._decay * self._tokens + tokens

    def _error(self, step: int) -> float:
        """Return ``e`` of a step; 0 before the first L0 is known."""
        assert self.config.l0 is not None
        if not self._first:
            return 0.0
        expected = path(self._spent[step], self._first, self.config.l0)
        ratio = self._active / self._tokens / expected
        return min(BOUND, max(-BOUND, math.log(ratio))) if ratio else -BOUND

    def state(self) -> dict[str, Any]:
        """Return JSON values for a checkpoint; none without a target."""
        if self.config.l0 is None:
            return {}
        names = "first", "active", "tokens", "integral"
        return {"steering": {name: getattr(self, f"_{name}") for name in names}}

    def load(self, scalars: Mapping[str, Any]) -> None:
        """Restore the values of :meth:`state`."""
        if self.config.l0 is not None:
            for name, value in scalars["steering"].items():
                setattr(self, f"_{name}", value)


def _shares(optimizer: OptimizerConfig, steps: int) -> tuple[list[float], list[float]]:
    """Return each step's share of the summed learning rates, and the sum of those before it.

    One more step, of share 0, stands for the end of the run. Sums are at most 1: rounding may
    exceed it at the last steps, where :func:`path` would take a root of a negative number.
    """
    rates = [learning_rate(step, steps, optimizer) for step in range(steps)]
    total = math.fsum(rates)
    shares = [rate / total for rate in rates]
    sums = itertools.accumulate(shares, initial=0.0)
    return [*shares, 0.0], [min(1.0, spent) for spent in sums]
