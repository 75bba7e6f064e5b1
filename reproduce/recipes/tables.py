"""Tables, figures and page of the recipes, from the contents of ``recipes.json``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fastadapt.reporting.figures import L0, Figure, Series
from fastadapt.reporting.formatting import number, percent
from fastadapt.reporting.tables import Interval, Table, as_markdown, shown
from reproduce.recipes.trials import trials_table

OUTSIDE = "not reached"
_HEAD = """# Recipes

Options of training, compared at equal L0 on two pairs. The first command trains what is missing
and writes this page; every number is from its files.

```text
python -m reproduce.recipes --page docs/recipes.md   # resumes after a stop
python -m reproduce.recipes              # the same in a second terminal: shares the work
python -m reproduce.recipes --summary    # only the tables, of what is measured so far
python -m reproduce.recipes --recipes l1 topk --pairs embedded --seeds 1   # a part of the work
python -m reproduce.recipes --record topk   # stores a recipe's results before its option goes
```

The recipes are listed in `reproduce/recipes/recipes.yaml`. The pair of real models is the one that
`make real` makes. A recipe whose option was removed stays a row, read from
`reproduce/recipes/removed.json`.

Of every recipe, runs with several values of the setting that moves L0 are trained with each seed.
The logarithm of KL is interpolated linearly in the logarithm of L0 between neighbouring runs of one
seed; nothing is extrapolated. A change of -10% is a tenth less KL than the baseline has at that L0.
Intervals are of 95% over seeds and held-out texts, both paired with the baseline's
(`reproduce/recipes/matched.py`), and over texts alone for a recipe with one seed.

"""


def tables(result: Mapping[str, Any]) -> list[Table]:
    """Return the tables of each pair: changes against ReLU + L1, features, and all points."""
    written: list[Table] = []
    for pair in result["pairs"].values():
        if pair["recipes"]:
            written += [_changes(pair), _features(pair), _points(pair)]
    return written


def _l0s(pair: Mapping[str, Any]) -> list[str]:
    return [f"at L0 {number(l0)}" for l0 in pair["l0"]]


def _name(recipe: Mapping[str, Any]) -> str:
    if not recipe["is_removed"]:
        return str(recipe["name"])
    commits = ", ".join(commit[:9] for commit in recipe["commits"]) or "unknown"
    return f"{recipe['name']} (removed; measured at {commits}, {recipe['dates'][-1]})"


def _changes(pair: Mapping[str, Any]) -> Table:
    rows = []
    for recipe in pair["recipes"]:
        is_baseline = recipe["baseline"] == recipe["name"]
        cells = recipe["kl"] if is_baseline else recipe["change"]
        show = _nats if is_baseline else _percent
        against = "–" if is_baseline else recipe["baseline"]
        seeds = str(len(recipe["seeds"]))
        rows.append([_name(recipe), recipe["description"], seeds, against, *map(show, cells)])
    return Table(
        f"KL at equal L0, {pair['title']}",
        ["recipe", "what it is", "seeds", "against", *_l0s(pair)],
        rows,
        "Of a baseline its KL in nats per predicted token, of others the relative change against "
        f"it. {number(pair['texts'])} held-out texts; the hybrid's KL is {number(pair['hybrid'])}. "
        f"The first L0 is that of the baseline's middle value. {OUTSIDE.capitalize()}: the runs of "
        "a seed do not lie on both sides of the L0.",
    )


def _nats(value: Interval) -> str:
    return OUTSIDE if value["mean"] is None else shown(value)


def _percent(value: Interval | None) -> str:
    if value is None:
        return "–"
    return OUTSIDE if value["mean"] is None else shown(value, percent)


def _features(pair: Mapping[str, Any]) -> Table:
    columns: dict[str, tuple[str, Callable[[Any], str]]] = {
        "silent": ("fire on no held-out token", percent),
        "dead": ("dead in training", percent),
        "detection": ("detection score", percent),
        "flops": ("TFLOP of the training", lambda v: number(None if v is None else v / 1e12)),
        "cpu_s": ("seconds of a processor", number),
        "peak_bytes": ("planned MB", lambda v: number(None if v is None else v / 1e6)),
    }
    return Table(
        f"Features and cost, {pair['title']}",
        ["recipe", *(head for head, _ in columns.values())],
        [
            [
                _name(recipe),
                *(
                    OUTSIDE if recipe["kl"][0]["mean"] is None else show(recipe[key][0])
                    for key, (_, show) in columns.items()
                ),
            ]
            for recipe in pair["recipes"]
        ],
        f"Read {_l0s(pair)[0]}, linear in log L0 between runs; means over seeds. Dead in "
        "training: share of the features that fire on none of its last tokens (`run.dead_window`). "
        "Detection score: share of scored examples that a rule over tokens labels rightly (a half "
        "by chance). Operations are planned at the mean L0 of the training, for buffers of codes "
        "whose size is a power of two.",
    )


def _points(pair: Mapping[str, Any]) -> Table:
    return Table(
        f"Runs, {pair['title']}",
        ["recipe", "setting", "value", "L0", "… by seed", "KL, nats", "dead in training"],
        [
            [
                _name(recipe),
                f"`{recipe['setting']}`",
                number(point["value"]),
                number(point["l0"]),
                ", ".join(map(number, point["l0_by_seed"])),
                shown(point["kl"]),
                percent(point["dead"]),
            ]
            for recipe in pair["recipes"]
            for point in recipe["points"]
        ],
        "L0 and KL are geometric means over seeds.",
    )


def figures(result: Mapping[str, Any]) -> list[Figure]:
    """Return a figure of KL against L0 for each pair; its key is the pair's name.

    It has no intervals: those of single recipes hide that the recipes are paired.
    """
    drawn = []
    for key, pair in result["pairs"].items():
        series = []
        for recipe in pair["recipes"]:
            points = sorted(recipe["points"], key=lambda point: point["l0"])
            kind = "reference" if recipe["baseline"] == recipe["name"] else "layer"
            x, y = [p["l0"] for p in points], [p["kl"]["mean"] for p in points]
            series.append(Series(recipe["name"], kind, x, y))
        if series:
            title = f"KL against L0, {pair['title']}"
            unit = "KL to the target, nats per predicted token"
            drawn.append(Figure(key, title, L0, unit, series, x_log=True, y_log=True))
    return drawn


def page(result: Mapping[str, Any], pictures: Mapping[str, str], command: str) -> str:
    """Return the page as Markdown.

    Args:
        result: the contents of ``recipes.json``.
        pictures: address of the picture of each pair, relative to the page.
        command: the command that trained the runs.
    """
    shown_pictures = [
        f"![KL against L0, {pair['title']}]({pictures[key]})\n"
        for key, pair in result["pairs"].items()
        if key in pictures
    ]
    missing = [
        pair["title"] if not pair["recipes"] else f"{', '.join(unmeasured)} ({pair['title']})"
        for pair in result["pairs"].values()
        if (unmeasured := pair["unmeasured"]) or not pair["recipes"]
    ]
    return "\n".join(
        [
            _HEAD.rstrip() + "\n",
            *(f"Not measured yet: {title}.\n" for title in missing),
            *shown_pictures,
            as_markdown([*tables(result), trials_table()]),
            _facts(result, command),
        ]
    )


def _facts(result: Mapping[str, Any], command: str) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    lines: Sequence[str] = [
        "## Settings\n",
        *(
            f"- {pair['title']}: `{pair['config']}` with "
            + ", ".join(f"`{name} {value}`" for name, value in pair["settings"].items())
            for pair in result["pairs"].values()
        ),
        f"- versions: {versions}",
        f"- command: `{command}`",
    ]
    return "\n".join(lines) + "\n"
