"""Compare measured rows with the bounds of bounds.toml, and record whether each is met."""

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
    "time ratio": lambda ours, other: ours["median_s"] / other["median_s"],
    "speed ratio": lambda ours, other: other["median_s"] / ours["median_s"],
    "memory ratio": lambda ours, other: ours["peak_bytes"] / other["peak_bytes"],
    "GB beyond results": lambda ours, _: (ours["peak_bytes"] - ours["result_bytes"]) / 1e9,
    "share of copy": lambda ours, _: ours["share_of_copy"],
}


@dataclass(frozen=True)
class Bound:
    """A bound on the fastest of ``ours``, for each value of the shape's key ``by``.

    ``claim`` and ``others`` are format strings. Their fields are the value of ``by``, ``s`` (a
    plural's ending), and ``best`` (the name of the fastest of ``ours``; only in ``claim``).
    """

    claim: str
    reason: str
    parts: Sequence[str]
    by: str
    measure: str
    ours: Sequence[str]
    others: Sequence[str] = ()  #: the fastest is the comparison; empty if not needed
    where: dict[str, Any] = field(default_factory=dict)  #: required shape: value or list of values
    at_most: float | None = None
    at_least: float | None = None
    on: dict[str, float] = field(default_factory=dict)  #: bounds by a word of the GPU's name
    worst: bool = False  #: give one verdict only, of the largest measured value

    def verdicts(self, parts: dict[str, list[Row]], gpu: str) -> Iterator[Row]:
        """Yield ``claim``, ``bound``, ``measured``, ``met``; skip values without rows."""
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
            return min(
                rows, key=lambda r: r["graph_s" if "graph_s" in r else "median_s"], default=None
            )

        ours, other = fastest(self.ours), fastest(self.others)
        if ours is None or (self.others and other is None):
            return None
        return MEASURES[self.measure](ours, other), value, ours["implementation"]


@dataclass(frozen=True)
class Limit:
    """A bound that a benchmark under pytest asserts, and the reason for its value."""

    value: float
    reason: str


def read_toml(name: str) -> dict[str, Any]:
    """Read a TOML file of this folder."""
    return tomllib.loads(Path(__file__).with_name(f"{name}.toml").read_text(encoding="utf-8"))


_DATA = read_toml("bounds")
BOUNDS = [Bound(**entry) for entry in _DATA.pop("bound")]
LIMITS = {name: Limit(**entry) for name, entry in _DATA.pop("limit").items()}
assert not _DATA, f"bounds.toml: unknown tables {sorted(_DATA)}"


def bounds(parts: dict[str, list[Row]], gpu: str) -> list[Row]:
    """Return the verdicts about these rows: ``claim``, ``bound``, ``measured``, ``met``."""
    return [verdict for bound in BOUNDS for verdict in bound.verdicts(parts, gpu)]


def limit(name: str) -> float:
    """Return a limit of bounds.toml; KeyError if the name does not exist."""
    return LIMITS[name].value
