"""What is known of every unit of a kind so far: how often, how strongly, where; and its examples.

All of it is sums of integers and k-bests, so it is the same bits in whatever order batches come.
N tokens of a batch (padding counted), F units of a layer, U units of all layers, C codes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastadapt.errors import RunError
from fastadapt.features.collect.config import CollectConfig
from fastadapt.features.collect.priority_hash import priority, tokens_hash, units_hash
from fastadapt.features.collect.topk_buffer import FIELDS, Candidates, Kept, best, rows
from fastadapt.features.store.schema import EDGES, REGIONS, SAMPLES, TENTHS, Kind, SampleKind
from fastadapt.kernels.transcoder import SparseCodes

#: Where a token stands: its region, or (behind those) its tenth of the thinking.
SLOTS = len(REGIONS) + TENTHS
#: Sums of activations are kept as integers in two parts: of 2**-16, and of 2**-48 for the rest.
HIGH, LOW = 2.0**16, 2.0**32
_UNITS = 8192  # whose examples are merged at a time
#: Of float32: the exponent of the first edge, and the mantissa of the square root of 2.
_FIRST_OCTAVE = round(math.log2(EDGES[0])) + 127
_HALF_OCTAVE = math.floor((math.sqrt(2) - 1) * 2**23)


class Places(NamedTuple):
    """The tokens of a batch: int64 ``[N]`` each."""

    slot: Tensor  #: ``domain * SLOTS + slot``.
    place: Tensor  #: see :func:`fastadapt.features.collect.topk_buffer.place_of`.
    hash: Tensor  #: see :func:`fastadapt.features.collect.priority_hash.tokens_hash`.
    first: Tensor  #: of the token's window, in the batch.
    last: Tensor  #: likewise, included.


def bins_of(values: Tensor) -> Tensor:
    """How many of ``EDGES`` each value is above, by its bits: ``EDGES`` are half octaves.

    Args:
        values: float32, positive and finite.
    """
    bits = values.view(torch.int32)
    octave, rest = (bits >> 23) - _FIRST_OCTAVE, bits & (2**23 - 1)
    above = 2 * octave + (rest > 0).int() + (rest > _HALF_OCTAVE).int()
    return above.clamp(0, len(EDGES))


class Tally:
    """Counts and examples of one kind of unit.

    Attributes:
        counts: int64 ``[U, domains + 1, SLOTS]``: active tokens; the last domain is none.
        histogram: int64 ``[U, len(EDGES) + 1]``.
        sums: int64 ``[U, 2]``, of activations: multiples of 2**-16, and of 2**-48.
        norms: float32 ``[U]``, of what each unit writes.
        kept: the examples, by kind of sample.
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
        self.kept: dict[SampleKind, Kept] = {
            name: Kept.empty(n_units, k, config.width, device)
            for name, k in zip(SAMPLES, (config.top, config.uniform), strict=True)
        }
        self._hashes = [
            units_hash(config.seed, kind, layer, self.n_features, device)
            for layer in range(self.n_layers)
        ]

    def add(self, layer: int, codes: SparseCodes, at: Places) -> None:
        """Take in a layer's codes of one batch.

        Raises:
            RunError: an activation is not finite, or not positive.
        """
        values = codes.values.float()
        if len(values) == 0:
            return
        least, most = values.aminmax()  # NaN, if any value is
        if not (least > 0 and most < torch.inf):
            raise RunError(
                f"layer {layer}: an activation of the {self.kind} is not a finite, positive number"
            )
        tokens, features = codes.tokens, codes.features
        self._count(layer, features, rows(at.slot, tokens), values)
        unit = features + layer * self.n_features
        of_unit = rows(self._hashes[layer], features)
        drawn = priority(of_unit, rows(at.hash, tokens))
        # Of positive floats, the bits sort as the numbers do.
        keys: dict[SampleKind, Tensor] = {"top": values.view(torch.int32).long(), "uniform": drawn}
        chosen: dict[SampleKind, Tensor] = {}
        for name, kept in self.kept.items():
            key = keys[name]
            found = kept.admits(unit, key)
            if len(found) > kept.k * self.n_features:  # more than could be kept
                place = rows(at.place, rows(tokens, found))
                chances = rows(unit, found), rows(key, found), place
                found = rows(found, best(*chances, kept.k)[0])
            chosen[name] = found
        windows = windows_of(
            codes._replace(values=values), torch.cat(list(chosen.values())), at, self.config
        ).split([len(found) for found in chosen.values()])
        for (name, found), window in zip(chosen.items(), windows, strict=True):
            key, place = rows(keys[name], found), rows(at.place, rows(tokens, found))
            new = Candidates(rows(unit, found), key, place, rows(values, found), window)
            self.kept[name].merge(new)

    def priorities(self, layer: int, features: Tensor, text: Tensor, position: Tensor) -> Tensor:
        """int64, of activations of a layer's units: ``[m]``, on the CPU."""
        return priority(self._hashes[layer].cpu()[features], tokens_hash(text, position))

    def _count(self, layer: int, features: Tensor, slot: Tensor, values: Tensor) -> None:
        F = self.n_features
        units = slice(layer * F, (layer + 1) * F)
        for total, index in ((self.counts, slot), (self.histogram, bins_of(values))):
            width = total[0].numel()
            found = torch.bincount(features * width + index, minlength=F * width)
            total[units] += found.view(F, *total.shape[1:])
        scaled = values.double() * HIGH
        high = scaled.floor()
        # Integers in float64: exact, in whatever order they are added.
        for part, whole in enumerate((high, ((scaled - high) * LOW).floor())):
            self.sums[units, part] += torch.bincount(features, whole, minlength=F).long()

    def absorb(self, other: Mapping[str, Tensor], domains: Sequence[int]) -> None:
        """Add what another tally's :meth:`tensors` hold, of other texts.

        Args:
            domains: place here of each of its domains.
        """
        for here, counts in zip(domains, other["counts"].unbind(1), strict=True):
            self.counts[:, here] += counts
        self.histogram += other["histogram"]
        self.sums += other["sums"]
        self.norms.copy_(other["norms"])
        for name, kept in self.kept.items():
            theirs = Kept(*(other[f"{name}.{field}"] for field in FIELDS))
            for units in torch.arange(len(self.counts)).split(_UNITS):
                kept.merge(theirs.candidates(units))

    def tensors(self) -> dict[str, Tensor]:
        """All of it, by name."""
        examples = {
            f"{name}.{field}": tensor
            for name, kept in self.kept.items()
            for field, tensor in kept.tensors().items()
        }
        return {
            "counts": self.counts,
            "histogram": self.histogram,
            "sums": self.sums,
            "norms": self.norms,
            **examples,
        }

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Be what :meth:`tensors` gave."""
        for name, mine in self.tensors().items():
            mine.copy_(tensors[name])


def wrong_values(tensors: Mapping[str, Tensor], like: Tally) -> Iterator[str]:
    """Names among :meth:`Tally.tensors` of a tally with values that collecting never makes."""
    for name, tensor in tensors.items():
        if tensor.numel() == 0:
            continue
        sample, _, field = name.rpartition(".")
        low, high = tensor.aminmax()
        least = -1 if field in ("key", "place", "slot") else 0
        beyond = field == "slot" and high >= like.kept[sample].k  # type: ignore[index]
        if beyond or not (low >= least and high < torch.inf):  # NaN, if any value is
            yield name


def windows_of(codes: SparseCodes, chosen: Tensor, at: Places, config: CollectConfig) -> Tensor:
    """The activations of a code's unit at the tokens around it: float32 ``[m, W]``.

    Args:
        codes: of a layer and batch.
        chosen: int64 ``[m]``, indices into them.
        at: the tokens of the batch.
    """
    device, N = chosen.device, len(at.place)
    windows = torch.zeros(len(chosen), config.width, device=device)
    if len(chosen) == 0:
        return windows
    feature, token = rows(codes.features, chosen), rows(codes.tokens, chosen)
    # Those of the chosen units alone, by unit and then token: a window is a run among them.
    wanted = torch.zeros(int(codes.features.max()) + 1, dtype=torch.bool, device=device)
    wanted[feature] = True
    near = rows(wanted, codes.features).nonzero().flatten()
    by_unit = rows(codes.features, near)
    small = torch.int16 if len(wanted) < 2**15 else torch.int32  # sorted by digits, and faster
    near = rows(near, by_unit.to(small).argsort(stable=True))
    key = rows(codes.features, near) * N + rows(codes.tokens, near)
    start = torch.searchsorted(key, feature * N + rows(at.first, token))
    end = torch.searchsorted(key, feature * N + rows(at.last, token), right=True)
    lengths = end - start
    row = torch.arange(len(chosen), device=device).repeat_interleave(lengths)
    ahead = rows(lengths.cumsum(0) - lengths - start, row)
    source = torch.arange(len(row), device=device) - ahead
    slot = rows(key, source) - rows(feature * N + token - config.before, row)
    windows[row, slot] = rows(codes.values, rows(near, source))
    return windows
