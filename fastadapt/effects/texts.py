"""Features, traces and responses as lines and rows of text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fastadapt.effects.generate import Generated
from fastadapt.effects.trace import ADAPTER, Firing, Trace, promotes
from fastadapt.features.loading import RunContents
from fastadapt.features.store.details import UnitDetails
from fastadapt.features.store.scales import Scales
from fastadapt.features.store.sets import Pair
from fastadapt.reporting.formatting import number, percent
from fastadapt.reporting.visible import token_text

#: Head and rows of a table.
Rows = tuple[list[str], list[list[str]]]
UNIT_HEAD = ("feature", "contribution", "share", "ΔKL", "density", "mostly in", "promotes")


def unit_row(unit: UnitDetails) -> list[str]:
    """Return a feature or neuron as a row of the table with the head :data:`UNIT_HEAD`."""
    said = [described["description"] for described in unit.descriptions[:1]]
    promoted = " ".join(token for token, _ in unit.promoted[:5])
    return [
        feature_name((unit.layer, unit.feature)),
        number(unit.contribution),
        percent(unit.share),
        number(unit.delta_kl),
        percent(unit.density),
        unit.region or "never fired",
        ": ".join([*said, promoted]),
    ]


def unit_lines(unit: UnitDetails) -> list[str]:
    """Return everything that a store says about a feature or neuron, as lines of text."""
    noun = "feature" if unit.kind == "adapter" else f"neuron of the {unit.kind}"
    lines = [f"Layer {unit.layer}, {noun} {unit.feature}"]
    for described in unit.descriptions:
        score = described["accuracy"]
        scored = "" if score is None else f", detection {percent(score)}"
        lines.append(f"  {described['description']}  ({described['judge']}{scored})")
    lines += [f"  class         {name}" for name in unit.classes]
    if unit.rank is None:
        return [*lines, "  never fired on the texts of the store"]
    lines += [
        f"  fires on      {percent(unit.density)} of tokens ({unit.count:,}), mostly in "
        f"{unit.region}",
        f"  activation    mean {number(unit.mean)} where active, largest {number(unit.max)}; "
        f"norm of the output row {number(unit.norm)}",
        f"  contribution  {number(unit.contribution)}, {percent(unit.share)} of all, "
        f"rank {unit.rank:,}",
    ]
    if unit.delta_kl is not None:
        lines.append(f"  when ablated  KL {unit.delta_kl:+.3g} nats per predicted token")
    if unit.scales is not None:
        lines.append(f"  in the base   {scales_text(unit.scales)}")
    for name, tokens in (("promotes", unit.promoted), ("suppresses", unit.suppressed)):
        texts = [f"{token} {number(logit)}" for token, logit in tokens]
        lines.append(f"  {name:<13} {' · '.join(texts)}")
    if unit.examples:
        lines.append("  strongest examples")
    for e in unit.examples:
        place = f"text {e.text}, token {e.position:,}, {e.region}"
        lines.append(f"    {number(e.value):>6}  {e.before}[{e.token}]{e.after}  ({place})")
    return lines


def scales_text(scales: Scales) -> str:
    """Return a feature's share in the base, its origin and its scales on a line.

    Example:
        >>> scales_text(Scales("strengthened", 0.5, 1.0, 2.0, 0.97, 148))
        '50.0%, strengthened: the MLPs write 1.00 (base) and 2.00 (target) times the feature'
    """
    base, target = number(scales.base), number(scales.target)
    return (
        f"{percent(scales.base_share)}, {scales.origin}: the MLPs write {base} (base) and {target} "
        "(target) times the feature"
    )


def token_table(traced: Trace, trained: str = ADAPTER) -> Rows:
    """Return a row per token: the target's likeliest next token, and each model's KL there.

    A KL is followed by the model's likeliest next token unless it is the target's. ``trained`` is
    the name of the trained part in the head.
    """
    rows = []
    for i, token in enumerate(traced.tokens):
        following, share = traced.predicted["target"][i]
        row = [str(i), token_text(token), f"{token_text(following)} {percent(share)}"]
        for model, kl in traced.kl.items():
            said = traced.predicted[model][i][0]
            row.append(number(kl[i]) + ("" if said == following else f" {token_text(said)}"))
        rows.append(row)
    names = (trained if model == ADAPTER else model for model in traced.kl)
    return ["", "token", "target, next", *(f"KL of {name}" for name in names)], rows


def features_table(
    totals: Sequence[Firing],
    n_tokens: int,
    promoted: Mapping[Pair, Sequence[str]],
    descriptions: Mapping[Pair, str] | None = None,
) -> Rows:
    """Return a row per feature of a text: contribution per token, promoted tokens, description.

    Args:
        totals: features with values summed over the text's tokens.
        n_tokens: number of tokens of the text.
        promoted: texts of the tokens that each feature promotes.
        descriptions: description of each feature that has one; None for no such column.
    """
    rows = []
    for firing in totals:
        contribution = number(firing.contribution / n_tokens)
        tokens = " ".join(map(token_text, promoted[firing.pair]))
        rows.append([feature_name(firing.pair), contribution, tokens])
        if descriptions:
            rows[-1].append(descriptions.get(firing.pair, ""))
    return ["feature", "contribution", "promotes", *["description"] * bool(descriptions)], rows


def feature_name(pair: Pair) -> str:
    """Return the name of a feature, such as ``2/17``."""
    return f"{pair[0]}/{pair[1]}"


def trace_tables(run: RunContents, traced: Trace, top: int) -> tuple[Rows, Rows, Rows]:
    """Return what `fastadapt trace` prints: tables of tokens, of mean KLs and of features.

    Args:
        run: the run.
        traced: the trace.
        top: number of features shown per token.
    """
    shown = {firing.pair for here in traced.fires for firing in here[:top]}
    totals = traced.totals()[: max(10, top)]
    promoted = promotes(run, sorted(shown | {firing.pair for firing in totals}))
    head, tokens = token_table(traced)
    for row, here in zip(tokens, traced.fires, strict=True):
        pairs = [firing.pair for firing in here[:top]]
        named = (f"{feature_name(pair)} {token_text(promoted[pair][0])}" for pair in pairs)
        row.append("  ".join(named))
    means = []
    # A KL belongs to the token that is predicted; after the last token there is none.
    last, first = len(traced.ids) - 1, max(0, traced.prompt_length - 1)
    for part, places in (("prompt", slice(0, first)), ("response", slice(first, last))):
        if n := len(traced.ids[places]):
            means.append(
                [part, f"{n:,}", *(number(sum(kl[places]) / n) for kl in traced.kl.values())]
            )
    return (
        ([*head, "features, promote"], tokens),
        (["mean", "predicted tokens", *head[3:]], means),
        features_table(totals, len(traced.ids), promoted),
    )


def responses_text(responses: Sequence[Generated], trained: str = ADAPTER) -> str:
    """Return the texts of responses, each below its model's name if there are several.

    ``trained`` is the name of the trained part.
    """
    if len(responses) == 1:
        return responses[0].text
    names = [trained if each.model == ADAPTER else each.model for each in responses]
    return "\n\n".join(
        f"--- {name}\n{each.text}" for name, each in zip(names, responses, strict=True)
    )
