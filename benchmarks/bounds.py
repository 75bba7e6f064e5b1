"""Compares measured rows with the bounds of bounds.toml. A missed bound is recorded as such."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.case import Row

if sys.version_info >= (3, 11):
    import tomllib
else:  # a dependency of pytest
    import tomli as tomllib

__all__ = ["BOUNDS", "LIMITS", "bounds", "limit", "read_toml"]

MEASURES = {
    "time ratio": lambda own, other: own["median_s"] / other["median_s"],
    "speed ratio": lambda own, other: other["median_s"] / own["median_s"],
    "memory ratio": lambda own, other: own["peak_bytes"] / other["peak_bytes"],
    "GB beyond results": lambda own, _: (own["peak_bytes"] - own["result_bytes"]) / 1e9,
    "share of copy": lambda own, _: own["share_of_copy"],
}


@dataclass(frozen=True)
class Bound:
    """A bound on the fastest of ``ours``, for each value of the shape's ``by`` in ``where``.

    ``claim`` and ``others`` are formatted with that value, an ``s`` of the plural, and ``best``.
    """

    claim: str
    reason: str
    parts: Sequence[str]
    by: str
    measure: str
    ours: Sequence[str]
    others: Sequence[str] = ()  #: the fastest is compared with; empty: none is needed
    where: dict[str, Any] = field(default_factory=dict)  #: of the shape: value, or list of values
    at_most: float | None = None
    at_least: float | None = None
    on: dict[str, float] = field(default_factory=dict)  #: by a word of the GPU's name
    worst: bool = False  #: one verdict, of the largest measured value

    def verdicts(self, parts: dict[str, list[Row]], gpu: str) -> Iterator[Row]:
        """``claim``, ``bound``, ``measured``, ``met``; nothing where a row is missing."""
        rows = [r for name in self.parts for r in parts.get(name, []) if self._applies(r)]
        values = sorted({r["shape"][self.by] for r in rows})
        measured = [m for value in values if (m := self._measure(rows, value)) is not None]
        default = self.at_most if self.at_least is None else self.at_least
        bound = next((v for word, v in self.on.items() if word in gpu), default)
        assert bound is not None
        for number, value, best in [max(measured)] if self.worst and measured else measured:
            names = {self.by: value, "s": "" if value == 1 else "s", "best": best}
            yield {
                "claim": self.claim.format(**names),
                "bound": f"{'≤' if self.at_least is None else '≥'} {bound:g}",
                "measured": number,
                "met": number <= bound if self.at_least is None else number >= bound,
            }

    def _applies(self, row: Row) -> bool:
        shape = row.get("shape", {})
        return (
            "median_s" in row
            and self.by in shape
            and all(
                shape.get(key) in (value if isinstance(value, list) else [value])
                for key, value in self.where.items()
            )
        )

    def _measure(self, rows: list[Row], value: float) -> tuple[float, float, str] | None:
        timed = {r["implementation"]: r for r in rows if r["shape"][self.by] == value}

        def fastest(names: Sequence[str]) -> Row | None:
            rows = [timed[n] for name in names if (n := name.format(**{self.by: value})) in timed]
            return min(rows, key=lambda r: r.get("graph_s", r["median_s"]), default=None)

        own, other = fastest(self.ours), fastest(self.others)
        if own is None or (self.others and other is None):
            return None
        return MEASURES[self.measure](own, other), value, own["implementation"]


@dataclass(frozen=True)
class Limit:
    """A number that a benchmark under pytest asserts."""

    value: float
    reason: str


def read_toml(name: str) -> dict[str, Any]:
    """One of the data files beside this one."""
    return tomllib.loads(Path(__file__).with_name(f"{name}.toml").read_text(encoding="utf-8"))


_DATA = read_toml("bounds")
BOUNDS = [Bound(**entry) for entry in _DATA.pop("bound")]
LIMITS = {name: Limit(**entry) for name, entry in _DATA.pop("limit").items()}
assert not _DATA, f"bounds.toml: unknown tables {sorted(_DATA)}"


def bounds(parts: dict[str, list[Row]], gpu: str) -> list[Row]:
    """Every claim about these rows: ``claim``, ``bound``, ``measured``, ``met``."""
    return [verdict for bound in BOUNDS for verdict in bound.verdicts(parts, gpu)]


def limit(name: str) -> float:
    """The value of a limit of bounds.toml; KeyError if there is none of this name."""
    return LIMITS[name].value
