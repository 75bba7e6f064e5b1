"""Options that were tried by a patch and not built: ``trials.json``, in a table of their own.

A trial is one run a seed, mostly of one seed. It shows whether an option is worth building, not its
gain.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import msgspec
from typing_extensions import NotRequired, TypedDict

from fastadapt.io.documents import Count, NonNegative, Positive, read_json
from fastadapt.reporting.formatting import number, percent
from fastadapt.reporting.tables import Table

TRIALS = Path(__file__).with_name("trials.json")


class Reached(TypedDict):
    """Held-out KL in nats, L0, and the share of dead features, if it was counted."""

    kl: NonNegative
    l0: NonNegative
    dead: NonNegative | None


class Trial(TypedDict):
    """Runs with an option, and the runs that they are compared with; means over the seeds.

    ``changes``: relative change of KL by seed, if both have the same L0 and several seeds were run.
    """

    name: str
    description: str
    features: Positive
    run: Reached
    against: str
    reference: Reached
    changes: NotRequired[list[float]]


class Group(TypedDict):
    """Trials of one day, with a patch of one commit; ``steps`` if they differ from the file's."""

    date: str
    steps: NotRequired[Positive]
    commit: str
    seeds: Annotated[list[Count], msgspec.Meta(min_length=1)]
    trials: Annotated[list[Trial], msgspec.Meta(min_length=1)]


class TrialsFile(TypedDict):
    """Contents of ``trials.json``: the trials, and what they share."""

    schema_version: Literal[2]
    pair: str
    steps: Positive
    texts: Positive
    groups: list[Group]


def trials_table(path: Path = TRIALS) -> Table:
    """Return the table of trials.

    Raises:
        UserError: the file is missing or damaged.
    """
    file: TrialsFile = read_json(path, TrialsFile)
    return Table(
        "Tried and not built",
        ["option", "what it is", "features", "KL, L0, dead", "against", "KL, L0, dead", "by seed"],
        [
            [
                trial["name"],
                trial["description"],
                number(trial["features"]),
                _shown(trial["run"]),
                trial["against"],
                _shown(trial["reference"]),
                ", ".join(percent(change) for change in trial.get("changes", ())) or "–",
            ]
            for group in file["groups"]
            for trial in group["trials"]
        ],
        f"Runs of the {file['pair']} with patches: {file['steps']} steps of {file['texts']} texts, "
        "other settings those of the preset. KL in nats on held-out texts; by seed: its change. "
        + " ".join(map(_origin, file["groups"])),
    )


def _origin(group: Group) -> str:
    first, last = group["trials"][0]["name"], group["trials"][-1]["name"]
    seeds = group["seeds"]
    runs = f"means of seeds {', '.join(map(str, seeds))}" if len(seeds) > 1 else f"seed {seeds[0]}"
    steps = f", {group['steps']} steps" if "steps" in group else ""
    return (
        f"From {first} to {last}: {runs}{steps}, of commit {group['commit'][:9]}, {group['date']}."
    )


def _shown(reached: Reached) -> str:
    dead = "–" if reached["dead"] is None else percent(reached["dead"])
    return f"{number(reached['kl'])}, {number(reached['l0'])}, {dead}"
