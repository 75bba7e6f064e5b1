"""Ablate features, isolate them, or add them to the target, in saved adapters or in a live model.

An intervention multiplies the features of a set S (:mod:`fastadapt.features.store.sets`) and all
other features by one factor each. Factor 0 removes a feature: its rows of ``W_enc`` and ``W_dec``
and its ``b_enc`` become 0. Its pre-activation is then 0, which is not active, since active
pre-activations are *above* 0. The model equals one that never had the feature; with ``topk``, the
feature with the next largest pre-activation takes its place. Any other factor scales the row of
``W_dec``.

========================  =========  =========  ==========  ==========  ================
intervention              factor S   others     ``b_dec``   MLPs        arXiv 2602.20904
========================  =========  =========  ==========  ==========  ================
:func:`ablate`            0          1          unchanged   base        removal
:func:`only`              1          0          unchanged   base        addition
:func:`onto_target`       scale      0          0           target      transfer
========================  =========  =========  ==========  ==========  ================

``b_dec`` belongs to no feature and stays with the base's MLPs: ``only`` of the empty set leaves
``b_dec`` alone, the control of what a set adds to it. The outputs of ``only(S)`` and
``only(~S)``, with ``b_dec`` counted once, therefore sum to the output of the adapter (for
activations without competition between features: all except ``topk``). On the target, ``b_dec``
would add a shift that no feature of S causes.

:func:`fastadapt.interventions.files.intervene` saves an intervention as a run;
:func:`scale_features` applies one to a live model.
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
from fastadapt.models.huggingface.classes import AdaptedModel
from fastadapt.models.replacement import ReplacementModel

Kind = Literal["ablate", "only", "onto-target"]
KINDS: tuple[Kind, ...] = get_args(Kind)
SCALE = -0.5  # default for onto-target; at -1 the generated text degenerates (arXiv 2602.20904)


@dataclass(frozen=True)
class Intervention:
    """Kind and scale of an intervention.

    Args:
        kind: ``ablate``, ``only`` or ``onto-target``.
        scale: factor of ``onto-target``, by default -0.5; None for the other kinds.

    Raises:
        UserError: the kind is unknown, or the scale is not finite or given with a kind other than
            ``onto-target``.

    Example:
        >>> Intervention("onto-target").scale
        -0.5
    """

    kind: Kind
    scale: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(f"intervention: expected one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.kind == "onto-target" and self.scale is None:
            object.__setattr__(self, "scale", SCALE)
        elif self.kind != "onto-target" and self.scale is not None:
            raise UserError(f"scale: expected none with {self.kind}, got {self.scale}")
        if self.scale is not None and not math.isfinite(self.scale):
            raise UserError(f"scale: expected a finite number, got {self.scale}")

    def checked(self, features: FeatureSet) -> FeatureSet:
        """Return ``features``; raise ``UserError`` for an empty set unless the kind is ``only``."""
        return features if self.kind == "only" else features.not_empty()

    def apply(self, adapter: TranscoderAdapter, rows: list[int]) -> TranscoderAdapter:
        """Return a changed copy of one layer's adapter; ``rows`` are the set's features in it."""
        if self.kind == "onto-target":
            check_beside(adapter)
        selected = {"ablate": 0.0, "only": 1.0}.get(self.kind, self.scale)
        others = float(self.kind == "ablate")
        factors = torch.full((adapter.n_features,), others, dtype=torch.float64)
        factors[rows] = torch.tensor(selected, dtype=torch.float64)
        return with_factors(adapter, factors, bias=self.kind != "onto-target")


def with_factors(
    adapter: TranscoderAdapter, factors: Tensor, *, bias: bool = True
) -> TranscoderAdapter:
    """Return a copy of an adapter with scaled features; factor 0 removes a feature.

    Args:
        adapter: the adapter, which is not changed.
        factors: ``[F]``, a factor of each feature.
        bias: keep ``b_dec``; False sets it to 0.

    Example:
        >>> from fastadapt.adapter.module import AdapterConfig
        >>> adapter = TranscoderAdapter(4, AdapterConfig(2))
        >>> with_factors(adapter, torch.tensor([0.0, 1.0])).W_enc[0].tolist()
        [0.0, 0.0, 0.0, 0.0]
    """
    changed = copy.deepcopy(adapter)
    factors = factors.to(changed.W_dec.device)
    removed = factors == 0
    with torch.no_grad():
        scaled = changed.W_dec * factors[:, None].to(changed.W_dec.dtype)
        changed.W_dec.copy_(scaled.masked_fill(removed[:, None], 0))
        changed.W_enc.masked_fill_(removed[:, None], 0)
        changed.b_enc.masked_fill_(removed, 0)
        if changed.config.activation == "jumprelu":
            # An inactive feature within the bandwidth of its threshold still is a code: move the
            # threshold away from the pre-activation 0.
            assert changed.threshold is not None
            assert changed.config.bandwidth is not None
            far = changed.threshold.clamp(min=changed.config.bandwidth)
            changed.threshold.copy_(torch.where(removed, far, changed.threshold))
        if not bias and changed.b_dec is not None:
            changed.b_dec.zero_()
    return changed


def ablate(adapters: nn.ModuleList, features: FeatureSet) -> nn.ModuleList:
    """Return copies of adapters without the features of the set.

    Raises:
        UserError: the set is empty or of adapters of another shape, or the model has no features.
    """
    return _changed(adapters, features, Intervention("ablate"))


def only(adapters: nn.ModuleList, features: FeatureSet) -> nn.ModuleList:
    """Return copies of adapters with only the features of the set, and ``b_dec``.

    The set may be empty: ``b_dec`` alone.

    Raises:
        UserError: the set is of adapters of another shape, or the model has no features.
    """
    return _changed(adapters, features, Intervention("only"))


def onto_target(
    adapters: nn.ModuleList, features: FeatureSet, scale: float = SCALE
) -> nn.ModuleList:
    """Return copies of adapters for the *target's* MLPs: the features of the set times ``scale``.

    Raises:
        UserError: see :func:`ablate`; or the scale is not finite.
    """
    return _changed(adapters, features, Intervention("onto-target", scale))


def _changed(
    adapters: nn.ModuleList, features: FeatureSet, intervention: Intervention
) -> nn.ModuleList:
    check_fit(intervention.checked(features), len(adapters), _transcoder(adapters[0]).n_features)
    return nn.ModuleList(
        intervention.apply(_transcoder(adapter), features.rows(layer))
        for layer, adapter in enumerate(adapters)
    )


def _transcoder(adapter: nn.Module) -> TranscoderAdapter:
    if not isinstance(adapter, TranscoderAdapter):
        raise UserError("expected transcoder adapters, got trained weights: they have no features")
    return adapter


def check_beside(adapter: TranscoderAdapter) -> None:
    """Raise ``UserError`` if an adapter computes the whole MLP: it cannot add to the target's."""
    if not adapter.config.base_mlp:
        raise UserError(
            "onto-target: these transcoders compute the whole output of an MLP (adapter.base_mlp "
            "is false), so their features cannot be added to the target's MLPs; ablate features, "
            "or give a run with adapter.base_mlp true"
        )


def check_fit(features: FeatureSet, n_layers: int, n_features: int) -> None:
    """Raise ``UserError`` if a set belongs to adapters of another shape."""
    if features.shape != (n_layers, n_features):
        raise UserError(
            f"{features.label}: expected {n_layers} layers of {n_features} features, those of the "
            f"adapter, got {features.shape[0]} of {features.shape[1]}"
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
    """Scale features of a live model inside the context, and restore the model afterwards.

    Factor 0 has the effect of :func:`ablate`. With ``onto="target"`` the effect is that of
    :func:`onto_target` with the same factor. Contexts nest: an inner context scales the adapters of
    the outer one. The changed adapters are copies, which exist as long as the context.

    The logits equal those of a saved intervention bit for bit if the model's adapters are in
    float32. In 16 bits this holds only for 0 and for powers of two of either sign; any other factor
    rounds the scaled row of ``W_dec`` once more.

    Args:
        model: model to change, for ``generate`` and all other calls.
        features: a set, scaled by ``factor``; or a factor per pair (layer, feature).
        factor: factor of a set; None with factors per pair.
        onto: ``base``: leave other features unchanged. ``target``: remove other features and run
            on the target's MLPs.

    Raises:
        UserError: the set is empty or of adapters of another shape, a feature does not exist, a
            factor is missing or not finite, or ``onto`` is ``target`` and the checkpoint lacks the
            target's MLPs.
    """
    mlps = model.mlps if isinstance(model, ReplacementModel) else model.adapted_mlps
    adapters = [_transcoder(mlp.adapter) for mlp in mlps]
    per_layer = _factors(features, factor, len(adapters), adapters[0].n_features)
    if onto not in ("base", "target"):
        raise UserError(f"onto: expected base or target, got {onto!r}")
    if onto == "target":
        check_beside(adapters[0])
        if any(mlp.target is None for mlp in mlps):
            raise UserError("onto='target': this checkpoint does not hold the target's MLPs")
    changed = []
    for layer, adapter in enumerate(adapters):
        if onto == "base" and not per_layer[layer]:
            changed.append(adapter)
            continue
        factors = torch.full((adapter.n_features,), float(onto == "base"), dtype=torch.float64)
        for feature, value in per_layer[layer].items():
            factors[feature] = value
        changed.append(with_factors(adapter, factors, bias=onto == "base"))
    before = [(mlp.base, mlp.adapter) for mlp in mlps]
    replaced = model.adapters if isinstance(model, ReplacementModel) else None
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
        if replaced is not None:
            model.adapters = replaced


def check_exists(pair: tuple[int, int], n_layers: int, n_features: int) -> None:
    """Raise ``UserError`` for a feature (layer, number) that adapters of a shape do not have."""
    layer, feature = pair
    if not (0 <= layer < n_layers and 0 <= feature < n_features):
        raise UserError(
            f"expected layers 0 to {n_layers - 1} and features 0 to {n_features - 1}, got "
            f"feature {feature} of layer {layer}"
        )


def _factors(
    features: FeatureSet | Mapping[tuple[int, int], float],
    factor: float | None,
    n_layers: int,
    n_features: int,
) -> list[dict[int, float]]:
    """Return the factors of each layer, by feature; raise ``UserError`` for impossible ones."""
    if isinstance(features, FeatureSet):
        check_fit(features.not_empty(), n_layers, n_features)
        if factor is None:
            raise UserError(
                f"{features.label}: a saved set has no factors; pass factor (0 removes its "
                "features, 1 changes nothing)"
            )
        features = dict.fromkeys(features, factor)
    elif factor is not None:
        raise UserError(f"factor: expected none with factors per feature, got {factor}")
    per_layer: list[dict[int, float]] = [{} for _ in range(n_layers)]
    for (layer, feature), value in features.items():
        check_exists((layer, feature), n_layers, n_features)
        if not math.isfinite(value):
            raise UserError(
                f"feature {feature} of layer {layer}: expected a finite factor, got {value}"
            )
        per_layer[layer][feature] = float(value)
    if not any(per_layer):
        raise UserError("expected at least one feature to scale, got none")
    return per_layer
