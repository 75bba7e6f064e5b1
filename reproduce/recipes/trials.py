"""Options that were tried by a patch and not built: ``trials.json``, in a table of their own.

A trial is one run of one seed. It shows whether an option is worth building, not its gain.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from typing_extensions import TypedDict

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
    """A run with an option, and the run that it is compared with."""

    name: str
    description: str
    features: Positive
    run: Reached
    against: str
    reference: Reached


class TrialsFile(TypedDict):
    """Contents of ``trials.json``: the trials, and what they share."""

    schema_version: Literal[1]
    date: str
    commit: str
    pair: str
    steps: Positive
    texts: Positive
    seed: Count
    trials: list[Trial]


def trials_table(path: Path = TRIALS) -> Table:
    """Return the table of trials.

    Raises:
        UserError: the file is missing or damaged.
    """
    file: TrialsFile = read_json(path, TrialsFile)
    return Table(
        "Tried and not built",
        ["option", "what it is", "features", "KL, L0, dead", "against", "KL, L0, dead"],
        [
            [
                trial["name"],
                trial["description"],
                number(trial["features"]),
                _shown(trial["run"]),
                trial["against"],
                _shown(trial["reference"]),
            ]
            for trial in file["trials"]
        ],
        f"Single runs of the {file['pair']} with a patch of commit {file['commit'][:9]}, "
        f"{file['date']}: {file['steps']} steps of {file['texts']} texts, seed {file['seed']}, "
        "other settings those of the preset. KL in nats on held-out texts.",
    )


def _shown(reached: Reached) -> str:
    dead = "–" if reached["dead"] is None else percent(reached["dead"])
    return f"{number(reached['kl'])}, {number(reached['l0'])}, {dead}"
