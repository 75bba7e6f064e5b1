"""Commands about what features do: show them, and change them."""

from __future__ import annotations

import json as json_module
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

from fastadapt.cli.console import print_table
from fastadapt.cli.parser import Typed
from fastadapt.errors import UserError
from fastadapt.features.store.schema import Kind
from fastadapt.features.store.store import Store
from fastadapt.reporting.formatting import number, percent

if TYPE_CHECKING:
    from fastadapt.features.store.details import UnitDetails


def show(
    run: str,
    features: list[str] = [],  # noqa: B006
    *,
    kind: Kind = "adapter",
    examples: int = 5,
    top: int = 20,
    json: bool = False,
) -> int:
    """Show features: how often they fire, what they promote, their effect and strongest examples.
    Without names, list the strongest features.

    Args:
        run: a run with collected features, or a store
        features: features, each as LAYER/NUMBER, such as 2/17
        kind: kind of unit: adapter for features, base or target for collected neurons of an MLP
        examples: number of examples of each feature
        top: number of features in the list
        json: print JSON
    """
    from fastadapt.features.store.details import read_details
    from fastadapt.features.store.ranking import strongest
    from fastadapt.features.store.sets import pair_of

    for name, value in (("--examples", examples), ("--top", top)):
        if value < 0:
            raise UserError(f"{name}: expected 0 or more, got {value}")
    store = Store.open(run)
    pairs = [pair_of(name) for name in features]
    pairs = pairs or [unit[:2] for unit in strongest(store, kind, top)]
    examples = examples if features else 0
    units = read_details(store, pairs, kind=kind, examples=examples)
    if json:
        print(json_module.dumps([asdict(unit) for unit in units], indent=2, ensure_ascii=False))
    elif features:
        for i, unit in enumerate(units):
            print("\n" * (i > 0) + "\n".join(_lines(unit)))
    else:
        rows = [_row(unit) for unit in units]
        head = ["feature", "contribution", "share", "ΔKL", "density", "mostly in", "promotes"]
        print_table(head, rows, left=True)
        if pairs:
            name = f"{pairs[0][0]}/{pairs[0][1]}"
            print(f"\nAll about one: fastadapt features show {run} {name}")
    return 0


def _row(unit: UnitDetails) -> list[str]:
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


def _lines(unit: UnitDetails) -> list[str]:
    """Return everything about a unit as lines."""
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


def intervene(
    run: str,
    *,
    ablate: str | None = None,
    only: str | None = None,
    onto_target: Annotated[str | None, Typed("--onto-target")] = None,
    scale: float | None = None,
    output: str,
    store: str | None = None,
    overwrite: bool = False,
) -> int:
    """Change a run's adapter by one of --ablate, --only and --onto-target, and save it as a run of
    its own, which evaluation, generation and serving read like any other.

    Args:
        run: a run with collected features
        ablate: remove these features: a set of the run, its file, or features such as 2/17,3/401
        only: remove all other features
        onto_target: add these features, scaled, to the target itself
        scale: factor of --onto-target, such as -0.5
        output: a new folder
        store: store of the features; by default features in the run
        overwrite: replace an earlier intervention in the folder
    """
    from fastadapt.features.store.sets import find_set
    from fastadapt.interventions import Intervention
    from fastadapt.interventions.files import intervene as save_intervention

    typed = {"ablate": ablate, "only": only, "onto-target": onto_target}
    chosen = {kind: name for kind, name in typed.items() if name is not None}
    if len(chosen) != 1:
        got = ", ".join(f"--{kind}" for kind in chosen) or "none"
        raise UserError(f"expected one of --ablate, --only, --onto-target, got {got}")
    ((kind, name),) = chosen.items()
    folder = save_intervention(
        run,
        output,
        find_set(store or run, name),
        Intervention(kind, scale=scale),  # type: ignore[arg-type]
        overwrite=overwrite,
    )
    print(f"adapter: {folder.resolve()}")
    # --onto-target makes another pair, the target with itself, which shares no evaluation.
    source = "" if kind == "onto-target" else f"{run} "
    print(f"Compare with:  fastadapt eval {source}{folder}")
    return 0
