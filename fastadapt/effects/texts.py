"""Features and traces as lines and rows of text, for a terminal."""

from __future__ import annotations

from fastadapt.effects.trace import Trace, promotes
from fastadapt.features.loading import LoadedRun
from fastadapt.features.store.details import UnitDetails, token_text
from fastadapt.reporting.formatting import number, percent

#: Head and rows of a table.
Rows = tuple[list[str], list[list[str]]]
UNIT_HEAD = ("feature", "contribution", "share", "ΔKL", "density", "mostly in", "promotes")


def unit_row(unit: UnitDetails) -> list[str]:
    """Return a feature or neuron as a row of the table with the head :data:`UNIT_HEAD`."""
    said = [described["description"] for described in unit.descriptions[:1]]
    promoted = " ".join(token for token, _ in unit.promoted[:5])
    return [
        f"{unit.layer}/{unit.feature}",
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
    for name, tokens in (("promotes", unit.promoted), ("suppresses", unit.suppressed)):
        texts = [f"{token} {number(logit)}" for token, logit in tokens]
        lines.append(f"  {name:<13} {' · '.join(texts)}")
    if unit.examples:
        lines.append("  strongest examples")
    for e in unit.examples:
        place = f"text {e.text}, token {e.position:,}, {e.region}"
        lines.append(f"    {number(e.value):>6}  {e.before}[{e.token}]{e.after}  ({place})")
    return lines


def trace_tables(run: LoadedRun, traced: Trace, top: int) -> tuple[Rows, Rows, Rows]:
    """Return what `fastadapt trace` prints: tables of tokens, of mean KLs and of features.

    Args:
        run: the run.
        traced: the trace.
        top: number of features shown per token.
    """
    shown = {firing.pair for here in traced.fires for firing in here[:top]}
    totals = traced.totals()[: max(10, top)]
    promoted = promotes(run, sorted(shown | {firing.pair for firing in totals}))
    heads = [f"KL of {model}" for model in traced.kl]
    tokens = []
    for i, token in enumerate(traced.tokens):
        following, share = traced.predicted["target"][i]
        row = [str(i), token_text(token), f"{token_text(following)} {percent(share)}"]
        for model, kl in traced.kl.items():
            said = traced.predicted[model][i][0]
            row.append(number(kl[i]) + ("" if said == following else f" {token_text(said)}"))
        pairs = [firing.pair for firing in traced.fires[i][:top]]
        named = (f"{pair[0]}/{pair[1]} {token_text(promoted[pair][0])}" for pair in pairs)
        tokens.append([*row, "  ".join(named)])
    means = []
    for part, places in (
        ("prompt", slice(0, traced.prompt_length)),
        ("response", slice(traced.prompt_length, None)),
    ):
        if n := len(traced.ids[places]):
            means.append(
                [part, f"{n:,}", *(number(sum(kl[places]) / n) for kl in traced.kl.values())]
            )
    features = [
        [
            f"{firing.layer}/{firing.feature}",
            number(firing.contribution / len(traced.ids)),
            " ".join(map(token_text, promoted[firing.pair])),
        ]
        for firing in totals
    ]
    return (
        (["", "token", "target, next", *heads, "features, promote"], tokens),
        (["mean", "tokens", *heads], means),
        (["feature", "contribution", "promotes"], features),
    )
