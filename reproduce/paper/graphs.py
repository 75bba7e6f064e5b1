"""The measure of the claim about attribution graphs, from the file of the shares of edges."""

from __future__ import annotations

from fastadapt.reporting.formatting import percent
from fastadapt.reporting.tables import shown
from reproduce.paper.finding import Finding, Result


def shares(result: Result) -> Finding | None:
    """Hesitation features depend on few other features, beside features of the same layers."""
    names = {"hesitation": "hesitation features", "other": "others of their layers"}
    if not names.keys() <= result["shares"].keys():
        return None
    text = ", ".join(
        f"{name} {shown(result['shares'][key]['adapter features'], percent)}"
        for key, name in names.items()
    )
    return Finding(f"of the absolute edges into a feature: {text}", "no number in the paper")
