"""Running statistics of the features, or neurons, of a model: counts, histogram, sum, examples.

The state is sums of integers and top-k's, so the order of batches does not change a bit of it.
N tokens of a batch (padding counted), F units of a layer, U units of all layers, C codes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastadapt.errors import RunError
from fastadapt.features.collect import exact_sums
from fastadapt.features.collect.config import CollectConfig
from fastadapt.features.collect.priority_hash import priority, tokens_hash, units_hash
from fastadapt.features.collect.scale_sums import ScaleSums
from fastadapt.features.collect.topk_buffer import (
    FIELDS,
    Candidates,
    TopKBuffer,
    rows,
    topk_per_group,
)
from fastadapt.features.store.schema import EDGES, REGIONS, SAMPLES, TENTHS, Kind, SampleKind
from fastadapt.kernels.transcoder import SparseCodes

#: Slots that a token is counted in: its region or, after the regions, its tenth of the thinking.
SLOTS = len(REGIONS) + TENTHS
_UNITS = 8192  # units whose examples are merged at once
#: In float32's bits: the exponent of the first edge, and the mantissa of the square root of 2.
_FIRST_OCTAVE = round(math.log2(EDGES[0])) + 127
_HALF_OCTAVE = math.floor((math.sqrt(2) - 1) * 2**23)


class BatchTokens(NamedTuple):
    """Domain and region, position, sampling hash and window of N tokens: int64 ``[N]`` each."""

    slot: Tensor  #: ``domain * SLOTS + slot``.
    place: Tensor  #: see :func:`fastadapt.features.collect.topk_buffer.place_of`.
    hash: Tensor  #: see :func:`fastadapt.features.collect.priority_hash.tokens_hash`.
    first: Tensor  #: first token of the token's window, an index into the batch.
    last: Tensor  #: last token of the window, included.


def bins_of(values: Tensor) -> Tensor:
    """Return the histogram bin of each value: the number of ``EDGES`` below the value.

    ``EDGES`` are half octaves, so exponent and mantissa give the bin without a search.

    Args:
        values: float32, positive and finite.
    """
    bits = values.view(torch.int32)
    octave, mantissa = (bits >> 23) - _FIRST_OCTAVE, bits & (2**23 - 1)
    above = 2 * octave + (mantissa > 0).int() + (mantissa > _HALF_OCTAVE).int()
    return above.clamp(0, len(EDGES))


class FeatureStats:
    """Statistics and examples of all units of one kind (features, or neurons of one model).

    Attributes:
        counts: int64 ``[U, domains + 1, SLOTS]``, active tokens; the last domain stands for none.
        histogram: int64 ``[U, len(EDGES) + 1]``, active tokens by activation.
        sums: int64 ``[U, 2]``, sum of activations, see :mod:`.exact_sums`.
        norms: float32 ``[U]``, norm of each unit's output row.
        scales: sums for the scales of features; None for neurons and where not requested.
        examples: the top activations by value and by priority, a buffer for each sample.
    """

    def __init__(
        self,
        kind: Kind,
        shape: tuple[int, int],
        n_domains: int,
        config: CollectConfig,
        device: torch.device,
    ) -> None:
        self.kind, self.config = kind, config
        self.n_layers, self.n_features = shape
        n_units = self.n_layers * self.n_features
        zeros = torch.zeros(n_units, 1, dtype=torch.int64, device=device)
        self.counts = zeros.new_zeros(n_units, n_domains + 1, SLOTS)
        self.histogram = zeros.new_zeros(n_units, len(EDGES) + 1)
        self.sums = zeros.new_zeros(n_units, 2)
        self.norms = torch.zeros(n_units, device=device)
        has_scales = config.scales and kind == "adapter"
        self.scales = ScaleSums(n_units, device) if has_scales else None
        self.examples: dict[SampleKind, TopKBuffer] = {
            name: TopKBuffer.empty(n_units, k, config.width, device)
            for name, k in zip(SAMPLES, (config.top, config.uniform), strict=True)
        }
        self._hashes = [
            units_hash(config.seed, kind, layer, self.n_features, device)
            for layer in range(self.n_layers)
        ]

    def add(self, layer: int, codes: SparseCodes, batch: BatchTokens) -> None:
        """Add one layer's codes of a batch to the statistics.

        Raises:
            RunError: an activation is not finite or not positive.
        """
        values = codes.values.float()
        if len(values) == 0:
            return
        least, most = values.aminmax()  # NaN if any value is
        if not (least > 0 and most < torch.inf):
            raise RunError(
                f"layer {layer}: an activation of the {self.kind} is not a finite, positive "
                "number; pass --dtype float32"
            )
        tokens, features = codes.tokens, codes.features
        self._count(layer, features, rows(batch.slot, tokens), values)
        unit = features + layer * self.n_features
        unit_hash = rows(self._hashes[layer], features)
        drawn = priority(unit_hash, rows(batch.hash, tokens))
        # The bits of positive floats sort as the numbers do.
        keys: dict[SampleKind, Tensor] = {"top": values.view(torch.int32).long(), "uniform": drawn}
        chosen: dict[SampleKind, Tensor] = {}
        for name, buffer in self.examples.items():
            key = keys[name]
            codes_in = buffer.may_enter(unit, key)
            if len(codes_in) > buffer.k * self.n_features:  # cut to k a unit before windows
                place = rows(batch.place, rows(tokens, codes_in))
                candidates = rows(unit, codes_in), rows(key, codes_in), place
                codes_in = rows(codes_in, topk_per_group(*candidates, buffer.k)[0])
            chosen[name] = codes_in
        windows = windows_of(
            codes._replace(values=values), torch.cat(list(chosen.values())), batch, self.config
        ).split([len(codes_in) for codes_in in chosen.values()])
        for (name, codes_in), window in zip(chosen.items(), windows, strict=True):
            key, place = rows(keys[name], codes_in), rows(batch.place, rows(tokens, codes_in))
            new = Candidates(rows(unit, codes_in), key, place, rows(values, codes_in), window)
            self.examples[name].merge(new)

    def priorities(self, layer: int, features: Tensor, text: Tensor, position: Tensor) -> Tensor:
        """Return the priorities of activations of a layer's units: int64 ``[m]``, on the CPU."""
        return priority(self._hashes[layer].cpu()[features], tokens_hash(text, position))

    def _count(self, layer: int, features: Tensor, slot: Tensor, values: Tensor) -> None:
        F = self.n_features
        units = slice(layer * F, (layer + 1) * F)
        for total, index in ((self.counts, slot), (self.histogram, bins_of(values))):
            width = total[0].numel()
            added = torch.bincount(features * width + index, minlength=F * width)
            total[units] += added.view(F, *total.shape[1:])
        exact_sums.add(self.sums[units], values, features)

    def merge(self, other: Mapping[str, Tensor], domains: Sequence[int]) -> None:
        """Add the statistics of other texts, such as those of another shard, to these.

        Args:
            other: returned by :meth:`tensors` of the other statistics.
            domains: for each domain of ``other``, its index in these statistics.
        """
        for domain, counts in zip(domains, other["counts"].unbind(1), strict=True):
            self.counts[:, domain] += counts
        self.histogram += other["histogram"]
        self.sums += other["sums"]
        self.norms.copy_(other["norms"])
        for name, mine in self._scales().items():
            mine += other[name]
        for name, buffer in self.examples.items():
            theirs = TopKBuffer(*(other[f"{name}.{field}"] for field in FIELDS))
            for units in torch.arange(len(self.counts)).split(_UNITS):
                buffer.merge(theirs.candidates(units))

    def tensors(self) -> dict[str, Tensor]:
        """Return the statistics as tensors by name."""
        examples = {
            f"{name}.{field}": tensor
            for name, buffer in self.examples.items()
            for field, tensor in buffer.tensors().items()
        }
        return {
            "counts": self.counts,
            "histogram": self.histogram,
            "sums": self.sums,
            "norms": self.norms,
            **self._scales(),
            **examples,
        }

    def _scales(self) -> dict[str, Tensor]:
        tensors = {} if self.scales is None else self.scales.tensors()
        return {f"scales.{name}": tensor for name, tensor in tensors.items()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Load the state returned by :meth:`tensors`, in place."""
        for name, mine in self.tensors().items():
            mine.copy_(tensors[name])


def wrong_values(tensors: Mapping[str, Tensor], like: FeatureStats) -> Iterator[str]:
    """Yield the names of :meth:`FeatureStats.tensors` with values that collecting cannot give."""
    for name, tensor in tensors.items():
        if tensor.numel() == 0:
            continue
        sample, _, field = name.rpartition(".")
        low, high = tensor.aminmax()
        least: float = -1 if field in ("key", "place", "slot") else 0
        least = -math.inf if name == "scales.sums" else least
        beyond = field == "slot" and high >= like.examples[sample].k  # type: ignore[index]
        if beyond or not (low >= least and high < torch.inf):  # NaN if any value is
            yield name


def windows_of(
    codes: SparseCodes, chosen: Tensor, batch: BatchTokens, config: CollectConfig
) -> Tensor:
    """Return, for each chosen code, its unit's activations at the tokens around: ``[m, W]``.

    Args:
        codes: the codes of one layer and batch.
        chosen: int64 ``[m]``, indices into ``codes``.
        batch: the tokens of the batch.
        config: gives the size of windows.
    """
    device, N = chosen.device, len(batch.place)
    windows = torch.zeros(len(chosen), config.width, device=device)
    if len(chosen) == 0:
        return windows
    feature, token = rows(codes.features, chosen), rows(codes.tokens, chosen)
    # Codes of the chosen units alone, sorted by unit, then token: a window is one run of them,
    # from ``start`` to ``end``, since ``key`` is unit * N + token.
    wanted = torch.zeros(int(codes.features.max()) + 1, dtype=torch.bool, device=device)
    wanted[feature] = True
    near = rows(wanted, codes.features).nonzero().flatten()
    by_unit = rows(codes.features, near)
    small = torch.int16 if len(wanted) < 2**15 else torch.int32  # a faster radix sort
    near = rows(near, by_unit.to(small).argsort(stable=True))
    key = rows(codes.features, near) * N + rows(codes.tokens, near)
    start = torch.searchsorted(key, feature * N + rows(batch.first, token))
    end = torch.searchsorted(key, feature * N + rows(batch.last, token), right=True)
    lengths = end - start
    # Each code of each window, end to end: its window, then its index among the sorted codes.
    row = torch.arange(len(chosen), device=device).repeat_interleave(lengths)
    offset = rows(lengths.cumsum(0) - lengths - start, row)
    source = torch.arange(len(row), device=device) - offset
    slot = rows(key, source) - rows(feature * N + token - config.before, row)
    windows[row, slot] = rows(codes.values, rows(near, source))
    return windows
