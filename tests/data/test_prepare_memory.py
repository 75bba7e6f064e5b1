"""Memory of a selection from a source of 1.2 million rows, 28 GB: shown on two smaller ones.

Two things could grow: what is held of a row's text, and what is held of a row at all. The first is
looked at with rows of the real size (23 kB), the second with short rows, of which there can be
many; quotas are in proportion, as 55,000 are to 1.2 million.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import openthoughts
import pytest

from fastadapt.organism import NAMES

REAL_ROWS, REAL_TRAIN, REAL_VALIDATION = 1_200_000, 50_000, 5_000
LIMIT = 1e9


def peak(folder: Path, rows: int, *, words: int, group: int) -> int:
    source = openthoughts.write_parquet(
        folder / f"{rows}.parquet", rows, words=words, group=group, copies=16
    )
    sizes = [rows * n // REAL_ROWS for n in (REAL_TRAIN, REAL_VALIDATION)]
    command = [sys.executable, Path(__file__).with_name("memory_of_prepare.py"), source]
    command += [folder / f"out-{rows}", NAMES["organism/target"], *sizes, 2 * words]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    size = source.stat().st_size
    source.unlink()
    print(f"{rows} rows of {words} words, file of {size:,} bytes: {int(done.stdout):,} bytes held")
    return int(done.stdout)


@pytest.mark.slow
def test_the_real_source_needs_less_than_a_gigabyte(tmp_path):
    # A word and its blank are 3 bytes here, a row holds 3/4 of `words` on average.
    real_size = {"words": 9_000, "group": 1000}
    few, more = (peak(tmp_path, n, **real_size) for n in (3_000, 12_000))
    assert more - few < 150e6  # the texts alone grew by 200 MB, read whole by 300 MB and more
    short = {"words": 12, "group": 10_000}
    sizes = (60_000, 240_000)
    held = [peak(tmp_path, n, **short) for n in sizes]
    slope = (held[1] - held[0]) / (sizes[1] - sizes[0])
    print(f"{slope:.0f} bytes per row of the source")
    assert max(few, more) + slope * REAL_ROWS < LIMIT
