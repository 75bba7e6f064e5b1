"""Estimate the memory of a selection from 1.2 million rows (28 GB) by smaller sources.

Memory could grow with the text of the rows, or with their number. The first is measured with rows
of the real size (23 kB), the second with many short rows. Quotas are 55,000 per 1.2 million rows.
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
def test_the_real_source_needs_less_than_a_gigabyte(tmp_path: Path) -> None:
    # A word with its space has 3 bytes, and a row has 3/4 of `words` on average.
    real_size = {"words": 9_000, "group": 1000}
    few, more = (peak(tmp_path, n, **real_size) for n in (3_000, 12_000))
    assert more - few < 150e6  # the texts grew by 200 MB; reading them whole takes 300 MB more
    short = {"words": 12, "group": 10_000}
    sizes = (60_000, 240_000)
    held = [peak(tmp_path, n, **short) for n in sizes]
    slope = (held[1] - held[0]) / (sizes[1] - sizes[0])
    print(f"{slope:.0f} bytes per row of the source")
    assert max(few, more) + slope * REAL_ROWS < LIMIT
