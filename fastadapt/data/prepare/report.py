"""Format the manifest of a selection as tables: counts, lengths, and rows left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from fastadapt.data.prepare.selection import SPLITS

Table = tuple[list[str], list[list[str]]]

_BAR_CHARACTERS = 30
#: Labels of counts of a split.
_LABELS = {
    "prompts": "distinct prompts",
    "tokens": "tokens",
    "longest": "tokens of the longest",
    "with_markers": "texts with markers",
}


def summary(manifest: Mapping[str, Any]) -> list[Table]:
    """Return the tables that describe a manifest: head and rows of each, as text."""
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
    for name, label in _LABELS.items():
        if all(name in counts[split] for split in splits):  # older manifests lack with_markers
            rows.append([label, "", *(f"{counts[split][name]:,}" for split in splits)])
    return ["conversations", "source", *splits], rows


def _filled(split: Mapping[str, Any], domain: str) -> str:
    n, quota = split["conversations"][domain], split["wanted"][domain]
    return f"{n:,}" if n == quota else f"{n:,} of {quota:,}"


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
            bar = ("█" * round(_BAR_CHARACTERS * per_split[0][i] / highest)).ljust(_BAR_CHARACTERS)
            rows.append([f"{first:,}–{last:,}", *(f"{n[i]:,}" for n in per_split), bar])
    return ["tokens", *SPLITS[::-1], ""], rows


def _left_out(manifest: Mapping[str, Any]) -> Table:
    counts = manifest["counts"]
    drawn: Counter[str] = Counter()
    for reasons in counts["left_out_of_drawn"].values():
        drawn.update(reasons)  # unlike +, update() keeps counts of 0
    rows = [
        [reason, f"{n:,}", among]
        for reasons, among in ((counts["left_out_of_source"], "all rows"), (drawn, "drawn rows"))
        for reason, n in reasons.items()
    ]
    return ["left out", "rows", "among"], rows
