"""Results about a text or a feature, shown as text in a terminal and as HTML in a notebook.

The HTML comes from the templates of :mod:`fastadapt.reporting.page`, which escape every text. It
needs no script and no network.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fastadapt.effects.generate import Generated
from fastadapt.effects.texts import (
    Rows,
    feature_name,
    features_table,
    responses_text,
    token_table,
    unit_lines,
)
from fastadapt.effects.trace import ADAPTER, Firing, Trace, totals
from fastadapt.errors import UserError
from fastadapt.features.store.details import UnitDetails
from fastadapt.features.store.sets import Pair
from fastadapt.reporting.formatting import number, percent
from fastadapt.reporting.page import render
from fastadapt.reporting.terminal import table_text
from fastadapt.reporting.visible import token_text, visible, visible_lines

_TOTALS = 10  # features of a text in its table, at least


def shown_features(fires: Sequence[Sequence[Firing]], top: int) -> tuple[list[Pair], list[Firing]]:
    """Return the features that a view shows, and those of its table, the strongest first.

    Args:
        fires: active features of each token.
        top: number of features shown per token.

    Example:
        >>> fires = [[Firing(0, 1, 1.0, 2.0), Firing(2, 5, 1.0, 1.0)]]
        >>> pairs, table = shown_features(fires, 1)
        >>> pairs, [firing.pair for firing in table]
        ([(0, 1), (2, 5)], [(0, 1), (2, 5)])
    """
    strongest = totals(fires)[: max(_TOTALS, top)]
    pairs = {
        firing.pair for here in [*(here[:top] for here in fires), strongest] for firing in here
    }
    return sorted(pairs), strongest


@dataclass(frozen=True, repr=False)
class TextFeatures:
    """The active features of each token of a text.

    Attributes:
        ids: the tokens.
        tokens: their texts.
        fires: active features of each token, the largest contribution first.
        promoted: texts of the tokens that each shown feature promotes most, by (layer, number).
        descriptions: a judge's description of shown features that have one.
        top: number of features shown per token.
    """

    ids: list[int]
    tokens: list[str]
    fires: list[list[Firing]]
    promoted: Mapping[Pair, Sequence[str]]
    descriptions: Mapping[Pair, str]
    top: int = 5

    def totals(self) -> list[Firing]:
        """Return one entry per feature that fires, summed over tokens, the strongest first."""
        return totals(self.fires)

    def _table(self) -> Rows:
        strongest = shown_features(self.fires, self.top)[1]
        return features_table(strongest, len(self.ids), self.promoted, self.descriptions)

    def __repr__(self) -> str:
        rows = []
        for i, (token, here) in enumerate(zip(self.tokens, self.fires, strict=True)):
            parts = [
                f"{feature_name(firing.pair)} {number(firing.value)} {self._promoted(firing, 1)}"
                for firing in here[: self.top]
            ]
            if len(here) > self.top:
                parts.append(f"+{len(here) - self.top}")
            rows.append([str(i), token_text(token), "  ".join(parts)])
        head = ["", "token", "features: activation, promotes"]
        tables = [(head, rows), self._table()]
        return "\n\n".join(table_text(*table, left=True) for table in tables)

    def _promoted(self, firing: Firing, n: int) -> str:
        return " ".join(map(token_text, self.promoted[firing.pair][:n]))

    def _repr_html_(self) -> str:
        largest = max((here[0].contribution for here in self.fires if here), default=0.0)
        rows = []
        for token, here in zip(self.tokens, self.fires, strict=True):
            features = [
                {
                    "name": feature_name(firing.pair),
                    "value": number(firing.value),
                    "promotes": self._promoted(firing, 1),
                    "about": self._about(firing),
                    "shade": _shade(firing.contribution / largest if largest else 0.0),
                }
                for firing in here[: self.top]
            ]
            rows.append((token_text(token), features, max(0, len(here) - self.top)))
        return render("text-features.html.j2", rows=rows, features=self._table())

    def _about(self, firing: Firing) -> str:
        lines = [
            self.descriptions.get(firing.pair, ""),
            f"promotes {self._promoted(firing, 5)}",
            f"activation {number(firing.value)}, contribution {number(firing.contribution)}",
        ]
        return "\n".join(filter(None, lines))


@dataclass(frozen=True, repr=False)
class FeatureCard:
    """Everything that a store says about a feature, as ``fastadapt features show`` prints it.

    Attributes:
        details: the values.
    """

    details: UnitDetails

    def __repr__(self) -> str:
        return "\n".join(unit_lines(self.details))

    def _repr_html_(self) -> str:
        unit = self.details
        tiles = [
            ("Density", percent(unit.density), "of tokens"),
            ("Active", f"{unit.count:,}", "tokens"),
            ("Maximum", number(unit.max), "activation"),
            ("Mean", number(unit.mean), "where active"),
            ("Decoder norm", number(unit.norm), "of its row"),
            ("Contribution", number(unit.contribution), f"{percent(unit.share)} of all"),
        ]
        if unit.delta_kl is not None:
            tiles.append(("When ablated", f"{unit.delta_kl:+.3g}", "KL, nats per token"))
        if unit.scales is not None:
            share = percent(unit.scales.base_share)
            tiles.append(("In the base", share, unit.scales.origin))
        return render(
            "feature.html.j2",
            unit=unit,
            tiles=tiles,
            lens=[
                (title, [(token, number(logit)) for token, logit in tokens])
                for title, tokens in (("Promotes", unit.promoted), ("Suppresses", unit.suppressed))
            ],
            examples=[(number(example.value), example) for example in unit.examples],
            scores=[percent(described["accuracy"]) for described in unit.descriptions],
        )


@dataclass(frozen=True, repr=False)
class TextKL:
    """KL(target ‖ model) of the next token after each token of a text, in nats.

    Attributes:
        trace: the predictions and KLs at each token.
        trained: name of the trained part in tables; it is ``adapter`` in the trace.
    """

    trace: Trace
    trained: str = ADAPTER

    def __getitem__(self, model: str) -> list[float]:
        """Return the KL after each token of ``base``, ``hybrid`` or ``adapter``."""
        if model not in self.trace.kl:
            raise UserError(f"model: expected one of {', '.join(self.trace.kl)}, got {model!r}")
        return self.trace.kl[model]

    def mean(self, model: str) -> float:
        """Return a model's mean KL over the tokens."""
        kl = self[model]
        return sum(kl) / len(kl)

    def _shown(self, model: str) -> str:
        return self.trained if model == ADAPTER else model

    def _means(self) -> str:
        means = (f"{self._shown(model)} {number(self.mean(model))}" for model in self.trace.kl)
        summary = f"mean KL to the target, nats per token: {', '.join(means)}"
        return "\n".join([summary, *self.trace.notes.values()])

    def __repr__(self) -> str:
        return f"{table_text(*token_table(self.trace, self.trained), left=True)}\n\n{self._means()}"

    def _repr_html_(self) -> str:
        target = self.trace.predicted["target"]
        lines = []
        for model, kl in self.trace.kl.items():
            places = zip(self.trace.tokens, kl, self.trace.predicted[model], target, strict=True)
            lines.append(
                (
                    self._shown(model),
                    [
                        {
                            "token": visible(token),
                            "shade": _shade(1 - math.exp(-size)),
                            "about": f"KL {number(size)} after {token_text(token)}\n"
                            f"target: {_likely(theirs)}\n{self._shown(model)}: {_likely(ours)}",
                        }
                        for token, size, ours, theirs in places
                    ],
                )
            )
        numbers = token_table(self.trace, self.trained)
        return render("text-kl.html.j2", means=self._means(), lines=lines, numbers=numbers)


@dataclass(frozen=True, repr=False)
class Responses:
    """Responses of one or several models to a prompt.

    Attributes:
        responses: the responses, in the order of the models that were asked.
        trained: name of the trained part where names are shown; its model is ``adapter``.
    """

    responses: Sequence[Generated]
    trained: str = ADAPTER

    @property
    def text(self) -> str:
        """The response, below the model's name if there are several."""
        return responses_text(self.responses, self.trained)

    def __getitem__(self, model: str) -> Generated:
        """Return the response of a model."""
        for each in self.responses:
            if each.model == model:
                return each
        names = ", ".join(each.model for each in self.responses)
        raise UserError(f"model: expected one of {names}, got {model!r}")

    def __repr__(self) -> str:
        return visible_lines(self.text)

    def _repr_html_(self) -> str:
        shown = [
            (self.trained if each.model == ADAPTER else each.model, each, visible_lines(each.text))
            for each in self.responses
        ]
        return render("responses.html.j2", responses=shown)


def _shade(share: float) -> str:
    """Return the opacity of a colour for a share of 1, as CSS."""
    return f"{0.75 * min(1.0, max(0.0, share)):.3f}"


def _likely(predicted: tuple[str, float]) -> str:
    return f"{token_text(predicted[0])} {percent(predicted[1])}"
