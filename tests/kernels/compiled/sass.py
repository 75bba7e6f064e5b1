"""Read a GPU's machine code: the instructions of its loops."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

import triton

PROGRAMS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_LABEL = re.compile(r"\s*(\.L_\w+):")
_INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(\S+)\s*(.*?);")
_TARGET = re.compile(r"`\((\.L_\w+)\)")


def dump(program: str, *options: str, cubin: bytes) -> str:
    """Return what a program of Triton's wheel prints about a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(PROGRAMS / program), *options, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def loops(cubin: bytes) -> list[dict[str, int]]:
    """Count the instructions of each loop by opcode; an outer loop includes its inner ones."""
    opcodes: list[str] = []
    labels: dict[str, int] = {}
    counts = []
    for line in dump("nvdisasm", "-c", cubin=cubin).splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(opcodes)
        elif instruction := _INSTRUCTION.match(line):
            opcodes.append(instruction[1])
            target = _TARGET.search(instruction[2])
            if instruction[1].startswith("BRA") and target and target[1] in labels:
                start = labels[target[1]]
                if start < len(opcodes) - 1:  # the last instruction of a kernel is its own target
                    counts.append(dict(Counter(opcodes[start:])))
    return counts
