"""Choose what each layer of a step saves for its backward pass (``objective.checkpoint: auto``).

The choice is a function of the run's configuration, the device's memory, the length of the batch,
the bridges' cutoff and the layers' densities. It reads nothing from the device. Gradients are
bitwise equal whatever is chosen, so the choice is not saved in checkpoints: a run that resumes on
another device has the same bits.

L layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from fastadapt.kernels.transcoder import plan_for
from fastadapt.models.pair import DTYPES
from fastadapt.models.recompute import POLICIES
from fastadapt.training.config import TrainConfig
from fastadapt.training.planning.devices import Device
from fastadapt.training.planning.memory import (
    FixedMemory,
    LayerBytes,
    MeasuredStep,
    layers_of,
    measure,
    roles,
    sum_layers,
)

#: Steps are measured at the longest sequence and at this many halvings of it.
_HALVINGS = 3


class RecomputePlanner:
    """Choose the policy of each layer, so that a step recomputes little and its memory fits.

    Memory is measured at a few lengths, when a batch first needs them (seconds), and interpolated
    between them. Bytes grow linearly with the length, or faster where attention makes all scores,
    so that the interpolation is not below them. Batches shorter than the shortest measured length
    count as that long.

    Args:
        config: the run's configuration; ``objective.checkpoint`` is not read.
        target: transformers' configuration of the target.
        longest: tokens of the longest sequence, with padding.
        device: device whose usable memory a step must fit into.
        ranks: number of devices that share the run.
    """

    def __init__(
        self, config: TrainConfig, target: Any, longest: int, device: Device, ranks: int = 1
    ) -> None:
        self._config, self._target, self._device = config, target, device
        self._n_layers, self._ranks = int(target.num_hidden_layers), ranks
        lengths = {max(1, math.ceil(longest / 2**i)) for i in range(_HALVINGS + 1)}
        # The workspace of the head grows up to this length.
        chunk = math.ceil(config.objective.kl_chunk_tokens / config.optimizer.batch_size)
        self._lengths = sorted(lengths | {chunk} if min(lengths) < chunk < longest else lengths)
        self._fixed: FixedMemory | None = None
        self._chosen = lru_cache(maxsize=4096)(self._choose)

    @property
    def recomputes(self) -> bool:
        """Whether the longest batch recomputes anything, at the cutoff that needs the most."""
        none = ["none"] * self._n_layers
        return not self._fits(none, {"none": self._measured(self._lengths[-1], "none")}, 1, None)

    @property
    def fits(self) -> bool:
        """Whether the longest batch fits with the policies of :meth:`policies` at every cutoff."""
        longest = self._lengths[-1]
        return self.peak_bytes(longest, 1, self.policies(longest, 1)) <= self._device.usable_bytes

    def policies(
        self, tokens: int, cutoff: int, codes_per_token: Sequence[float] | None = None
    ) -> tuple[str, ...]:
        """Return the policy of each layer for a batch; all ``full`` if no policies fit.

        Args:
            tokens: tokens of the batch's longest sequence, with padding.
            cutoff: the bridges' cutoff, 0..L.
            codes_per_token: expected codes per token of each layer, as in
                :func:`fastadapt.objective.objective`. None: the densities are not known, and each
                layer is planned with the one that needs more.
        """
        dense = None
        if codes_per_token is not None:
            dense = tuple(self._dense(tokens, cutoff, codes_per_token))
        return self._chosen(tokens, cutoff, dense)

    def peak_bytes(
        self,
        tokens: int,
        cutoff: int,
        policies: Sequence[str],
        codes_per_token: Sequence[float] | None = None,
    ) -> int:
        """Return the planned peak of a step in bytes; arguments as in :meth:`policies`."""
        measured = {p: self._measured(tokens, p) for p in set(policies)}
        dense = None
        if codes_per_token is not None:
            dense = tuple(self._dense(tokens, cutoff, codes_per_token))
        return self._peak(policies, measured, cutoff, dense)

    def _choose(self, tokens: int, cutoff: int, dense: tuple[bool, ...] | None) -> tuple[str, ...]:
        none, full = (tuple([policy] * self._n_layers) for policy in ("none", "full"))
        # A longer batch that recomputes nothing shows that this one need not, without measurements
        # at its own length.
        longer = next((n for n in self._lengths if n >= tokens), tokens)
        if self._fits(none, {"none": self._measured(longer, "none")}, cutoff, dense):
            return none
        measured = {policy: self._measured(tokens, policy) for policy in POLICIES}
        policies = list(full)
        for layer, policy in self._trials():
            raised = [*policies[:layer], policy, *policies[layer + 1 :]]
            less = POLICIES.index(policy) < POLICIES.index(policies[layer])
            if less and self._fits(raised, measured, cutoff, dense):
                policies = raised
        return tuple(policies)

    def _trials(self) -> list[tuple[int, str]]:
        """Return the layers and policies to try, in order.

        No gradient passes the first layer's MLP, so that there ``none`` saves little more than
        ``attention``. Then attention saves the most work per byte, gate and up the next most. The
        last layers come first: their backward pass runs while the most bytes are alive, and
        recomputation needs a layer's bytes beside them.
        """
        layers = range(self._n_layers)[::-1]
        return [(0, "none")] + [(i, p) for p in ("attention", "mlp", "none") for i in layers]

    def _fits(self, *step: Any) -> bool:
        return self._peak(*step) <= self._device.usable_bytes

    def _peak(
        self,
        policies: Sequence[str],
        measured: Mapping[str, Sequence[MeasuredStep]],
        cutoff: int,
        dense: Sequence[bool] | None,
    ) -> int:
        of_layers = roles(self._config, self._n_layers, cutoff)
        by_density = [
            layers_of({p: m[d] for p, m in measured.items()}, of_layers, policies)
            for d in range(len(measured[policies[0]]))
        ]
        if dense is not None and len(by_density) > 1:
            with_products, with_codes = by_density
            layers = [
                a if is_dense else b
                for is_dense, a, b in zip(dense, with_products, with_codes, strict=True)
            ]
        else:
            layers = [_largest(each) for each in zip(*by_density, strict=True)]
        step = sum_layers(layers, measured[policies[-1]][0], self._fixed_memory())
        return max(step.forward, step.head, step.backward)

    def _dense(self, tokens: int, cutoff: int, codes_per_token: Sequence[float]) -> list[bool]:
        """Return whether each layer's call uses dense products."""
        config, of_layers = self._config, roles(self._config, self._n_layers, cutoff)
        n_tokens = tokens * config.optimizer.batch_size
        dtype, features = DTYPES[config.pair.dtype], config.n_features
        return [
            plan_for(
                codes,
                n_tokens * (1 + (role in ("fork", "behind"))),
                features,
                dtype,
                self._device.kind,
            ).dense
            for codes, role in zip(codes_per_token, of_layers, strict=True)
        ]

    def _fixed_memory(self) -> FixedMemory:
        if self._fixed is None:
            one = self._measured(self._lengths[-1], "none")[0]
            self._fixed = FixedMemory.for_run(self._config, self._n_layers, one, self._ranks)
        return self._fixed

    def _measured(self, tokens: int, policy: str) -> list[MeasuredStep]:
        """Return measurements by density, interpolated between the measured lengths."""

        def measured(length: int) -> list[MeasuredStep]:
            return measure(self._config, self._target, length, self._device.kind, policy)

        longer = next((n for n in self._lengths if n >= tokens), tokens)
        shorter = max((n for n in self._lengths if n < tokens), default=longer)
        if tokens in (longer, shorter) or shorter == longer:
            return measured(longer)
        share = (tokens - shorter) / (longer - shorter)
        return [
            _between(a, b, share) for a, b in zip(measured(shorter), measured(longer), strict=True)
        ]


def _between(short: MeasuredStep, long: MeasuredStep, share: float) -> MeasuredStep:
    """Return measurements at ``share`` of the way between two lengths, rounded up."""

    def mix(a: int, b: int) -> int:
        return math.ceil(a + share * (b - a))

    return long._replace(
        head=mix(short.head, long.head),
        behind_head=mix(short.behind_head, long.behind_head),
        layers={
            role: LayerBytes(*map(mix, short.layers[role], layer))
            for role, layer in long.layers.items()
        },
    )


def _largest(layers: Sequence[LayerBytes]) -> LayerBytes:
    return LayerBytes(*map(max, zip(*layers, strict=True)))
