"""Write the results of a run to a file, and format rows as lines of text."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

__all__ = ["default_path", "line_of", "write"]

FOLDER = Path(__file__).resolve().parent / "results"


def write(result: dict[str, Any], path: Path) -> None:
    """Replace the file by the result as valid JSON, atomically."""
    from fastadapt.io.atomic import replacing

    with replacing(path) as staged:
        staged.write_text(json.dumps(without_nan(result), indent=1, allow_nan=False) + "\n")


def default_path(name: str, date: str) -> Path:
    """Return a path with date and time, so that runs do not overwrite each other."""
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    day, clock = date[:10], date[11:19].replace(":", "")
    return FOLDER / f"{slug}-{day}-{clock}.json"


def without_nan(value: Any) -> Any:
    """Replace non-finite numbers, which JSON does not support, by text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    return [without_nan(item) for item in value] if isinstance(value, (list, tuple)) else value


def line_of(row: dict[str, Any]) -> str:
    """Format a row as one line for the terminal."""
    shape = " ".join(f"{key}={value}" for key, value in row.get("shape", {}).items())
    words = [row["op"], *([shape] if shape else []), row["implementation"] + ":"]
    if "median_s" in row:
        words.append(f"{row['median_s'] * 1e3:.4g} ms ± {row['spread_s'] * 1e3:.2g}")
        words.append(f"{row['peak_bytes'] / 1e9:.3g} GB")
    if "claim" in row:
        words.append(row["claim"])
    if "tests" in row:
        words.append(f"{row['tests']} tests in {row['processes']} processes")
    if "first_s" in row:
        words.append(f"{sum(row['first_s']):.3g} s, then {sum(row['again_s']):.3g} s")
    if "overwrites" in row:
        words.append("overwrites its inputs")
    if row.get("right") is False:
        words.append("WRONG")
    words += [str(row[key]) for key in ("wrong", "error", "skipped") if row.get(key)]
    return "  " + " ".join(words)
