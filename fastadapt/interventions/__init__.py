"""Features switched: removed, kept alone, put onto the target; saved as adapters, or live.

Of the features of an adapter a set S is chosen (:mod:`fastadapt.features.store.sets`), and each
feature gets a factor. Factor 0 takes it out: its rows of ``W_enc`` and ``W_dec`` and its ``b_enc``
become 0, so its pre-activation is 0 and no activation function keeps it (active is what is *above*
0); the model is the one that never had it. With ``topk`` its place goes to the next one. Any other
factor scales its row of ``W_dec``.

========================  =======  ======  =========  ==========  ================
                          S        others  ``b_dec``  runs on     arXiv 2602.20904
========================  =======  ======  =========  ==========  ================
:func:`ablate`            0        1       kept       the base    removal
:func:`only`              1        0       kept       the base    addition
:func:`onto_target`       scale    0       0          the target  transfer
========================  =======  ======  =========  ==========  ================

``b_dec`` is no feature's: it stays where the base's MLP does, so that keeping S and keeping the
rest, together and with ``b_dec`` counted once, is the whole adapter (exactly so where features do
not compete: all but ``topk``). Onto the target it would add what no feature says.

Saved (:func:`fastadapt.interventions.files.intervene`) it is a run as any other;
:func:`scale_features` does the same live.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from fastadapt.adapter.module import TranscoderAdapter
from fastadapt.errors import UserError
from fastadapt.features.store.sets import FeatureSet
from fastadapt.models.hf_classes import AdaptedModel
from fastadapt.models.replacement import ReplacementModel

Kind = Literal["ablate", "only", "onto-target"]
KINDS: tuple[Kind, ...] = get_args(Kind)
SCALE = -0.5  # onto the target: at -1 its text falls apart (arXiv 2602.20904)


@dataclass(frozen=True)
class Intervention:
    """What is done with a set.

    Args:
        kind: ``ablate``, ``only`` or ``onto-target``.
        scale: of ``onto-target``, -0.5 if not given; the others have none.
    """

    kind: Kind
    scale: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(f"an intervention is one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.kind == "onto-target" and self.scale is None:
            object.__setattr__(self, "scale", SCALE)
        elif self.kind != "onto-target" and self.scale is not None:
            raise UserError(f"scale: of onto-target alone, not of {self.kind}; got {self.scale}")
        if self.scale is not None and not math.isfinite(self.scale):
            raise UserError(f"scale: expected a finite number, got {self.scale}")

    def apply(self, adapter: TranscoderAdapter, rows: list[int]) -> TranscoderAdapter:
        """A new adapter, of which the features ``rows`` are those of the set."""
        of_set = {"ablate": 0.0, "only": 1.0}.get(self.kind, self.scale)
        of_others = float(self.kind == "ablate")
        factors = torch.full((adapter.n_features,), of_others, dtype=torch.float64)
        factors[rows] = torch.tensor(of_set, dtype=torch.float64)
        return with_factors(adapter, factors, bias=self.kind != "onto-target")


def with_factors(
    adapter: TranscoderAdapter, factors: Tensor, *, bias: bool = True
) -> TranscoderAdapter:
    """A copy of an adapter whose feature i counts ``factors[i]`` times, or is gone where that is 0.

    Args:
        adapter: left as it is.
        factors: ``[F]``.
        bias: keep ``b_dec``, or make it 0.
    """
    changed = copy.deepcopy(adapter)
    factors = factors.to(changed.W_dec.device)
    gone = factors == 0
    with torch.no_grad():
        scaled = changed.W_dec * factors[:, None].to(changed.W_dec.dtype)
        changed.W_dec.copy_(scaled.masked_fill(gone[:, None], 0))
        changed.W_enc.masked_fill_(gone[:, None], 0)
        changed.b_enc.masked_fill_(gone, 0)
        if changed.config.activation == "jumprelu":
            # Outside of the window around the threshold, where a feature that is silent is a code.
            assert changed.threshold is not None
            assert changed.config.bandwidth is not None
            far = changed.threshold.clamp(min=changed.config.bandwidth)
            changed.threshold.copy_(torch.where(gone, far, changed.threshold))
        if not bias:
            changed.b_dec.zero_()
    return changed


def ablate(adapters: nn.ModuleList, features: FeatureSet) -> nn.ModuleList:
    """New adapters that never had the features of the set.

    Raises:
        UserError: the set is empty, or of adapters of another shape.
    """
    return _changed(adapters, features, Intervention("ablate"))


def only(adapters: nn.ModuleList, features: FeatureSet) -> nn.ModuleList:
    """New adapters that have the features of the set, and ``b_dec``; else as :func:`ablate`."""
    return _changed(adapters, features, Intervention("only"))


def onto_target(
    adapters: nn.ModuleList, features: FeatureSet, scale: float = SCALE
) -> nn.ModuleList:
    """New adapters for the *target's* MLPs: the set, times ``scale``; else as :func:`ablate`."""
    return _changed(adapters, features, Intervention("onto-target", scale))


def _changed(
    adapters: nn.ModuleList, features: FeatureSet, intervention: Intervention
) -> nn.ModuleList:
    check_fit(features.not_empty(), len(adapters), _transcoder(adapters[0]).n_features)
    return nn.ModuleList(
        intervention.apply(_transcoder(adapter), features.rows(layer))
        for layer, adapter in enumerate(adapters)
    )


def _transcoder(adapter: nn.Module) -> TranscoderAdapter:
    if not isinstance(adapter, TranscoderAdapter):
        raise UserError("these are weights of the model, trained themselves: they have no features")
    return adapter


def check_fit(features: FeatureSet, n_layers: int, n_features: int) -> None:
    """Raise ``UserError`` where a set is of adapters of another shape."""
    if features.shape != (n_layers, n_features):
        raise UserError(
            f"{features.label} is of {features.shape[0]} layers of {features.shape[1]} features; "
            f"the adapter has {n_layers} of {n_features}"
        )


# --- live ----------------------------------------------------------------------------------------


@contextmanager
def scale_features(
    model: ReplacementModel | AdaptedModel,
    features: FeatureSet | Mapping[tuple[int, int], float],
    factor: float | None = None,
    *,
    onto: Literal["base", "target"] = "base",
) -> Iterator[None]:
    """Inside the context features count otherwise; nothing is saved, and all is as before after it.

    It does what is saved otherwise: a factor of 0 is :func:`ablate`, and a factor onto the target
    is :func:`onto_target`. The bits are the same where the model holds its adapters in float32, as
    saved ones are; in 16 bits for 0 and powers of two of either sign, while by other factors a row
    is rounded twice. Contexts nest: the inner one starts from what the outer one made. The changed
    adapters are copies, held as long as the context.

    Args:
        model: it answers as the replacement, in ``generate`` and everything else.
        features: a set, all by ``factor``; or a factor for each pair (layer, feature).
        factor: of a set.
        onto: ``base``, other features stay; ``target``, the features alone, on the target's MLPs.

    Raises:
        UserError: an empty set, one of adapters of another shape, a feature that is not there, or
            no factor; ``target`` with a model that was read without it.
    """
    mlps = model.mlps if isinstance(model, ReplacementModel) else model.adapted_mlps
    adapters = [_transcoder(mlp.adapter) for mlp in mlps]
    of = _factors(features, factor, len(adapters), adapters[0].n_features)
    if onto not in ("base", "target"):
        raise UserError(f"onto: expected base or target, got {onto!r}")
    if onto == "target" and any(mlp.target is None for mlp in mlps):
        raise UserError("onto='target': this checkpoint does not hold the target's MLPs")
    changed = []
    for layer, adapter in enumerate(adapters):
        if onto == "base" and not of[layer]:
            changed.append(adapter)
            continue
        factors = torch.full((adapter.n_features,), float(onto == "base"), dtype=torch.float64)
        for feature, value in of[layer].items():
            factors[feature] = value
        changed.append(with_factors(adapter, factors, bias=onto == "base"))
    before = [(mlp.base, mlp.adapter) for mlp in mlps]
    held = model.adapters if isinstance(model, ReplacementModel) else None
    try:
        for mlp, adapter in zip(mlps, changed, strict=True):
            mlp.adapter = adapter
            if onto == "target":
                assert mlp.target is not None
                mlp.base = mlp.target
        if isinstance(model, ReplacementModel):
            model.adapters = nn.ModuleList(changed)
        yield
    finally:
        for mlp, (base, old) in zip(mlps, before, strict=True):
            mlp.base, mlp.adapter = base, old
        if held is not None:
            model.adapters = held


def _factors(
    features: FeatureSet | Mapping[tuple[int, int], float],
    factor: float | None,
    n_layers: int,
    n_features: int,
) -> list[dict[int, float]]:
    """Of each layer, the factors of the features that have one."""
    if isinstance(features, FeatureSet):
        check_fit(features.not_empty(), n_layers, n_features)
        if factor is None:
            raise UserError(f"{features.label}: expected a factor for it")
        features = dict.fromkeys(features, factor)
    elif factor is not None:
        raise UserError("factor: expected none beside factors of each feature")
    of: list[dict[int, float]] = [{} for _ in range(n_layers)]
    for (layer, feature), value in features.items():
        if not (0 <= layer < n_layers and 0 <= feature < n_features):
            raise UserError(
                f"expected features of layers 0 to {n_layers - 1} and numbers 0 to "
                f"{n_features - 1}, got feature {feature} of layer {layer}"
            )
        if not math.isfinite(value):
            raise UserError(f"feature {feature} of layer {layer}: expected a finite factor")
        of[layer][feature] = float(value)
    if not any(of):
        raise UserError("expected at least one feature to scale, got none")
    return of
