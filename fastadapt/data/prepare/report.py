"""The manifest of a selection as tables: how much of what, how long, and what was left out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastadapt.data.prepare.selection import SPLITS

Table = tuple[list[str], list[list[str]]]

_BAR = 30


def summary(manifest: Mapping[str, Any]) -> list[Table]:
    """Heads and rows of the tables, as text."""
    return [_domains(manifest), _lengths(manifest), _left_out(manifest)]


def _domains(manifest: Mapping[str, Any]) -> Table:
    counts = manifest["counts"]
    splits = SPLITS[::-1]
    rows = [
        [domain, f"{n:,}", *(_filled(counts[split], domain) for split in splits)]
        for domain, n in counts["domains"].items()
    ]
    totals = [f"{sum(counts[split]['conversations'].values()):,}" for split in splits]
    rows.append(["all", f"{counts['rows']:,}", *totals])
    for name in _TOLD:
        if not all(name in counts[split] for split in splits):
            continue  # a manifest of an earlier version
        rows.append([_TOLD[name], "", *(f"{counts[split][name]:,}" for split in splits)])
    return ["conversations", "source", *splits], rows


_TOLD = {
    "prompts": "different prompts",
    "tokens": "tokens",
    "longest": "tokens of the longest",
    "with_markers": "markers in their text",
}


def _filled(split: Mapping[str, Any], domain: str) -> str:
    taken, wanted = split["conversations"][domain], split["wanted"][domain]
    return f"{taken:,}" if taken == wanted else f"{taken:,} of {wanted:,}"


def _lengths(manifest: Mapping[str, Any]) -> Table:
    counts, longest = manifest["counts"], manifest["settings"]["max_tokens"]
    per_split = [counts[split]["lengths"] for split in SPLITS[::-1]]
    bins = len(per_split[0])
    highest = max(max(per_split[0]), 1)
    rows = []
    for i in range(bins):
        # The lengths n with (n - 1) * bins // longest == i.
        first, last = -(-i * longest // bins) + 1, -(-(i + 1) * longest // bins)
        if first <= last:
            bar = "█" * round(_BAR * per_split[0][i] / highest)
            rows.append([f"{first:,}–{last:,}", *(f"{n[i]:,}" for n in per_split), bar.ljust(_BAR)])
    return ["tokens", *SPLITS[::-1], ""], rows


def _left_out(manifest: Mapping[str, Any]) -> Table:
    counts = manifest["counts"]
    rows = [[why, f"{n:,}", "of all rows"] for why, n in counts["left_out_of_source"].items()]
    drawn: dict[str, int] = {}
    for reasons in counts["left_out_of_drawn"].values():
        for why, n in reasons.items():
            drawn[why] = drawn.get(why, 0) + n
    rows += [[why, f"{n:,}", "of the rows drawn"] for why, n in drawn.items()]
    return ["left out", "rows", ""], rows
