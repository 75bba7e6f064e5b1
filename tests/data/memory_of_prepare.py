"""Prepare a selection and print the peak memory of this process in bytes.

Usage: ``memory_of_prepare.py SOURCE OUTPUT TOKENIZER TRAIN VALIDATION MAX_TOKENS``.
"""

from __future__ import annotations

import sys
from pathlib import Path

from fastadapt.data.prepare import prepare
from fastadapt.data.prepare.selection import PrepareConfig


def peak() -> int:
    """Return the peak resident memory (VmHWM) of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmHWM in /proc/self/status")


if __name__ == "__main__":
    source, output, tokenizer, train, validation, max_tokens = sys.argv[1:]
    prepare(
        PrepareConfig(
            source,
            output,
            tokenizer,
            train=int(train),
            validation=int(validation),
            max_tokens=int(max_tokens),
        )
    )
    print(peak())
